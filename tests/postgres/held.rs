//! The check after every crash: the relay, cut off from its primary, serves what it had acknowledged.

use std::path::Path;

use crate::support::compare::{primary_bytes, same_wal};
use crate::support::lsn_text;
use crate::support::raw::{Event, RawClient, identify_system};
use crate::support::relay::Relay;
use crate::support::wait::wait_at_most;

/// Whether the relay holds, in files without a gap, and serves, byte for byte, all from its first segment to `acknowledged`.
/// The primary must be out of the relay's reach, or a loss could be mended before it is seen.
pub(crate) fn check_held(
    relay: &mut Relay,
    primary_wal: &Path,
    segment_bytes: u64,
    acknowledged: u64,
) -> Result<(), String> {
    if acknowledged == 0 {
        return Ok(());
    }
    let serving = wait_at_most(std::time::Duration::from_secs(20), || {
        (!relay.is_running() || RawClient::replication(relay.port).is_ok()).then_some(())
    });
    if serving.is_none() || !relay.is_running() {
        return Err(format!("the relay does not serve after its restart:\n{}", relay.log()));
    }
    // Retention, which runs after a start as always, may take the first segments before they are asked for.
    for _ in 1..LOOKS_MAX {
        let first = same_wal(&relay.wal_dir(), primary_wal, segment_bytes, acknowledged)?;
        match serves(relay, primary_wal, segment_bytes, first..acknowledged) {
            Err(_) if relay.oldest() > first => {}
            outcome => return outcome,
        }
    }
    Err("the first segment held changes faster than it can be asked for".to_owned())
}

fn serves(
    relay: &Relay,
    primary_wal: &Path,
    segment_bytes: u64,
    wanted: std::ops::Range<u64>,
) -> Result<(), String> {
    let mut client =
        RawClient::replication(relay.port).map_err(|error| format!("the relay does not serve: {error}"))?;
    let (_, timeline, position) = identify_system(&mut client);
    if position < wanted.end {
        return Err(format!(
            "the relay offers {}, acknowledged was {}",
            lsn_text(position),
            lsn_text(wanted.end)
        ));
    }
    client.start_replication(None, wanted.start, timeline).map_err(|error| error.to_string())?;
    let mut served = wanted.start;
    while served < wanted.end {
        match client.next_event(std::time::Duration::from_secs(10)) {
            Event::Wal { start, bytes, .. } => {
                let end = start + bytes.len() as u64;
                if start != served || bytes != primary_bytes(primary_wal, segment_bytes, start, end) {
                    return Err(format!("served other bytes in {}..{}", lsn_text(start), lsn_text(end)));
                }
                served = end;
            }
            Event::Keepalive { .. } => {}
            other => return Err(format!("the stream ended at {}: {other:?}", lsn_text(served))),
        }
    }
    Ok(())
}

/// Looks at a store whose retention is at work.
const LOOKS_MAX: u32 = 10;
