//! The protocol's decoders are total and bounded, and read back what is written.
//!
//! For every message: what is written reads back, every prefix is incomplete and never something else, and no bytes at all
//! make a decoder panic. For streams: any split gives the same items, and WAL comes out as slices of what was pushed. The
//! bodies of the fuzz targets run here too, over random bytes and over `tests/corpus/protocol`.
#![allow(clippy::unwrap_used, reason = "clippy exempts test functions, not their helpers")]

use bytes::{Bytes, BytesMut};
use proptest::{collection::vec, option, prelude::*};
use walrelay::{
    protocol::{
        Command, CopyStream, QUERY_BYTES_MAX, ServerError, SqlState, StreamItem,
        backend::{
            self, Authentication, Column, ColumnType, CopyFormat, DataRow, NegotiateProtocolVersion,
            Severity, TransactionStatus,
        },
        command::{
            self, CommandOption, CreateReplicationSlot, CreateSlotKind, OptionValue, Persistence,
            StartReplication, StreamKind, WhenActive,
        },
        copy_stream,
        frontend::{self, CancelKey, CancelRequest, FirstPacket, Password, ProtocolVersion, Startup},
        link, md5,
        replication::{
            self, HotStandbyFeedback, Keepalive, PrimaryMessage, StandbyMessage, StandbyStatusUpdate,
            WalDataHeader,
        },
        scram::{self, Verifier},
    },
    wal::{Lsn, PgTimestamp, TimelineId},
};

fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

fn position() -> impl Strategy<Value = Option<Lsn>> {
    any::<u64>().prop_map(Lsn::new)
}

fn timestamp() -> impl Strategy<Value = PgTimestamp> {
    any::<i64>().prop_map(PgTimestamp)
}

fn bytes(most: usize) -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..=most).prop_map(Bytes::from)
}

/// Text as it can be between NULs.
fn text() -> impl Strategy<Value = String> {
    "[^\\x00]{0,20}"
}

fn name() -> impl Strategy<Value = String> {
    "[^\\x00]{1,20}"
}

fn cancel_key() -> impl Strategy<Value = CancelKey> {
    vec(any::<u8>(), 4..=256).prop_map(|key| CancelKey::new(key).unwrap())
}

fn version() -> impl Strategy<Value = ProtocolVersion> {
    any::<u16>().prop_map(|minor| ProtocolVersion { major: 3, minor })
}

fn first_packet() -> impl Strategy<Value = FirstPacket> {
    prop_oneof![
        Just(FirstPacket::SslRequest),
        Just(FirstPacket::GssEncRequest),
        (any::<u32>(), cancel_key())
            .prop_map(|(process_id, key)| FirstPacket::Cancel(CancelRequest { process_id, key })),
        (version(), vec((name(), text()), 0..5))
            .prop_map(|(version, parameters)| FirstPacket::Startup(Startup { version, parameters })),
    ]
}

fn frontend_message() -> impl Strategy<Value = frontend::Message> {
    use frontend::Message;
    prop_oneof![
        text().prop_map(|query| Message::Query(query.into())),
        bytes(50).prop_map(|body| Message::Password(Password::of_sasl(body))),
        bytes(50).prop_map(Message::CopyData),
        text().prop_map(|reason| Message::CopyFail(reason.into())),
        Just(Message::CopyDone),
        Just(Message::Terminate),
        Just(Message::Sync),
        Just(Message::Flush),
        Just(Message::FunctionCall),
        prop::sample::select(b"PBDEC".to_vec()).prop_map(Message::Extended),
    ]
}

fn authentication() -> impl Strategy<Value = Authentication> {
    prop_oneof![
        Just(Authentication::Ok),
        Just(Authentication::CleartextPassword),
        any::<[u8; 4]>().prop_map(Authentication::Md5Password),
        vec(name(), 0..3).prop_map(Authentication::Sasl),
        bytes(50).prop_map(Authentication::SaslContinue),
        bytes(50).prop_map(Authentication::SaslFinal),
        Just(Authentication::Other(7)),
    ]
}

