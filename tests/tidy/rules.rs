//! The rules of `tidy.rs`: each takes a path and a text and answers with complaints. They touch no file.

/// Layers from the bottom up. A module imports itself and lower layers, never a sibling.
const LAYERS: &[&[&str]] = &[
    &["wal"],
    &["protocol", "conninfo"],
    &["access"],
    &["config", "metrics", "status"],
    &["session", "store"],
    &["net"],
    &["upstream", "downstream", "admin"],
    &["relay"],
    &["cli"],
    &["main"],
];

/// Modules in which time and bytes are arguments.
const PURE: &[&str] = &["wal", "protocol", "access", "session"];
const IMPURE: &[&str] = &["tokio::", "std::fs", "std::net", "std::thread", "Instant::now", "SystemTime::now"];

/// Where files may be touched: the store's disk, and the few that read what a person wrote.
const FILES_ALLOWED: &[&str] =
    &["src/store/disk.rs", "src/config.rs", "src/conninfo/surroundings.rs", "src/cli/"];

/// Words that PostgreSQL itself has given up, and abbreviations.
const WORDS: &[&str] = &["master", "slave", "tli", "xlog", "segno", "pgb", "msg", "conn", "pos"];

/// Columns of PostgreSQL's views and commands; our structs have fields of these names.
const COLUMNS: &[&str] = &[
    "last_msg_receipt_time",
    "last_msg_send_time",
    "next_tli",
    "next_tli_startpos",
    "receive_start_tli",
    "received_tli",
    "restart_tli",
    "xlogpos",
];

/// What a library that is used calls its own.
const FOREIGN: &[(&str, &[&str])] = &[("src/protocol/link/codec.rs", &["pos", "around_pos"])];

const FILE_LINES_MAX: usize = 600;

/// All complaints about one Rust file. `path` is relative to the top, with `/`.
pub(crate) fn complaints(path: &str, text: &str) -> Vec<String> {
    let mut all = unfinished(path, text);
    all.extend(shape(path, text));
    all.extend(words(path, text));
    if path.starts_with("src/") {
        all.extend(layers(path, text));
        all.extend(reach(path, text));
    }
    all
}

/// Work left for later has no place in the tree.
pub(crate) fn unfinished(path: &str, text: &str) -> Vec<String> {
    // Spelt in halves, or this file would complain about itself.
    let marks = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("#[ig", "nore"),
        concat!("to", "do!("),
        concat!("unimple", "mented!("),
        concat!("db", "g!("),
    ];
    let found = marks.iter().filter(|mark| text.contains(**mark));
    found.map(|mark| format!("{path}: contains {mark}")).collect()
}

/// Every file says first what it owns, and none is long.
fn shape(path: &str, text: &str) -> Vec<String> {
    let mut all = Vec::new();
    if !text.starts_with("//!") && !path.starts_with("fuzz/") {
        all.push(format!("{path}: does not begin with //! (what it owns, what it must never do)"));
    }
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX {
        all.push(format!("{path}: {lines} lines, the limit is {FILE_LINES_MAX}"));
    }
    all
}

fn layers(path: &str, text: &str) -> Vec<String> {
    let module = module_of(path);
    if module == "lib" {
        return Vec::new();
    }
    let Some(own) = layer_of(module) else { return vec![format!("{path}: module {module} is in no layer")] };
    let mut all = Vec::new();
    for forbidden in ["super::super", "use crate::{", "use walrelay::{"] {
        if text.contains(forbidden) {
            all.push(format!("{path}: {forbidden} hides who is imported"));
        }
    }
    for used in text.split("crate::").skip(1).filter_map(leading_identifier) {
        if used == module || !used.starts_with(|first: char| first.is_ascii_lowercase()) {
            continue;
        }
        match layer_of(used) {
            Some(layer) if layer < own => {}
            Some(_) => all.push(format!("{path}: may not import crate::{used}")),
            None => all.push(format!("{path}: crate::{used} is in no layer")),
        }
    }
    all
}

