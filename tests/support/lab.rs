//! What this machine offers: PostgreSQL installations, a user for the servers, ports, folders. Skips what it lacks.

use std::fs::{File, OpenOptions};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex};

use tempfile::TempDir;

/// One major version of PostgreSQL with its programs.
#[derive(Clone, Debug)]
pub(crate) struct Installation {
    pub(crate) major: u32,
    programs: PathBuf,
}

impl Installation {
    /// The major named by the caller, or `None` (said in one line) when this run does without it.
    pub(crate) fn of(major: u32) -> Option<Self> {
        if !chosen_majors().contains(&major) {
            println!("skipped: PostgreSQL {major} is not in WALRELAY_PG");
            return None;
        }
        let found = Self::find(major);
        if found.is_none() {
            skip(&format!("no PostgreSQL {major}; tests/install.sh provides it"));
        }
        found
    }

    /// Any major, for a property that does not depend on it: the first that was chosen.
    pub(crate) fn any() -> Option<Self> {
        Self::of(*chosen_majors().first()?)
    }

    /// One of the majors, for a property that hardly depends on it: tests that say different numbers share them out.
    pub(crate) fn in_turn(turn: usize) -> Option<Self> {
        let majors = chosen_majors();
        Self::of(*majors.get(turn % majors.len().max(1))?)
    }

    /// The first chosen one of this major or a later one, for what earlier ones cannot tell.
    pub(crate) fn since(major: u32) -> Option<Self> {
        let found = chosen_majors().into_iter().find(|chosen| *chosen >= major);
        if found.is_none() {
            println!("skipped: no PostgreSQL since {major} is in WALRELAY_PG");
        }
        Self::of(found?)
    }

    fn find(major: u32) -> Option<Self> {
        let candidates =
            [lab().join(format!("pg/{major}/bin")), format!("/usr/lib/postgresql/{major}/bin").into()];
        let programs = candidates.into_iter().find(|folder| folder.join("postgres").exists())?;
        Some(Self { major, programs })
    }

    /// A program of this major; a client program may come from 15 where this major has none.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        let own = self.programs.join(name);
        if own.exists() {
            return own;
        }
        let other = Self::find(15).map(|installation| installation.programs.join(name));
        other
            .filter(|path| path.exists())
            .unwrap_or_else(|| panic!("PostgreSQL {} has no {name}", self.major))
    }

    /// Whether the major itself brings the program (its formats are then this major's).
    pub(crate) fn has(&self, name: &str) -> bool {
        self.programs.join(name).exists()
    }

    pub(crate) fn has_extension(&self, name: &str) -> bool {
        let output = Command::new(self.program("pg_config")).arg("--sharedir").output();
        let told = output.map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
        // A relocated installation tells where it was built, not where it is.
        let root = self.programs.canonicalize().unwrap();
        let near = root.ancestors().take(5).flat_map(|folder| {
            ["share/postgresql", "share"]
                .map(|share| folder.join(share))
                .into_iter()
                .chain([folder.join(format!("share/postgresql/{}", self.major))])
        });
        told.into_iter().chain(near).any(|share| share.join(format!("extension/{name}.control")).exists())
    }
}

/// The majors of this run: `WALRELAY_PG="13 14"`, by default 15, 17 and 18.
pub(crate) fn chosen_majors() -> Vec<u32> {
    let text = std::env::var("WALRELAY_PG").unwrap_or_else(|_| "15 17 18".to_owned());
    text.split_whitespace().map(|major| major.parse().expect("WALRELAY_PG lists major versions")).collect()
}

/// Says why a test does nothing here. With `CI=true` that is a failure.
pub(crate) fn skip(reason: &str) {
    println!("skipped: {reason}");
    assert!(std::env::var("CI").as_deref() != Ok("true"), "CI may not skip: {reason}");
}

/// Whether this machine lets us mount; says so when it does not.
pub(crate) fn may_mount() -> bool {
    if !is_root() || !Path::new("/dev/loop-control").exists() {
        skip("mounting a file system needs root and loop devices");
        return false;
    }
    true
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Where `tests/install.sh` puts things.
pub(crate) fn lab() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/lab");
    let lab = std::env::var_os("WALRELAY_LAB").map_or_else(default, PathBuf::from);
    lab.canonicalize().unwrap_or(lab)
}

/// PostgreSQL refuses to run as root: the user and group for the servers, when we are root.
pub(crate) fn server_user() -> Option<(u32, u32)> {
    if !is_root() {
        return None;
    }
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    let ids = |name: &str| {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    Some(ids("postgres").or_else(|| ids("nobody")).expect("a user to run PostgreSQL as"))
}

/// A fresh folder, removed at the end. The path is short, for it holds sockets; others may pass through it.
pub(crate) fn scratch() -> TempDir {
    let folder = tempfile::Builder::new().prefix("walrelay-").tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    folder
}

/// Gives a folder, which must exist, to the user of the servers.
pub(crate) fn give_to_server(folder: &Path) {
    if let Some((user, group)) = server_user() {
        std::os::unix::fs::chown(folder, Some(user), Some(group)).unwrap();
    }
}

/// Gives a folder with all it holds to another owner.
pub(crate) fn give_all_to_server(path: &Path) {
    give_to_server(path);
    if path.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            give_all_to_server(&entry.unwrap().path());
        }
    }
}

/// A port that no other test of this or another process uses, below the kernel's range for outgoing connections.
pub(crate) fn free_port() -> u16 {
    static HELD: LazyLock<Mutex<Vec<File>>> = LazyLock::new(Mutex::default);
    static NEXT: Mutex<u32> = Mutex::new(0);
    let folder = std::env::temp_dir().join(format!("walrelay-ports-{}", rustix::process::geteuid().as_raw()));
    std::fs::create_dir_all(&folder).unwrap();
    loop {
        let tried = {
            let mut next = NEXT.lock().unwrap();
            *next += 1;
            *next
        };
        let port = 12_000 + u16::try_from((std::process::id().wrapping_mul(97) + tried) % 20_000).unwrap();
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(folder.join(port.to_string()))
            .unwrap();
        if lock.try_lock().is_ok() && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            HELD.lock().unwrap().push(lock);
            return port;
        }
    }
}

/// Device and inode, to see that a file was replaced.
pub(crate) fn inode(path: &Path) -> (u64, u64) {
    let metadata = std::fs::metadata(path).unwrap();
    (metadata.dev(), metadata.ino())
}