fn server_error() -> impl Strategy<Value = ServerError> {
    use Severity::{Debug, Error, Fatal, Info, Log, Notice, Panic, Warning};
    let severity = prop::sample::select(vec![Debug, Error, Fatal, Info, Log, Notice, Panic, Warning]);
    let sqlstate = option::of("[0-9A-Z]{5}".prop_map(|code| SqlState::new(code.as_bytes()).unwrap()));
    (severity, sqlstate, text(), option::of(text()), option::of(text())).prop_map(
        |(severity, sqlstate, message, detail, hint)| ServerError {
            severity,
            sqlstate,
            message,
            detail,
            hint,
        },
    )
}

fn column() -> impl Strategy<Value = Column> {
    (text(), any::<(u32, i16, u32, i16, i32, i16)>()).prop_map(|(name, fields)| {
        let (table, number, oid, len, modifier, format) = fields;
        Column { name, table, number, column_type: ColumnType { oid, len }, modifier, format }
    })
}

fn copy_format() -> impl Strategy<Value = CopyFormat> {
    (any::<u8>(), vec(any::<i16>(), 0..4)).prop_map(|(overall, columns)| CopyFormat { overall, columns })
}

fn backend_message() -> impl Strategy<Value = backend::Message> {
    use TransactionStatus::{Failed, Idle, InTransaction};
    use backend::Message;
    prop_oneof![
        authentication().prop_map(Message::Authentication),
        (text(), text()).prop_map(|(name, value)| Message::ParameterStatus { name, value }),
        (any::<u32>(), cancel_key())
            .prop_map(|(process_id, key)| Message::BackendKeyData { process_id, key }),
        prop::sample::select(vec![Idle, InTransaction, Failed]).prop_map(Message::ReadyForQuery),
        vec(column(), 0..4).prop_map(Message::RowDescription),
        vec(option::of(bytes(20)), 0..4).prop_map(|values| Message::DataRow(DataRow::new(values))),
        text().prop_map(Message::CommandComplete),
        Just(Message::EmptyQueryResponse),
        server_error().prop_map(Message::ErrorResponse),
        server_error().prop_map(Message::NoticeResponse),
        copy_format().prop_map(Message::CopyInResponse),
        copy_format().prop_map(Message::CopyOutResponse),
        copy_format().prop_map(Message::CopyBothResponse),
        bytes(50).prop_map(Message::CopyData),
        Just(Message::CopyDone),
        (version(), vec(text(), 0..3)).prop_map(|(version, unrecognized)| {
            Message::NegotiateProtocolVersion(NegotiateProtocolVersion { version, unrecognized })
        }),
    ]
}

fn keepalive() -> impl Strategy<Value = Keepalive> {
    (position(), timestamp(), any::<bool>()).prop_map(|(wal_end, sent_at, reply_requested)| Keepalive {
        wal_end,
        sent_at,
        reply_requested,
    })
}

fn standby_message() -> impl Strategy<Value = StandbyMessage> {
    prop_oneof![
        (position(), position(), position(), timestamp(), any::<bool>()).prop_map(
            |(write, flush, apply, sent_at, reply_requested)| {
                StandbyMessage::StatusUpdate(StandbyStatusUpdate {
                    write,
                    flush,
                    apply,
                    sent_at,
                    reply_requested,
                })
            }
        ),
        (timestamp(), any::<[u32; 4]>()).prop_map(
            |(sent_at, [xmin, xmin_epoch, catalog_xmin, catalog_epoch])| {
                let feedback = HotStandbyFeedback { sent_at, xmin, xmin_epoch, catalog_xmin, catalog_epoch };
                StandbyMessage::HotStandbyFeedback(feedback)
            }
        ),
    ]
}