/// What a module may touch beyond this crate. Its unit tests may touch more.
fn reach(path: &str, text: &str) -> Vec<String> {
    let production = text.split("#[cfg(test)]\nmod ").next().unwrap_or(text);
    let module = module_of(path);
    let mut all = Vec::new();
    if PURE.contains(&module) {
        all.extend(
            IMPURE
                .iter()
                .filter(|name| production.contains(**name))
                .map(|name| format!("{path}: pure, but names {name}")),
        );
    }
    if production.contains("std::fs") && !FILES_ALLOWED.iter().any(|allowed| path.starts_with(allowed)) {
        all.push(format!("{path}: std::fs belongs to src/store/disk.rs"));
    }
    if production.contains("tokio::fs") {
        all.push(format!("{path}: tokio::fs hides a thread per call; files belong to src/store/disk.rs"));
    }
    if module == "store" && production.contains("tokio::") {
        all.push(format!("{path}: the store has no tokio"));
    }
    if production.contains("anyhow::") && !matches!(module, "main" | "cli") {
        all.push(format!("{path}: anyhow belongs to main.rs and cli; say which error it is"));
    }
    all
}

/// Identifiers only: strings and comments may quote PostgreSQL, and so may constants named after its record types.
fn words(path: &str, text: &str) -> Vec<String> {
    let mut all = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for identifier in identifiers(&without_quotes(line)) {
            let is_postgres = COLUMNS.contains(&identifier)
                || identifier.starts_with("XLOG_")
                || identifier.starts_with("XLP_");
            let is_foreign_module = line.contains(&format!("::{identifier}::"));
            let is_foreign = FOREIGN.iter().any(|(file, names)| *file == path && names.contains(&identifier));
            if is_postgres || is_foreign_module || is_foreign {
                continue;
            }
            if let Some(word) =
                split_identifier(identifier).into_iter().find(|word| WORDS.contains(&word.as_str()))
            {
                all.push(format!("{path}:{}: {identifier} has the word {word}", number + 1));
            }
            if identifier.starts_with("get_") && line.contains(&format!("fn {identifier}")) {
                all.push(format!("{path}:{}: {identifier} says get_", number + 1));
            }
        }
    }
    all
}

/// Metric names in `text` that do not occur in `exported`.
pub(crate) fn unknown_metrics(path: &str, text: &str, exported: &str) -> Vec<String> {
    let named = identifiers(text).into_iter().filter(|name| name.starts_with("walrelay_"));
    // A histogram is exported under one name and queried under three.
    let unknown = named.filter(|name| {
        let base =
            ["_bucket", "_sum", "_count"].iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(name);
        !exported.contains(&format!("\"{name}\"")) && !exported.contains(&format!("\"{base}\""))
    });
    unknown.map(|name| format!("{path}: {name}")).collect()
}

fn module_of(path: &str) -> &str {
    let inside = path.trim_start_matches("src/");
    inside.split(['/', '.']).next().unwrap_or(inside)
}

