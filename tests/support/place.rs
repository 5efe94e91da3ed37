//! Where a server is: on this machine as it stands, or in a network namespace that a test has made.
//!
//! Ports are chosen by the tests and never used twice, so a port says where to look. Who connects by it from here gets a
//! socket of that namespace.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Result;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Mutex;

static PLACES: Mutex<BTreeMap<u16, String>> = Mutex::new(BTreeMap::new());

/// From now on this port is one of the namespace.
pub(crate) fn put(port: u16, namespace: &str) {
    PLACES.lock().unwrap().insert(port, namespace.to_owned());
}

/// Connects to a port of this machine's loopback, or of its namespace's.
pub(crate) fn connect(port: u16) -> Result<TcpStream> {
    let place = PLACES.lock().unwrap().get(&port).cloned();
    match place {
        None => TcpStream::connect(("127.0.0.1", port)),
        Some(namespace) => within(&namespace, move || TcpStream::connect(("127.0.0.1", port))),
    }
}

/// Programs that put the next one into the namespace.
pub(crate) fn wrapper(namespace: &str) -> Vec<String> {
    ["ip", "netns", "exec", namespace].map(str::to_owned).to_vec()
}

/// Does something in a namespace. On a thread of its own, for a namespace is a thread's.
pub(crate) fn within<T: Send + 'static>(
    namespace: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let path = PathBuf::from("/var/run/netns").join(namespace);
    let entered = std::thread::spawn(move || {
        let namespace = File::open(path)?;
        // SAFETY: a system call with a descriptor that is open and a flag; it concerns this thread alone.
        #[allow(unsafe_code, reason = "no crate in use enters a namespace")]
        let result = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
        if result != 0 {
            return Err(std::io::Error::last_os_error());
        }
        work()
    });
    entered.join().expect("it does not panic")
}
