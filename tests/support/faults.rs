//! Faults of the disk: a preloaded library with switches (`tests/tools/faults.c`), small file systems that fill up.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use tempfile::TempDir;

use super::lab;
use super::wait::wait_until;

/// The switches of one process under test.
pub(crate) struct Faults {
    triggers: TempDir,
    kill: Option<String>,
}

impl Faults {
    pub(crate) fn new() -> Self {
        Self { triggers: lab::scratch(), kill: None }
    }

    /// Ends the process at the n-th call: `rename:2:before`. See `tests/tools/faults.c`.
    pub(crate) fn kill_at(plan: &str) -> Self {
        Self { kill: Some(plan.to_owned()), ..Self::new() }
    }

    /// What the process under test must have in its environment, for faults in files below `folder`.
    pub(crate) fn environment(&self, folder: &Path) -> Vec<(String, String)> {
        let mut environment = vec![
            ("LD_PRELOAD".to_owned(), library().to_str().unwrap().to_owned()),
            ("FAULT_PATH".to_owned(), folder.to_str().unwrap().to_owned()),
            ("FAULT_TRIGGERS".to_owned(), self.triggers.path().to_str().unwrap().to_owned()),
        ];
        environment.extend(self.kill.clone().map(|plan| ("FAULT_KILL".to_owned(), plan)));
        environment
    }

    /// Switches a fault on; the number means what `faults.c` says.
    pub(crate) fn set(&self, fault: &str, number: u64) {
        let path = self.triggers.path().join(fault);
        let fresh = path.with_extension("new");
        std::fs::write(&fresh, number.to_string()).unwrap();
        std::fs::rename(fresh, path).unwrap(); // never seen half written
    }

    pub(crate) fn clear(&self, fault: &str) {
        drop(std::fs::remove_file(self.triggers.path().join(fault)));
    }
}

/// The compiled library, made once.
fn library() -> &'static Path {
    static LIBRARY: LazyLock<PathBuf> = LazyLock::new(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools/faults.c");
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("faults.so");
        let made = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("faults-{}.so", std::process::id()));
        let status = Command::new("gcc")
            .args(["-O1", "-shared", "-fPIC", "-o", made.to_str().unwrap(), source.to_str().unwrap(), "-ldl"])
            .status()
            .unwrap_or_else(|error| panic!("gcc: {error}; tests/install.sh provides it"));
        assert!(status.success(), "faults.c does not compile");
        std::fs::rename(made, &target).unwrap(); // other test processes may have it open
        target
    });
    &LIBRARY
}

/// An ext4 of its own on a loop device, unmounted at the end.
pub(crate) struct SmallDisk {
    image: PathBuf,
    mountpoint: PathBuf,
    mounted: bool,
    _scratch: TempDir,
}

impl SmallDisk {
    pub(crate) fn of_megabytes(size: u64) -> Self {
        Self::made(size, &[])
    }

    /// One that can hold so few files that it runs out of them long before it runs out of space.
    pub(crate) fn of_files(count: u32) -> Self {
        Self::made(64, &["-N", &count.to_string()])
    }

    fn made(size: u64, options: &[&str]) -> Self {
        let scratch = lab::scratch();
        let (image, mountpoint) = (scratch.path().join("image"), scratch.path().join("mnt"));
        std::fs::File::create(&image).unwrap().set_len(size << 20).unwrap();
        std::fs::create_dir(&mountpoint).unwrap();
        run("mkfs.ext4", &[&["-q", "-F", "-m", "0"], options, &[image.to_str().unwrap()]].concat());
        let mut disk = Self { image, mountpoint, mounted: false, _scratch: scratch };
        disk.mount();
        disk
    }

    pub(crate) fn path(&self) -> &Path {
        &self.mountpoint
    }

    pub(crate) fn mount(&mut self) {
        run("mount", &["-o", "loop", self.image.to_str().unwrap(), self.mountpoint.to_str().unwrap()]);
        self.mounted = true;
    }

    /// Unmounts; nothing may use the disk any more. On return it has gone: while a copy of the mount is left anywhere, the next
    /// mount would find the file system as it was, with its power cut.
    pub(crate) fn unmount(&mut self) {
        run("umount", &[self.mountpoint.to_str().unwrap()]);
        self.mounted = false;
        let device = || output("losetup", &["--noheadings", "--associated", self.image.to_str().unwrap()]);
        wait_until("the disk to be detached", || device().is_empty());
    }

    /// Remounts with an option such as `ro`.
    pub(crate) fn remount(&self, option: &str) {
        run("mount", &["-o", &format!("remount,{option}"), self.mountpoint.to_str().unwrap()]);
    }

    /// Cuts the power: what was not synced is gone, what the journal had not committed is rolled back at the next mount,
    /// and every write and sync from now on fails.
    #[allow(unsafe_code, reason = "no safe wrapper exists for this ioctl")]
    pub(crate) fn cut_power(&self) {
        use std::os::fd::AsRawFd;
        const FS_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587D;
        let no_log_flush: u32 = 2;
        let root = std::fs::File::open(&self.mountpoint).unwrap();
        // SAFETY: the descriptor is open and the argument points to the u32 that this request reads.
        let result = unsafe { libc::ioctl(root.as_raw_fd(), FS_IOC_SHUTDOWN, &raw const no_log_flush) };
        assert_eq!(result, 0, "cannot cut the power: {}", std::io::Error::last_os_error());
    }

    /// Fills the disk up to its last block; also what has become free since an earlier call. Removing the file that is
    /// returned makes space again.
    pub(crate) fn fill(&self) -> PathBuf {
        use std::io::Write;
        let path = self.mountpoint.join("filler");
        let mut file = std::fs::File::options().create(true).append(true).open(&path).unwrap();
        loop {
            let before = file.metadata().unwrap().len();
            for size in [1 << 20, 4096] {
                while file.write_all(&vec![1; size]).is_ok() {}
            }
            // Blocks that were freed can be had once the journal has committed that.
            drop(file.sync_all());
            if file.metadata().unwrap().len() == before {
                return path;
            }
        }
    }

    /// Fills the disk, but for so many bytes. Removing the file that is returned makes space again.
    pub(crate) fn fill_but(&self, leave: u64) -> PathBuf {
        use std::io::Write;
        let path = self.mountpoint.join("filler");
        let mut file = std::fs::File::options().create(true).append(true).open(&path).unwrap();
        loop {
            let figures = rustix::fs::statvfs(&self.mountpoint).unwrap();
            let Some(excess) =
                (figures.f_bavail * figures.f_frsize).checked_sub(leave).filter(|bytes| *bytes > 0)
            else {
                return path;
            };
            file.write_all(&vec![1; usize::try_from(excess).unwrap()]).unwrap();
            file.sync_all().unwrap();
        }
    }

    /// Takes the last inode. Removing the folder that is returned gives them back.
    pub(crate) fn fill_inodes(&self) -> PathBuf {
        let path = self.mountpoint.join("fillers");
        std::fs::create_dir(&path).unwrap();
        let made =
            (0_u32..).take_while(|number| std::fs::File::create(path.join(number.to_string())).is_ok());
        assert!(made.count() > 0, "no inode was left for the first filler");
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if self.mounted {
            drop(Command::new("umount").args(["-l", self.mountpoint.to_str().unwrap()]).status());
        }
    }
}

fn run(program: &str, arguments: &[&str]) {
    output(program, arguments);
}

fn output(program: &str, arguments: &[&str]) -> String {
    let search = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).env("PATH", search).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
