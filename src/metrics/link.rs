//! What is counted of links between relays.

use metrics::{Counter, Gauge};

use crate::metrics::Metrics;
use crate::protocol::link::Encoding;

/// What links carry, both ways.
#[derive(Clone)]
pub struct LinkMetrics {
    /// From the relay before this one.
    pub received: LinkCounters,
    /// To the relays behind it.
    pub sent: LinkCounters,
    /// Times that something wrong came over the link from the relay before this one.
    pub errors: Counter,
    /// Epochs of shared streams that were begun.
    pub epochs: Counter,
    /// Those of them that were begun because a link joined.
    pub join_epochs: Counter,
    /// Standalone frames that were compressed.
    pub compressed_frames: Counter,
    /// Standalone frames that were sent and had been compressed for another link.
    pub shared_frames: Counter,
    /// Frames of shared streams that were made, each for all links.
    pub encoded_stream_frames: Counter,
    /// WAL in frames that were made; by several codecs, or again: as often.
    pub encoded_wal_bytes: Counter,
    /// Links that send by zstd now.
    pub zstd: Gauge,
    /// Links that send by LZ4 now.
    pub lz4: Gauge,
    /// Links that send uncompressed now.
    pub uncompressed: Gauge,
    /// Time for which links had to wait for their turn, in microseconds.
    pub paced_microseconds: Counter,
}

/// What links carry in one direction.
#[derive(Clone)]
pub struct LinkCounters {
    /// WAL.
    pub wal_bytes: Counter,
    /// What it took to carry it.
    pub wire_bytes: Counter,
    /// Frames that stand alone.
    pub bulk_frames: Counter,
    /// Frames that are part of a stream.
    pub stream_frames: Counter,
    /// Messages of WAL that is not in a frame.
    pub plain_messages: Counter,
}

/// How WAL came, or went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carried {
    /// In a frame that stands alone.
    Bulk,
    /// In a frame that is part of a stream.
    Stream,
    /// In a plain message.
    Plain,
}

impl LinkCounters {
    /// Registers those of one direction, under these names in the order of the fields.
    fn register(metrics: &Metrics, names: [&'static str; 5]) -> Self {
        let [wal_bytes, wire_bytes, bulk_frames, stream_frames, plain_messages] = names;
        Self {
            wal_bytes: metrics.counter(wal_bytes, "WAL carried by compressed links, in bytes"),
            wire_bytes: metrics.counter(wire_bytes, "Bytes that this WAL had on the way"),
            bulk_frames: metrics.counter(bulk_frames, "Frames that stand alone"),
            stream_frames: metrics.counter(stream_frames, "Frames that are part of a stream"),
            plain_messages: metrics.counter(plain_messages, "Uncompressed messages of WAL over links"),
        }
    }

    /// A message went or came.
    pub fn note(&self, carried: Carried, wal_bytes: u64, wire_bytes: u64) {
        self.wal_bytes.increment(wal_bytes);
        self.wire_bytes.increment(wire_bytes);
        match carried {
            Carried::Bulk => self.bulk_frames.increment(1),
            Carried::Stream => self.stream_frames.increment(1),
            Carried::Plain => self.plain_messages.increment(1),
        }
    }
}

impl LinkMetrics {
    /// Registers the metrics of links.
    pub fn register(metrics: &Metrics) -> Self {
        Self {
            received: LinkCounters::register(
                metrics,
                [
                    "walrelay_link_received_wal_bytes_total",
                    "walrelay_link_received_wire_bytes_total",
                    "walrelay_link_received_bulk_frames_total",
                    "walrelay_link_received_stream_frames_total",
                    "walrelay_link_received_plain_messages_total",
                ],
            ),
            sent: LinkCounters::register(
                metrics,
                [
                    "walrelay_link_sent_wal_bytes_total",
                    "walrelay_link_sent_wire_bytes_total",
                    "walrelay_link_sent_bulk_frames_total",
                    "walrelay_link_sent_stream_frames_total",
                    "walrelay_link_sent_plain_messages_total",
                ],
            ),
            errors: metrics.counter(
                "walrelay_link_errors_total",
                "Times that the link from the relay before this one brought something wrong",
            ),
            epochs: metrics.counter("walrelay_link_epochs_total", "Epochs of shared streams begun"),
            join_epochs: metrics
                .counter("walrelay_link_join_epochs_total", "Epochs begun because a link joined the stream"),
            compressed_frames: metrics
                .counter("walrelay_link_compressed_frames_total", "Standalone frames compressed"),
            shared_frames: metrics.counter(
                "walrelay_link_shared_frames_total",
                "Standalone frames sent that had been compressed for another link",
            ),
            encoded_stream_frames: metrics.counter(
                "walrelay_link_encoded_stream_frames_total",
                "Frames of shared streams made, each for all links",
            ),
            encoded_wal_bytes: metrics.counter(
                "walrelay_link_encoded_wal_bytes_total",
                "WAL in frames that were made, however many links they went to, in bytes",
            ),
            zstd: metrics.gauge("walrelay_link_zstd", None, "Links that send by zstd"),
            lz4: metrics.gauge("walrelay_link_lz4", None, "Links that send by LZ4"),
            uncompressed: metrics.gauge("walrelay_link_uncompressed", None, "Links that send uncompressed"),
            paced_microseconds: metrics.counter(
                "walrelay_link_paced_microseconds_total",
                "Time for which links waited because of a configured rate, in microseconds",
            ),
        }
    }

    /// The number of links that send so.
    pub fn sending_by(&self, encoding: Encoding) -> &Gauge {
        match encoding {
            Encoding::Plain => &self.uncompressed,
            Encoding::Zstd => &self.zstd,
            Encoding::Lz4 => &self.lz4,
        }
    }
}
