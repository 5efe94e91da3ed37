//! Compressed links to relays behind this one: what they share.
//!
//! Owns which offers are accepted, the shared streams of live WAL, the cache of standalone frames, and the rates. WAL is
//! compressed once and the same bytes go to every link: live WAL is encoded at most once by each codec that is allowed, whatever
//! each link may have when, and what is caught up with as often as it is asked for after its frame was dropped. A link's own part is in [`sending`], and `walsender` drives it like any stream.

pub(super) mod bulk;
pub(super) mod fill;
pub(super) mod sending;
mod tail;

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;

use crate::config;
use crate::downstream::link::bulk::BulkFrames;
use crate::downstream::link::tail::Tail;
use crate::metrics::{LinkMetrics, LinkTraffic, TrafficSample};
use crate::protocol::frontend::{ReplicationMode, Startup};
use crate::protocol::link::offer::OFFER_PARAMETER;
use crate::protocol::link::{Codec, Compression, Offer};
use crate::session::link::{Bucket, EpochCause, Urgency};
use crate::status::{LinkStatus, LinksStatus};
use crate::wal::{Lsn, TimelineId};

/// What all links share.
pub struct Links {
    compressions: Vec<Compression>,
    adapt: bool,
    tails: Mutex<HashMap<TailKey, Weak<Tail>>>,
    bulk: BulkFrames,
    /// The last epoch that was begun.
    epochs: AtomicU32,
    /// Whether there is any limit; without one nobody looks at the rates.
    is_limited: AtomicBool,
    rates: Mutex<Rates>,
    metrics: LinkMetrics,
}

/// What links follow the same stream for. When each may have what is its own business: live WAL is encoded once by each codec,
/// and so at most twice.
type TailKey = (TimelineId, Codec);

struct Rates {
    link_rate_max: Option<NonZeroU64>,
    all: Bucket,
}

/// How fast links may send, in bytes a second; `None` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkRates {
    /// Each of them.
    pub link_rate_max: Option<NonZeroU64>,
    /// All together.
    pub links_rate_max: Option<NonZeroU64>,
}

/// An offer that was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AcceptedLink {
    /// How it is compressed.
    pub(super) compression: Compression,
    /// What is faster, and both can.
    fallback: Option<Compression>,
}

impl Links {
    /// No link is there yet.
    pub fn new(settings: &config::Links, metrics: LinkMetrics) -> Self {
        let config::Links { compressions, adapt, link_rate_max, links_rate_max } = settings;
        let all = Bucket::new(*links_rate_max, Instant::now());
        Self {
            compressions: compressions.clone(),
            adapt: *adapt,
            tails: Mutex::default(),
            bulk: BulkFrames::new(metrics.clone()),
            epochs: AtomicU32::new(0),
            is_limited: AtomicBool::new(link_rate_max.is_some() || links_rate_max.is_some()),
            rates: Mutex::new(Rates { link_rate_max: *link_rate_max, all }),
            metrics,
        }
    }

    /// Whether a client's offer is accepted, if it made one.
    pub(super) fn accept(&self, startup: &Startup, mode: ReplicationMode) -> Option<AcceptedLink> {
        let text = startup.parameter(OFFER_PARAMETER).filter(|_| mode == ReplicationMode::Physical)?;
        let chosen = Offer::parse(text).and_then(|offer| {
            let compression = offer.choose(&self.compressions)?;
            let is_faster = |other: &Compression| *other == Compression::Lz4 && *other != compression;
            let faster: Vec<_> = self.compressions.iter().copied().filter(is_faster).collect();
            Ok(AcceptedLink { compression, fallback: offer.choose(&faster).ok() })
        });
        match chosen {
            Ok(accepted) => Some(accepted),
            Err(declined) => {
                tracing::debug!(offer = ?text, %declined, "a compressed link is declined");
                None
            }
        }
    }

    /// How fast links may send.
    pub fn rates(&self) -> LinkRates {
        let rates = self.rates.lock();
        LinkRates { link_rate_max: rates.link_rate_max, links_rate_max: rates.all.rate() }
    }

    /// Changes how fast they may send, at once; returns what holds then. Whoever else changes them waits for `change`.
    pub fn change_rates(&self, change: impl FnOnce(&mut LinkRates)) -> LinkRates {
        let mut rates = self.rates.lock();
        let mut wanted = LinkRates { link_rate_max: rates.link_rate_max, links_rate_max: rates.all.rate() };
        change(&mut wanted);
        rates.link_rate_max = wanted.link_rate_max;
        rates.all.set_rate(wanted.links_rate_max, Instant::now());
        let is_limited = wanted.link_rate_max.is_some() || wanted.links_rate_max.is_some();
        self.is_limited.store(is_limited, Ordering::Relaxed);
        wanted
    }

    /// The rates as operators see them.
    pub fn status(&self) -> LinksStatus {
        let LinkRates { link_rate_max, links_rate_max } = self.rates();
        LinksStatus {
            link_rate_max: link_rate_max.map(NonZeroU64::get),
            links_rate_max: links_rate_max.map(NonZeroU64::get),
        }
    }

    /// Whether a message may be sent now by the link that owns the bucket; else when to ask again.
    fn check_rates(&self, own: &mut Bucket, urgency: Urgency, now: Instant) -> Result<(), Instant> {
        if !self.is_limited.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut rates = self.rates.lock();
        own.set_rate(rates.link_rate_max, now);
        own.check(urgency, now)?;
        rates.all.check(urgency, now)
    }

