//! A proxy between two peers of the replication protocol that spoils what passes, and writes down what passed.
//!
//! Knows just enough of the wire: messages from the server, and what the client says in a stream. No TLS.

use std::io::{Read, Result, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::lab::free_port;
use super::lsn;

/// What becomes of a message from the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Forward,
    /// A gap, if it was WAL.
    Drop,
    /// The connection ends here, before the message.
    Cut,
    /// These whole messages in its place.
    Replace(Vec<Vec<u8>>),
}

/// Sees every message from the server, may change it in place, and decides. Called from the connection's thread.
pub(crate) type Edit = Box<dyn FnMut(&mut Vec<u8>) -> Verdict + Send>;

/// Sees name and value of each parameter in a client's startup packet, and may change them.
pub(crate) type EditStartup = Box<dyn FnMut(&mut Vec<(String, String)>) + Send>;

/// Sees every command from the client before the server does, and may take its time. Called from the connection's thread.
pub(crate) type BeforeCommand = Box<dyn FnMut(&str) + Send>;

/// Positions that the client told in one standby status update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reported {
    pub(crate) write: u64,
    pub(crate) flush: u64,
    pub(crate) apply: u64,
}

/// What passed, over all connections.
#[derive(Default)]
pub(crate) struct Passed {
    /// Positions of START_REPLICATION, in order.
    pub(crate) starts: Vec<u64>,
    /// End of the WAL delivered to the client.
    pub(crate) delivered: u64,
    /// Bytes of WAL delivered, repeated ones counted again.
    pub(crate) wal_bytes: u64,
    /// The last status update, and how many there were.
    pub(crate) reported: Option<Reported>,
    pub(crate) status_updates: u64,
    /// Highest flush position told so far, and in each stream.
    pub(crate) flush_max: u64,
    pub(crate) flush_max_of: Vec<u64>,
    /// Highest write position told beside a flush position; with flush 0 nothing is vouched for.
    pub(crate) write_max: u64,
    /// What the client told that it may never tell.
    pub(crate) violations: Vec<String>,
}

#[derive(Default)]
struct State {
    target: AtomicU16,
    /// Where connections for SQL lead; 0: where all do.
    sql_target: AtomicU16,
    closed: AtomicBool,
    stalled: AtomicBool,
    delay_ms: AtomicU64,
    connections: AtomicU64,
    ended: AtomicBool,
    edit: Mutex<Option<Edit>>,
    before_command: Mutex<Option<BeforeCommand>>,
    edit_startup: Mutex<Option<EditStartup>>,
    passed: Mutex<Passed>,
    streams: Mutex<Vec<TcpStream>>,
}

pub(crate) struct Proxy {
    pub(crate) port: u16,
    state: Arc<State>,
}

impl Proxy {
    pub(crate) fn to(target_port: u16) -> Self {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let state = Arc::new(State { target: AtomicU16::new(target_port), ..State::default() });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if shared.ended.load(Ordering::Relaxed) {
                    return;
                }
                if let Ok(client) = client {
                    accept(&shared, client);
                }
            }
        });
        Self { port, state }
    }

    /// Ends every connection and accepts no more (they are closed at once) until `open`.
    pub(crate) fn close(&self) {
        self.state.closed.store(true, Ordering::SeqCst);
        self.cut();
    }

    pub(crate) fn open(&self) {
        self.state.closed.store(false, Ordering::SeqCst);
    }

    /// Ends every connection now; new ones may come.
    pub(crate) fn cut(&self) {
        for stream in self.state.streams.lock().unwrap().drain(..) {
            drop(stream.shutdown(Shutdown::Both));
        }
    }

    /// Leads to another server from now on, as an address that has moved: what was open ends.
    pub(crate) fn lead_to(&self, target_port: u16) {
        self.state.target.store(target_port, Ordering::SeqCst);
        self.cut();
    }

    /// Connections for SQL lead to another server from now on, as behind an address that several servers share.
    pub(crate) fn lead_sql_to(&self, target_port: u16) {
        self.state.sql_target.store(target_port, Ordering::SeqCst);
    }

    /// From now on `look` hears every command before the server does.
    pub(crate) fn before_command(&self, look: impl FnMut(&str) + Send + 'static) {
        *self.state.before_command.lock().unwrap() = Some(Box::new(look));
    }

    /// From now on `edit` sees what each client says first.
    pub(crate) fn edit_startup(&self, edit: impl FnMut(&mut Vec<(String, String)>) + Send + 'static) {
        *self.state.edit_startup.lock().unwrap() = Some(Box::new(edit));
    }

    /// Holds everything back, in both directions, without ending a connection.
    pub(crate) fn stall(&self, stalled: bool) {
        self.state.stalled.store(stalled, Ordering::SeqCst);
    }

    /// Every chunk waits this long, in each direction.
    pub(crate) fn delay(&self, delay: Duration) {
        self.state.delay_ms.store(u64::try_from(delay.as_millis()).unwrap(), Ordering::SeqCst);
    }

    /// From now on `edit` sees every message from the server.
    pub(crate) fn edit(&self, edit: impl FnMut(&mut Vec<u8>) -> Verdict + Send + 'static) {
        *self.state.edit.lock().unwrap() = Some(Box::new(edit));
    }

    pub(crate) fn edit_nothing(&self) {
        *self.state.edit.lock().unwrap() = None;
    }

    /// Looks at what passed so far.
    pub(crate) fn passed<T>(&self, look: impl FnOnce(&Passed) -> T) -> T {
        look(&self.state.passed.lock().unwrap())
    }

    /// Connections accepted so far, but for those that only look how the relay stands.
    pub(crate) fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// Panics if the client ever broke the rules of status updates.
    pub(crate) fn assert_honest(&self) {
        self.passed(|passed| assert!(passed.violations.is_empty(), "{:#?}", passed.violations));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::SeqCst);
        self.close();
        drop(TcpStream::connect(("127.0.0.1", self.port))); // wakes the listener
    }
}

