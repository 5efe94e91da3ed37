//! `walrelay scram`: a password in, a verifier for the users file out.
//!
//! Owns reading the password without showing it. Never prints or keeps one.

use std::{
    io::{BufRead, IsTerminal, Write},
    num::NonZeroU32,
};

use anyhow::Context;
use aws_lc_rs::rand;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use secrecy::{ExposeSecret, SecretString};

use crate::protocol::scram::{ITERATIONS_DEFAULT, ITERATIONS_MAX, SALT_BYTES, Verifier};

/// Arguments of `walrelay scram`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Print a whole line of the users file for this user, not the verifier alone.
    #[arg(long)]
    user: Option<String>,
    /// Hash iterations (`scram_iterations`).
    #[arg(long, default_value_t = ITERATIONS_DEFAULT)]
    iterations: NonZeroU32,
}

/// Reads a password from standard input and prints its verifier.
pub fn run(options: &Options) -> anyhow::Result<()> {
    anyhow::ensure!(options.iterations.get() <= ITERATIONS_MAX, "more than {ITERATIONS_MAX} iterations");
    let password = read_password()?;
    let mut salt = vec![0; SALT_BYTES];
    rand::fill(&mut salt).map_err(|_| anyhow::anyhow!("could not generate random salt"))?;
    let verifier = Verifier::from_password(password.expose_secret().as_bytes(), salt, options.iterations);
    let line = match &options.user {
        Some(user) => toml::to_string(&std::collections::BTreeMap::from([(user, verifier.to_string())]))?,
        None => verifier.to_string() + "\n",
    };
    std::io::stdout().write_all(line.as_bytes()).context("could not write to standard output")
}

fn read_password() -> anyhow::Result<SecretString> {
    let input = std::io::stdin();
    let is_terminal = input.is_terminal();
    let shown = if is_terminal { Some(hide_input()?) } else { None };
    let mut line = String::new();
    let outcome = input.lock().read_line(&mut line);
    if let Some(shown) = shown {
        tcsetattr(&input, OptionalActions::Now, &shown).context("could not restore the terminal")?;
        writeln!(std::io::stderr()).context("could not write to standard error")?;
    }
    outcome.context("could not read the password")?;
    let password = line.trim_end_matches(['\n', '\r']);
    anyhow::ensure!(!password.is_empty(), "the password is empty");
    Ok(SecretString::from(password.to_owned()))
}

/// Turns echo off; the settings before are returned.
fn hide_input() -> anyhow::Result<rustix::termios::Termios> {
    let input = std::io::stdin();
    write!(std::io::stderr(), "Password: ").context("could not write to standard error")?;
    let before = tcgetattr(&input).context("could not read the terminal's settings")?;
    let mut hidden = before.clone();
    hidden.local_modes.remove(LocalModes::ECHO);
    tcsetattr(&input, OptionalActions::Now, &hidden).context("could not hide the password")?;
    Ok(before)
}
