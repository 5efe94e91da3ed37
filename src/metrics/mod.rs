//! Every metric of the relay, one struct per part.
//!
//! Owns names, descriptions and the registry. A part gets its struct at start and keeps the handles: nothing is looked up
//! by name while WAL flows. Labels are closed sets; a position is a gauge in bytes from the beginning of the log, as
//! `pg_wal_lsn_diff(lsn, '0/0')` prints it.

mod link;
mod slots;
mod traffic;

use std::{sync::Arc, time::Duration};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Level, Metadata, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

pub use link::{Carried, LinkCounters, LinkMetrics};
pub use slots::{SLOT_SERIES_MAX, SlotSample, slot_lines};
pub use traffic::{LinkTraffic, RateMeter, TrafficSample};

/// The registry, and what the page at `/metrics` shows.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let builder = PrometheusBuilder::new();
        let sync_name = Matcher::Full("walrelay_store_sync_seconds".to_owned());
        let builder = match builder.set_buckets_for_metric(sync_name, &SYNC_SECONDS_BUCKETS) {
            Ok(builder) => builder,
            Err(_) => PrometheusBuilder::new(),
        };
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        Self { recorder, handle }
    }
}

impl Metrics {
    /// The text of `/metrics`, in Prometheus' exposition format.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds collected samples; without a regular call a histogram keeps every sample it was given.
    pub fn run_upkeep(&self) {
        self.handle.run_upkeep();
    }

    fn counter(&self, name: &'static str, description: &'static str) -> Counter {
        self.recorder.describe_counter(KeyName::from(name), None, SharedString::const_str(description));
        self.recorder.register_counter(&Key::from_static_name(name), &METADATA)
    }

    fn gauge(&self, name: &'static str, unit: Option<Unit>, description: &'static str) -> Gauge {
        self.recorder.describe_gauge(KeyName::from(name), unit, SharedString::const_str(description));
        self.recorder.register_gauge(&Key::from_static_name(name), &METADATA)
    }

    fn histogram(&self, name: &'static str, description: &'static str) -> Histogram {
        let unit = Some(Unit::Seconds);
        self.recorder.describe_histogram(KeyName::from(name), unit, SharedString::const_str(description));
        self.recorder.register_histogram(&Key::from_static_name(name), &METADATA)
    }
}

/// What the store did.
#[derive(Clone)]
pub struct StoreMetrics {
    /// End of the verified WAL.
    pub verified: Gauge,
    /// End of the WAL given to the operating system.
    pub written: Gauge,
    /// End of the WAL on stable storage.
    pub flushed: Gauge,
    /// End of the last sealed segment.
    pub sealed: Gauge,
    /// Time that one sync took.
    pub sync_seconds: Histogram,
    /// Bytes made durable.
    pub synced_bytes: Counter,
    /// WAL acknowledged upstream that no standby has flushed.
    pub only_copy_bytes: Gauge,
    /// How long the oldest of it has been acknowledged.
    pub only_copy_seconds: Gauge,
    /// Segments sealed.
    pub sealed_segments: Counter,
    /// Segments found damaged.
    pub suspect_segments: Counter,
    /// Segments that are damaged now.
    pub damaged_segments: Gauge,
    /// Damaged segments that were fetched again.
    pub repaired_segments: Counter,
    /// Segments that were read again, and were what was written.
    pub scrubbed_segments: Counter,
    /// Times that all complete segments were read again.
    pub scrub_rounds: Counter,
    /// Reads that the disk answered with an error.
    pub read_errors: Counter,
    /// 1 while no space can be had for new WAL.
    pub no_space: Gauge,
    /// 1 once a sync failed.
    pub failed: Gauge,
    /// Slots invalidated.
    pub invalidated_slots: Counter,
    /// Segments removed before their time, because the disk budget was used up.
    pub budget_segments: Counter,
}

