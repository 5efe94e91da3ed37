//! What can go wrong towards the upstream, and what follows from it.
//!
//! Owns the error type of this folder and the one question that the reconnect loop asks of it: [`UpstreamError::advice`].

use std::{io, time::Duration};

use crate::conninfo::ConninfoError;
use crate::net::tls::TlsError;
use crate::protocol::link::LinkError;
use crate::protocol::{DecodeError, ServerError, SqlState, frontend::ProtocolVersion, scram::ClientError};
use crate::session::timelines::Refusal;
use crate::store::{AppendError, StoreError};
use crate::wal::timeline::HistoryError;
use crate::wal::{Lsn, PAGE_BYTES, SegmentSize, SystemId, TimelineId};

/// An attempt to connect, or a stream, failed.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// No connection to one address.
    #[error("connection to server {host} failed")]
    Connect {
        /// Host and port, or socket, as libpq names them.
        host: String,
        /// Why.
        source: io::Error,
    },
    /// A host name has no address.
    #[error("could not translate host name \"{host}\" to address")]
    Resolve {
        /// The name.
        host: String,
        /// Why.
        source: io::Error,
    },
    /// The connection string's `connect_timeout` passed.
    #[error("connection to server {host} failed: timeout expired")]
    ConnectTimeout {
        /// Host and port, or socket, as libpq names them.
        host: String,
    },
    /// The server let us in, but did not answer all that is asked then.
    #[error("the upstream did not answer what is asked before a stream in time")]
    OpeningTimeout,
    /// A host name stands for no address.
    #[error("no host to connect to")]
    NoHost,
    /// The connection string excludes what would have to be done.
    #[error(transparent)]
    Conninfo(#[from] ConninfoError),
    /// The system does not tell who is at the other end of a Unix socket.
    #[error("could not get peer credentials")]
    PeerCredentials(#[source] io::Error),
    /// Somebody without a name is at the other end of a Unix socket.
    #[error("local user with ID {0} does not exist")]
    UnknownPeer(u32),
    /// The server runs as somebody else than `requirepeer` says.
    #[error("requirepeer specifies \"{wanted}\", but actual peer user name is \"{actual}\"")]
    WrongPeer {
        /// What the connection string says.
        wanted: String,
        /// Who it is.
        actual: String,
    },
    /// `channel_binding=require`, and the server wants to do without.
    #[error("{0}")]
    NoChannelBinding(&'static str),
    /// TLS cannot be set up, or did not come about.
    #[error("connection to server {host} failed")]
    Tls {
        /// Host and port, as libpq names them.
        host: String,
        /// Why.
        source: Box<TlsError>,
    },
    /// The other end has broken TLS off after the handshake, as a server does that does not believe our certificate.
    #[error(transparent)]
    BrokenTls(Box<TlsError>),
    /// TLS is required.
    #[error("server does not support SSL, but SSL was required")]
    NoTls,
    /// TLS that was begun without asking, with a server that does not say whose protocol it speaks.
    #[error("direct SSL connection was established without ALPN protocol negotiation extension")]
    NoAlpn,
    /// An error instead of an answer to the question for TLS.
    #[error("server sent an error response during SSL exchange")]
    ErrorBeforeTls,
    /// Neither yes nor no.
    #[error("received invalid response to SSL negotiation: {0}")]
    InvalidTlsAnswer(String),
    /// `sslcertmode=require`.
    #[error("{0}")]
    NoCertificate(&'static str),
    /// The server speaks only older protocols than are accepted.
    #[error("server only supports protocol version {got}, but \"min_protocol_version\" was set to {min}")]
    OldProtocol {
        /// What it speaks.
        got: ProtocolVersion,
        /// What the connection string says.
        min: ProtocolVersion,
    },
    /// The server's answer to our protocol version makes no sense.
    #[error("received invalid protocol negotiation message: {0}")]
    Negotiation(String),
    /// The session is not of the kind that `target_session_attrs` asks for.
    #[error("{0}")]
    WrongSessionAttributes(&'static str),
    /// Nobody has said that WAL may come from a standby, which may be anything but what the primary has.
    #[error(
        "server is in hot standby mode: set target_session_attrs=any if WAL is to be streamed from a standby"
    )]
    StandbyUnasked,
    /// The connection string asks for what this build cannot give.
    #[error("{0}")]
    Unsupported(String),
    /// The system gives no random numbers.
    #[error("could not generate nonce")]
    NoRandomness,
    /// The server wants a password and there is none.
    #[error("fe_sendauth: no password supplied")]
    NoPassword,
    /// The SCRAM exchange failed on our side.
    #[error("SCRAM authentication failed")]
    Scram(#[from] ClientError),
    /// The server answered with an error.
    #[error("{0}")]
    Server(Box<ServerError>),
    /// The server's bytes are not the protocol.
    #[error("upstream broke the replication protocol")]
    Protocol(#[from] DecodeError),
    /// The server sent a message that has no place where it came.
    #[error("unexpected response from the upstream: {0}")]
    Unexpected(String),
    /// A column of an answer does not hold what it should.
    #[error("invalid {field} in the upstream's answer to {command}: \"{value}\"")]
    InvalidAnswer {
        /// The command.
        command: &'static str,
        /// The field.
        field: &'static str,
        /// What stood there.
        value: String,
    },
    /// The socket failed.
    #[error("could not communicate with the upstream")]
    Io(#[from] io::Error),
    /// The server closed the connection without a word.
    #[error("server closed the connection unexpectedly")]
    Closed,
    /// Another cluster.
    #[error("upstream has system identifier {got}, this relay holds WAL of {expected}")]
    WrongSystem {
        /// What is held.
        expected: SystemId,
        /// What was found.
        got: SystemId,
    },
    /// Another page size than any WAL that is understood here.
    #[error("upstream has a WAL page size (wal_block_size) of {got}, only {PAGE_BYTES} is supported")]
    WrongPageSize {
        /// What was found.
        got: String,
    },
    /// Another segment size.
    #[error("upstream has a WAL segment size of {got}, this relay holds segments of {expected}")]
    WrongSegmentSize {
        /// What is held.
        expected: SegmentSize,
        /// What was found.
        got: SegmentSize,
    },
    /// Its WAL comes from here.
    #[error("{}", loop_text(host, *relays))]
    Loop {
        /// Host and port, or socket, as libpq names them.
        host: String,
        /// Relays between it and us; 0: it is this relay itself.
        relays: usize,
    },
    /// Its timeline is not one that may be followed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// We hold WAL that the upstream's history does not have, and are not to go on without a word from a person.
    #[error(
        "new timeline {next} forked off timeline {timeline} at {fork}, before {held_end}, the end of what this relay holds"
    )]
    Forked {
        /// The timeline that is held.
        timeline: TimelineId,
        /// The timeline that goes on.
        next: TimelineId,
        /// Where it was left.
        fork: Lsn,
        /// Our end.
        held_end: Lsn,
    },
    /// All that we hold of the timeline is on a branch that the upstream's history does not have.
    #[error(
        "new timeline {next} forked off timeline {timeline} at {fork}, before {oldest}, the beginning of what this relay holds; with another data directory it would begin anew"
    )]
    ForkedBefore {
        /// The timeline that is held.
        timeline: TimelineId,
        /// The timeline that goes on.
        next: TimelineId,
        /// Where it was left.
        fork: Lsn,
        /// Start of what is held.
        oldest: Lsn,
    },
    /// The upstream has no more of a timeline than what we hold, and says that it went on.
    #[error(
        "the upstream ended timeline {timeline} after {held_end}, but its history says that it was left at {fork}"
    )]
    EndedEarly {
        /// The timeline.
        timeline: TimelineId,
        /// Our end.
        held_end: Lsn,
        /// Where it was left, by its history.
        fork: Lsn,
    },
    /// None of several hosts will do.
    #[error("no host of the connection string can be followed: {}", all_hosts(.0))]
    AllHosts(Vec<(String, UpstreamError)>),
    /// The WAL that follows ours is gone from the upstream.
    #[error("the upstream has removed WAL that follows {held_end}, the end of what this relay holds")]
    WalRemoved {
        /// Our end.
        held_end: Lsn,
        /// The server's words.
        source: Box<ServerError>,
    },
    /// The slot was dropped, and what it should keep is gone.
    #[error(
        "replication slot \"{0}\" does not exist on the upstream, which has removed WAL that this relay needs; it is not created again"
    )]
    SlotGone(String),
    /// There is no slot, and none may be made.
    #[error("replication slot \"{0}\" does not exist on the upstream")]
    SlotAbsent(String),
    /// What one name stands for are several servers, or something in between that has processes of its own.
    #[error(
        "the connection for SQL to {host} does not reach the server that streams, where process {process_id} sends WAL to this relay"
    )]
    OtherServer {
        /// Host and port, or socket, as libpq names them.
        host: String,
        /// As the server of the stream has told it.
        process_id: u32,
    },
    /// The slot is there and keeps nothing any more.
    #[error("replication slot \"{slot}\" on the upstream has been invalidated")]
    SlotInvalidated {
        /// The slot.
        slot: String,
        /// The server's words.
        source: Box<ServerError>,
    },
    /// A relay's answer to the offer of a link cannot be understood.
    #[error("could not understand the upstream's answer \"{0}\" to the offer of a compressed link")]
    LinkAnswer(String),
    /// Only a compressed link will do, and the server offers none.
    #[error("server {host} does not offer a compressed link, but \"upstream.link\" is set to \"require\"")]
    LinkDeclined {
        /// Host and port, or socket, as libpq names them.
        host: String,
    },
    /// What came over the link is not what was sent, or not of what is held.
    #[error("could not take WAL from the compressed link")]
    Link(#[from] LinkError),
    /// A history file of the upstream cannot be read.
    #[error("could not read a timeline history file")]
    History(#[from] HistoryError),
    /// The upstream does not have WAL that we hold.
    #[error(
        "the WAL flush position of the upstream {flushed} is behind {held_end}, the end of what this relay holds on timeline {timeline}"
    )]
    BehindUs {
        /// The upstream's end.
        flushed: Lsn,
        /// Our end.
        held_end: Lsn,
        /// The timeline.
        timeline: TimelineId,
        /// A primary has lost WAL then; a standby or relay may only be late.
        upstream: BehindUpstream,
    },
    /// What came cannot follow, or contradicts, what is held.
    #[error("could not take WAL from the upstream")]
    Append(#[from] AppendError),
    /// The store failed.
    #[error("could not use the store")]
    Store(#[from] StoreError),
}

/// What kind of server is behind us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BehindUpstream {
    /// It accepts writes: it has lost WAL that it had sent.
    Primary,
    /// It receives WAL itself.
    Standby,
}