/// WAL somewhere below the last position, so that it fits.
fn wal_data() -> impl Strategy<Value = (WalDataHeader, Bytes)> {
    (1..u64::MAX / 2, position(), timestamp(), bytes(100)).prop_map(|(start, wal_end, sent_at, wal)| {
        (WalDataHeader { start: Lsn::new(start).unwrap(), wal_end, sent_at }, wal)
    })
}

/// Something in a stream, with its wire form.
fn stream_message() -> impl Strategy<Value = BytesMut> {
    let encoded = |message: backend::Message| {
        let mut out = BytesMut::new();
        message.encode(&mut out);
        out
    };
    prop_oneof![
        4 => wal_data().prop_map(|(header, wal)| {
            let mut out = BytesMut::from(&header.encode(u32::try_from(wal.len()).unwrap())[..]);
            out.extend_from_slice(&wal);
            out
        }),
        2 => keepalive().prop_map(|keepalive| {
            let mut out = BytesMut::new();
            keepalive.encode(&mut out);
            out
        }),
        1 => backend_message()
            .prop_filter("CopyData comes from the other two", |message| !matches!(message, backend::Message::CopyData(_)))
            .prop_map(encoded),
    ]
}

/// A name that a quoted identifier can have: at most 63 bytes.
fn identifier() -> impl Strategy<Value = String> {
    prop_oneof!["[^\\x00]{0,15}", "[a-z_][a-z0-9_]{0,62}", "[A-Z_\"'; ]{0,10}"]
}

fn command_options(least: usize) -> impl Strategy<Value = Vec<CommandOption>> {
    let value = prop_oneof![text().prop_map(OptionValue::Text), any::<u32>().prop_map(OptionValue::Number)];
    vec((identifier(), option::of(value)), least..4)
        .prop_map(|options| options.into_iter().map(|(name, value)| CommandOption { name, value }).collect())
}

fn timeline() -> impl Strategy<Value = TimelineId> {
    (1..=u32::MAX).prop_map(|raw| TimelineId::new(raw).unwrap())
}

fn create_replication_slot() -> impl Strategy<Value = Command> {
    let kind = prop_oneof![
        any::<bool>().prop_map(|reserve_wal| CreateSlotKind::Physical { reserve_wal }),
        (identifier(), command_options(0))
            .prop_map(|(plugin, options)| CreateSlotKind::Logical { plugin, options }),
    ];
    let persistence = prop::sample::select(vec![Persistence::Permanent, Persistence::Temporary]);
    (identifier(), persistence, kind).prop_map(|(slot, persistence, kind)| {
        Command::CreateReplicationSlot(CreateReplicationSlot { slot, persistence, kind })
    })
}

fn start_replication() -> impl Strategy<Value = Command> {
    let physical = (option::of(identifier()), option::of(timeline()))
        .prop_map(|(slot, timeline)| (slot, StreamKind::Physical { timeline }));
    let logical = (identifier(), vec((identifier(), option::of(text())), 0..3))
        .prop_map(|(slot, options)| (Some(slot), StreamKind::Logical(options)));
    (prop_oneof![physical, logical], position())
        .prop_map(|((slot, kind), start)| Command::StartReplication(StartReplication { slot, start, kind }))
}

fn any_command() -> impl Strategy<Value = Command> {
    let when_active = prop::sample::select(vec![WhenActive::Fail, WhenActive::Wait]);
    prop_oneof![
        Just(Command::IdentifySystem),
        Just(Command::UploadManifest),
        identifier().prop_map(Command::Show),
        identifier().prop_map(Command::ReadReplicationSlot),
        timeline().prop_map(Command::TimelineHistory),
        create_replication_slot(),
        start_replication(),
        (identifier(), when_active)
            .prop_map(|(slot, when_active)| Command::DropReplicationSlot { slot, when_active }),
        (identifier(), command_options(1))
            .prop_map(|(slot, options)| Command::AlterReplicationSlot { slot, options }),
        "BASE_BACKUP( \\( [A-Z]{1,5} '[a-z;]{0,5}' \\))?".prop_map(Command::BaseBackup),
        "(select|SELECT|--|[a-z]{1,5})[ a-z;,]{0,9}".prop_map(Command::Sql),
    ]
}

