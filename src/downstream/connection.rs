//! One client's bytes, both ways.
//!
//! Owns the buffers of a connection and their limits. What is to be sent waits in a queue of shared pieces, so that WAL
//! goes from the store's memory to the socket without a copy; reading and writing progress in the same wait, so that
//! neither can block the other. Knows frames, but not what a message means.

use std::{
    collections::VecDeque,
    future::poll_fn,
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::{Buf, Bytes, BytesMut};
use rustix::{fs::MemfdFlags, io::retry_on_intr};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use crate::downstream::walsender::now;
use crate::net::tls::{ServerTls, TlsError, TlsStart};
use crate::net::{Socket, TlsFacts};
use crate::protocol::{DecodeError, QUERY_BYTES_MAX, STARTUP_PACKET_BYTES_MAX, frontend};

/// What a connection runs over.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Whether TLS may be spoken over it.
    fn may_be_encrypted(&self) -> bool;

    /// Goes through a TLS handshake; `early` came off the stream before. After a failure the stream is of no more use.
    fn accept_tls(
        &mut self,
        early: Bytes,
        tls: &ServerTls,
        start: TlsStart,
    ) -> impl Future<Output = Result<TlsFacts, TlsError>> + Send;
}

impl Stream for Socket {
    fn may_be_encrypted(&self) -> bool {
        Self::may_be_encrypted(self)
    }

    async fn accept_tls(
        &mut self,
        early: Bytes,
        tls: &ServerTls,
        start: TlsStart,
    ) -> Result<TlsFacts, TlsError> {
        Self::accept_tls(self, early, tls, start).await
    }
}

/// A client's connection.
pub(super) struct Connection<S> {
    stream: S,
    incoming: BytesMut,
    pub(super) outgoing: Outgoing,
    /// What the stream has taken may still be in its own buffer.
    is_unflushed: bool,
    /// When the stream took something last.
    took_at: Option<Instant>,
    is_encrypted: bool,
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("connection to client lost")]
    Io(#[from] io::Error),
    #[error("unexpected EOF on client connection")]
    Closed,
    #[error("client broke the protocol")]
    Protocol(#[from] DecodeError),
}

/// What [`Connection::exchange`] came back with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exchanged {
    /// Bytes came in.
    Received,
    /// Nothing is waiting to be sent any longer.
    Sent,
    /// The client will send nothing more.
    Closed,
}

/// Whether an exchange takes bytes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// Yes, up to the buffer's limit.
    On,
    /// Not now.
    Off,
}