fn layer_of(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

fn leading_identifier(text: &str) -> Option<&str> {
    identifiers(text.split(|c: char| !is_identifier(c)).next()?).first().copied()
}

fn identifiers(text: &str) -> Vec<&str> {
    text.split(|c: char| !is_identifier(c))
        .filter(|word| word.starts_with(|c: char| c.is_alphabetic() || c == '_'))
        .collect()
}

fn is_identifier(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn split_identifier(identifier: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut was_lower = false;
    for c in identifier.chars() {
        if c == '_' || (c.is_uppercase() && was_lower) {
            words.push(String::new());
        }
        was_lower = c.is_lowercase() || c.is_numeric();
        if c != '_' {
            words.last_mut().expect("never empty").extend(c.to_lowercase());
        }
    }
    words
}

/// The line without string literals and without what follows `//`. Good enough for strings on one line.
fn without_quotes(line: &str) -> String {
    let mut code = String::new();
    let mut characters = line.chars().peekable();
    let mut in_string = false;
    while let Some(c) = characters.next() {
        match c {
            '\\' if in_string => drop(characters.next()),
            '\'' if !in_string && characters.peek() == Some(&'"') => drop(characters.next()),
            '"' => in_string = !in_string,
            '/' if !in_string && characters.peek() == Some(&'/') => break,
            _ if in_string => {}
            _ => code.push(c),
        }
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complained(path: &str, text: &str, about: &str) -> bool {
        complaints(path, &format!("//! Doc.\n{text}")).iter().any(|complaint| complaint.contains(about))
    }

    #[test]
    fn imports_that_point_up_or_sideways_are_caught() {
        assert!(complained("src/wal/lsn.rs", "use crate::store::Store;", "crate::store"));
        assert!(complained("src/upstream/mod.rs", "use crate::downstream::Registry;", "crate::downstream"));
        assert!(complained("src/net/mod.rs", "use crate::{wal, store};", "hides"));
        assert!(complained("src/newcomer.rs", "", "in no layer"));
        assert!(!complained("src/upstream/mod.rs", "use crate::store::Store;", "crate::store"));
        assert!(!complained("src/store/mod.rs", "use crate::store::disk::Disk;", "crate::store"));
    }

    #[test]
    fn a_clock_in_a_pure_module_is_caught() {
        assert!(complained("src/session/sender.rs", "let now = Instant::now();", "Instant::now"));
        assert!(!complained("src/net/mod.rs", "let now = Instant::now();", "Instant::now"));
        assert!(!complained(
            "src/session/sender.rs",
            "#[cfg(test)]\nmod tests {\nlet now = Instant::now();",
            "Instant::now"
        ));
    }

    #[test]
    fn files_touched_outside_the_disk_are_caught() {
        assert!(complained("src/store/writer.rs", "use std::fs::File;", "std::fs"));
        assert!(!complained("src/store/disk.rs", "use std::fs::File;", "std::fs"));
    }

    #[test]
    fn anyhow_below_the_command_line_is_caught() {
        assert!(complained("src/relay.rs", "use anyhow::Context;", "anyhow"));
        assert!(!complained("src/cli/run.rs", "use anyhow::Context;", "anyhow"));
    }

    #[test]
    fn unfinished_work_is_caught() {
        assert!(complained("src/relay.rs", concat!("// TO", "DO later"), "contains"));
        assert!(complained("tests/a.rs", concat!("#[ig", "nore]"), "contains"));
    }

    #[test]
    fn words_are_caught_in_identifiers_only() {
        assert!(complained("src/relay.rs", "let master_host = 1;", "word master"));
        assert!(complained("src/relay.rs", "struct XlogReader;", "word xlog"));
        assert!(complained("src/relay.rs", "fn f(tli: u32) {}", "word tli"));
        assert!(!complained("src/relay.rs", "let columns = [\"xlogpos\", \"tli\"]; // tli", "word"));
        assert!(!complained("src/relay.rs", "const XLOG_SWITCH: u8 = 0x40;", "word"));
        assert!(!complained("src/relay.rs", "let position = settling;", "word"));
        assert!(!complained("src/relay.rs", "hyper::server::conn::http1::Builder::new()", "word"));
        assert!(!complained("src/status.rs", "pub received_tli: u32,", "word"));
        assert!(complained("src/status.rs", "pub start_tli: u32,", "word"));
        assert!(complained("src/relay.rs", "fn get_segment() {}", "get_"));
    }

    #[test]
    fn long_and_undocumented_files_are_caught() {
        assert!(complained("src/relay.rs", &"\n".repeat(FILE_LINES_MAX), "the limit"));
        assert!(complaints("src/relay.rs", "use std::io;").iter().any(|complaint| complaint.contains("//!")));
    }

    #[test]
    fn a_metric_that_nobody_exports_is_caught() {
        let exported = "\"walrelay_store_written_bytes_total\" \"walrelay_store_sync_seconds\"";
        let query = "rate(walrelay_store_written_bytes_total[1m]) + walrelay_store_sync_seconds_bucket";
        assert!(unknown_metrics("a.yaml", query, exported).is_empty());
        assert_eq!(unknown_metrics("a.yaml", "walrelay_gone", exported).len(), 1);
    }
}
