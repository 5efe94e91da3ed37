//! Whatever WAL a server writes, and however it arrives, breaks off or is damaged, a scan proves exactly what is whole.
//!
//! The oracle is the builder of the WAL: it knows where each record lies and where a stream may be cut.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test")]

use proptest::{collection::vec, prelude::*, sample::Index, test_runner::FileFailurePersistence};
use walrelay::wal::{
    Lsn, PAGE_BYTES, PgTimestamp, Record, RecordHeader, RecordVisitor, ResumePoint, ScanError, Scanner,
    SegmentSize, SystemId, TimelineId, WalFormat, builder::WalBuilder, scanner::fuzz_scan,
};

#[derive(Clone, Debug)]
enum Step {
    Noise(usize),
    Commit,
    Image(usize),
    /// A record that ends with the page, `pages` pages on.
    FillPage {
        pages: u64,
    },
    /// A record that leaves so many times 8 bytes on its page.
    LeaveOnPage {
        words: u64,
    },
    Overwritten(u64),
    Timeline,
    Switch,
}

#[derive(Clone, Debug)]
struct Plan {
    format: usize,
    segment: u64,
    head: Option<Vec<u8>>,
    steps: Vec<Step>,
}

impl Plan {
    fn build(&self) -> WalBuilder {
        let segment_size = SegmentSize::new(1 << 20).unwrap();
        let start = Lsn::new(self.segment << 20).unwrap();
        let format = WalFormat::ALL[self.format];
        let mut timeline = 1;
        let mut wal =
            WalBuilder::new(format, SystemId(0x1234_5678_9ABC_DEF0), segment_size, TimelineId::FIRST, start);
        if let Some(head) = &self.head {
            wal = wal.continuing(head);
        } else {
            wal = wal.after(Lsn::new(start.get() - 64).unwrap());
        }
        for step in &self.steps {
            match step {
                Step::Noise(bytes) => drop(wal.noise(*bytes)),
                Step::Commit => drop(wal.commit(PgTimestamp(77))),
                Step::Image(bytes) => drop(wal.full_page_image(&vec![0x11; *bytes])),
                Step::FillPage { pages } => fill(&mut wal, *pages, 0),
                Step::LeaveOnPage { words } => fill(&mut wal, 0, *words),
                Step::Overwritten(pages) => drop(wal.overwritten(*pages)),
                Step::Timeline => {
                    timeline += 1;
                    wal.switch_timeline(TimelineId::new(timeline).unwrap());
                }
                Step::Switch => drop(wal.switch()),
            }
        }
        if wal.bytes().is_empty() {
            wal.noise(3);
        }
        wal
    }
}

fn fill(wal: &mut WalBuilder, pages: u64, words_left: u64) {
    let boundary = wal.end().advance(PAGE_BYTES - wal.end().page_offset()).advance(pages * PAGE_BYTES);
    let end = Lsn::new(boundary.get() - words_left * 8).unwrap();
    let end = if end.bytes_since(wal.end()) < 100 { end.advance(PAGE_BYTES) } else { end };
    wal.noise_up_to(end);
}

fn steps(with_switch: Switches) -> impl Strategy<Value = Vec<Step>> {
    let switches = if with_switch == Switches::Some { 1 } else { 0 };
    let step = prop_oneof![
        10 => (0_usize..300).prop_map(Step::Noise),
        3 => (300_usize..20_000).prop_map(Step::Noise),
        3 => Just(Step::Commit),
        2 => (1_usize..8000).prop_map(Step::Image),
        2 => (0_u64..3).prop_map(|pages| Step::FillPage { pages }),
        3 => (1_u64..5).prop_map(|words| Step::LeaveOnPage { words }),
        1 => (0_u64..3).prop_map(Step::Overwritten),
        1 => Just(Step::Timeline),
        switches => Just(Step::Switch),
    ];
    vec(step, 1..12)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Switches {
    None,
    Some,
}

fn plan(switches: Switches) -> impl Strategy<Value = Plan> {
    let head = prop_oneof![
        3 => Just(None),
        1 => vec(any::<u8>(), 1..20).prop_map(Some),
        1 => vec(any::<u8>(), 8100..17_000).prop_map(Some),
    ];
    (0..WalFormat::ALL.len(), 1_u64..6, head, steps(switches))
        .prop_map(|(format, segment, head, steps)| Plan { format, segment, head, steps })
}

fn cases(cases: u32) -> ProptestConfig {
    let failure_persistence = Some(Box::new(FileFailurePersistence::Off) as _);
    ProptestConfig { cases, failure_persistence, ..ProptestConfig::default() }
}

/// All that a visitor was told of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Event {
    start: Lsn,
    end: Lsn,
    format: Option<WalFormat>,
    header: RecordHeader,
    prefix: Vec<u8>,
}