impl<S: Stream> Connection<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            incoming: BytesMut::new(),
            outgoing: Outgoing::default(),
            is_unflushed: false,
            took_at: None,
            is_encrypted: false,
        }
    }

    /// Whether TLS may be spoken over it.
    pub(super) fn may_be_encrypted(&self) -> bool {
        self.stream.may_be_encrypted()
    }

    /// When it took something last of what was to be sent.
    pub(super) fn took_at(&self) -> Option<Instant> {
        self.took_at
    }

    /// Whether TLS is spoken over it: then what is sent is looked at, and not only handed to the kernel.
    pub(super) fn is_encrypted(&self) -> bool {
        self.is_encrypted
    }

    /// Goes through a TLS handshake, which begins with what came in and was not decoded. Everything must be sent.
    pub(super) async fn accept_tls(
        &mut self,
        tls: &ServerTls,
        start: TlsStart,
    ) -> Result<TlsFacts, TlsError> {
        let early = self.incoming.split().freeze();
        self.is_encrypted = true;
        self.stream.accept_tls(early, tls, start).await
    }

    /// Reads until a message is there whole; what is waiting to be sent stays where it is. Cancel-safe.
    pub(super) async fn read_message(
        &mut self,
        body_bytes_max: usize,
    ) -> Result<frontend::Message, ConnectionError> {
        loop {
            if let Some(message) = self.decode_message(body_bytes_max)? {
                return Ok(message);
            }
            self.fill().await?;
        }
    }

    /// Takes a message that is there whole; reads nothing.
    pub(super) fn decode_message(
        &mut self,
        body_bytes_max: usize,
    ) -> Result<Option<frontend::Message>, DecodeError> {
        frontend::Message::decode(&mut self.incoming, body_bytes_max)
    }

    /// Bytes that came in and were not decoded.
    pub(super) fn incoming(&mut self) -> &mut BytesMut {
        &mut self.incoming
    }

    /// Waits for more bytes, or for nothing once there are enough. Cancel-safe.
    pub(super) async fn fill_bounded(&mut self) -> Result<(), ConnectionError> {
        if self.incoming.len() >= INCOMING_BYTES_MAX {
            return std::future::pending().await;
        }
        self.fill().await
    }

    /// Waits for more bytes. Cancel-safe.
    pub(super) async fn fill(&mut self) -> Result<(), ConnectionError> {
        match poll_fn(|context| self.poll_read(context)).await? {
            0 => Err(ConnectionError::Closed),
            _ => Ok(()),
        }
    }

    /// Reads and writes what it can; comes back when bytes came in, or when everything is sent. Never comes back when
    /// there is neither anything to send nor a wish to read. Cancel-safe: nothing is lost when it is dropped.
    pub(super) async fn exchange(&mut self, reading: Reading) -> io::Result<Exchanged> {
        poll_fn(|context| {
            if reading == Reading::On
                && self.incoming.len() < INCOMING_BYTES_MAX
                && let Poll::Ready(read) = self.poll_read(context)?
            {
                let exchanged = if read == 0 { Exchanged::Closed } else { Exchanged::Received };
                return Poll::Ready(Ok(exchanged));
            }
            if self.outgoing.is_empty() && !self.is_unflushed {
                return Poll::Pending;
            }
            ready!(self.poll_send(context))?;
            Poll::Ready(Ok(Exchanged::Sent))
        })
        .await
    }

    /// Waits until everything is sent.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        poll_fn(|context| self.poll_send(context)).await
    }

    /// Ends our direction of the connection.
    pub(super) async fn shutdown(&mut self) -> io::Result<()> {
        self.stream.shutdown().await
    }

    fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut space = [MaybeUninit::<u8>::uninit(); READ_BYTES];
        let mut buffer = ReadBuf::uninit(&mut space);
        ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer))?;
        self.incoming.extend_from_slice(buffer.filled());
        Poll::Ready(Ok(buffer.filled().len()))
    }

    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.outgoing.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let count = self.outgoing.fill_slices(&mut slices);
            let slices = slices.get(..count).unwrap_or_default();
            let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(context, slices))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.outgoing.advance(written);
            self.is_unflushed = true;
            self.took_at = Some(now());
        }
        ready!(Pin::new(&mut self.stream).poll_flush(context))?;
        self.is_unflushed = false;
        Poll::Ready(Ok(()))
    }
}

/// What waits to be sent, in order.
#[derive(Default)]
pub(super) struct Outgoing {
    pieces: VecDeque<Bytes>,
    /// Small messages behind the pieces, not yet one itself.
    control: BytesMut,
    bytes: usize,
}

impl Outgoing {
    /// Appends small messages by `write`.
    pub(super) fn encode(&mut self, write: impl FnOnce(&mut BytesMut)) {
        let before = self.control.len();
        write(&mut self.control);
        self.bytes += self.control.len() - before;
    }

    /// Appends a message of WAL: its header is copied, its bytes are shared.
    pub(super) fn push_wal(&mut self, header: &[u8], wal: Vec<Bytes>) {
        self.encode(|out| out.extend_from_slice(header));
        self.seal_control();
        for piece in wal.into_iter().filter(|piece| !piece.is_empty()) {
            self.bytes += piece.len();
            self.pieces.push_back(piece);
        }
    }

    /// Whether another message may be added now.
    pub(super) fn has_room(&self) -> bool {
        self.bytes < UNSENT_BYTES_MAX && self.pieces.len() < UNSENT_PIECES_MAX
    }

