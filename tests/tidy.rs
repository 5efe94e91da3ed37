//! Holds what the compiler and clippy cannot: who may import whom, purity, sizes, words, names, dependencies.
//!
//! Reads text, not Rust, on purpose: a doc link upward counts too, for lower code should not talk about upper code.
//! The rules are in `tidy/rules.rs`, each shown there to catch a planted violation.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a test reads the tree and fails by panicking"
)]

#[path = "tidy/dependencies.rs"]
mod dependencies;
#[path = "tidy/rules.rs"]
mod rules;

use std::path::{Path, PathBuf};

/// What may lie at the top of the tree, beside dotfiles and build output.
const TOP_LEVEL: &[&str] = &[
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "benches",
    "config",
    "deploy",
    "fuzz",
    "src",
    "target",
    "tests",
];

#[test]
fn every_file_keeps_the_rules() {
    let mut complaints = Vec::new();
    for folder in ["src", "tests", "benches", "fuzz/fuzz_targets"] {
        for file in files_below(&root().join(folder), &["rs"]) {
            complaints.extend(rules::complaints(&relative(&file), &read(&file)));
        }
    }
    for folder in ["tests", "deploy", "config", ".ci"] {
        for file in
            files_below(&root().join(folder), &["sh", "yaml", "yml", "toml", "c", "md", "service", "run"])
        {
            complaints.extend(rules::unfinished(&relative(&file), &read(&file)));
        }
    }
    assert!(complaints.is_empty(), "{} complaints:\n{}", complaints.len(), complaints.join("\n"));
}

#[test]
fn top_level_holds_only_what_belongs_there() {
    let strangers: Vec<String> = std::fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.') && !TOP_LEVEL.contains(&name.as_str()))
        .collect();
    assert!(strangers.is_empty(), "not expected at the top level: {strangers:?}");
}

#[test]
fn every_file_of_the_tests_against_servers_is_explained() {
    let explained = read(&root().join("tests/README.md"));
    let files = files_below(&root().join("tests/postgres"), &["rs"]);
    let names = files.iter().map(|file| file.file_stem().unwrap().to_str().unwrap());
    let unexplained: Vec<_> = names.filter(|name| !explained.contains(&format!("| `{name}` |"))).collect();
    // Where they begin, and what several of them ask.
    assert_eq!(unexplained, ["held", "main"], "not in the table of tests/README.md");
}

#[test]
fn every_metric_that_is_named_to_operators_is_exported() {
    let exported: String = files_below(&root().join("src"), &["rs"]).iter().map(|file| read(file)).collect();
    let mut unknown = rules::unknown_metrics("README.md", &read(&root().join("README.md")), &exported);
    for folder in ["deploy/prometheus", "deploy/grafana"] {
        for file in files_below(&root().join(folder), &["yaml", "yml", "json"]) {
            unknown.extend(rules::unknown_metrics(&relative(&file), &read(&file), &exported));
        }
    }
    assert!(unknown.is_empty(), "metrics that src/ does not name:\n{}", unknown.join("\n"));
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn relative(file: &Path) -> String {
    file.strip_prefix(root()).unwrap().to_str().unwrap().to_owned()
}

fn read(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// Every file below `folder` (none if it is absent) whose name, or what follows its last dot, is one of `endings`.
fn files_below(folder: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = std::fs::read_dir(folder) else { return found };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            found.extend(files_below(&path, endings));
        } else if path
            .file_name()
            .and_then(|name| name.to_str()?.rsplit('.').next())
            .is_some_and(|ending| endings.contains(&ending))
        {
            found.push(path);
        }
    }
    found.sort();
    found
}