#[derive(Debug, Default)]
struct Events(Vec<Event>);

impl RecordVisitor for Events {
    fn record(&mut self, record: &Record<'_>) {
        let Record { start, end, format, header, prefix } = *record;
        self.0.push(Event { start, end, format, header, prefix: prefix.to_vec() });
    }
}

struct Scanned {
    scanner: Scanner,
    events: Vec<Event>,
    result: Result<(), ScanError>,
}

fn scan<'a>(wal: &WalBuilder, pieces: impl IntoIterator<Item = &'a [u8]>) -> Scanned {
    scan_from(wal, ResumePoint::unknown(wal.start()), pieces)
}

fn scan_from<'a>(wal: &WalBuilder, from: ResumePoint, pieces: impl IntoIterator<Item = &'a [u8]>) -> Scanned {
    let mut scanner = Scanner::resume(wal.context(), from);
    let mut events = Events::default();
    let result = pieces.into_iter().try_for_each(|piece| scanner.feed(piece, &mut events));
    Scanned { scanner, events: events.0, result }
}

/// `bytes` cut into pieces of the lengths given, over and over.
fn cut<'a>(bytes: &'a [u8], lengths: &[usize]) -> Vec<&'a [u8]> {
    let mut rest = bytes;
    let mut pieces = Vec::new();
    for length in lengths.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, after) = rest.split_at((*length).min(rest.len()));
        pieces.push(piece);
        rest = after;
    }
    pieces
}

fn assert_may_be_cut(position: Lsn) {
    let header = if position.get() % (1 << 20) < PAGE_BYTES { 40 } else { 24 };
    let in_page = position.page_offset();
    assert!(in_page == 0 || in_page > header, "{position} is in a page header or at its end");
}

fn starts(events: &[Event]) -> Vec<(Lsn, Lsn)> {
    events.iter().map(|event| (event.start, event.end)).collect()
}

fn placed(wal: &WalBuilder) -> Vec<(Lsn, Lsn)> {
    wal.records().iter().map(|record| (record.start(), record.end())).collect()
}

/// What an error must not be confused with: which bytes of valid WAL are covered by no check.
struct Coverage {
    flags_not_checked: u16,
    /// Ranges of bytes that were never verified, but whose change may be noticed.
    unverified: Vec<(Lsn, Lsn)>,
    start: Lsn,
    highest_timeline: u32,
}

impl Coverage {
    fn of(wal: &WalBuilder, plan: &Plan) -> Self {
        let mut unverified = Vec::new();
        let mut before = wal.start();
        for record in wal.records() {
            // More than a page header is (part of) a record that was never completed, or began before the start.
            let gap = record.start().bytes_since(before);
            let header = if before.get().is_multiple_of(1 << 20) { 40 } else { 24 };
            if gap > 0 && (before.page_offset() != 0 || gap > header) {
                unverified.push((before, record.start()));
            }
            before = record.end();
            for tail in wal.zero_tails().iter().filter(|tail| tail.start() == record.end()) {
                before = tail.end();
            }
        }
        if wal.end() > before {
            unverified.push((before, wal.end()));
        }
        let is_before_19 = WalFormat::ALL[plan.format] < WalFormat::V19;
        let highest_timeline = wal.context().timeline.get();
        let flags_not_checked = if is_before_19 { 4 } else { 0 };
        Self { flags_not_checked, unverified, start: wal.start(), highest_timeline }
    }

    /// Whether `at` is before the first record, or the header of its page.
    fn is_in_head(&self, at: Lsn) -> bool {
        self.unverified.first().is_some_and(|(start, end)| *start == self.start && at < *end)
    }