/// What the reconnect loop does after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Try again, soon at first.
    Retry,
    /// The server said no: try again, but not within a second.
    RetryLater,
    /// Somebody must act; look again now and then, in case they did.
    TellAHuman,
}

impl UpstreamError {
    /// What came of a read or a write: the library tells of TLS in the same way.
    pub(super) fn of_io(error: io::Error) -> Self {
        match TlsError::of_handshake(error) {
            TlsError::Io(error) => Self::Io(error),
            broken => Self::BrokenTls(Box::new(broken)),
        }
    }

    /// What to do about it.
    pub fn advice(&self) -> Advice {
        match self {
            Self::AllHosts(errors) => advice_of_all(errors),
            Self::Connect { .. }
            | Self::Resolve { .. }
            | Self::ConnectTimeout { .. }
            | Self::OpeningTimeout
            | Self::NoHost
            | Self::Io(_)
            | Self::Closed
            | Self::Protocol(_)
            | Self::Unexpected(_)
            | Self::Negotiation(_)
            | Self::LinkAnswer(_)
            | Self::InvalidAnswer { .. }
            | Self::BehindUs { upstream: BehindUpstream::Standby, .. }
            | Self::Append(
                AppendError::Gap { .. } | AppendError::Corrupt(_) | AppendError::TooMuchToReplace { .. },
            ) => Advice::Retry,
            Self::Server(error) if error.is(SqlState::CANNOT_CONNECT_NOW) => Advice::Retry,
            Self::Server(_)
            | Self::Scram(_)
            | Self::NoPassword
            | Self::NoRandomness
            | Self::Conninfo(_)
            | Self::PeerCredentials(_)
            | Self::UnknownPeer(_)
            | Self::WrongPeer { .. }
            | Self::NoChannelBinding(_)
            | Self::NoTls
            | Self::NoAlpn
            | Self::ErrorBeforeTls
            | Self::InvalidTlsAnswer(_)
            | Self::NoCertificate(_)
            | Self::OldProtocol { .. }
            | Self::LinkDeclined { .. }
            | Self::OtherServer { .. }
            | Self::WrongSessionAttributes(_)
            | Self::StandbyUnasked => Advice::RetryLater,
            Self::Tls { source, .. } | Self::BrokenTls(source) if source.is_lasting() => Advice::RetryLater,
            Self::Tls { .. } | Self::BrokenTls(_) => Advice::Retry,
            Self::Link(error) if error.needs_a_person() => Advice::TellAHuman,
            Self::Link(_) => Advice::Retry,
            Self::Unsupported(_)
            | Self::WrongSystem { .. }
            | Self::WrongPageSize { .. }
            | Self::WrongSegmentSize { .. }
            | Self::Loop { .. }
            | Self::Refused(_)
            | Self::Forked { .. }
            | Self::ForkedBefore { .. }
            | Self::EndedEarly { .. }
            | Self::WalRemoved { .. }
            | Self::SlotGone(_)
            | Self::SlotAbsent(_)
            | Self::SlotInvalidated { .. }
            | Self::History(_)
            | Self::BehindUs { upstream: BehindUpstream::Primary, .. }
            | Self::Append(AppendError::Diverged { .. } | AppendError::Store(_))
            | Self::Store(_) => Advice::TellAHuman,
        }
    }

