//! What a connection string depends on besides itself: environment, operating system user, files.
//!
//! The only place outside the store that opens a file. Looked at only through a trait, so that everything else here is a
//! function of its arguments. Never writes anything.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use zeroize::Zeroizing;

/// The process's environment as libpq looks at it.
pub trait Surroundings {
    /// The environment variable `name`.
    fn variable(&self, name: &str) -> Option<String>;

    /// Name of the operating system user we run as.
    fn user_name(&self) -> Option<String>;

    /// Its number, for the error when it has no name.
    fn user_id(&self) -> u32;

    /// Its home directory; `HOME` has precedence, the caller sees to that.
    fn user_home(&self) -> Option<PathBuf>;

    /// The file at `path`.
    fn read(&self, path: &Path) -> io::Result<FoundFile>;

    /// What tells the file at `path` from another one and from itself after any change, without reading it; `None`: only reading
    /// it tells.
    fn identity(&self, _path: &Path) -> Option<FileIdentity> {
        None
    }

    /// The files in the directory at `path`, at most [`LISTED_FILES_MAX`], by name; none if it is not there.
    fn list(&self, path: &Path) -> Vec<PathBuf>;
}

/// The home directory by libpq's rule: `HOME`, else what the operating system knows.
pub(crate) fn home_directory(surroundings: &dyn Surroundings) -> Option<PathBuf> {
    match surroundings.variable("HOME").filter(|home| !home.is_empty()) {
        Some(home) => Some(PathBuf::from(home)),
        None => surroundings.user_home(),
    }
}

/// A file that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FoundFile {
    /// A plain file.
    Plain {
        /// Permission bits.
        mode: u32,
        /// The user it belongs to.
        owner: u32,
        /// Content; bytes that are not UTF-8 are replaced, which spoils only the lines they stand in. It may hold secrets.
        text: Zeroizing<String>,
    },
    /// A directory, a device, a pipe: never read.
    NotPlain,
}

/// One state of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIdentity {
    /// Device and inode.
    pub place: (u64, u64),
    /// Its length.
    pub bytes: u64,
    /// When its content or its permissions were last changed; seconds and nanoseconds since 1970.
    pub changed_at: (i64, i64),
}

/// The true environment of this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessSurroundings;

impl Surroundings for ProcessSurroundings {
    fn variable(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn user_name(&self) -> Option<String> {
        // Users of a directory service are not in the file; service managers and shells name them in LOGNAME.
        let from_login = || self.variable("LOGNAME").or_else(|| self.variable("USER"));
        self.passwd_field(self.user_id(), 0).or_else(from_login).filter(|name| !name.is_empty())
    }

    fn user_id(&self) -> u32 {
        rustix::process::geteuid().as_raw()
    }

    fn user_home(&self) -> Option<PathBuf> {
        self.passwd_field(self.user_id(), 5).filter(|home| !home.is_empty()).map(PathBuf::from)
    }

    fn read(&self, path: &Path) -> io::Result<FoundFile> {
        read_file(path)
    }

    fn identity(&self, path: &Path) -> Option<FileIdentity> {
        identity_at(path, SystemTime::now())
    }

    fn list(&self, path: &Path) -> Vec<PathBuf> {
        list_files(path)
    }
}

impl ProcessSurroundings {
    /// Name of an operating system user.
    pub fn name_of_user(&self, user_id: u32) -> Option<String> {
        if user_id == self.user_id() { self.user_name() } else { self.passwd_field(user_id, 0) }
    }