    /// Whether byte `at`, one of `bytes`, may have the value `value` as far as a scan can tell.
    fn allows(&self, wal: &WalBuilder, at: Lsn, value: u8) -> bool {
        let bytes = wal.bytes();
        let offset = usize::try_from(at.bytes_since(self.start)).unwrap();
        let holds = |ranges: &[(Lsn, Lsn)]| ranges.iter().any(|(start, end)| (*start..*end).contains(&at));
        if bytes[offset] == value {
            return true;
        }
        let is_zero_tail = wal.zero_tails().iter().any(|tail| tail.start() <= at && at < tail.end());
        let in_page = offset % 8192;
        if is_zero_tail || in_page >= 24 {
            return holds(&self.unverified) && !is_zero_tail;
        }
        let page = offset - in_page;
        match in_page {
            2 => (u16::from(value ^ bytes[offset]) & !self.flags_not_checked) == 0,
            4..8 => {
                let field = |page: usize| -> [u8; 4] { bytes[page + 4..page + 8].try_into().unwrap() };
                let mut changed = field(page);
                changed[in_page - 4] = value;
                let before = page.checked_sub(8192).map_or(1, |before| u32::from_le_bytes(field(before)));
                (before.max(1)..=self.highest_timeline).contains(&u32::from_le_bytes(changed))
            }
            16..20 => holds(&self.unverified),
            _ => false,
        }
    }
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn any_split_tells_the_same(
        plan in plan(Switches::Some),
        lengths in vec(prop_oneof![1_usize..50, 1_usize..9000, 1_usize..100_000], 1..8),
    ) {
        let wal = plan.build();
        let whole = scan(&wal, [wal.bytes()]);
        prop_assert_eq!(&whole.result, &Ok(()));
        prop_assert_eq!(starts(&whole.events), placed(&wal));
        prop_assert_eq!(whole.scanner.verified_end(), wal.safe_end_within(wal.bytes().len()));
        prop_assert_eq!(whole.scanner.last_record(), wal.records().last().map(|record| record.start()));
        for event in &whole.events {
            let length = (event.header.total_bytes as usize - 24).min(1024);
            prop_assert_eq!(event.prefix.len(), length);
        }
        let pieces = scan(&wal, cut(wal.bytes(), &lengths));
        prop_assert_eq!(&pieces.result, &Ok(()));
        prop_assert_eq!(&pieces.events, &whole.events);
        prop_assert_eq!(pieces.scanner.resume_point(), whole.scanner.resume_point());
    }

    #[test]
    fn a_scan_resumes_where_it_was_sure(plan in plan(Switches::Some), at in any::<Index>(), length in 1_usize..9000) {
        let wal = plan.build();
        let (before, _) = wal.bytes().split_at(at.index(wal.bytes().len() + 1));
        let first = scan(&wal, cut(before, &[length]));
        prop_assert_eq!(&first.result, &Ok(()));
        prop_assert_eq!(first.scanner.verified_end(), wal.safe_end_within(before.len()));
        let point = first.scanner.resume_point();
        let second = scan_from(&wal, point, cut(wal.slice(point.position, wal.end()), &[length]));
        prop_assert_eq!(&second.result, &Ok(()));
        let whole = scan(&wal, [wal.bytes()]);
        prop_assert_eq!([first.events, second.events].concat(), whole.events);
        prop_assert_eq!(second.scanner.resume_point(), whole.scanner.resume_point());
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in vec(any::<u8>(), 0..500), plan in plan(Switches::None), at in any::<Index>()) {
        fuzz_scan(&bytes);
        let wal = plan.build();
        let mut damaged = vec![bytes.first().copied().unwrap_or(0)];
        damaged.extend(wal.bytes());
        let at = at.index(damaged.len());
        let end = (at + bytes.len()).min(damaged.len());
        damaged[at..end].copy_from_slice(&bytes[..end - at]);
        fuzz_scan(&damaged);
    }
}

