//! The stream of frames that the live links of one kind share.
//!
//! Owns which frames there are, where their epochs begin, and what a link sends next: a frame that is there, standalone
//! frames until it can follow, a new frame that it makes for all, or nothing. A link can begin to follow where an epoch
//! begins. One that comes to the end of the stream without that gets a new epoch soon: at once when nobody else would
//! compress worse for it, and else not too often. Until then it goes on with standalone frames.
//!
//! Frames end only where messages may end, because each begins where another ended or where all that could be sent had been
//! looked at.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::session::cut::message_end;
use crate::session::link::{BULK_FRAME_BYTES, LIVE_LAG_MAX};
use crate::wal::{Lsn, LsnRange};

/// The newest frames of a stream; `F` is what they are made of.
#[derive(Debug)]
pub struct Ring<F> {
    frames: VecDeque<Entry<F>>,
    /// Number of the first of `frames`, among all that there ever were.
    first: u64,
    /// Where the next frame begins.
    end: Lsn,
    /// WAL in `frames`.
    wal_bytes: u64,
    epoch: Option<Epoch>,
    /// Why the next frame begins an epoch.
    restart_due: Option<EpochCause>,
    /// Somebody makes a frame now, which is of use only if this is the same then.
    generation: u64,
}

#[derive(Debug)]
struct Entry<F> {
    epoch: u32,
    sequence: u32,
    range: LsnRange,
    frame: F,
}

/// The epoch that goes on.
#[derive(Clone, Copy, Debug)]
struct Epoch {
    number: u32,
    next_sequence: u32,
    wal_bytes: u64,
    begun_at: Instant,
}

/// Where a link is in the stream that it follows: it has sent every frame of the epoch before this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(u64);

/// A frame that is being made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// Its epoch.
    pub epoch: u32,
    /// Its number there; 0: the encoder begins anew.
    pub sequence: u32,
    /// Its WAL.
    pub range: LsnRange,
    generation: u64,
}

/// Why an epoch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EpochCause {
    /// There is nothing to go on with.
    Anew,
    /// The one before is as long as one may be.
    Length,
    /// A link wants to follow.
    Join,
}

/// What a link does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<F> {
    /// It sends this frame.
    Frame {
        /// The frame's epoch.
        epoch: u32,
        /// Its number there.
        sequence: u32,
        /// Its WAL.
        range: LsnRange,
        /// The frame.
        frame: F,
        /// Where the link is then.
        place: Place,
    },
    /// It sends WAL up to here in frames that stand alone.
    Bulk {
        /// Where it may be able to follow.
        until: Lsn,
    },
    /// It makes the next frame, unless somebody does already.
    Encode,
    /// It waits until more may be sent.
    Wait,
}

/// A link, as the stream sees it.
#[derive(Clone, Copy, Debug)]
pub struct Follower {
    /// Where it is in the stream; `None` while it does not follow.
    pub place: Option<Place>,
    /// What it has sent.
    pub sent: Lsn,
    /// What it may send.
    pub limit: Lsn,
}

/// Where a link's next bytes are in the stream.
enum Found {
    Frame(usize),
    /// Not there: an epoch, or the end of the stream, is behind them.
    Before(Lsn),
    /// At the end, as one that follows.
    AtEnd,
    /// At the end, as one that does not.
    Joining,
    /// Beyond the end.
    Beyond,
}

impl<F: Clone> Ring<F> {
    /// A stream that begins at `end`, where a message may end.
    pub fn new(end: Lsn) -> Self {
        Self {
            frames: VecDeque::new(),
            first: 0,
            end,
            wal_bytes: 0,
            epoch: None,
            restart_due: Some(EpochCause::Anew),
            generation: 0,
        }
    }

