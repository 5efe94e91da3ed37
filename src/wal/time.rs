//! PostgreSQL's timestamps.
//!
//! Owns the conversion between microseconds since 2000-01-01 (on the wire and in records) and Unix time. Has no clock:
//! whoever knows the time passes it in.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Microseconds since 2000-01-01 00:00:00 UTC (`TimestampTz`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct PgTimestamp(pub i64);

impl PgTimestamp {
    /// The timestamp of a system time; saturates outside PostgreSQL's range.
    pub fn from_system_time(time: SystemTime) -> Self {
        let unix_micros = match time.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_micros()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_micros()).map_or(i64::MIN, i64::wrapping_neg),
        };
        Self(unix_micros.saturating_sub(POSTGRES_EPOCH_UNIX_SECONDS * 1_000_000))
    }

    /// The timestamp of a Unix time in seconds, as checkpoint records hold it (`pg_time_t`).
    pub fn from_unix_seconds(seconds: i64) -> Self {
        Self(seconds.saturating_sub(POSTGRES_EPOCH_UNIX_SECONDS).saturating_mul(1_000_000))
    }

    /// Microseconds since 1970-01-01.
    pub fn unix_micros(self) -> i64 {
        self.0.saturating_add(POSTGRES_EPOCH_UNIX_SECONDS * 1_000_000)
    }

    /// Time from `earlier` to `self`; zero when the clocks disagree about the order.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

/// 2000-01-01 00:00:00 UTC as Unix time.
const POSTGRES_EPOCH_UNIX_SECONDS: i64 = 946_684_800;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_differ_by_thirty_years() {
        let epoch = UNIX_EPOCH + Duration::from_secs(946_684_800);
        assert_eq!(PgTimestamp::from_system_time(epoch), PgTimestamp(0));
        assert_eq!(PgTimestamp::from_system_time(UNIX_EPOCH), PgTimestamp(-946_684_800_000_000));
        assert_eq!(PgTimestamp::from_unix_seconds(946_684_801), PgTimestamp(1_000_000));
        assert_eq!(PgTimestamp(5).since(PgTimestamp(9)), Duration::ZERO);
    }
}