proptest! {
    #![proptest_config(cases(250))]

    #[test]
    fn each_prefix_is_proved_up_to_its_last_safe_end(plan in plan(Switches::None)) {
        let wal = plan.build();
        let mut scanner = Scanner::at_segment_start(wal.context(), wal.start());
        let safe_ends = wal.safe_ends();
        let mut next = safe_ends.iter().skip(1).peekable();
        let mut expected = wal.start();
        for byte in wal.bytes() {
            prop_assert_eq!(scanner.feed(&[*byte], &mut ()), Ok(()));
            if let Some(end) = next.next_if(|end| **end == scanner.position()) {
                expected = *end;
            }
            prop_assert_eq!(scanner.verified_end(), expected);
            assert_may_be_cut(expected);
        }
    }

    #[test]
    fn a_flipped_bit_is_noticed_before_its_record_is_believed(
        plan in plan(Switches::Some),
        flips in vec((any::<Index>(), 0_u8..8), 40),
        header_flips in vec((any::<Index>(), 0_usize..48, 0_u8..8), 20),
    ) {
        let wal = plan.build();
        let coverage = Coverage::of(&wal, &plan);
        let whole = scan(&wal, [wal.bytes()]);
        let mut bytes = wal.bytes().to_vec();
        let anywhere = flips.into_iter().map(|(at, bit)| (at.index(bytes.len()), bit)).collect::<Vec<_>>();
        let pages = bytes.len().div_ceil(8192);
        let in_headers = header_flips.into_iter().map(|(page, at, bit)| (page.index(pages) * 8192 + at, bit));
        for (at, bit) in anywhere.into_iter().chain(in_headers).filter(|(at, _)| *at < wal.bytes().len()) {
            bytes[at] ^= 1 << bit;
            let value = bytes[at];
            let position = wal.start().advance(at as u64);
            let damaged = scan(&wal, [&bytes[..]]);
            bytes[at] ^= 1 << bit;
            // A wrong length of the record before the first may skip some, but makes up none.
            let skipped = whole.events.iter().position(|event| damaged.events.first() == Some(event)).unwrap_or(0);
            prop_assert!(whole.events[skipped..].starts_with(&damaged.events), "an event was made up");
            prop_assert!(skipped == 0 || coverage.is_in_head(position));
            assert_may_be_cut(damaged.scanner.verified_end());
            if !coverage.allows(&wal, position, value) {
                let end = damaged.scanner.verified_end();
                prop_assert!(end <= position, "verified {} with bit {} flipped at {}", end, bit, position);
            }
        }
    }
}

/// What a disk may hold after the last byte that was written.
#[derive(Clone, Debug)]
enum Rest {
    Zeros,
    Noise(u64),
    /// WAL of an older segment in whose file this was written.
    Recycled {
        segments_before: u64,
        same_plan: bool,
    },
}

impl Rest {
    fn bytes(&self, plan: &Plan, length: usize) -> Vec<u8> {
        let mut bytes = match self {
            Self::Zeros => Vec::new(),
            Self::Noise(seed) => {
                let mut state = seed | 1;
                let mut next = || {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    state.to_le_bytes()
                };
                std::iter::repeat_with(&mut next).flatten().take(length).collect()
            }
            Self::Recycled { segments_before, same_plan } => {
                let mut old = plan.clone();
                old.segment = plan.segment - segments_before;
                if !same_plan {
                    old.steps.reverse();
                }
                old.steps.push(Step::Noise(length.min(300_000)));
                old.build().bytes().to_vec()
            }
        };
        bytes.resize(length, 0);
        bytes
    }
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn a_torn_segment_ends_where_its_wal_ends(
        mut plan in plan(Switches::None),
        at in any::<Index>(),
        sector in any::<bool>(),
        rest in prop_oneof![
            Just(Rest::Zeros),
            any::<u64>().prop_map(Rest::Noise),
            (1_u64..9, any::<bool>())
                .prop_map(|(segments_before, same_plan)| Rest::Recycled { segments_before, same_plan }),
        ],
        length in 1_usize..20_000,
    ) {
        // While the record before the first is not known, an old one may be taken for the first: a scan for the end
        // begins where it is known.
        plan.head = None;
        plan.segment += 10;
        let wal = plan.build();
        let from = ResumePoint {
            previous_record: Lsn::new(wal.start().get() - 64),
            ..ResumePoint::unknown(wal.start())
        };
        let mut torn = at.index(wal.bytes().len() + 1);
        if sector {
            torn -= torn % 512;
        }
        let mut bytes = rest.bytes(&plan, wal.bytes().len() + 20_000);
        bytes[..torn].copy_from_slice(&wal.bytes()[..torn]);
        // What follows may happen to be what was written, or be where nothing is checked.
        let coverage = Coverage::of(&wal, &plan);
        let first_wrong = (torn..wal.bytes().len())
            .find(|at| !coverage.allows(&wal, wal.start().advance(*at as u64), bytes[*at]))
            .unwrap_or(wal.bytes().len());
        let scanned = scan_from(&wal, from, cut(&bytes, &[length]));
        let whole = scan_from(&wal, from, [wal.bytes()]);
        prop_assert!(whole.events.starts_with(&scanned.events), "an event was made up");
        let end = scanned.scanner.verified_end();
        prop_assert!(end <= wal.safe_end_within(first_wrong), "{} is after the end", end);
        prop_assert!(end >= wal.safe_end_within(torn), "{} is before the end", end);
        if torn == wal.bytes().len() {
            prop_assert_eq!(end, wal.safe_end_within(torn));
            prop_assert!(scanned.result.is_err());
        }
    }
}
