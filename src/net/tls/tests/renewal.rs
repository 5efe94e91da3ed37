//! How often the files are read of a certificate that may have been renewed.

use std::path::{Path, PathBuf};

use super::*;
use crate::conninfo::{FileIdentity, FoundFile, Surroundings};

/// Counts how often files are read, and tells how they look.
struct Watched<'a> {
    files: &'a FixedSurroundings,
    reads: std::cell::Cell<usize>,
    changed_at: std::cell::Cell<Option<i64>>,
}

impl Surroundings for Watched<'_> {
    fn variable(&self, name: &str) -> Option<String> {
        self.files.variable(name)
    }

    fn user_name(&self) -> Option<String> {
        self.files.user_name()
    }

    fn user_id(&self) -> u32 {
        self.files.user_id()
    }

    fn user_home(&self) -> Option<PathBuf> {
        self.files.user_home()
    }

    fn read(&self, path: &Path) -> std::io::Result<FoundFile> {
        self.reads.set(self.reads.get() + 1);
        self.files.read(path)
    }

    fn identity(&self, _: &Path) -> Option<FileIdentity> {
        let changed_at = self.changed_at.get()?;
        Some(FileIdentity { place: (1, 1), bytes: 1, changed_at: (changed_at, 0) })
    }

    fn list(&self, path: &Path) -> Vec<PathBuf> {
        self.files.list(path)
    }
}

#[test]
fn files_that_look_as_before_are_not_read_again() {
    let root = authority("root");
    let files = Files::new().with_server(issued(&params("server", &["db.example"]), &root));
    let server = files.server(None).unwrap();
    let with = |files| Watched { files, reads: 0.into(), changed_at: None.into() };
    let mut watched = with(&files.0);
    let reads_of = |watched: &Watched<'_>| {
        watched.reads.set(0);
        assert!(server.read_again(watched).unwrap().is_none());
        watched.reads.get()
    };
    assert_eq!(reads_of(&watched), 2, "they were changed just now, and only reading tells more");
    assert_eq!(reads_of(&watched), 2);
    watched.changed_at.set(Some(7));
    assert_eq!(reads_of(&watched), 2, "now they have settled");
    assert_eq!(reads_of(&watched), 0);
    watched.changed_at.set(Some(8));
    assert_eq!((reads_of(&watched), reads_of(&watched)), (2, 0), "they were written with what they had");
    let renewed = Files::new().with_server(issued(&params("server", &["db.example"]), &root));
    watched.files = &renewed.0;
    watched.changed_at.set(Some(9));
    let read = server.read_again(&watched).unwrap();
    server.replace(read.expect("what was changed"));
    assert_eq!(reads_of(&watched), 0);
}