/// Flips one bit of the WAL byte at `position`, the first time it passes.
pub(crate) fn flip_once(position: u64) -> impl FnMut(&mut Vec<u8>) -> Verdict + Send {
    let mut done = false;
    move |message| {
        if let Some((start, wal)) = wal_in(message)
            && !done
            && (start..start + wal.len() as u64).contains(&position)
        {
            done = true;
            let at = message.len() - wal_length(message) + usize::try_from(position - start).unwrap();
            message[at] ^= 0x10;
        }
        Verdict::Forward
    }
}

/// Drops the message that carries `position`, the first time it passes.
pub(crate) fn drop_once(position: u64) -> impl FnMut(&mut Vec<u8>) -> Verdict + Send {
    let mut done = false;
    move |message| match wal_in(message) {
        Some((start, wal)) if !done && (start..start + wal.len() as u64).contains(&position) => {
            done = true;
            Verdict::Drop
        }
        _ => Verdict::Forward,
    }
}

/// Cuts every WAL message into pieces whose lengths `next_length` gives.
pub(crate) fn in_pieces(
    mut next_length: impl FnMut() -> usize + Send,
) -> impl FnMut(&mut Vec<u8>) -> Verdict + Send {
    move |message| {
        let Some((start, wal)) = wal_in(message) else { return Verdict::Forward };
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < wal.len() {
            let end = (done + next_length().max(1)).min(wal.len());
            pieces.push(wal_message(start + done as u64, &message[14..30], &wal[done..end]));
            done = end;
        }
        Verdict::Replace(pieces)
    }
}

/// Start and bytes, if this message of the server carries WAL.
pub(crate) fn wal_in(message: &[u8]) -> Option<(u64, &[u8])> {
    let is_wal = message.first() == Some(&b'd') && message.get(5) == Some(&b'w') && message.len() >= 30;
    is_wal.then(|| (u64::from_be_bytes(message[6..14].try_into().unwrap()), &message[30..]))
}

/// Leaves only so many bytes of the WAL in this message.
pub(crate) fn shorten_wal(message: &mut Vec<u8>, bytes: u64) {
    message.truncate(30 + usize::try_from(bytes).unwrap());
    let length = u32::try_from(message.len() - 1).unwrap();
    message[1..5].copy_from_slice(&length.to_be_bytes());
}

/// A frame of a compressed link.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    /// Where its WAL begins, if it says so: it may go on where the one before ended.
    pub(crate) start: Option<u64>,
    pub(crate) wal_bytes: u64,
    /// Where its payload begins in the message.
    pub(crate) payload: usize,
}

/// The frame, if this message of the server is one.
pub(crate) fn frame_in(message: &[u8]) -> Option<Frame> {
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    match (message.first()?, message.get(5..7)?) {
        (b'd', b"zf") if message.len() >= 53 => Some(Frame {
            start: Some(number(&message[21..29])),
            wal_bytes: number(&message[45..49]),
            payload: 53,
        }),
        (b'd', b"zs") if message.len() >= 23 => {
            Some(Frame { start: None, wal_bytes: number(&message[8..11]), payload: 23 })
        }
        _ => None,
    }
}