impl StoreMetrics {
    /// Registers the store's metrics.
    pub fn register(metrics: &Metrics) -> Self {
        let bytes = Some(Unit::Bytes);
        Self {
            verified: metrics.gauge("walrelay_store_verified_bytes", bytes, "End of the verified WAL"),
            written: metrics.gauge(
                "walrelay_store_written_bytes",
                bytes,
                "End of the WAL given to the system",
            ),
            flushed: metrics.gauge("walrelay_store_flushed_bytes", bytes, "End of the WAL on stable storage"),
            sealed: metrics.gauge("walrelay_store_sealed_bytes", bytes, "End of the last sealed segment"),
            sync_seconds: metrics
                .histogram("walrelay_store_sync_seconds", "Duration of one sync of the store"),
            synced_bytes: metrics.counter("walrelay_store_synced_bytes_total", "WAL made durable, in bytes"),
            only_copy_bytes: metrics.gauge(
                "walrelay_only_copy_bytes",
                bytes,
                "WAL acknowledged upstream that no standby of the relay has flushed",
            ),
            only_copy_seconds: metrics.gauge(
                "walrelay_only_copy_seconds",
                Some(Unit::Seconds),
                "Time since the oldest of that WAL was acknowledged",
            ),
            sealed_segments: metrics.counter("walrelay_store_sealed_segments_total", "Segments sealed"),
            suspect_segments: metrics
                .counter("walrelay_store_suspect_segments_total", "Segments found damaged"),
            damaged_segments: metrics.gauge(
                "walrelay_store_damaged_segments",
                None,
                "Segments that are damaged or cannot be read, and are not repaired yet",
            ),
            repaired_segments: metrics
                .counter("walrelay_store_repaired_segments_total", "Damaged segments fetched again"),
            scrubbed_segments: metrics.counter(
                "walrelay_store_scrubbed_segments_total",
                "Segments read from the disk again and found to be what was written",
            ),
            scrub_rounds: metrics.counter(
                "walrelay_store_scrub_rounds_total",
                "Rounds in which each complete segment was read",
            ),
            read_errors: metrics
                .counter("walrelay_store_read_errors_total", "Reads of WAL that failed on the disk"),
            no_space: metrics.gauge("walrelay_store_no_space", None, "1 while no space can be had for WAL"),
            failed: metrics.gauge("walrelay_store_failed", None, "1 once the store has failed"),
            invalidated_slots: metrics
                .counter("walrelay_store_invalidated_slots_total", "Replication slots invalidated"),
            budget_segments: metrics.counter(
                "walrelay_store_budget_segments_total",
                "Segments that no slot needed, removed before their time for the disk budget",
            ),
        }
    }
}

/// What the upstream connection did.
#[derive(Clone)]
pub struct UpstreamMetrics {
    /// 1 while WAL is streamed.
    pub streaming: Gauge,
    /// Sessions that reached streaming.
    pub sessions: Counter,
    /// Attempts and sessions that ended with an error.
    pub errors: Counter,
    /// WAL bytes received, the overlap included.
    pub received_bytes: Counter,
    /// WAL bytes received that were held already and compared.
    pub overlap_bytes: Counter,
    /// 1 while WAL is acknowledged although the standbys that the policy asks for do not have it.
    pub acknowledge_degraded: Gauge,
    /// Bytes copied in user space on the way from the socket to the store: message headers and small messages.
    pub copied_bytes: Counter,
    /// Streams ended because a page or record did not verify.
    pub corrupt: Counter,
    /// Status updates sent.
    pub status_updates: Counter,
    /// End of the WAL that the upstream has sent or flushed, as it says.
    pub wal_end: Gauge,
    /// WAL that the upstream keeps for our slot, as far as it was told.
    pub slot_retained: Gauge,
    /// WAL that was acknowledged, has been lost here and is not fetched again yet.
    pub lost: Gauge,
    /// 1 while a person must look at the upstream connection.
    pub needs_attention: Gauge,
    /// 1 while the primary is expected to wait for this relay and does not, or does not say so.
    pub not_synchronous: Gauge,
    /// 1 while nothing is acknowledged because this has been the only copy for too long.
    pub acknowledge_held_back: Gauge,
    /// 1 while nothing may be received or acknowledged.
    pub fenced: Gauge,
}

