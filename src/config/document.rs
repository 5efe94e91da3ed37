//! A TOML text and the places in it.
//!
//! Owns the way from text to a serde type with errors that name key and line. Knows no key of ours.

use serde::{Serialize, de::DeserializeOwned};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::config::error::Problem;

/// A parsed text.
pub(crate) struct Document<'a> {
    text: &'a str,
    table: Spanned<DeTable<'a>>,
}

impl<'a> Document<'a> {
    /// Parses; the error comes with its line.
    pub(crate) fn parse(text: &'a str) -> Result<Self, (Problem, Option<usize>)> {
        match DeTable::parse(text) {
            Ok(table) => Ok(Self { text, table }),
            Err(error) => {
                let line = error.span().map(|span| line_at(text, span.start));
                // Some messages of the parser take several lines.
                let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
                Err((Problem::Syntax(message), line))
            }
        }
    }

    /// All that it says, not interpreted; texts without escapes are not copied.
    pub(crate) fn table(&self) -> &DeTable<'a> {
        self.table.get_ref()
    }

    /// Reads it as a `T` that knows the keys of `known` and no others. Errors show the value.
    pub(crate) fn read<T: DeserializeOwned>(&self, known: &impl Serialize) -> Result<T, Problem> {
        self.check_keys(&known_keys(known))?;
        toml::from_str(self.text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            let (key, value) = self.entry_at(at).unwrap_or_default();
            // serde's "invalid type: integer `5`, expected a string": only its end is for people.
            let message = error.message();
            let expected = match message.rsplit_once("expected ") {
                Some((_, "i64")) => "an integer",
                Some((_, expected)) => expected,
                None => message,
            };
            Problem::Invalid { key, value, advice: format!("expected {expected}") }
        })
    }

    /// The line of the first of `keys` that is written here, else of a section of theirs.
    pub(crate) fn line_of(&self, keys: &[&str]) -> Option<usize> {
        let table = self.table.get_ref();
        let line = |start: usize| line_at(self.text, start);
        let exact = keys.iter().find_map(|key| {
            let in_section = || {
                let (section, name) = key.split_once('.')?;
                let section = table.get(section)?.get_ref().as_table()?;
                // What is within a value that is a table itself is on that value's line.
                section.get_key_value(name).or_else(|| section.get_key_value(name.split_once('.')?.0))
            };
            table.get_key_value(*key).or_else(in_section)
        });
        let section = || keys.iter().find_map(|key| table.get_key_value(key.split_once('.')?.0));
        exact.or_else(section).map(|(key, _)| line(key.span().start))
    }

    fn check_keys(&self, known: &[String]) -> Result<(), Problem> {
        for (section, value) in self.table.get_ref() {
            let section = section.get_ref().as_ref();
            let prefix = format!("{section}.");
            let names =
                value.get_ref().as_table().filter(|_| known.iter().any(|key| key.starts_with(&prefix)));
            let Some(names) = names else { return Err(unrecognized(section, known)) };
            for name in names.keys() {
                let key = format!("{prefix}{}", name.get_ref());
                if !known.contains(&key) {
                    return Err(unrecognized(&key, known));
                }
            }
        }
        Ok(())
    }

    /// The key whose value is at `offset`, and that value as written.
    fn entry_at(&self, offset: usize) -> Option<(String, String)> {
        entry_in(self.table.get_ref(), "", offset)
            .map(|(key, span)| (key, self.text.get(span).unwrap_or_default().to_owned()))
    }
}

fn entry_in(table: &DeTable<'_>, prefix: &str, offset: usize) -> Option<(String, std::ops::Range<usize>)> {
    table.iter().find_map(|(key, value)| {
        let key = format!("{prefix}{}", key.get_ref());
        match value.get_ref() {
            DeValue::Table(inner) => entry_in(inner, &format!("{key}."), offset),
            _ => value.span().contains(&offset).then(|| (key, value.span())),
        }
    })
}

/// Every `section.key` of a settings type.
pub(crate) fn known_keys(known: &impl Serialize) -> Vec<String> {
    let value = serde_json::to_value(known).unwrap_or_default();
    let sections = value.as_object().into_iter().flatten();
    sections
        .flat_map(|(section, value)| {
            let names = value.as_object().into_iter().flatten();
            names.map(move |(name, _)| format!("{section}.{name}")).collect::<Vec<_>>()
        })
        .collect()
}

/// The complaint about `key`, with the known key that is most like it.
fn unrecognized(key: &str, known: &[String]) -> Problem {
    let name = key.rsplit('.').next().unwrap_or(key);
    let distance = |candidate: &str| {
        let other = candidate.rsplit('.').next().unwrap_or(candidate);
        // The same name in another section, or a slip in the name.
        edit_distance(name, other)
    };
    let closest = known.iter().min_by_key(|candidate| distance(candidate));
    let close = closest.filter(|candidate| distance(candidate) <= name.len() / 4).cloned();
    Problem::Unrecognized { key: key.to_owned(), close }
}

/// Levenshtein's distance in characters.
fn edit_distance(left: &str, right: &str) -> usize {
    let mut row = (0..=right.chars().count()).collect::<Vec<_>>();
    for (index, l) in left.chars().enumerate() {
        let mut diagonal = index;
        let mut before = index + 1;
        let mut next = vec![before];
        for (r, above) in right.chars().zip(row.iter().skip(1)) {
            let cost = usize::from(l != r);
            before = (diagonal + cost).min(before + 1).min(above + 1);
            diagonal = *above;
            next.push(before);
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

fn line_at(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distance_counts_changes() {
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("tail_size", "tail_size"), 0);
        assert_eq!(edit_distance("tailsize", "tail_size"), 1);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
    }
}