    /// Whether a small message may be added, which answers a client or asks him: also while there is no room for WAL.
    pub(super) fn has_room_for_control(&self) -> bool {
        let is_bounded = self.control.len() < CONTROL_BYTES_MAX
            && self.pieces.len() < UNSENT_PIECES_MAX + CONTROL_PIECES_MAX;
        is_bounded || self.has_room()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Copies everything into memory of its own: a client that takes nothing must not hold the store's memory. Returns how
    /// many bytes.
    ///
    /// A piece may be of a file whose pages were evicted since it was brought in. The kernel does the copying: where such
    /// a page cannot be read again it answers with an error, and touching it would be a signal that ends the process.
    pub(super) fn detach(&mut self) -> io::Result<u64> {
        self.seal_control();
        let copy = rustix::fs::memfd_create("walrelay unsent", MemfdFlags::CLOEXEC)?;
        for piece in &self.pieces {
            let mut rest = piece.as_ref();
            while !rest.is_empty() {
                let written = retry_on_intr(|| rustix::io::write(&copy, rest))?;
                rest = rest.get(written..).unwrap_or_default();
            }
        }
        let mut own = BytesMut::zeroed(self.bytes);
        let mut filled = 0;
        while let Some(space) = own.get_mut(filled..).filter(|space| !space.is_empty()) {
            match retry_on_intr(|| rustix::io::pread(&copy, &mut *space, filled as u64))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => filled += read,
            }
        }
        self.pieces.clear();
        self.pieces.push_back(own.freeze());
        Ok(filled as u64)
    }

    fn seal_control(&mut self) {
        if !self.control.is_empty() {
            self.pieces.push_back(self.control.split().freeze());
        }
    }

    fn fill_slices<'a>(&'a mut self, slices: &mut [IoSlice<'a>]) -> usize {
        self.seal_control();
        let count = self.pieces.len().min(slices.len());
        for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
            *slice = IoSlice::new(piece);
        }
        count
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes = self.bytes.saturating_sub(written);
        while let Some(piece) = self.pieces.front_mut() {
            if piece.len() > written {
                piece.advance(written);
                return;
            }
            written -= piece.len();
            self.pieces.pop_front();
        }
    }
}

/// A message's type byte, for errors that name it.
pub(super) fn tag_of(message: &frontend::Message) -> u8 {
    match message {
        frontend::Message::Query(_) => b'Q',
        frontend::Message::Password(_) => b'p',
        frontend::Message::CopyData(_) => b'd',
        frontend::Message::CopyDone => b'c',
        frontend::Message::CopyFail(_) => b'f',
        frontend::Message::Terminate => b'X',
        frontend::Message::Sync => b'S',
        frontend::Message::Flush => b'H',
        frontend::Message::FunctionCall => b'F',
        frontend::Message::Extended(tag) => *tag,
    }
}

/// More is added to what waits only below this.
pub(super) const UNSENT_BYTES_MAX: usize = 512 << 10;
/// Each piece may hold a whole receive block or mapping.
const UNSENT_PIECES_MAX: usize = 64;
/// Small messages that wait behind WAL, as bytes that came together and as pieces: then nothing more is answered.
const CONTROL_BYTES_MAX: usize = 4096;
const CONTROL_PIECES_MAX: usize = 64;
/// Most undecoded bytes kept of a client: the longest message and what came in with it.
const INCOMING_BYTES_MAX: usize = QUERY_BYTES_MAX + READ_BYTES;
/// Bytes taken in at once: clients say little.
const READ_BYTES: usize = 4096;
/// Pieces given to one system call.
const SLICES_MAX: usize = 64;