    /// What `link` does next. `others` tells whether other links follow the stream.
    pub fn step(&mut self, link: Follower, others: bool, now: Instant) -> Step<F> {
        let found = self.find(link);
        if let Found::Frame(index) = found {
            return self.frame(index, link.limit);
        }
        let is_stale = link.limit.bytes_since(self.end) > LIVE_LAG_MAX;
        if is_stale && !matches!(found, Found::Before(_)) {
            // Nobody needed it for so long that it is better begun anew than caught up with.
            self.begin_at(link.limit);
            return Step::Bulk { until: link.limit };
        }
        match found {
            Found::Before(until) => {
                // Others may be faster to look every time: it is waited for at the end.
                if until == self.end && until.bytes_since(link.sent) <= BULK_FRAME_BYTES {
                    self.join(others, now);
                }
                Step::Bulk { until: until.min(link.limit) }
            }
            Found::Joining => {
                self.join(others, now);
                self.encode_up_to(link.limit)
            }
            Found::Frame(_) | Found::AtEnd | Found::Beyond => self.encode_up_to(link.limit),
        }
    }

    /// Begins the next frame, with WAL up to `limit` at most. Only one may be in the making. `new_epoch` is asked for a number
    /// when an epoch begins.
    pub fn begin(
        &mut self,
        limit: Lsn,
        now: Instant,
        new_epoch: impl FnOnce(EpochCause) -> u32,
    ) -> Option<Begun> {
        let end = message_end(self.end, limit, STREAM_FRAME_BYTES_MAX)?;
        let range = LsnRange::new(self.end, end)?;
        let goes_on = self.epoch.filter(|epoch| epoch.wal_bytes < EPOCH_BYTES_MAX);
        let cause = self.restart_due.take().or_else(|| goes_on.is_none().then_some(EpochCause::Length));
        let begins = cause.map(|cause| {
            let number = new_epoch(cause);
            Epoch { number, next_sequence: 0, wal_bytes: 0, begun_at: now }
        });
        let epoch = begins.or(goes_on)?;
        self.epoch = Some(epoch);
        let (number, sequence) = (epoch.number, epoch.next_sequence);
        Some(Begun { epoch: number, sequence, range, generation: self.generation })
    }

    /// The frame is made: it can be sent by all, if the stream has not been begun anew meanwhile.
    pub fn push(&mut self, begun: Begun, frame: F) {
        if begun.generation != self.generation {
            return;
        }
        let Begun { epoch, sequence, range, .. } = begun;
        if let Some(epoch) = &mut self.epoch {
            epoch.next_sequence += 1;
            epoch.wal_bytes += range.bytes();
        }
        self.end = range.end();
        self.wal_bytes += range.bytes();
        self.frames.push_back(Entry { epoch, sequence, range, frame });
        while self.wal_bytes > RING_WAL_BYTES_MAX || self.frames.len() > RING_FRAMES_MAX {
            let Some(oldest) = self.frames.pop_front() else { break };
            self.wal_bytes -= oldest.range.bytes();
            self.first += 1;
        }
    }

    /// The frame could not be made: what the encoder knows is of no use any more.
    pub fn fail(&mut self) {
        self.restart_due = Some(EpochCause::Anew);
    }

    /// End of the newest frame.
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// WAL that is in frames.
    pub fn wal_bytes(&self) -> u64 {
        self.wal_bytes
    }

    fn find(&self, link: Follower) -> Found {
        let Follower { place, sent, .. } = link;
        if let Some(index) = place.and_then(|place| place.0.checked_sub(self.first))
            && let Ok(index) = usize::try_from(index)
        {
            match self.frames.get(index) {
                Some(entry) if entry.range.start() == sent => return Found::Frame(index),
                None if index == self.frames.len() && sent == self.end => return Found::AtEnd,
                _ => {}
            }
        }
        let from = self.frames.partition_point(|entry| entry.range.start() < sent);
        let epoch = self.frames.iter().enumerate().skip(from).find(|(_, entry)| entry.sequence == 0);
        match epoch {
            Some((index, entry)) if entry.range.start() == sent => Found::Frame(index),
            Some((_, entry)) => Found::Before(entry.range.start()),
            None if sent < self.end => Found::Before(self.end),
            None if sent == self.end => Found::Joining,
            None => Found::Beyond,
        }
    }

