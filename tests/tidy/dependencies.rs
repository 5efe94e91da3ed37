//! What the crate may depend on: banned crates, licences, and versions that occur twice.
//!
//! The lists are those of `.deny.toml`, so that cargo-deny and this test cannot disagree. This test needs nothing but
//! cargo itself, and runs on every machine.

use std::collections::BTreeMap;
use std::process::Command;

#[test]
fn no_banned_crate_is_locked() {
    let banned = names(&policy(), "bans", "deny");
    assert!(!banned.is_empty());
    let locked: Vec<String> = packages(&lock()).into_keys().filter(|name| banned.contains(name)).collect();
    assert!(locked.is_empty(), "banned by .deny.toml: {locked:?}");
}

#[test]
fn no_crate_is_locked_in_two_versions() {
    let skipped = names(&policy(), "bans", "skip");
    let twice: BTreeMap<String, Vec<String>> = packages(&lock())
        .into_iter()
        .filter(|(name, versions)| versions.len() > 1 && !skipped.contains(name))
        .collect();
    assert!(twice.is_empty(), "locked in several versions: {twice:?}");
}

#[test]
fn every_licence_is_permitted() {
    let policy = policy();
    let permitted: Vec<&str> =
        policy["licenses"]["allow"].as_array().unwrap().iter().map(|one| one.as_str().unwrap()).collect();
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--locked"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let refused: Vec<String> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|package| !is_permitted(package["license"].as_str().unwrap_or("none"), &permitted))
        .map(|package| format!("{} is under {}", package["name"], package["license"]))
        .collect();
    assert!(refused.is_empty(), "{refused:#?}");
}

#[test]
fn an_expression_needs_every_and_and_one_or() {
    let permitted = ["MIT", "Apache-2.0", "ISC"];
    assert!(is_permitted("MIT OR GPL-3.0", &permitted));
    assert!(is_permitted("ISC AND (Apache-2.0 OR ISC)", &permitted));
    assert!(is_permitted("(MIT OR Apache-2.0) AND ISC", &permitted));
    assert!(!is_permitted("MIT AND OpenSSL", &permitted));
    assert!(!is_permitted("GPL-3.0", &permitted));
}

/// SPDX expressions as crates write them: AND binds closer than OR, parentheses, `/` as an old OR.
fn is_permitted(expression: &str, permitted: &[&str]) -> bool {
    let expression = expression.replace('/', " OR ");
    let expression = strip_parentheses(expression.trim());
    for (word, all) in [(" OR ", false), (" AND ", true)] {
        let parts = split_outside_parentheses(expression, word);
        if parts.len() > 1 {
            let mut answers = parts.iter().map(|part| is_permitted(part, permitted));
            return if all { answers.all(|yes| yes) } else { answers.any(|yes| yes) };
        }
    }
    permitted.contains(&expression)
}

fn split_outside_parentheses<'a>(text: &'a str, word: &str) -> Vec<&'a str> {
    let (mut parts, mut depth, mut begin) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ if depth == 0 && at >= begin && text[at..].starts_with(word) => {
                parts.push(&text[begin..at]);
                begin = at + word.len();
            }
            _ => {}
        }
    }
    parts.push(&text[begin..]);
    parts
}

/// `(a OR b)` without its parentheses, but `(a) AND (b)` as it is.
fn strip_parentheses(text: &str) -> &str {
    let Some(inside) = text.strip_prefix('(').and_then(|rest| rest.strip_suffix(')')) else { return text };
    let mut depth = 0;
    let balanced = inside.chars().all(|c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        depth >= 0
    });
    if balanced { inside } else { text }
}

fn policy() -> toml::Table {
    read_toml(".deny.toml")
}

fn lock() -> toml::Table {
    read_toml("Cargo.lock")
}

fn read_toml(name: &str) -> toml::Table {
    super::read(&super::root().join(name)).parse().unwrap()
}

fn names(policy: &toml::Table, section: &str, list: &str) -> Vec<String> {
    let entries = policy[section][list].as_array().unwrap();
    entries.iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect()
}

fn packages(lock: &toml::Table) -> BTreeMap<String, Vec<String>> {
    let mut packages: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in lock["package"].as_array().unwrap() {
        let text = |key: &str| package[key].as_str().unwrap().to_owned();
        packages.entry(text("name")).or_default().push(text("version"));
    }
    packages
}
