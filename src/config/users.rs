//! The users file: who may connect, what proves it, and what each may do.
//!
//! Owns its reading. A line is `name = "SECRET"`, the secret being that of `pg_authid.rolpassword`, or a table with more about
//! the user. Holds no password; a secret is one all the same, and no error repeats it.

use std::collections::{BTreeMap, BTreeSet};

use toml::{Table, Value};
use zeroize::Zeroizing;

use crate::access::{Permission, Permissions, Secret, User, Users};
use crate::config::{document::Document, error::Problem};
use crate::wal::PgTimestamp;

/// Reads the file's text; the error comes with its line.
pub(crate) fn parse(text: &str) -> Result<Users, (Problem, Option<usize>)> {
    let document = Document::parse(text)?;
    let with_line = |problem: Problem| {
        let line = document.line_of(&problem.keys());
        (problem, line)
    };
    let table: Table = document.read_any().map_err(with_line)?;
    if table.is_empty() {
        return Err((Problem::NoUsers, None));
    }
    let read = |(name, value): (String, Value)| read_user(&name, value).map(|user| (name, user));
    let by_name = table.into_iter().map(read).collect::<Result<BTreeMap<_, _>, _>>().map_err(with_line)?;
    Ok(Users::new(by_name))
}

fn read_user(name: &str, value: Value) -> Result<User, Problem> {
    let mut user = User {
        secret: None,
        may: [Permission::Stream].into_iter().collect(),
        valid_until: None,
        connection_limit: None,
        member_of: BTreeSet::new(),
    };
    let table = match value {
        Value::Table(table) => table,
        value => {
            user.secret = Some(secret(name, value)?);
            return Ok(user);
        }
    };
    for (key, value) in table {
        let wrong = |advice: String| Problem::InvalidUser { user: name.to_owned(), key: key.clone(), advice };
        match key.as_str() {
            "secret" => user.secret = Some(secret(name, value)?),
            "may" => user.may = permissions(&value).map_err(wrong)?,
            "valid_until" => {
                user.valid_until = Some(time(&value).ok_or_else(|| wrong(TIME_ADVICE.to_owned()))?)
            }
            "connection_limit" => {
                user.connection_limit = limit(&value).ok_or_else(|| wrong(LIMIT_ADVICE.to_owned()))?;
            }
            "member_of" => {
                let groups = texts(&value).ok_or_else(|| wrong(GROUPS_ADVICE.to_owned()))?;
                user.member_of = groups.into_iter().collect();
            }
            _ => return Err(wrong(KEYS_ADVICE.to_owned())),
        }
    }
    Ok(user)
}

fn secret(name: &str, value: Value) -> Result<Secret, Problem> {
    let wrong = || Problem::InvalidVerifier(name.to_owned());
    let Value::String(text) = value else { return Err(wrong()) };
    let text = Zeroizing::new(text);
    if let Ok(stored) = text.parse() {
        return Ok(Secret::Md5(stored));
    }
    text.parse().map(Secret::Scram).map_err(|_| wrong())
}

fn permissions(value: &Value) -> Result<Permissions, String> {
    let known = || Permission::ALL.map(|one| format!("\"{}\"", one.as_str())).join(", ");
    let names = texts(value).ok_or_else(|| format!("expected a list of {}", known()))?;
    let permission = |name: String| {
        let found = Permission::ALL.into_iter().find(|one| one.as_str() == name);
        found.ok_or_else(|| format!("\"{name}\" is none of {}", known()))
    };
    names.into_iter().map(permission).collect()
}

fn texts(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect()
}

/// A time with its offset, in quotes or as TOML has times.
fn time(value: &Value) -> Option<PgTimestamp> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Datetime(time) => time.to_string(),
        _ => return None,
    };
    let time: jiff::Timestamp = text.parse().ok()?;
    Some(PgTimestamp::from_system_time(time.into()))
}

/// -1 is no limit, as in PostgreSQL.
fn limit(value: &Value) -> Option<Option<usize>> {
    match value.as_integer()? {
        -1 => Some(None),
        limit => usize::try_from(limit).ok().map(Some),
    }
}

const TIME_ADVICE: &str = "expected a time with its offset, as in \"2027-01-01T00:00:00Z\"";
const LIMIT_ADVICE: &str = "expected a number of sessions, or -1 for no limit";
const GROUPS_ADVICE: &str = "expected a list of names";
const KEYS_ADVICE: &str =
    "expected \"secret\", \"may\", \"valid_until\", \"connection_limit\", or \"member_of\"";
