//! Asks libpq by running `psql` in an environment of its own.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use walrelay::conninfo::{FixedSurroundings, FoundFile, ProcessSurroundings, Surroundings as _};

/// A `psql` and the environment it is run in.
pub(crate) struct Psql {
    program: PathBuf,
    /// libpq's major version.
    pub(crate) major: u32,
    /// Home directory, socket directory, and place of every file.
    pub(crate) directory: PathBuf,
    /// What `{port}` stands for.
    pub(crate) port: u16,
    /// Environment variables, besides `HOME`.
    pub(crate) variables: BTreeMap<String, String>,
    _directory: tempfile::TempDir,
}

impl Psql {
    /// One of every major version that the lab (`tests/install.sh`) or the system has.
    pub(crate) fn all() -> Vec<Self> {
        let default_lab = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/lab");
        let lab = std::env::var_os("WALRELAY_LAB").map_or_else(default_lab, PathBuf::from);
        let directories = [lab.join("pg"), PathBuf::from("/usr/lib/postgresql")];
        let versions = directories.iter().flat_map(fs::read_dir).flatten().flatten();
        let mut programs: Vec<PathBuf> = versions.map(|entry| entry.path().join("bin/psql")).collect();
        // The wrapper that Debian calls psql sets variables of its own, so it comes last.
        programs.push(PathBuf::from("psql"));
        let mut found = BTreeMap::new();
        for program in programs {
            if let Some(major) = major_version(&program).filter(|_| knows_encryption(&program)) {
                found.entry(major).or_insert(program);
            }
        }
        if found.is_empty() {
            assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "psql is not installed");
            eprintln!("skipped: psql is not installed, so libpq cannot be asked");
        }
        found.into_iter().map(|(major, program)| Self::new(major, program)).collect()
    }

    fn new(major: u32, program: PathBuf) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path().to_owned();
        Self { program, major, directory, port: 1, variables: BTreeMap::new(), _directory: temporary }
    }

    /// Replaces `{dir}` and `{port}`.
    pub(crate) fn fill_in(&self, text: &str) -> String {
        text.replace("{dir}", self.directory.to_str().unwrap()).replace("{port}", &self.port.to_string())
    }

    /// Writes a file into the directory; `{dir}` and `{port}` in it are replaced.
    pub(crate) fn write_file(&self, name: &str, text: &str, mode: u32) {
        let path = self.directory.join(name);
        fs::write(&path, self.fill_in(text)).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Everything `psql` writes when told to connect to `text`.
    pub(crate) fn run(&self, text: &str) -> String {
        let output = Command::new(&self.program)
            .args(["-X", "-w", "-d", text, "-c", "SELECT 1"])
            .env_clear()
            .env("LC_ALL", "C")
            .env("HOME", &self.directory)
            .envs(&self.variables)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// What libpq says of a string it does not understand. Some of it is found only while connecting.
    pub(crate) fn complaint(&self, text: &str) -> String {
        let said = self.run(text);
        let line = said.lines().find_map(|line| line.strip_prefix("psql: error: "));
        let line = line.unwrap_or_else(|| panic!("{text}: no error in {said:?}"));
        match line.split_once(" failed: ") {
            Some((place, complaint)) if place.starts_with("connection to server") => complaint.to_owned(),
            _ => line.to_owned(),
        }
    }

    /// The servers that libpq tried, all in vain: `at "127.0.0.1", port 1`, `on socket "/path"`.
    pub(crate) fn places_tried(&self, text: &str) -> Vec<String> {
        let said = self.run(text);
        let mut places: Vec<String> = Vec::new();
        for line in said.lines() {
            let line = line.strip_prefix("psql: error: ").unwrap_or(line);
            let Some(rest) = line.strip_prefix("connection to server ") else { continue };
            let (place, _) = rest.split_once(" failed: ").unwrap();
            let place = without_looked_up_address(place);
            // A name with several addresses is one host.
            if places.last() != Some(&place) {
                places.push(place);
            }
        }
        assert!(!places.is_empty(), "{text}: {said}");
        places
    }

    /// The same environment for our own code.
    pub(crate) fn surroundings(&self) -> FixedSurroundings {
        let process = ProcessSurroundings;
        let mut surroundings = FixedSurroundings {
            variables: self.variables.clone(),
            user_name: process.user_name(),
            ..FixedSurroundings::default()
        };
        surroundings.variables.insert("HOME".to_owned(), self.directory.to_str().unwrap().to_owned());
        for entry in fs::read_dir(&self.directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
                let text = fs::read_to_string(&path).unwrap();
                surroundings.files.insert(path, FoundFile::Plain { mode, owner: 1000, text: text.into() });
            }
        }
        surroundings
    }
}

/// A libpq built without TLS is no measure: it refuses other things, and in other words.
fn knows_encryption(program: &Path) -> bool {
    let text = "host=127.0.0.1 port=1 sslmode=require";
    let output = Command::new(program).args(["-X", "-w", "-d", text]).stdin(Stdio::null()).output();
    output.is_ok_and(|output| !String::from_utf8_lossy(&output.stderr).contains("not compiled in"))
}

fn major_version(program: &Path) -> Option<u32> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// `at "localhost" (::1), port 1` without the address.
fn without_looked_up_address(place: &str) -> String {
    match place.split_once(" (") {
        Some((before, after)) => format!("{before}{}", after.split_once(')').unwrap().1),
        None => place.to_owned(),
    }
}