    fn spend(&self, own: &mut Bucket, bytes: u64, now: Instant) {
        if self.is_limited.load(Ordering::Relaxed) {
            own.spend(bytes, now);
            self.rates.lock().all.spend(bytes, now);
        }
    }

    /// The stream that links of this kind share; it begins at `end`, where a message may end, if there is none.
    fn tail(self: &Arc<Self>, timeline: TimelineId, compression: Compression, end: Lsn) -> Arc<Tail> {
        let key = (timeline, compression.codec());
        let mut tails = self.tails.lock();
        if let Some(tail) = tails.get(&key).and_then(Weak::upgrade) {
            return tail;
        }
        tails.retain(|_, tail| tail.strong_count() > 0);
        let tail = Arc::new(Tail::new(Arc::clone(self), compression, end));
        tails.insert(key, Arc::downgrade(&tail));
        tail
    }

    /// The number of a new epoch. A stream of 4 MiB each would have to run for years to use a number again, and then in vain:
    /// what follows is held to the positions, too.
    fn new_epoch(&self, cause: EpochCause) -> u32 {
        self.metrics.epochs.increment(1);
        if cause == EpochCause::Join {
            self.metrics.join_epochs.increment(1);
        }
        self.epochs.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }
}

/// What a link carries, as operators see it; absent where there is no link.
pub fn link_status(traffic: &LinkTraffic, now: Instant) -> Option<LinkStatus> {
    let TrafficSample { compression, encoding, wal_bytes, wire_bytes, wire_rate } = traffic.sample(now)?;
    #[allow(clippy::cast_precision_loss)] // shown, not computed with
    let ratio = (wire_bytes > 0).then(|| wal_bytes as f64 / wire_bytes as f64);
    Some(LinkStatus {
        codec: compression.to_string(),
        encoding: encoding.as_str(),
        wal_bytes,
        wire_bytes,
        ratio,
        wire_rate,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::AllMetrics;

    fn links(compressions: &[Compression]) -> Arc<Links> {
        let settings = config::Links {
            compressions: compressions.to_vec(),
            adapt: true,
            link_rate_max: None,
            links_rate_max: None,
        };
        Arc::new(Links::new(&settings, AllMetrics::default().link))
    }

    const ZSTD: Compression = Compression::Zstd { level: 3 };

    #[test]
    fn an_offer_is_accepted_for_wal_alone_and_as_far_as_it_is_allowed() {
        let accepted = |links: &Links, offer: &str, mode| {
            links.accept(&Startup::new([("user", "u"), (OFFER_PARAMETER, offer)]), mode)
        };
        let both = links(&[ZSTD, Compression::Lz4]);
        let physical = ReplicationMode::Physical;
        let full = AcceptedLink { compression: ZSTD, fallback: Some(Compression::Lz4) };
        assert_eq!(accepted(&both, "1;zstd,lz4", physical), Some(full));
        assert_eq!(accepted(&both, "1;zstd", physical), Some(AcceptedLink { fallback: None, ..full }));
        let lz4 = Some(AcceptedLink { compression: Compression::Lz4, fallback: None });
        assert_eq!(accepted(&both, "1;lz4,zstd", physical), lz4);
        assert_eq!(accepted(&links(&[Compression::Lz4]), "1;zstd,lz4", physical), lz4);
        assert_eq!(accepted(&links(&[]), "1;zstd,lz4", physical), None);
        assert_eq!(accepted(&both, "2;zstd", physical), None);
        assert_eq!(accepted(&both, "1;zstd;must!", physical), None);
        for mode in [ReplicationMode::Off, ReplicationMode::Database] {
            assert_eq!(accepted(&both, "1;zstd", mode), None);
        }
        assert_eq!(both.accept(&Startup::new([("user", "u")]), physical), None);
    }

    #[test]
    fn who_changes_one_rate_leaves_the_other_as_somebody_else_sets_it_meanwhile() {
        let links = links(&[ZSTD]);
        let (one, other) = (NonZeroU64::new(2_000), NonZeroU64::new(3_000));
        let (done, is_done) = std::sync::mpsc::sync_channel(1);
        std::thread::scope(|threads| {
            let links = &links;
            links.change_rates(|rates| {
                threads.spawn(move || {
                    links.change_rates(|rates| rates.links_rate_max = other);
                    done.send(()).unwrap();
                });
                // Long enough for somebody who does not wait.
                let waited = is_done.recv_timeout(std::time::Duration::from_millis(300));
                assert!(waited.is_err(), "both change the rates at once");
                rates.link_rate_max = one;
            });
        });
        assert_eq!(links.rates(), LinkRates { link_rate_max: one, links_rate_max: other });
    }

    #[test]
    fn links_of_one_kind_share_a_stream_as_long_as_there_is_one() {
        let (links, timeline) = (links(&[ZSTD]), TimelineId::FIRST);
        let first = links.tail(timeline, ZSTD, Lsn::MIN);
        assert!(Arc::ptr_eq(&first, &links.tail(timeline, ZSTD, Lsn::MIN)));
        let next = links.tail(TimelineId::new(2).unwrap(), ZSTD, Lsn::MIN);
        assert!(!Arc::ptr_eq(&first, &next));
        drop((first, next));
        let _other = links.tail(timeline, Compression::Lz4, Lsn::MIN);
        assert_eq!(links.tails.lock().len(), 1, "those without links are forgotten");
        let levels = (1..9).map(|level| Compression::Zstd { level });
        let _all: Vec<_> = levels.map(|level| links.tail(timeline, level, Lsn::MIN)).collect();
        assert_eq!(links.tails.lock().len(), 2, "no position has more encoders than there are codecs");
    }
}
