//! Commands: arguments in, exit status out.
//!
//! Owns the command line, logging set-up and the words printed to a person. Does no work of the relay itself.

pub mod demo;
pub mod fence;
mod http;
pub mod logging;
pub mod run;
pub mod scram;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

/// WAL streaming proxy and standby receiver for PostgreSQL.
#[derive(Debug, Parser)]
#[command(name = "walrelay", version, about, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the relay.
    Run {
        /// Configuration file.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Leave the upstream, and receive and acknowledge nothing more until "unfence"; what is held is served.
    ///
    /// The answer is one line of JSON, with the timeline and the end of WAL up to which standbys must have come before one of
    /// them is promoted. The exit status is 0 when the fence is durable, and 1 when it is not, or not known to be.
    Fence(fence::Options),
    /// Take the fence away: follow the upstream again.
    Unfence(fence::Options),
    /// Work with configuration files.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Show a throwaway primary, relays and a standby on this machine, with load.
    Demo(demo::Options),
    /// Make a SCRAM-SHA-256 verifier for the users file from a password read from standard input.
    Scram(scram::Options),
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check a configuration file and say what is wrong with it.
    Check {
        /// Configuration file.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
}

/// Runs the command that was asked for.
pub fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run { config } => run::run(&config),
        Command::Fence(options) => fence::run(&options, fence::Wish::Fence),
        Command::Unfence(options) => fence::run(&options, fence::Wish::Unfence),
        Command::Config(ConfigCommand::Check { config }) => run::check(&config),
        Command::Demo(options) => demo::run(options),
        Command::Scram(options) => scram::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
            // Standard error may be closed; there is nobody left to tell then.
            let _ = std::io::Write::write_fmt(
                &mut std::io::stderr(),
                format_args!("walrelay: error: {}\n", causes.join(": ")),
            );
            ExitCode::FAILURE
        }
    }
}
