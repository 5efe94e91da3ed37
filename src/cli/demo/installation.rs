//! The PostgreSQL programs of this machine, and the account they run under.
//!
//! Owns finding them and the environment they get. PostgreSQL refuses to run as root, so root's servers belong to the
//! account `postgres`, else `nobody`; everybody else's belong to themselves.

use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::{fs::DirBuilderExt, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, anyhow, bail};

/// What the demo and the benchmarks run.
const PROGRAMS: [&str; 5] = ["initdb", "postgres", "psql", "pg_basebackup", "pgbench"];
/// Where Debian and its relatives put each major.
const DEBIAN_FOLDER: &str = "/usr/lib/postgresql";

/// One installation of PostgreSQL.
#[derive(Clone, Debug)]
pub struct Installation {
    folder: PathBuf,
    version: String,
    account: Option<Account>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Account {
    user: u32,
    group: u32,
}

impl Installation {
    /// The chosen folder, else what `pg_config` says, else the newest of Debian's.
    pub fn find(choice: Option<&Path>) -> Result<Self> {
        let folder = match choice {
            Some(folder) => match missing_program(folder) {
                None => folder.to_owned(),
                Some(program) => bail!("program \"{program}\" not found in {}", folder.display()),
            },
            None => candidates().into_iter().find(|folder| missing_program(folder).is_none()).ok_or_else(|| {
                anyhow!("no PostgreSQL server found: install it (on Debian: apt-get install postgresql), or name its folder with --pg-bin")
            })?,
        };
        let folder =
            fs::canonicalize(&folder).with_context(|| format!("could not read {}", folder.display()))?;
        let output = Command::new(folder.join("postgres"))
            .arg("--version")
            .output()
            .with_context(|| format!("could not run {}", folder.join("postgres").display()))?;
        // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split_whitespace().nth(2).map(str::to_owned);
        let version =
            version.ok_or_else(|| anyhow!("unexpected answer of postgres --version: \"{text}\""))?;
        Ok(Self { folder, version, account: account()? })
    }

    /// Where the programs are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The version as the server says it, for instance `15.18`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The major version; 0 if the version cannot be read.
    pub fn major(&self) -> u32 {
        let digits: String = self.version.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0)
    }

    /// A program of this installation, under the right account, in a group of its own, untouched by the caller's `PG*`
    /// variables.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.folder.join(program));
        isolate(&mut command);
        command.env("LC_ALL", "C").env("HOME", "/").current_dir("/");
        if let Some(account) = self.account {
            command.uid(account.user).gid(account.group);
        }
        command
    }

    /// A new folder that belongs to the servers' account and that nobody else can read.
    pub fn make_folder(&self, path: &Path) -> Result<()> {
        fs::DirBuilder::new()
            .mode(0o700)
            .create(path)
            .with_context(|| format!("could not create {}", path.display()))?;
        self.give(path)
    }

    /// Hands a file or folder to the servers' account.
    pub fn give(&self, path: &Path) -> Result<()> {
        let Some(account) = self.account else { return Ok(()) };
        std::os::unix::fs::chown(path, Some(account.user), Some(account.group))
            .with_context(|| format!("could not change the owner of {}", path.display()))
    }
}

/// Keeps the caller's libpq variables away and Ctrl-C for the caller alone.
pub(crate) fn isolate(command: &mut Command) {
    for (name, _) in env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"PG")) {
        command.env_remove(name);
    }
    command.process_group(0);
}

fn candidates() -> Vec<PathBuf> {
    let mut all = Vec::new();
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        all.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    let mut majors: Vec<(u32, PathBuf)> = fs::read_dir(DEBIAN_FOLDER)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .collect();
    majors.sort_unstable_by(|left, right| right.cmp(left));
    all.extend(majors.into_iter().map(|(_, folder)| folder));
    let path = env::var_os("PATH").unwrap_or_default();
    all.extend(env::split_paths(&path));
    all
}

fn missing_program(folder: &Path) -> Option<&'static str> {
    PROGRAMS.into_iter().find(|program| !folder.join(program).is_file())
}

fn account() -> Result<Option<Account>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let accounts = fs::read_to_string("/etc/passwd").context("could not read /etc/passwd")?;
    let found = ["postgres", "nobody"].into_iter().find_map(|name| account_named(&accounts, name));
    found.map(Some).ok_or_else(|| {
        anyhow!("PostgreSQL does not run as root, and there is no user \"postgres\" or \"nobody\"")
    })
}

fn account_named(accounts: &str, name: &str) -> Option<Account> {
    let line = accounts.lines().find(|line| line.split(':').next() == Some(name))?;
    let mut fields = line.split(':').skip(2);
    Some(Account { user: fields.next()?.parse().ok()?, group: fields.next()?.parse().ok()? })
}

/// The arguments of a program, for an error line.
pub(crate) fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(OsStr::new("?"));
    program.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_read_by_their_whole_name() {
        let accounts =
            "root:x:0:0:root:/root:/bin/bash\npostgresql:x:7:8::/:/bin/sh\npostgres:x:101:104::/:/bin/sh\n";
        assert_eq!(account_named(accounts, "postgres"), Some(Account { user: 101, group: 104 }));
        assert_eq!(account_named(accounts, "nobody"), None);
    }

    #[test]
    fn a_folder_without_programs_is_named_in_the_error() {
        let error = Installation::find(Some(Path::new("/nonexistent"))).unwrap_err();
        assert_eq!(error.to_string(), "program \"initdb\" not found in /nonexistent");
    }
}
