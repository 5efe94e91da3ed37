//! A server that only listens: it declines encryption, takes the startup packet, asks for a password and goes.

use std::{
    io::{Read, Write},
    net::TcpListener,
    os::unix::net::UnixListener,
    path::Path,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::Duration,
};

/// What a client sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Of the startup packet, in order.
    pub(crate) parameters: Vec<(String, String)>,
    /// In answer to the question for it.
    pub(crate) password: Option<String>,
}

/// A server on a TCP port, and on a Unix socket of that port.
pub(crate) struct Server {
    pub(crate) port: u16,
    sent: Receiver<Sent>,
}

impl Server {
    /// Listens on a free port of 127.0.0.1, and in `directory`. The threads end with the test.
    pub(crate) fn start(directory: &Path) -> Self {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let unix = UnixListener::bind(directory.join(format!(".s.PGSQL.{port}"))).unwrap();
        let (sender, sent) = sync_channel(4);
        let unix_sender = sender.clone();
        thread::spawn(move || tcp.incoming().for_each(|stream| serve(stream.unwrap(), &sender)));
        thread::spawn(move || unix.incoming().for_each(|stream| serve(stream.unwrap(), &unix_sender)));
        Self { port, sent }
    }

    /// What the last client sent.
    pub(crate) fn sent(&self) -> Option<Sent> {
        let first = self.sent.recv_timeout(Duration::from_secs(10)).ok();
        self.sent.try_iter().last().or(first)
    }
}

fn serve(mut stream: impl Read + Write, sent: &SyncSender<Sent>) {
    let Some(parameters) = startup(&mut stream) else { return };
    // AuthenticationCleartextPassword
    let asked = stream.write_all(&[b'R', 0, 0, 0, 8, 0, 0, 0, 3]);
    let password = asked.ok().and_then(|()| password(&mut stream));
    let _ = stream.write_all(b"E\0\0\0\x1dSFATAL\0C28P01\0Mno entry\0\0");
    let _ = sent.send(Sent { parameters, password });
}

fn startup(stream: &mut (impl Read + Write)) -> Option<Vec<(String, String)>> {
    loop {
        let packet = packet(stream)?;
        let (code, rest) = packet.split_first_chunk::<4>()?;
        // SSLRequest and GSSENCRequest: no.
        if matches!(u32::from_be_bytes(*code), 80_877_103 | 80_877_104) {
            stream.write_all(b"N").ok()?;
            continue;
        }
        let mut words = rest.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
        let mut parameters = Vec::new();
        while let (Some(name), Some(value)) = (words.next().filter(|name| !name.is_empty()), words.next()) {
            parameters.push((name, value));
        }
        return Some(parameters);
    }
}

fn password(stream: &mut impl Read) -> Option<String> {
    let mut tag = [0];
    stream.read_exact(&mut tag).ok()?;
    let text = packet(stream)?;
    (tag == [b'p'])
        .then(|| String::from_utf8_lossy(text.split(|byte| *byte == 0).next().unwrap()).into_owned())
}

/// The rest of a message after its length.
fn packet(stream: &mut impl Read) -> Option<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).ok()?;
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap();
    let mut packet = vec![0; length.checked_sub(4).filter(|rest| *rest <= 10_000)?];
    stream.read_exact(&mut packet).ok()?;
    Some(packet)
}