const _: () = assert!(STARTUP_PACKET_BYTES_MAX < INCOMING_BYTES_MAX);

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::{Disk, RealDisk};

    impl Stream for tokio::io::DuplexStream {
        fn may_be_encrypted(&self) -> bool {
            false
        }

        async fn accept_tls(&mut self, _: Bytes, _: &ServerTls, _: TlsStart) -> Result<TlsFacts, TlsError> {
            Err(TlsError::NoAlpn)
        }
    }

    #[tokio::test]
    async fn pieces_and_messages_go_out_in_order_through_a_narrow_pipe() {
        let (client, server) = tokio::io::duplex(7);
        let mut connection = Connection::new(server);
        connection.outgoing.encode(|out| out.extend_from_slice(b"one "));
        let wal = vec![Bytes::from_static(b"three "), Bytes::new(), Bytes::from_static(b"four ")];
        connection.outgoing.push_wal(b"two ", wal);
        connection.outgoing.encode(|out| out.extend_from_slice(b"five"));
        let reading = tokio::spawn(async move {
            let (mut client, mut text) = (client, Vec::new());
            tokio::io::AsyncReadExt::read_to_end(&mut client, &mut text).await.unwrap();
            text
        });
        connection.flush().await.unwrap();
        assert!(connection.outgoing.is_empty());
        drop(connection);
        assert_eq!(reading.await.unwrap(), b"one two three four five");
    }

    #[tokio::test]
    async fn replies_are_read_while_nothing_can_be_sent() {
        let (mut client, server) = tokio::io::duplex(64);
        let mut connection = Connection::new(server);
        connection.outgoing.push_wal(b"head", vec![Bytes::from(vec![0; 10_000])]);
        client.write_all(b"reply").await.unwrap();
        assert_eq!(connection.exchange(Reading::On).await.unwrap(), Exchanged::Received);
        assert_eq!(connection.incoming(), &b"reply"[..]);
        assert!(!connection.outgoing.is_empty());
    }

    #[test]
    fn the_queue_is_bounded_by_bytes_and_by_pieces() {
        let mut outgoing = Outgoing::default();
        outgoing.push_wal(b"h", vec![Bytes::from(vec![0; UNSENT_BYTES_MAX])]);
        assert!(!outgoing.has_room());
        let mut outgoing = Outgoing::default();
        while outgoing.has_room() {
            outgoing.push_wal(b"h", vec![Bytes::from_static(b"x")]);
        }
        assert!(outgoing.pieces.len() <= UNSENT_PIECES_MAX + 2);
        let bytes = outgoing.bytes;
        outgoing.encode(|out| out.extend_from_slice(b"tail"));
        assert_eq!(outgoing.detach().unwrap(), bytes as u64 + 4);
        assert_eq!((outgoing.pieces.len(), outgoing.bytes), (1, bytes + 4));
        assert!(outgoing.has_room());
    }

    #[test]
    fn small_messages_have_room_behind_a_full_queue_and_not_without_end() {
        let mut outgoing = Outgoing::default();
        outgoing.push_wal(b"h", vec![Bytes::from(vec![0; UNSENT_BYTES_MAX])]);
        let mut count = 0;
        while outgoing.has_room_for_control() {
            outgoing.encode(|out| out.extend_from_slice(b"pong"));
            // As when the client takes nothing.
            outgoing.seal_control();
            count += 1;
        }
        assert!((CONTROL_PIECES_MAX..2 * CONTROL_PIECES_MAX + UNSENT_PIECES_MAX).contains(&count), "{count}");
        outgoing.detach().unwrap();
        assert!(!outgoing.has_room() && outgoing.has_room_for_control());
        outgoing.encode(|out| out.extend_from_slice(&[0; CONTROL_BYTES_MAX]));
        assert!(!outgoing.has_room_for_control());
    }

    #[test]
    fn a_page_that_is_gone_is_an_error_and_not_the_end_of_the_process() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 16).unwrap();
        let mapping = RealDisk.map(file.path(), 1 << 16).unwrap();
        let wal = || mapping.slice(0..1 << 16, Arc::new(())).unwrap();
        let mut outgoing = Outgoing::default();
        outgoing.push_wal(b"header", vec![wal()]);
        assert_eq!(outgoing.detach().unwrap(), 6 + (1 << 16));
        assert_eq!(outgoing.pieces, [[&b"header"[..], &[0; 1 << 16]].concat()]);
        outgoing.push_wal(b"header", vec![wal()]);
        // As if the disk could not give them back.
        file.as_file().set_len(0).unwrap();
        assert_eq!(outgoing.detach().unwrap_err().raw_os_error(), Some(libc::EFAULT));
    }
}
