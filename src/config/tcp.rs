//! What is asked of the kernel for TCP connections.
//!
//! Owns the keys and their bounds; names and meaning are PostgreSQL's. Sizes of buffers are not among them: what is set here
//! the kernel tunes no longer, and by itself it goes further (`tcp_wmem`, `tcp_rmem`) than it lets be set (`wmem_max`,
//! `rmem_max`). Sets nothing itself.

use std::{ops::RangeInclusive, time::Duration};

use crate::config::{check, error::Problem, raw::Quantity, raw::RawDownstream};

/// Options of clients' TCP connections; `None` is the system's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientTcp {
    /// Silence before the first keepalive probe.
    pub keepalives_idle: Option<Duration>,
    /// Time between probes.
    pub keepalives_interval: Option<Duration>,
    /// Unanswered probes after which a connection is given up.
    pub keepalives_count: Option<u32>,
    /// Longest time that sent data may stay unacknowledged.
    pub user_timeout: Option<Duration>,
}

pub(super) fn of_clients(raw: &RawDownstream) -> Result<ClientTcp, Problem> {
    let count: u32 = check::number("downstream.tcp_keepalives_count", raw.tcp_keepalives_count, PROBES)?;
    Ok(ClientTcp {
        keepalives_idle: probe_time("downstream.tcp_keepalives_idle", &raw.tcp_keepalives_idle)?,
        keepalives_interval: probe_time("downstream.tcp_keepalives_interval", &raw.tcp_keepalives_interval)?,
        keepalives_count: Some(count).filter(|count| *count > 0),
        user_timeout: check::timeout("downstream.tcp_user_timeout", &raw.tcp_user_timeout)?,
    })
}

/// The kernel counts in seconds.
fn probe_time(key: &'static str, raw: &Quantity) -> Result<Option<Duration>, Problem> {
    let time = check::span(key, raw, Duration::ZERO..=PROBE_TIME_MAX)?;
    if time.subsec_nanos() != 0 {
        return Err(Problem::invalid(key, &raw.0, "expected whole seconds, or 0 for the system's choice"));
    }
    Ok(Some(time).filter(|time| !time.is_zero()))
}

/// What Linux takes (`MAX_TCP_KEEPIDLE` and `MAX_TCP_KEEPINTVL`).
const PROBE_TIME_MAX: Duration = Duration::from_secs(32_767);
/// The same (`MAX_TCP_KEEPCNT`).
const PROBES: RangeInclusive<i64> = 0..=127;