impl UpstreamMetrics {
    /// Registers the upstream's metrics.
    pub fn register(metrics: &Metrics) -> Self {
        let bytes = Some(Unit::Bytes);
        Self {
            streaming: metrics.gauge("walrelay_upstream_streaming", None, "1 while WAL is streamed"),
            sessions: metrics.counter("walrelay_upstream_sessions_total", "Sessions that reached streaming"),
            errors: metrics.counter("walrelay_upstream_errors_total", "Sessions that ended with an error"),
            received_bytes: metrics
                .counter("walrelay_upstream_received_bytes_total", "WAL received, in bytes"),
            overlap_bytes: metrics.counter(
                "walrelay_upstream_overlap_bytes_total",
                "WAL compared with what was held, in bytes",
            ),
            acknowledge_degraded: metrics.gauge(
                "walrelay_upstream_acknowledge_degraded",
                None,
                "1 while WAL is acknowledged without the standbys that the policy asks for",
            ),
            copied_bytes: metrics
                .counter("walrelay_upstream_copied_bytes_total", "Bytes copied between socket and store"),
            corrupt: metrics
                .counter("walrelay_upstream_corrupt_total", "Streams ended by WAL that did not verify"),
            status_updates: metrics.counter("walrelay_upstream_status_updates_total", "Status updates sent"),
            wal_end: metrics.gauge("walrelay_upstream_wal_end_bytes", bytes, "End of WAL at the upstream"),
            slot_retained: metrics.gauge(
                "walrelay_upstream_slot_retained_bytes",
                bytes,
                "WAL kept by the upstream for the relay's slot, as last heard",
            ),
            lost: metrics.gauge(
                "walrelay_upstream_lost_bytes",
                bytes,
                "WAL acknowledged earlier, lost here and not fetched again yet",
            ),
            needs_attention: metrics.gauge(
                "walrelay_upstream_needs_attention",
                None,
                "1 while a person must look at the upstream connection",
            ),
            not_synchronous: metrics.gauge(
                "walrelay_upstream_not_synchronous",
                None,
                "1 while the primary is expected to wait for this relay and does not, or does not say so",
            ),
            acknowledge_held_back: metrics.gauge(
                "walrelay_upstream_acknowledge_held_back",
                None,
                "1 while nothing is acknowledged because this has been the only copy for too long",
            ),
            fenced: metrics.gauge(
                "walrelay_fenced",
                None,
                "1 while the relay is fenced: it receives and acknowledges nothing",
            ),
        }
    }
}

/// What goes to standbys.
#[derive(Clone)]
pub struct DownstreamMetrics {
    /// Connections accepted.
    pub connections: Counter,
    /// Connections refused before a command, for any reason.
    pub refused: Counter,
    /// Logins refused because the proof was wrong.
    pub failed_logins: Counter,
    /// Sessions that stream now.
    pub streaming: Gauge,
    /// WAL bytes sent.
    pub sent_bytes: Counter,
    /// WAL bytes sent that were read from files instead of memory.
    pub cold_bytes: Counter,
    /// WAL bytes copied in user space, for clients that take nothing.
    pub copied_bytes: Counter,
    /// Last second of the TLS certificate's validity, since 1970; 0 without TLS.
    pub certificate_expires_at: Gauge,
}