/// Every prefix of a whole message is incomplete, and the whole reads back with nothing left.
fn check_prefixes<T: PartialEq + std::fmt::Debug, E: std::fmt::Debug + PartialEq>(
    whole: &BytesMut,
    message: T,
    decode: impl Fn(&mut BytesMut) -> Result<Option<T>, E>,
) {
    for len in 0..whole.len() {
        let mut prefix = BytesMut::from(whole.get(..len).unwrap());
        assert_eq!(decode(&mut prefix), Ok(None), "of {message:?}, {len} bytes");
        assert_eq!(prefix.len(), len, "an incomplete message is left where it is");
    }
    let mut whole = whole.clone();
    assert_eq!(decode(&mut whole), Ok(Some(message)));
    assert!(whole.is_empty());
}

/// All items, and whether each piece of WAL points into the block it names.
fn items_of(blocks: &[Bytes]) -> Vec<StreamItem> {
    let mut stream = CopyStream::new();
    let (mut items, mut wal_bytes, mut wire_bytes) = (Vec::new(), 0, 0);
    for (number, block) in blocks.iter().enumerate() {
        stream.push(block.clone(), number as u64);
        wire_bytes += block.len();
        while let Some(item) = stream.poll().unwrap() {
            if let StreamItem::WalBytes { bytes, block: from, .. } = &item {
                let pushed = blocks.get(usize::try_from(*from).unwrap()).unwrap().as_ptr_range();
                assert!(
                    pushed.start <= bytes.as_ptr() && bytes.as_ptr_range().end <= pushed.end,
                    "WAL was copied"
                );
                assert!(!bytes.is_empty());
                wal_bytes += bytes.len();
            }
            items.push(item);
        }
    }
    assert!(stream.is_at_message_start());
    assert_eq!(stream.copied_bytes(), (wire_bytes - wal_bytes) as u64, "all but the WAL is copied, once");
    items
}

