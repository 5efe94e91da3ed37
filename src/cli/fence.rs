//! `walrelay fence` and `walrelay unfence`.
//!
//! Owns the words and the way: a relay that runs is asked over HTTP, with the token of its configuration; where none runs,
//! the fence is set in its data directory, under the lock that keeps a relay from starting meanwhile. Success means that it is
//! durable, and nothing else does. Believes no process for listening on the relay's port, and shows it nothing: a relay has its
//! port before it has its data directory, so that the port is a relay's for certain while one has the directory.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow, bail};

use crate::cli::http::{self, Request};
use crate::config::Config;
use crate::net::interfaces;
use crate::status::{FenceStatus, Timestamp};
use crate::store::{Fence, MustHold, RealDisk, StoreError, durable_fence, fence_directory, is_open};
use crate::upstream::FENCE_TIME_MAX;
use crate::wal::PgTimestamp;

/// Which relay.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Configuration file of the relay.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Change the fence also in a data directory that holds no WAL. Without this such a directory is taken for one whose
    /// disk is not mounted.
    #[arg(long)]
    empty: bool,
    /// Show the token to whoever listens on admin.listen, and believe him, where the data directory is on another machine or cannot
    /// be read, so that it cannot be checked that he is the relay.
    #[arg(long)]
    unchecked: bool,
}

/// What is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Nothing more is to be received or acknowledged.
    Fence,
    /// It may go on.
    Unfence,
}

/// Brings it about, and prints what is so then as one line of JSON.
pub fn run(options: &Options, wish: Wish) -> anyhow::Result<()> {
    let config = Config::load(&options.config)?;
    let running = match config.admin.listen {
        Some(address) => {
            let address = reachable(address);
            match http::connect(address, FENCE_TIME_MAX + ANSWER_TIME) {
                Ok(stream) => Some((address, stream)),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => None,
                Err(error) => bail!(could_not_ask(address, error.into())),
            }
        }
        None => None,
    };
    let told = match running {
        Some((address, stream)) => change_running(address, stream, (&config, options), wish)?,
        None => change_directory(&config, options, wish)?,
    };
    writeln!(io::stdout(), "{told}")?;
    Ok(())
}

/// Where somebody listens.
fn change_running(
    address: SocketAddr,
    stream: TcpStream,
    (config, options): (&Config, &Options),
    wish: Wish,
) -> anyhow::Result<String> {
    let directory = config.relay.data_dir.display();
    match has_directory(address, &config.relay.data_dir) {
        Ok(true) => {
            let told = ask(address, stream, config, wish)?;
            check_directory(&config.relay.data_dir, wish)?;
            Ok(told)
        }
        Ok(false) => bail!(
            "somebody listens at {address}, but no relay has data directory \"{directory}\" open: he was asked nothing, and \
             did not see the token (end that process, and run this again)"
        ),
        Err(why) if options.unchecked => {
            writeln!(
                io::stderr(),
                "walrelay: warning: not checked: whether the relay is what listens at {address}, and whether what it says is \
                 durable in its data directory: {why}"
            )?;
            ask(address, stream, config, wish)
        }
        Err(why) => bail!(
            "could not check that the relay is what listens at {address}, so it did not see the token: {why} (run this on the \
             relay's machine as the user who owns its data directory, or add --unchecked)"
        ),
    }
}

/// Whether the relay that listens at this address has the directory open, or why that cannot be known.
fn has_directory(address: SocketAddr, data_dir: &Path) -> Result<bool, String> {
    let ip = address.ip().to_canonical();
    let is_here = ip.is_loopback() || interfaces().iter().any(|interface| interface.address == ip);
    if !is_here {
        return Err("that is not an address of this machine".to_owned());
    }
    is_open(data_dir, &RealDisk).map_err(|error| format!("{:#}", anyhow!(error)))
}

/// Whether what was answered is so, by the directory itself.
fn check_directory(data_dir: &Path, wish: Wish) -> anyhow::Result<()> {
    let fence = durable_fence(data_dir, &RealDisk)
        .context("the relay says that it is done, but its data directory could not be read")?;
    if fence.is_some() == (wish == Wish::Fence) {
        return Ok(());
    }
    let (shown, is) = (data_dir.display(), if fence.is_some() { "is still fenced" } else { "is not fenced" });
    bail!("the relay says that it is done, but its data directory \"{shown}\" {is}")
}