    fn frame(&self, index: usize, limit: Lsn) -> Step<F> {
        // What others may send already, this one may in a moment.
        let Some(entry) = self.frames.get(index).filter(|entry| entry.range.end() <= limit) else {
            return Step::Wait;
        };
        let Entry { epoch, sequence, range, ref frame } = *entry;
        let place = Place(self.first + index as u64 + 1);
        Step::Frame { epoch, sequence, range, frame: frame.clone(), place }
    }

    fn encode_up_to(&self, limit: Lsn) -> Step<F> {
        if limit > self.end { Step::Encode } else { Step::Wait }
    }

    /// A link has come to the end, or nearly, and would follow if an epoch began here.
    fn join(&mut self, others: bool, now: Instant) {
        let Some(epoch) = self.epoch else { return };
        let is_long = epoch.wal_bytes >= JOIN_EPOCH_BYTES_MIN;
        let is_old = now.saturating_duration_since(epoch.begun_at) >= JOIN_INTERVAL_MIN;
        if !others || is_long || is_old {
            self.restart_due.get_or_insert(EpochCause::Join);
        }
    }

    /// Forgets all frames; the stream goes on with an epoch that begins here.
    fn begin_at(&mut self, end: Lsn) {
        // Nobody's place is in what follows.
        self.first += self.frames.len() as u64 + 1;
        self.frames.clear();
        self.wal_bytes = 0;
        self.end = end;
        self.restart_due = Some(EpochCause::Anew);
        self.generation += 1;
    }
}

/// WAL in a frame of the stream at most.
pub const STREAM_FRAME_BYTES_MAX: u64 = 128 << 10;

/// WAL after which an epoch ends: so much is sent again at most to a link that lost its place, and no window is longer.
pub const EPOCH_BYTES_MAX: u64 = 4 << 20;

/// WAL in frames that are kept: two epochs, so that there is nearly always one to begin with.
pub const RING_WAL_BYTES_MAX: u64 = 8 << 20;

/// Frames that are kept, however small.
pub const RING_FRAMES_MAX: usize = 16 << 10;

/// An epoch has so much WAL, or is so old, before another begins only because a link wants to follow: each costs the
/// others some of their ratio, and a link may come and go without end.
pub const JOIN_EPOCH_BYTES_MIN: u64 = 256 << 10;

/// See [`JOIN_EPOCH_BYTES_MIN`].
pub const JOIN_INTERVAL_MIN: Duration = Duration::from_secs(10);

const _: () = assert!(EPOCH_BYTES_MAX * 2 <= RING_WAL_BYTES_MAX && LIVE_LAG_MAX <= EPOCH_BYTES_MAX);

#[cfg(test)]
mod tests {
    use super::*;

    fn at(raw: u64) -> Lsn {
        Lsn::new(raw).unwrap()
    }

    /// A ring whose frames are their WAL's range, and which counts its epochs.
    struct Stream {
        ring: Ring<LsnRange>,
        epochs: u32,
        causes: Vec<EpochCause>,
        now: Instant,
    }

    impl Stream {
        fn new(end: u64) -> Self {
            Self { ring: Ring::new(at(end)), epochs: 0, causes: Vec::new(), now: Instant::now() }
        }

        fn encode(&mut self, limit: u64) {
            let epochs = &mut self.epochs;
            let new_epoch = |cause| {
                self.causes.push(cause);
                *epochs += 1;
                *epochs
            };
            let begun = self.ring.begin(at(limit), self.now, new_epoch).unwrap();
            self.ring.push(begun, begun.range);
        }

        fn step(&mut self, place: Option<Place>, sent: u64, limit: u64, others: bool) -> Step<LsnRange> {
            let link = Follower { place, sent: at(sent), limit: at(limit) };
            self.ring.step(link, others, self.now)
        }
    }

