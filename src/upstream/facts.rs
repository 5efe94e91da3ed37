//! What a server says of itself.
//!
//! Owns the settings that are asked for, for our own use or because clients will ask us, and how they are read.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::protocol::instances;
use crate::store::ServerFacts;
use crate::upstream::UpstreamError;
use crate::upstream::dialog::Dialog;
use crate::wal::PAGE_BYTES;

/// What our own clients will ask of us while this server may be away.
pub(super) async fn server_facts(dialog: &mut Dialog) -> Result<ServerFacts, UpstreamError> {
    let version_num = dialog.show("server_version_num").await?;
    let version_num = version_num.parse().map_err(|_| UpstreamError::InvalidAnswer {
        command: "SHOW server_version_num",
        field: "value",
        value: version_num,
    })?;
    let mut settings: BTreeMap<String, String> = dialog.introduction.parameters.clone();
    // That is about those before us, and changes.
    settings.remove(instances::PARAMETER);
    for name in MIRRORED_SETTINGS {
        settings.insert((*name).to_owned(), dialog.show(name).await?);
    }
    let version = settings.get("server_version").cloned().unwrap_or_default();
    Ok(ServerFacts { version, version_num, settings })
}

/// Every check of WAL is by its pages; a server can be built with others, and nothing else tells before WAL flows.
pub(super) fn check_page_size(facts: &ServerFacts) -> Result<(), UpstreamError> {
    let got = facts.settings.get("wal_block_size").cloned().unwrap_or_default();
    if got == PAGE_BYTES.to_string() { Ok(()) } else { Err(UpstreamError::WrongPageSize { got }) }
}

/// `SHOW wal_sender_timeout` prints a number with a unit, or 0.
pub(super) fn parse_milliseconds(text: &str) -> Option<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (count, unit) = text.split_at_checked(split)?;
    let count: u64 = count.parse().ok()?;
    let milliseconds = match unit {
        "" | "ms" => 1,
        "s" => 1000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    (count > 0).then(|| Duration::from_millis(count.saturating_mul(milliseconds)))
}

/// Settings of the upstream that clients ask of the relay.
const MIRRORED_SETTINGS: &[&str] =
    &["data_directory_mode", "wal_segment_size", "wal_block_size", "wal_level"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_the_server_shows_them() {
        assert_eq!(parse_milliseconds("1min"), Some(Duration::from_secs(60)));
        assert_eq!(parse_milliseconds("2500ms"), Some(Duration::from_millis(2500)));
        assert_eq!(parse_milliseconds("3s"), Some(Duration::from_secs(3)));
        for text in ["0", "", "5 parsecs", "-1"] {
            assert_eq!(parse_milliseconds(text), None, "{text}");
        }
    }
}