    /// Whether it says something of that server which its checks before did not: another may do.
    pub fn speaks_against_the_server(&self) -> bool {
        matches!(
            self,
            Self::WalRemoved { .. }
                | Self::SlotGone(_)
                | Self::SlotInvalidated { .. }
                | Self::EndedEarly { .. }
                | Self::BehindUs { .. }
                | Self::Append(AppendError::Diverged { .. } | AppendError::Corrupt(_))
                | Self::Store(StoreError::BadSwitch { .. })
                | Self::Link(LinkError::Mismatch(_))
        )
    }

    /// Whether it would perhaps not have come without the compressed link on which it came.
    pub fn is_of_the_link(&self, on_link: bool) -> bool {
        match self {
            Self::Link(error) => !error.needs_a_person(),
            Self::LinkAnswer(_) => true,
            Self::Protocol(_) | Self::Append(AppendError::Gap { .. } | AppendError::Corrupt(_)) => on_link,
            Self::AllHosts(errors) => errors.iter().any(|(_, error)| error.is_of_the_link(false)),
            _ => false,
        }
    }

    /// Whether a server of our cluster has answered and is not followed: a slot of ours there would keep WAL for nobody. One of
    /// another cluster, or that gets its WAL from here, has none of ours.
    pub fn sets_the_server_aside(&self) -> bool {
        matches!(
            self,
            Self::WrongSessionAttributes(_)
                | Self::StandbyUnasked
                | Self::WrongPageSize { .. }
                | Self::Refused(_)
                | Self::Forked { .. }
                | Self::ForkedBefore { .. }
                | Self::History(_)
                | Self::BehindUs { .. }
        )
    }