    const START: u64 = 0x100_0000;

    #[test]
    fn a_link_alone_makes_each_frame_and_sends_it() {
        let mut stream = Stream::new(START);
        assert_eq!(stream.step(None, START, START, false), Step::Wait);
        let (mut place, mut sent) = (None, START);
        for number in 0..5 {
            let limit = sent + 100;
            assert_eq!(stream.step(place, sent, limit, false), Step::Encode);
            stream.encode(limit);
            let Step::Frame { epoch: 1, sequence, range, place: next, .. } =
                stream.step(place, sent, limit, false)
            else {
                panic!("no frame")
            };
            assert_eq!((sequence, range.end()), (number, at(limit)));
            (place, sent) = (Some(next), limit);
        }
        assert_eq!(stream.step(place, sent, sent, false), Step::Wait);
        assert_eq!(stream.epochs, 1);
    }

    #[test]
    fn a_link_that_comes_later_catches_up_to_where_an_epoch_begins() {
        let mut stream = Stream::new(START);
        stream.encode(START + 1000);
        stream.encode(START + 2000);
        let limit = START + 2000;
        assert_eq!(stream.step(None, START - 5000, limit, true), Step::Bulk { until: at(START) });
        assert!(matches!(stream.step(None, START, limit, true), Step::Frame { sequence: 0, .. }));
        // Behind the beginning of the only epoch: up to the end of the stream.
        assert_eq!(stream.step(None, START + 500, limit, true), Step::Bulk { until: at(limit) });
        assert_eq!(stream.step(None, START + 1000, limit, true), Step::Bulk { until: at(limit) });
    }

    #[test]
    fn a_link_that_joins_gets_an_epoch_at_once_only_where_that_harms_nobody() {
        let mut stream = Stream::new(START);
        stream.encode(START + 1000);
        let (sent, limit) = (START + 1000, START + 1100);
        assert_eq!(stream.step(None, sent, limit, true), Step::Encode);
        stream.encode(limit);
        assert_eq!(stream.epochs, 1, "another link follows");
        assert_eq!(stream.step(None, sent, limit, true), Step::Bulk { until: at(limit) });
        let (sent, limit) = (limit, limit + 100);
        assert_eq!(stream.step(None, sent, limit, false), Step::Encode);
        stream.encode(limit);
        assert_eq!(stream.epochs, 2, "nobody else does");
        assert!(matches!(stream.step(None, sent, limit, true), Step::Frame { epoch: 2, sequence: 0, .. }));

        stream.now += JOIN_INTERVAL_MIN;
        assert_eq!(stream.step(None, limit, limit + 8, true), Step::Encode);
        stream.encode(limit + 8);
        assert_eq!(stream.epochs, 3, "the last one was long ago");
        assert_eq!(stream.causes, [EpochCause::Anew, EpochCause::Join, EpochCause::Join]);
    }

    #[test]
    fn a_link_that_is_never_first_to_look_can_follow_all_the_same() {
        let mut stream = Stream::new(START);
        let mut limit = START;
        // Long enough that an epoch may begin for it.
        while limit < START + JOIN_EPOCH_BYTES_MIN {
            limit += 1000;
            stream.encode(limit);
        }
        assert_eq!(stream.step(None, limit - 1000, limit, true), Step::Bulk { until: at(limit) });
        stream.encode(limit + 1000);
        assert_eq!(stream.epochs, 2);
        assert!(matches!(stream.step(None, limit, limit + 1000, true), Step::Frame { sequence: 0, .. }));
        // One that is far behind does not want it yet.
        let far = limit + 1000 + JOIN_EPOCH_BYTES_MIN + BULK_FRAME_BYTES;
        (limit + 2000..=far).step_by(1000).for_each(|end| stream.encode(end));
        let end = stream.ring.end().get();
        assert_eq!(stream.step(None, limit + 1000, end, true), Step::Bulk { until: at(end) });
        stream.encode(end + 8);
        assert_eq!(stream.epochs, 2);
    }