fn wal_length(message: &[u8]) -> usize {
    message.len() - 30
}

fn wal_message(start: u64, rest_of_header: &[u8], wal: &[u8]) -> Vec<u8> {
    let mut message = vec![b'd'];
    message.extend(u32::try_from(4 + 25 + wal.len()).unwrap().to_be_bytes());
    message.push(b'w');
    message.extend(start.to_be_bytes());
    message.extend(rest_of_header);
    message.extend(wal);
    message
}

fn accept(state: &Arc<State>, client: TcpStream) {
    let is_closed = state.closed.load(Ordering::SeqCst);
    let server = TcpStream::connect(("127.0.0.1", target(state, &client)));
    let Some(server) = server.ok().filter(|_| !is_closed) else {
        state.connections.fetch_add(1, Ordering::Relaxed);
        return;
    };
    drop((client.set_nodelay(true), server.set_nodelay(true)));
    {
        let mut streams = state.streams.lock().unwrap();
        streams.push(client.try_clone().unwrap());
        streams.push(server.try_clone().unwrap());
    }
    // Bytes that the server must answer with one raw byte: requests for encryption.
    let raw_answers = Arc::new(AtomicU64::new(0));
    let (down, up) = (Arc::clone(state), Arc::clone(state));
    let (client_read, server_write) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    let expected = Arc::clone(&raw_answers);
    std::thread::spawn(move || {
        drop(pass_up(&up, client_read, &server_write, &raw_answers));
        drop(server_write.shutdown(Shutdown::Both));
    });
    std::thread::spawn(move || {
        drop(pass_down(&down, server, &client, &expected));
        drop(client.shutdown(Shutdown::Both));
    });
}

/// Where this connection leads.
fn target(state: &State, client: &TcpStream) -> u16 {
    let (target, for_sql) = (state.target.load(Ordering::SeqCst), state.sql_target.load(Ordering::SeqCst));
    let mut first = [0; 1024];
    if for_sql == 0 {
        return target;
    }
    let read = client.peek(&mut first).unwrap_or(0);
    let is_replication = first[..read].windows(REPLICATION.len()).any(|part| part == REPLICATION);
    if is_replication { target } else { for_sql }
}

/// In the startup packet of connections for replication.
const REPLICATION: &[u8] = b"replication\0true\0";

/// Server to client, message by message.
fn pass_down(
    state: &State,
    mut server: TcpStream,
    mut client: &TcpStream,
    raw_answers: &AtomicU64,
) -> Result<()> {
    // Of the WAL that passed last.
    let mut end = 0;
    loop {
        let mut first = [0];
        server.read_exact(&mut first)?;
        if raw_answers.load(Ordering::SeqCst) > 0 {
            raw_answers.fetch_sub(1, Ordering::SeqCst);
            client.write_all(&first)?;
            continue;
        }
        let mut length = [0; 4];
        server.read_exact(&mut length)?;
        let mut message = [&first[..], &length].concat();
        message.resize(1 + u32::from_be_bytes(length) as usize, 0);
        server.read_exact(&mut message[5..])?;
        let verdict = state.edit.lock().unwrap().as_mut().map_or(Verdict::Forward, |edit| edit(&mut message));
        let messages = match verdict {
            Verdict::Forward => vec![message],
            Verdict::Drop => vec![],
            Verdict::Cut => return Ok(()),
            Verdict::Replace(messages) => messages,
        };
        wait_turn(state);
        for message in messages {
            let plain = wal_in(&message).map(|(start, wal)| (start, wal.len() as u64));
            let framed = frame_in(&message).map(|frame| (frame.start.unwrap_or(end), frame.wal_bytes));
            if let Some((start, length)) = plain.or(framed) {
                end = start.saturating_add(length);
                let mut passed = state.passed.lock().unwrap();
                passed.delivered = passed.delivered.max(end);
                passed.wal_bytes += length;
            }
            client.write_all(&message)?;
        }
    }
}

/// End of the application name of connections that only look.
const LOOK: &[u8] = b"_look\0";