    /// A field of a user's line in the user database (passwd(5)).
    fn passwd_field(&self, user_id: u32, field: usize) -> Option<String> {
        let Ok(FoundFile::Plain { text, .. }) = self.read(Path::new("/etc/passwd")) else { return None };
        let user_id = user_id.to_string();
        let line = text.lines().find(|line| line.split(':').nth(2) == Some(&user_id))?;
        line.split(':').nth(field).map(str::to_owned)
    }
}

/// Reads one small file of the administrator's.
// Files of the store belong to store/disk.rs; these are not the store's, and are only read.
#[allow(clippy::disallowed_methods)]
fn read_file(path: &Path) -> io::Result<FoundFile> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    // Looked at before it is opened: opening a pipe would block.
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Ok(FoundFile::NotPlain);
    }
    if metadata.len() > FILE_BYTES_MAX {
        return Err(io::Error::from(io::ErrorKind::FileTooLarge));
    }
    // It may hold secrets: no copy is made of one that is as it should be.
    let text = String::from_utf8(std::fs::read(path)?).unwrap_or_else(|error| {
        let bytes = Zeroizing::new(error.into_bytes());
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let mode = metadata.permissions().mode() & 0o7777;
    Ok(FoundFile::Plain { mode, owner: metadata.uid(), text: Zeroizing::new(text) })
}

/// None for a file that was changed just before `now`: another change may still be of the same time by the file system's clock.
fn identity_at(path: &Path, now: SystemTime) -> Option<FileIdentity> {
    use std::os::unix::fs::MetadataExt as _;

    let metadata = path.metadata().ok()?;
    let changed_at = UNIX_EPOCH + Duration::from_secs(u64::try_from(metadata.ctime()).ok()?);
    let age = now.duration_since(changed_at).ok()?;
    (age >= SETTLED_AGE).then_some(FileIdentity {
        place: (metadata.dev(), metadata.ino()),
        bytes: metadata.len(),
        changed_at: (metadata.ctime(), metadata.ctime_nsec()),
    })
}

// As above.
#[allow(clippy::disallowed_methods)]
fn list_files(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
    let plain = entries.filter_map(Result::ok).map(|entry| entry.path()).filter(|path| path.is_file());
    let mut files: Vec<_> = plain.take(LISTED_FILES_MAX).collect();
    files.sort();
    files
}

/// Most files of a directory that are looked at.
pub const LISTED_FILES_MAX: usize = 1024;

/// Longer than any file system takes for one time.
const SETTLED_AGE: Duration = Duration::from_secs(3);

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Surroundings made of values: for tests.
#[derive(Clone, Debug, Default)]
pub struct FixedSurroundings {
    /// Environment variables.
    pub variables: BTreeMap<String, String>,
    /// The operating system user's name.
    pub user_name: Option<String>,
    /// The operating system user's home directory.
    pub user_home: Option<PathBuf>,
    /// Files by path.
    pub files: BTreeMap<PathBuf, FoundFile>,
}

impl FixedSurroundings {
    /// Somebody called `name`, with nothing in the environment and no files.
    pub fn of_user(name: &str) -> Self {
        Self { user_name: Some(name.to_owned()), ..Self::default() }
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn with_variable(mut self, name: &str, value: &str) -> Self {
        self.variables.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Adds a plain file.
    #[must_use]
    pub fn with_file(mut self, path: &str, mode: u32, text: &str) -> Self {
        self.files.insert(
            PathBuf::from(path),
            FoundFile::Plain { mode, owner: 1000, text: text.to_owned().into() },
        );
        self
    }
}

impl Surroundings for FixedSurroundings {
    fn variable(&self, name: &str) -> Option<String> {
        self.variables.get(name).cloned()
    }

    fn user_name(&self) -> Option<String> {
        self.user_name.clone()
    }

    fn user_id(&self) -> u32 {
        1000
    }

    fn user_home(&self) -> Option<PathBuf> {
        self.user_home.clone()
    }

    fn read(&self, path: &Path) -> io::Result<FoundFile> {
        self.files.get(path).cloned().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    fn list(&self, path: &Path) -> Vec<PathBuf> {
        self.files.keys().filter(|file| file.parent() == Some(path)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_knows_its_user_and_reads_only_plain_files() {
        let surroundings = ProcessSurroundings;
        assert!(surroundings.user_name().is_some());
        assert_eq!(surroundings.read(Path::new("/dev/null")).unwrap(), FoundFile::NotPlain);
        assert_eq!(surroundings.read(Path::new("/")).unwrap(), FoundFile::NotPlain);
        assert!(surroundings.read(Path::new("/no/such/file")).is_err());
    }

    #[test]
    fn a_file_is_known_by_its_looks_once_it_has_settled() {
        let place = tempfile::NamedTempFile::new().unwrap();
        let path = place.path();
        let (now, later) = (SystemTime::now(), SystemTime::now() + 2 * SETTLED_AGE);
        assert_eq!(identity_at(path, now), None, "it was just made");
        let first = identity_at(path, later).unwrap();
        assert_eq!(identity_at(path, later), Some(first));
        // Not even what keeps its length, its place and the time that it claims goes unseen.
        std::io::Write::write_all(&mut place.as_file(), b"key").unwrap();
        let second = identity_at(path, later).unwrap();
        place.as_file().set_modified(UNIX_EPOCH).unwrap();
        let third = identity_at(path, later).unwrap();
        assert!(
            first != second && second.changed_at >= first.changed_at && third.changed_at >= second.changed_at
        );
        assert_eq!(identity_at(Path::new("/no/such/file"), later), None);
    }

    #[test]
    fn home_comes_from_the_environment_first() {
        let mut surroundings = FixedSurroundings::of_user("postgres");
        surroundings.user_home = Some(PathBuf::from("/var/lib/postgresql"));
        assert_eq!(home_directory(&surroundings), surroundings.user_home);
        let surroundings = surroundings.with_variable("HOME", "");
        assert_eq!(home_directory(&surroundings), surroundings.user_home);
        let surroundings = surroundings.with_variable("HOME", "/root");
        assert_eq!(home_directory(&surroundings), Some(PathBuf::from("/root")));
    }
}
