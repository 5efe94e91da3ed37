//! The users file: who may connect, what proves it, and what each may do.
//!
//! Owns its reading. A line is `name = "SECRET"`, the secret being that of `pg_authid.rolpassword`, or a table with more about
//! the user. Holds no password; a secret is one all the same, and no error repeats it, nor any other value of the file.

use std::collections::{BTreeMap, BTreeSet};

use toml::de::{DeTable, DeValue};

use crate::access::{Permission, Permissions, Secret, User, Users};
use crate::config::{document::Document, error::Problem};
use crate::wal::PgTimestamp;

/// Reads the file's text; the error comes with its line. No secret is copied on the way.
pub(crate) fn parse(text: &str) -> Result<Users, (Problem, Option<usize>)> {
    let document = Document::parse(text)?;
    if document.table().is_empty() {
        return Err((Problem::NoUsers, None));
    }
    let mut by_name = BTreeMap::new();
    for (name, value) in document.table() {
        let name = name.get_ref().as_ref();
        let user = read_user(name, value.get_ref()).map_err(|problem| {
            let line = document.line_of(&problem.keys());
            (problem, line)
        })?;
        by_name.insert(name.to_owned(), user);
    }
    Ok(Users::new(by_name))
}

fn read_user(name: &str, value: &DeValue<'_>) -> Result<User, Problem> {
    let mut user = User {
        secret: None,
        may: [Permission::Stream].into_iter().collect(),
        valid_until: None,
        connection_limit: None,
        member_of: BTreeSet::new(),
    };
    match value {
        DeValue::Table(table) => read_table(&mut user, name, table)?,
        value => user.secret = Some(secret(name, value)?),
    }
    Ok(user)
}

fn read_table(user: &mut User, name: &str, table: &DeTable<'_>) -> Result<(), Problem> {
    for (key, value) in table {
        let (key, value) = (key.get_ref().as_ref(), value.get_ref());
        let wrong = |advice: &str| Problem::InvalidUser {
            user: name.to_owned(),
            key: key.to_owned(),
            advice: advice.to_owned(),
        };
        match key {
            "secret" => user.secret = Some(secret(name, value)?),
            "may" => user.may = permissions(value).ok_or_else(|| wrong(&permissions_advice()))?,
            "valid_until" => user.valid_until = Some(time(value).ok_or_else(|| wrong(TIME_ADVICE))?),
            "connection_limit" => {
                user.connection_limit = limit(value).ok_or_else(|| wrong(LIMIT_ADVICE))?;
            }
            "member_of" => {
                let groups = texts(value).ok_or_else(|| wrong(GROUPS_ADVICE))?;
                user.member_of = groups.into_iter().map(str::to_owned).collect();
            }
            _ => return Err(wrong(KEYS_ADVICE)),
        }
    }
    Ok(())
}

fn secret(name: &str, value: &DeValue<'_>) -> Result<Secret, Problem> {
    let wrong = || Problem::InvalidVerifier(name.to_owned());
    let text = value.as_str().ok_or_else(wrong)?;
    if let Ok(stored) = text.parse() {
        return Ok(Secret::Md5(stored));
    }
    text.parse().map(Secret::Scram).map_err(|_| wrong())
}

fn permissions(value: &DeValue<'_>) -> Option<Permissions> {
    let permission = |name: &str| Permission::ALL.into_iter().find(|one| one.as_str() == name);
    texts(value)?.into_iter().map(permission).collect()
}

fn texts<'a>(value: &'a DeValue<'_>) -> Option<Vec<&'a str>> {
    value.as_array()?.iter().map(|text| text.get_ref().as_str()).collect()
}

/// A time with its offset, in quotes or as TOML has times.
fn time(value: &DeValue<'_>) -> Option<PgTimestamp> {
    let time: jiff::Timestamp = match value {
        DeValue::String(text) => text.parse().ok()?,
        DeValue::Datetime(time) => time.to_string().parse().ok()?,
        _ => return None,
    };
    Some(PgTimestamp::from_system_time(time.into()))
}

/// -1 is no limit, as in PostgreSQL.
fn limit(value: &DeValue<'_>) -> Option<Option<usize>> {
    let number = value.as_integer()?;
    match i64::from_str_radix(number.as_str(), number.radix()).ok()? {
        -1 => Some(None),
        limit => usize::try_from(limit).ok().map(Some),
    }
}

/// The wrong one is not told: it may be a secret in the wrong place.
fn permissions_advice() -> String {
    let known = Permission::ALL.map(|one| format!("\"{}\"", one.as_str()));
    format!("expected a list of {}", known.join(", "))
}

const TIME_ADVICE: &str = "expected a time with its offset, as in \"2027-01-01T00:00:00Z\"";
const LIMIT_ADVICE: &str = "expected a number of sessions, or -1 for no limit";
const GROUPS_ADVICE: &str = "expected a list of names";
const KEYS_ADVICE: &str =
    "expected \"secret\", \"may\", \"valid_until\", \"connection_limit\", or \"member_of\"";