/// Client to server: first its startup packets, then messages.
fn pass_up(
    state: &State,
    mut client: TcpStream,
    mut server: &TcpStream,
    raw_answers: &AtomicU64,
) -> Result<()> {
    loop {
        let mut length = [0; 4];
        client.read_exact(&mut length)?;
        let mut rest = vec![0; (u32::from_be_bytes(length) as usize).saturating_sub(4)];
        client.read_exact(&mut rest)?;
        let is_request = matches!(rest.get(..4), Some([0x04, 0xD2, 0x16, 0x2F | 0x30]));
        let is_look = rest.windows(LOOK.len()).any(|part| part == LOOK);
        if is_request {
            raw_answers.fetch_add(1, Ordering::SeqCst);
        } else if !is_look {
            state.connections.fetch_add(1, Ordering::Relaxed);
        }
        if !is_request && let Some(edit) = state.edit_startup.lock().unwrap().as_mut() {
            rest = edited_startup(&rest, edit);
        }
        let length = u32::try_from(rest.len() + 4).unwrap().to_be_bytes();
        server.write_all(&[&length[..], &rest].concat())?;
        if !is_request {
            break;
        }
    }
    let mut session = Session::default();
    loop {
        let mut head = [0; 5];
        client.read_exact(&mut head)?;
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
        let mut body = vec![0; length.saturating_sub(4)];
        client.read_exact(&mut body)?;
        session.note(&mut state.passed.lock().unwrap(), head[0], &body);
        if head[0] == b'Q'
            && let Some(look) = state.before_command.lock().unwrap().as_mut()
        {
            look(&String::from_utf8_lossy(&body));
        }
        wait_turn(state);
        server.write_all(&[&head[..], &body].concat())?;
    }
}

/// The startup packet behind its length: the version, then names and values.
fn edited_startup(packet: &[u8], edit: &mut EditStartup) -> Vec<u8> {
    let (version, texts) = packet.split_at(4);
    let texts: Vec<String> =
        texts.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned()).collect();
    let pairs = texts.chunks_exact(2).take_while(|pair| !pair[0].is_empty());
    let mut parameters: Vec<(String, String)> =
        pairs.map(|pair| (pair[0].clone(), pair[1].clone())).collect();
    edit(&mut parameters);
    let texts = parameters.iter().flat_map(|(name, value)| [name, value]);
    let mut edited = version.to_vec();
    texts.for_each(|text| edited.extend(text.bytes().chain([0])));
    edited.push(0);
    edited
}

/// What one client told in this connection; flush 0 may follow any value.
#[derive(Default)]
struct Session {
    last: Reported,
    /// Its last stream among all.
    stream: Option<usize>,
}

impl Session {
    fn note(&mut self, passed: &mut Passed, kind: u8, body: &[u8]) {
        if kind == b'Q'
            && let Some((_, command)) = String::from_utf8_lossy(body).split_once("START_REPLICATION ")
        {
            passed.starts.extend(command.split([' ', ';', '\0']).find(|word| word.contains('/')).map(lsn));
            passed.flush_max_of.resize(passed.starts.len(), 0);
            self.stream = passed.starts.len().checked_sub(1);
            self.last = Reported::default();
        }
        if kind == b'd' && body.first() == Some(&b'r') && body.len() >= 25 {
            let number = |at: usize| u64::from_be_bytes(body[at..at + 8].try_into().unwrap());
            let now = Reported { write: number(1), flush: number(9), apply: number(17) };
            let mut complain =
                |what: &str| passed.violations.push(format!("{what}: {now:X?} after {:X?}", self.last));
            if now.flush > now.write {
                complain("flush beyond write");
            }
            if now.apply > now.flush {
                complain("apply beyond flush");
            }
            if now.flush != 0 && now.flush < self.last.flush {
                complain("flush went back");
            }
            // A report with flush 0 vouches for nothing: its write is what was received, and the next may be what was written.
            if now.write != 0 && now.write < self.last.write && self.last.flush != 0 {
                complain("write went back");
            }
            if now.write > passed.delivered {
                passed
                    .violations
                    .push(format!("write {:X} beyond delivered {:X}", now.write, passed.delivered));
            }
            self.last = now;
            passed.reported = Some(now);
            passed.status_updates += 1;
            passed.flush_max = passed.flush_max.max(now.flush);
            if now.flush != 0 {
                passed.write_max = passed.write_max.max(now.write);
            }
            if let Some(most) = self.stream.and_then(|stream| passed.flush_max_of.get_mut(stream)) {
                *most = now.flush.max(*most);
            }
        }
    }
}

fn wait_turn(state: &State) {
    let delay = state.delay_ms.load(Ordering::SeqCst);
    if delay > 0 {
        std::thread::sleep(Duration::from_millis(delay));
    }
    while state.stalled.load(Ordering::SeqCst) && !state.closed.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(5));
    }
}
