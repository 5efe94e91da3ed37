//! pg_receivewal as a client of the relay, or of a primary.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::compare::completed_end;
use super::lab::{self, Installation};
use super::process::{Process, Program};

pub(crate) struct PgReceivewal {
    pub(crate) process: Process,
    folder: PathBuf,
    _scratch: Option<TempDir>,
}

impl PgReceivewal {
    /// Starts it into a fresh folder. It tries again for ever unless `--no-loop` is among the arguments.
    pub(crate) fn start(installation: &Installation, port: u16, arguments: &[&str]) -> Self {
        let scratch = lab::scratch();
        let folder = scratch.path().join("received");
        std::fs::create_dir(&folder).unwrap();
        let mut started = Self::start_into(installation, port, arguments, &folder);
        started._scratch = Some(scratch);
        started
    }

    /// Starts it into a folder that exists.
    pub(crate) fn start_into(
        installation: &Installation,
        port: u16,
        arguments: &[&str],
        folder: &Path,
    ) -> Self {
        let program = Self::program(installation, port, folder).args(arguments.iter().copied());
        let process = Process::spawn("pg_receivewal", &program, &folder.with_extension("log"));
        Self { process, folder: folder.to_owned(), _scratch: None }
    }

    /// The program with its target, to which arguments can be added.
    pub(crate) fn program(installation: &Installation, port: u16, folder: &Path) -> Program {
        Program::new(installation.program("pg_receivewal")).args([
            "-D",
            folder.to_str().unwrap(),
            "-d",
            &format!("host=127.0.0.1 port={port} user=postgres sslmode=disable"),
            "--verbose",
        ])
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn log(&self) -> String {
        let log = std::fs::read(self.folder.with_extension("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// End of the last segment that it has completed.
    pub(crate) fn completed(&self, segment_bytes: u64) -> u64 {
        completed_end(&self.folder, segment_bytes)
    }
}