impl DownstreamMetrics {
    /// Registers the downstream's metrics.
    pub fn register(metrics: &Metrics) -> Self {
        Self {
            connections: metrics.counter("walrelay_downstream_connections_total", "Connections accepted"),
            refused: metrics.counter("walrelay_downstream_refused_total", "Connections refused"),
            failed_logins: metrics.counter(
                "walrelay_downstream_failed_logins_total",
                "Logins refused because the password or another proof was wrong",
            ),
            streaming: metrics.gauge("walrelay_downstream_streaming", None, "Sessions that stream"),
            sent_bytes: metrics.counter("walrelay_downstream_sent_bytes_total", "WAL sent, in bytes"),
            cold_bytes: metrics
                .counter("walrelay_downstream_cold_bytes_total", "WAL read from files, in bytes"),
            copied_bytes: metrics.counter(
                "walrelay_downstream_copied_bytes_total",
                "WAL copied for clients that take nothing, in bytes",
            ),
            certificate_expires_at: metrics.gauge(
                "walrelay_downstream_tls_certificate_expires_timestamp_seconds",
                None,
                "End of the TLS certificate's validity, in seconds since 1970",
            ),
        }
    }
}

/// What the process as a whole does.
#[derive(Clone)]
pub struct ProcessMetrics {
    /// Log lines that were dropped because nobody took them.
    pub log_lines_dropped: Gauge,
    /// 1 while files that were read again contain errors.
    pub reload_failed: Gauge,
}

impl ProcessMetrics {
    /// Registers the process's metrics.
    pub fn register(metrics: &Metrics) -> Self {
        let name = "walrelay_log_lines_dropped";
        Self {
            log_lines_dropped: metrics.gauge(name, None, "Log lines dropped since the start"),
            reload_failed: metrics.gauge(
                "walrelay_reload_failed",
                None,
                "1 while files that were read again contain errors, and what was read before holds",
            ),
        }
    }
}

/// Registers every part's metrics with one registry.
pub struct AllMetrics {
    /// The registry.
    pub registry: Arc<Metrics>,
    /// The store's.
    pub store: StoreMetrics,
    /// The upstream's.
    pub upstream: UpstreamMetrics,
    /// The downstream's.
    pub downstream: DownstreamMetrics,
    /// Those of links.
    pub link: LinkMetrics,
    /// The process's.
    pub process: ProcessMetrics,
}

impl Default for AllMetrics {
    fn default() -> Self {
        let registry = Arc::new(Metrics::default());
        Self {
            store: StoreMetrics::register(&registry),
            upstream: UpstreamMetrics::register(&registry),
            downstream: DownstreamMetrics::register(&registry),
            link: LinkMetrics::register(&registry),
            process: ProcessMetrics::register(&registry),
            registry,
        }
    }
}

/// A position as a gauge's value; exact up to 2^53 bytes.
#[allow(clippy::cast_precision_loss)] // a gauge is a double by Prometheus' format
pub fn position_value(position: crate::wal::Lsn) -> f64 {
    position.get() as f64
}

/// A number of bytes as a gauge's value; exact up to 2^53.
#[allow(clippy::cast_precision_loss)] // a gauge is a double by Prometheus' format
pub fn bytes_value(bytes: u64) -> f64 {
    bytes as f64
}

/// How often [`Metrics::run_upkeep`] is to be called.
pub const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

const METADATA: Metadata<'_> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

const SYNC_SECONDS_BUCKETS: [f64; 12] =
    [0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.1, 0.5, 2.0, 10.0];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_a_help_line_and_the_prefix() {
        let all = AllMetrics::default();
        all.store.sync_seconds.record(0.001);
        let text = all.registry.render();
        let names = |kind: &str| -> Vec<String> {
            let lines = text.lines().filter_map(|line| line.strip_prefix(kind));
            lines.filter_map(|rest| rest.split_whitespace().next()).map(str::to_owned).collect()
        };
        let (helped, typed) = (names("# HELP "), names("# TYPE "));
        assert_eq!(helped, typed);
        assert!(typed.len() >= 23, "{text}");
        assert!(typed.iter().all(|name| name.starts_with("walrelay_")), "{typed:?}");
        assert!(text.contains("walrelay_store_sync_seconds_bucket{le=\"0.0025\"} 1"), "{text}");
    }
}
