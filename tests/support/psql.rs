//! psql as a libpq client: what it gets, or what it says.

use super::lab::Installation;
use super::process::Program;

/// Runs one query or replication command. The home directory has nothing of libpq's in it.
pub(crate) fn run_psql(installation: &Installation, conninfo: &str, query: &str) -> Result<String, String> {
    run_psql_in(&[], installation, conninfo, query)
}

/// The same with these variables.
pub(crate) fn run_psql_in(
    environment: &[(&str, &str)],
    installation: &Installation,
    conninfo: &str,
    query: &str,
) -> Result<String, String> {
    let mut program = Program::new(installation.program("psql")).args(["-XAtd", conninfo, "-c", query]);
    program.environment.push(("HOME".to_owned(), "/nonexistent".to_owned()));
    program
        .environment
        .extend(environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    let output = program.command().output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}