/// Joins the pieces of each message's WAL, which are all that a split may change.
fn joined(items: Vec<StreamItem>) -> Vec<StreamItem> {
    let mut joined: Vec<StreamItem> = Vec::new();
    for item in items {
        match (joined.last_mut(), item) {
            (
                Some(StreamItem::WalBytes { at: start, bytes: head, .. }),
                StreamItem::WalBytes { at, bytes, .. },
            ) => {
                assert_eq!(at, start.advance(head.len() as u64), "pieces follow one another");
                *head = [head.as_ref(), bytes.as_ref()].concat().into();
            }
            (_, StreamItem::WalBytes { at, bytes, .. }) => {
                joined.push(StreamItem::WalBytes { at, bytes, block: 0 })
            }
            (_, item) => joined.push(item),
        }
    }
    joined
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_first_packet_reads_back_and_no_prefix_is_one(packet in first_packet()) {
        let mut whole = BytesMut::new();
        packet.encode(&mut whole);
        check_prefixes(&whole, packet, FirstPacket::decode);
    }

    #[test]
    fn every_frontend_message_reads_back_and_no_prefix_is_one(message in frontend_message()) {
        let mut whole = BytesMut::new();
        message.encode(&mut whole);
        check_prefixes(&whole, message, |buffer| frontend::Message::decode(buffer, QUERY_BYTES_MAX));
    }

    #[test]
    fn every_backend_message_reads_back_and_no_prefix_is_one(message in backend_message()) {
        let mut whole = BytesMut::new();
        message.encode(&mut whole);
        check_prefixes(&whole, message, backend::Message::decode);
    }

    #[test]
    fn every_cut_body_is_an_error(message in backend_message(), cut in any::<prop::sample::Index>()) {
        let mut whole = BytesMut::new();
        message.encode(&mut whole);
        let body = whole.split_off(5);
        if body.is_empty() {
            return Ok(());
        }
        let kept = cut.index(body.len());
        let mut short = BytesMut::from(&whole.first().unwrap().to_be_bytes()[..]);
        short.extend_from_slice(&u32::try_from(kept + 4).unwrap().to_be_bytes());
        short.extend_from_slice(body.get(..kept).unwrap());
        // Only what ends in bytes of any number can be cut unseen.
        let decoded = backend::Message::decode(&mut short);
        match message {
            backend::Message::CopyData(_) | backend::Message::BackendKeyData { .. } | backend::Message::Authentication(_) => {}
            _ => prop_assert!(decoded.is_err(), "{decoded:?}"),
        }
    }

    #[test]
    fn every_standby_message_reads_back_and_every_cut_one_is_an_error(message in standby_message()) {
        let mut out = BytesMut::new();
        match message {
            StandbyMessage::StatusUpdate(update) => update.encode(&mut out),
            StandbyMessage::HotStandbyFeedback(feedback) => feedback.encode(&mut out),
        }
        let frontend::Message::CopyData(body) =
            frontend::Message::decode(&mut out, replication_limit()).unwrap().unwrap() else { panic!() };
        for len in 0..body.len() {
            prop_assert!(StandbyMessage::decode(body.slice(..len)).is_err());
        }
        prop_assert_eq!(StandbyMessage::decode(body), Ok(message));
    }

    #[test]
    fn wal_and_keepalives_read_back((header, wal) in wal_data(), keepalive in keepalive()) {
        let mut out = BytesMut::from(&header.encode(u32::try_from(wal.len()).unwrap())[..]);
        out.extend_from_slice(&wal);
        keepalive.encode(&mut out);
        for expected in [PrimaryMessage::WalData(header, wal), PrimaryMessage::Keepalive(keepalive)] {
            let backend::Message::CopyData(body) = backend::Message::decode(&mut out).unwrap().unwrap() else { panic!() };
            prop_assert_eq!(PrimaryMessage::decode(body), Ok(expected));
        }
    }

    #[test]
    fn any_split_gives_the_same_items_and_wal_is_never_copied(
        messages in vec(stream_message(), 1..6),
        cuts in vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let wire = Bytes::from(messages.concat());
        let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(wire.len())).collect();
        places.sort_unstable();
        let mut rest = wire.clone();
        let mut blocks: Vec<Bytes> = Vec::new();
        for place in places.into_iter().rev() {
            blocks.push(Bytes::copy_from_slice(&rest.split_off(place)));
        }
        blocks.push(Bytes::copy_from_slice(&rest));
        blocks.reverse();
        let byte_by_byte: Vec<Bytes> = wire.chunks(1).map(Bytes::copy_from_slice).collect();
        let whole = joined(items_of(&[wire]));
        prop_assert_eq!(&joined(items_of(&blocks)), &whole);
        prop_assert_eq!(&joined(items_of(&byte_by_byte)), &whole);
    }

    #[test]
    fn every_command_reads_back_as_it_is_printed(command in any_command()) {
        let printed = command.to_string();
        prop_assert_eq!(Command::parse(&printed), Ok(command.clone()), "{}", printed);
        prop_assert_eq!(Command::parse(format!("\n{printed} \t")).is_ok(), true);
        if !matches!(command, Command::Sql(_)) {
            prop_assert_eq!(Command::parse(format!("{printed};")), Ok(command));
            let two = format!("{printed}; IDENTIFY_SYSTEM");
            prop_assert!(Command::parse(two).is_err());
        }
    }

    #[test]
    fn every_verifier_reads_back(salt in vec(any::<u8>(), 0..40), iterations in 1..3_u32, password in bytes(20)) {
        let verifier = Verifier::from_password(&password, salt, iterations.try_into().unwrap());
        prop_assert_eq!(verifier.to_string().parse(), Ok(verifier));
    }

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..200)) {
        TARGETS.iter().for_each(|(_, body)| body(&bytes));
    }

    #[test]
    fn random_bodies_of_known_messages_never_panic(
        tag in prop::sample::select(b"RSKZTDCIENGHWdcvQpfXFPB".to_vec()),
        body in vec(prop_oneof![Just(0), 0..4_u8, any::<u8>()], 0..60),
    ) {
        let mut bytes = vec![tag];
        bytes.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        bytes.extend_from_slice(&body);
        TARGETS.iter().for_each(|(_, body)| body(&bytes));
        TARGETS.iter().for_each(|(_, target)| target(&body));
    }

    #[test]
    fn random_startup_packets_never_panic(body in vec(prop_oneof![Just(0), any::<u8>()], 0..60)) {
        let mut bytes = u32::try_from(body.len() + 8).unwrap().to_be_bytes().to_vec();
        bytes.extend_from_slice(&[0, 3, 0, 0]);
        bytes.extend_from_slice(&body);
        frontend::fuzz_frontend(&bytes);
    }

    #[test]
    fn words_of_commands_in_any_order_never_panic(words in vec(prop::sample::select(WORDS.to_vec()), 0..9)) {
        command::fuzz_command(words.join(" ").as_bytes());
    }

    #[test]
    fn scram_messages_in_any_order_never_panic(pieces in vec(prop::sample::select(SCRAM_PIECES.to_vec()), 0..7)) {
        scram::fuzz_scram(pieces.concat().as_bytes());
    }
}