/// The answer of the relay.
fn ask(address: SocketAddr, stream: TcpStream, config: &Config, wish: Wish) -> anyhow::Result<String> {
    let path = match wish {
        Wish::Fence => "/fence",
        Wish::Unfence => "/unfence",
    };
    let request =
        Request { method: "POST", path, token: config.admin.token.as_ref(), relay: Some(&config.relay.name) };
    let answer = request.send_over(stream).map_err(|error| could_not_ask(address, error))?;
    let text = answer.body.trim_end();
    match answer.status {
        200 if is_as_wished(text, wish) => Ok(text.to_owned()),
        200 => bail!("the answer of the relay at {address} to {path} is not understood: {text}"),
        409 => bail!("another relay than \"{}\" listens at {address}: {}", config.relay.name, why(text)),
        401 => bail!("the relay at {address} does not accept the token of admin.token_file"),
        403 => bail!("the relay at {address} does not let its fence be changed: {text}"),
        status => bail!("the relay at {address} answered with status {status}: {}", why(text)),
    }
}

fn could_not_ask(address: SocketAddr, error: anyhow::Error) -> anyhow::Error {
    error.context(format!("could not ask the relay at {address}"))
}

/// Whether the answer says that it is done.
fn is_as_wished(answer: &str, wish: Wish) -> bool {
    let told: Option<serde_json::Value> = serde_json::from_str(answer).ok();
    told.and_then(|told| told.get("fenced")?.as_bool()) == Some(wish == Wish::Fence)
}

/// Why it was not done, as the relay says it.
fn why(answer: &str) -> String {
    let told: Option<serde_json::Value> = serde_json::from_str(answer).ok();
    let why = told.as_ref().and_then(|told| told.get("error")?.as_str());
    why.unwrap_or(answer).to_owned()
}

/// Where no relay runs.
fn change_directory(config: &Config, options: &Options, wish: Wish) -> anyhow::Result<String> {
    let data_dir = &config.relay.data_dir;
    check_owner(data_dir)?;
    let since = PgTimestamp::from_system_time(SystemTime::now());
    let fence = (wish == Wish::Fence).then_some(Fence { since });
    let must_hold = match (config.relay.data_must_exist, options.empty) {
        (true, _) => MustHold::Wal,
        (false, false) => MustHold::WalOrFence,
        (false, true) => MustHold::Nothing,
    };
    let told = fence_directory(data_dir, &RealDisk, fence, must_hold).map_err(|error| match error {
        error @ StoreError::Locked { .. } => {
            anyhow!(error).context("the relay runs, but nobody listens on its admin.listen")
        }
        error @ StoreError::NoWal { .. } => {
            let advice = match must_hold {
                MustHold::Wal => "relay.data_must_exist is set",
                _ => "mount its disk, or add --empty if the relay has never run",
            };
            anyhow!("the relay does not run, and {error}: {advice}")
        }
        error => {
            anyhow!(error).context("the relay does not run, and its data directory could not be changed")
        }
    })?;
    let status = FenceStatus {
        fenced: told.fence.is_some(),
        since: told.fence.map(|fence| Timestamp(fence.since)),
        system_identifier: told.holds.map(|(system_id, _)| system_id.to_string()),
        timeline: told.holds.map(|(_, timeline)| timeline),
        // Where the WAL ends shows when the relay starts.
        flushed: None,
    };
    let mut value = serde_json::to_value(status)?;
    if let Some(fields) = value.as_object_mut() {
        fields.insert("running".to_owned(), false.into());
    }
    Ok(value.to_string())
}

/// Files that somebody else makes in the directory the relay could not read.
fn check_owner(data_dir: &Path) -> anyhow::Result<()> {
    let shown = data_dir.display();
    let owner = rustix::fs::stat(data_dir)
        .with_context(|| format!("the relay does not run, and there is no data directory \"{shown}\""))?
        .st_uid;
    let user = rustix::process::geteuid().as_raw();
    if owner != user {
        bail!(
            "the relay does not run, and data directory \"{shown}\" belongs to the user with ID {owner}: run this as that user"
        );
    }
    Ok(())
}

/// Where a listener that is bound to this is reached from the same machine.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// Time for the answer to arrive, beside what the relay may take to bring it about.
const ANSWER_TIME: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_every_address_is_reached_on_this_machine() {
        let reached = |text: &str| reachable(text.parse().unwrap()).to_string();
        assert_eq!(reached("0.0.0.0:9588"), "127.0.0.1:9588");
        assert_eq!(reached("[::]:9588"), "[::1]:9588");
        assert_eq!(reached("10.1.0.5:9588"), "10.1.0.5:9588");
    }
}