    /// Whether somebody must act, whatever else is tried meanwhile: one of several servers is enough.
    pub fn needs_a_person(&self) -> bool {
        match self {
            Self::AllHosts(errors) => errors.iter().any(|(_, error)| error.needs_a_person()),
            other => other.advice() == Advice::TellAHuman,
        }
    }

    /// Whether the server, or what the connection string demands of it, will most likely refuse the next attempt too. Only
    /// when this comes several times in a row must somebody act: they may be in the middle of a change.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Server(error) => {
                error.is(SqlState::INVALID_AUTHORIZATION_SPECIFICATION)
                    || error.is(SqlState::INVALID_PASSWORD)
                    || error.is(SqlState::INSUFFICIENT_PRIVILEGE)
            }
            Self::Scram(_)
            | Self::NoPassword
            | Self::Conninfo(_)
            | Self::PeerCredentials(_)
            | Self::UnknownPeer(_)
            | Self::WrongPeer { .. }
            | Self::NoChannelBinding(_)
            | Self::NoTls
            | Self::NoAlpn
            | Self::NoCertificate(_)
            | Self::OldProtocol { .. } => true,
            Self::Tls { source, .. } | Self::BrokenTls(source) => source.is_lasting(),
            Self::AllHosts(errors) => errors.iter().all(|(_, error)| error.is_refusal()),
            _ => false,
        }
    }

    /// The error and its causes in one line.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Whichever may pass soonest: a server that must not be followed does not keep us from looking for the others.
fn advice_of_all(errors: &[(String, UpstreamError)]) -> Advice {
    let advices = || errors.iter().map(|(_, error)| error.advice());
    [Advice::Retry, Advice::RetryLater]
        .into_iter()
        .find(|soon| advices().any(|advice| advice == *soon))
        .unwrap_or(Advice::TellAHuman)
}

fn loop_text(host: &str, relays: usize) -> String {
    match relays {
        0 => format!("the upstream {host} is this relay itself"),
        _ => format!(
            "the upstream {host} gets its WAL from this relay, through {relays} of the relays that it names: a loop"
        ),
    }
}

fn all_hosts(errors: &[(String, UpstreamError)]) -> String {
    let told: Vec<_> = errors.iter().map(|(host, error)| format!("{host}: {}", error.chain())).collect();
    told.join("; ")
}

/// Least time between attempts at a server that said no.
pub(super) const REFUSED_DELAY_MIN: Duration = Duration::from_secs(1);
