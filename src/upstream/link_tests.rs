//! A link that brings far more WAL than bytes.

use bytes::{Bytes, BytesMut};
use tokio::net::UnixStream;

use super::*;
use crate::net::Socket;
use crate::protocol::link::{
    BulkEncoder, Codec, Compression, Encoding, FrameHeader, FrameKind, Hello, Offer, Seed, WalChecksum,
};
use crate::store::Identity;
use crate::upstream::tests::upstream;
use crate::wal::builder::WalBuilder;
use crate::wal::scanner::ScanContext;
use crate::wal::{LsnRange, PgTimestamp, SystemId, TimelineId};

/// Segments that are all but empty, as `pg_switch_wal` leaves them.
const SEGMENTS: usize = 64;
const FRAME_BYTES: usize = 256 << 10;

/// The messages of a link that carries all of this WAL.
fn messages(wal: &WalBuilder, system_id: SystemId) -> BytesMut {
    let (mut out, mut payload, timeline) = (BytesMut::new(), Vec::new(), TimelineId::FIRST);
    Hello { system_id, timeline, history: None, encoding: Encoding::Zstd }.encode(&mut out);
    let (seed, mut encoder) =
        (Seed::new(system_id, None), BulkEncoder::new(Compression::Zstd { level: 1 }).unwrap());
    let mut at = wal.start();
    for piece in wal.bytes().chunks(FRAME_BYTES) {
        let encoding = encoder.encode(piece, &mut payload).unwrap();
        let range = LsnRange::new(at, at.advance(piece.len() as u64)).unwrap();
        let (kind, wal_end, sent_at) = (FrameKind::Standalone, Some(wal.end()), PgTimestamp(0));
        let header = FrameHeader { kind, encoding, timeline, range, wal_end, sent_at };
        let head = header.encode(&seed, WalChecksum::of([piece]), payload.len(), None);
        out.extend_from_slice(head.as_ref());
        out.extend_from_slice(&payload);
        at = range.end();
    }
    out
}

/// A stream of which this was read already.
fn opened(socket: UnixStream, already_read: Bytes, start: Lsn, terms: LinkTerms) -> Opened {
    let (socket, block) = (Socket::Unix(socket), BlockId(1));
    Opened {
        streaming: connect::Streaming { socket, already_read, block, start, held_end: start },
        host: "near".to_owned(),
        introduction: Introduction::default(),
        settings: ReceiverSettings { receiver_timeout: None, status_interval: STATUS_INTERVAL_MAX },
        lost: None,
        retained: None,
        link: Some(terms),
        link_due: None,
        is_slot_holding_back: false,
    }
}

fn context(upstream: &mut Upstream) -> StreamContext<'_> {
    StreamContext {
        writer: &mut upstream.writer,
        positions: upstream.positions.clone(),
        condition: upstream.condition.clone(),
        acknowledging: &mut upstream.acknowledging,
        feedbacks: None,
        durable: watch::Sender::default(),
        status: &upstream.status,
        metrics: &upstream.metrics,
        link_metrics: &upstream.link_metrics,
        link_traffic: &upstream.link_traffic,
        shutdown: CancellationToken::new(),
        leave: CancellationToken::new(),
    }
}

#[tokio::test]
async fn what_one_read_expands_to_is_taken_as_the_store_has_room() {
    let folder = tempfile::tempdir().unwrap();
    let mut upstream = upstream(folder.path());
    let mut wal = WalBuilder::small();
    for _ in 0..SEGMENTS {
        wal.noise(100);
        wal.switch();
    }
    let (ScanContext { segment_size, timeline, .. }, start) = (wal.context(), wal.start());
    let system_id = wal.context().system_id.unwrap();
    upstream.writer.initialize(Identity { system_id, segment_size }, timeline, start).unwrap();
    upstream.writer.begin(start).unwrap();
    let (store, mut positions) = (upstream.store.clone(), upstream.positions.clone());
    let read = messages(&wal, system_id).freeze();
    assert!(read.len() < 64 << 10, "{} bytes are more than one read", read.len());

    let (socket, _server) = UnixStream::pair().unwrap();
    let accepted = (Compression::Zstd { level: 1 }, Offer::of(&[Codec::Zstd]).unwrap());
    let terms = LinkTerms::new(accepted, system_id, timeline, &store).unwrap();
    let mut receiver = WalReceiver::new(context(&mut upstream), opened(socket, read, start, terms));
    let (mut turns, mut largest) = (0, 0);
    while receiver.has_unread || turns == 0 {
        assert_eq!(receiver.handle_items().unwrap(), None);
        turns += 1;
        largest = store.unwritten_bytes().max(largest);
        while !receiver.context.writer.has_room() {
            positions.changed().await.unwrap();
        }
    }
    assert_eq!(receiver.context.writer.received(), wal.end());
    // The limit, and the frame that reaches it.
    let most = (1 << 20) + FRAME_BYTES as u64 + (4 << 10);
    assert!(largest <= most, "{largest} bytes in memory, at most {most}");
    assert!(turns >= SEGMENTS, "{turns} turns");
    drop(receiver);
    store.shutdown();
}