fn replication_limit() -> usize {
    walrelay::protocol::STANDBY_MESSAGE_BYTES_MAX
}

const WORDS: [&str; 26] = [
    "IDENTIFY_SYSTEM",
    "SHOW",
    "TIMELINE_HISTORY",
    "CREATE_REPLICATION_SLOT",
    "DROP_REPLICATION_SLOT",
    "SLOT",
    "WAIT",
    "READ_REPLICATION_SLOT",
    "ALTER_REPLICATION_SLOT",
    "START_REPLICATION",
    "BASE_BACKUP",
    "UPLOAD_MANIFEST",
    "PHYSICAL",
    "LOGICAL",
    "TEMPORARY",
    "RESERVE_WAL",
    "TIMELINE",
    "a",
    "\"B\"\"c\"",
    "'d'",
    "(",
    ")",
    ",",
    ";",
    "7",
    "0/16B3748",
];

const SCRAM_PIECES: [&str; 16] = [
    "n,,",
    "y,,",
    "p=tls-server-end-point,,",
    "n=",
    "r=",
    ",",
    "c=biws",
    "p=AAAA",
    "v=",
    "e=",
    "s=AAAA",
    "m=",
    "a=",
    "x",
    "rOprNGfw",
    "=",
];

type Body = fn(&[u8]);

/// The fuzz targets, by their names and their folders in the corpus.
const TARGETS: [(&str, Body); 9] = [
    ("frontend", frontend::fuzz_frontend),
    ("backend", backend::fuzz_backend),
    ("replication", replication::fuzz_replication),
    ("copy_stream", copy_stream::fuzz_copy_stream),
    ("command", command::fuzz_command),
    ("scram", scram::fuzz_scram),
    ("link", link::inbound::fuzz_inbound),
    ("link_offer", link::offer::fuzz_offer),
    ("password", md5::fuzz_password),
];

#[test]
#[allow(clippy::disallowed_methods, reason = "a test reads its own corpus")]
fn the_corpus_is_replayed_and_each_target_has_one() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/protocol");
    for (target, body) in TARGETS {
        let mut inputs = 0;
        for entry in std::fs::read_dir(corpus.join(target)).unwrap() {
            body(&std::fs::read(entry.unwrap().path()).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "{target} has no corpus");
    }
}