    #[test]
    fn an_epoch_ends_when_it_is_long_and_the_ring_keeps_two() {
        let mut stream = Stream::new(START);
        let mut limit = START;
        for _ in 0..200 {
            limit += STREAM_FRAME_BYTES_MAX;
            stream.encode(limit);
        }
        assert_eq!(u64::from(stream.epochs), 200 * STREAM_FRAME_BYTES_MAX / EPOCH_BYTES_MAX + 1);
        assert!(stream.causes[1..].iter().all(|cause| *cause == EpochCause::Length));
        assert!(stream.ring.wal_bytes() <= RING_WAL_BYTES_MAX);
        let mut small = Stream::new(START);
        (1..RING_FRAMES_MAX as u64 + 100).for_each(|number| small.encode(START + number * 8));
        assert_eq!(small.ring.frames.len(), RING_FRAMES_MAX);
    }

    #[test]
    fn a_link_that_falls_out_of_the_ring_catches_up_again() {
        let mut stream = Stream::new(START);
        stream.encode(START + 1000);
        let Step::Frame { place, .. } = stream.step(None, START, START + 1000, false) else { panic!() };
        let mut limit = START + 1000;
        for _ in 0..100 {
            limit += STREAM_FRAME_BYTES_MAX;
            stream.encode(limit);
        }
        let Step::Bulk { until } = stream.step(Some(place), START + 1000, limit, true) else { panic!() };
        assert!(until > at(START + 1000) && until <= at(limit));
        assert!(matches!(stream.step(None, until.get(), limit, true), Step::Frame { sequence: 0, .. }));
    }

    #[test]
    fn a_stream_that_nobody_followed_begins_anew_where_wal_is_now() {
        let mut stream = Stream::new(START);
        stream.encode(START + 1000);
        let Step::Frame { place, .. } = stream.step(None, START, START + 1000, false) else { panic!() };
        let limit = START + 1000 + LIVE_LAG_MAX + 1;
        let step = stream.step(Some(place), START + 1000, limit, false);
        assert_eq!(step, Step::Bulk { until: at(limit) });
        assert_eq!(stream.step(Some(place), limit, limit + 100, false), Step::Encode);
        stream.encode(limit + 100);
        assert!(matches!(stream.step(None, limit, limit + 100, false), Step::Frame { sequence: 0, .. }));
        assert_eq!(stream.ring.wal_bytes(), 100);
    }

    #[test]
    fn a_frame_that_was_begun_before_the_stream_began_anew_is_not_kept() {
        let mut stream = Stream::new(START);
        let begun = stream.ring.begin(at(START + 8), stream.now, |_| 1).unwrap();
        let limit = START + LIVE_LAG_MAX + 1;
        assert_eq!(stream.step(None, START, limit, false), Step::Bulk { until: at(limit) });
        stream.ring.push(begun, begun.range);
        assert_eq!((stream.ring.end(), stream.ring.wal_bytes()), (at(limit), 0));
    }

    #[test]
    fn after_a_failure_the_next_frame_begins_an_epoch() {
        let mut stream = Stream::new(START);
        stream.encode(START + 8);
        let begun = stream.ring.begin(at(START + 16), stream.now, |_| 9).unwrap();
        assert_eq!((begun.epoch, begun.sequence), (1, 1));
        stream.ring.fail();
        let begun = stream.ring.begin(at(START + 16), stream.now, |_| 9).unwrap();
        assert_eq!((begun.epoch, begun.sequence), (9, 0));
    }

    #[test]
    fn nothing_is_sent_beyond_what_this_link_may_send() {
        let mut stream = Stream::new(START);
        stream.encode(START + 1000);
        assert_eq!(stream.step(None, START, START + 500, true), Step::Wait);
        assert_eq!(stream.step(None, START - 100, START - 50, true), Step::Bulk { until: at(START - 50) });
    }
}
