//! `walrelay fence` and `walrelay unfence`.
//!
//! Owns the words and the way: a relay that runs is asked over HTTP, with the token of its configuration; where none runs,
//! the fence is set in its data directory, under the lock that keeps a relay from starting meanwhile. Success means that it is
//! durable, and nothing else does.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow, bail};

use crate::cli::http::{self, Request};
use crate::config::Config;
use crate::status::{FenceStatus, Timestamp};
use crate::store::{Fence, MustHold, RealDisk, StoreError, fence_directory};
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
        Some(address) => ask(reachable(address), &config, wish)?,
        None => None,
    };
    let told = match running {
        Some(told) => told,
        None => change_directory(&config, options, wish)?,
    };
    writeln!(std::io::stdout(), "{told}")?;
    Ok(())
}

/// The answer of the relay; `None` when nobody listens there.
fn ask(address: SocketAddr, config: &Config, wish: Wish) -> anyhow::Result<Option<String>> {
    let path = match wish {
        Wish::Fence => "/fence",
        Wish::Unfence => "/unfence",
    };
    let request =
        Request { method: "POST", path, token: config.admin.token.as_ref(), relay: Some(&config.relay.name) };
    let answer = match request.send(address, FENCE_TIME_MAX + ANSWER_TIME) {
        Ok(answer) => answer,
        Err(error) if http::is_refused(&error) => return Ok(None),
        Err(error) => return Err(error.context(format!("could not ask the relay at {address}"))),
    };
    let text = answer.body.trim_end();
    match answer.status {
        200 => Ok(Some(text.to_owned())),
        409 => bail!("another relay than \"{}\" listens at {address}: {}", config.relay.name, why(text)),
        401 => bail!("the relay at {address} does not accept the token of admin.token_file"),
        403 => bail!("the relay at {address} was started without a token: {text}"),
        status => bail!("the relay at {address} answered with status {status}: {}", why(text)),
    }
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
