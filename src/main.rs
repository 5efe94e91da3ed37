//! The `walrelay` program: hands over to [`walrelay::cli`] and turns its answer into an exit status.

use std::process::ExitCode;

fn main() -> ExitCode {
    walrelay::cli::main()
}
