//! Two network namespaces, and between them a cable as long, narrow and bad as a test wants it.
//!
//! The kernel here may have no netem, so packets go from a TUN device of one namespace through this process to one of the
//! other: delay, rate, loss, reordering and flipped bits are decided here, and can be changed while it is in use. What it
//! carries is counted.

use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::lab;
use super::place;
use super::process::Program;

/// One direction of a cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    ToFar,
    ToNear,
}

/// What the cable does to each packet; the same in both directions, but where it is cut.
#[derive(Debug, Default)]
pub(crate) struct Cable {
    /// One way.
    delay_us: AtomicU64,
    /// Bits in a second; 0: any number.
    rate_bits: AtomicU64,
    /// Lost of a million packets.
    lost_ppm: AtomicU64,
    /// Held back by [`HELD_BACK`], of a million: others overtake them.
    reordered_ppm: AtomicU64,
    /// Packets with a TCP payload whose middle byte gets another bit, checksum and all, until none is left to spoil.
    to_flip: AtomicU64,
    /// To the far end, and to the near one.
    is_cut: [AtomicBool; 2],
    ended: AtomicBool,
}

/// The cable and its two ends.
pub(crate) struct Wan {
    pub(crate) near: String,
    pub(crate) far: String,
    pub(crate) cable: Arc<Cable>,
    to_far: Arc<AtomicU64>,
    to_near: Arc<AtomicU64>,
}

/// Addresses of the two ends.
pub(crate) const NEAR: &str = "10.88.0.1";
pub(crate) const FAR: &str = "10.88.0.2";

const HELD_BACK: Duration = Duration::from_millis(8);

impl Wan {
    /// A cable with this round trip. `None`, said in one line, where namespaces cannot be had.
    pub(crate) fn new(round_trip: Duration) -> Option<Self> {
        let (near, far) =
            (format!("walrelay-{}-near", std::process::id()), format!("walrelay-{}-far", std::process::id()));
        if !ip(&["netns", "add", &near])
            || !ip(&["netns", "add", &far])
            || !std::path::Path::new("/dev/net/tun").exists()
        {
            ip(&["netns", "del", &near]);
            lab::skip("needs root, iproute2, network namespaces and /dev/net/tun");
            return None;
        }
        let cable = Arc::new(Cable::default());
        cable.set_round_trip(round_trip);
        let (to_far, to_near) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let wan = Self { near, far, cable, to_far, to_near };
        let (near_end, far_end) = (tun(&wan.near), tun(&wan.far));
        for (namespace, own, peer) in [(&wan.near, NEAR, FAR), (&wan.far, FAR, NEAR)] {
            run(&["-n", namespace, "link", "set", "lo", "up"]);
            run(&["-n", namespace, "addr", "add", own, "peer", peer, "dev", DEVICE]);
            run(&["-n", namespace, "link", "set", DEVICE, "mtu", "1500", "up"]);
            use_cubic(namespace);
        }
        lay((&near_end, &far_end), Way::ToFar, &wan.cable, &wan.to_far);
        lay((&far_end, &near_end), Way::ToNear, &wan.cable, &wan.to_near);
        Some(wan)
    }

    /// Packets of this size at most, at both ends.
    pub(crate) fn set_packet_bytes(&self, bytes: u32) {
        for namespace in [&self.near, &self.far] {
            run(&["-n", namespace, "link", "set", DEVICE, "mtu", &bytes.to_string()]);
        }
    }

    /// How far the kernel lets the buffers of new connections grow, at both ends.
    pub(crate) fn set_buffer_limits(&self, send: u64, receive: u64) {
        for namespace in [&self.near, &self.far] {
            place::within(namespace, move || {
                std::fs::write("/proc/sys/net/ipv4/tcp_wmem", format!("4096 16384 {send}"))?;
                std::fs::write("/proc/sys/net/ipv4/tcp_rmem", format!("4096 131072 {receive}"))
            })
            .unwrap();
        }
    }

    /// Bytes of packets that have left for the far end.
    pub(crate) fn bytes_to_far(&self) -> u64 {
        self.to_far.load(Relaxed)
    }
}

impl Cable {
    pub(crate) fn set_round_trip(&self, round_trip: Duration) {
        self.delay_us.store(u64::try_from(round_trip.as_micros() / 2).unwrap(), Relaxed);
    }

    pub(crate) fn set_rate(&self, bits: u64) {
        self.rate_bits.store(bits, Relaxed);
    }

    pub(crate) fn set_lost_ppm(&self, ppm: u64) {
        self.lost_ppm.store(ppm, Relaxed);
    }

    pub(crate) fn set_reordered_ppm(&self, ppm: u64) {
        self.reordered_ppm.store(ppm, Relaxed);
    }

    /// Spoils so many packets from now on.
    pub(crate) fn flip(&self, packets: u64) {
        self.to_flip.store(packets, Relaxed);
    }

    /// How many are still to be spoiled.
    pub(crate) fn left_to_flip(&self) -> u64 {
        self.to_flip.load(Relaxed)
    }

    /// Nothing passes any more, and nobody is told.
    pub(crate) fn cut(&self) {
        self.cut_one_way(Way::ToFar);
        self.cut_one_way(Way::ToNear);
    }

    /// The same in one direction: what is said in the other still arrives.
    pub(crate) fn cut_one_way(&self, way: Way) {
        self.is_cut[way as usize].store(true, Relaxed);
    }

    pub(crate) fn mend(&self) {
        self.is_cut.iter().for_each(|is_cut| is_cut.store(false, Relaxed));
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        self.cable.ended.store(true, Relaxed);
        for namespace in [&self.near, &self.far] {
            ip(&["netns", "del", namespace]);
        }
    }
}

/// As most machines have it, whatever this one has. Where it is not among those that anybody may use, it is added to them.
fn use_cubic(namespace: &str) {
    const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
    let allowed = std::fs::read_to_string(ALLOWED).unwrap_or_default();
    if !allowed.split_whitespace().any(|name| name == "cubic") {
        std::fs::write(ALLOWED, format!("{} cubic", allowed.trim())).ok();
    }
    let chosen =
        place::within(namespace, || std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "cubic"));
    if let Err(error) = chosen {
        println!("congestion control stays as it is: {error}");
    }
}

const DEVICE: &str = "wan0";

fn ip(arguments: &[&str]) -> bool {
    Program::new("ip").args(arguments.iter().copied()).succeeds()
}

fn run(arguments: &[&str]) {
    Program::new("ip").args(arguments.iter().copied()).run();
}

/// A TUN device in the namespace; what is sent through it is read from the file.
fn tun(namespace: &str) -> File {
    place::within(namespace, || {
        // SAFETY: `request` is a whole `ifreq` with a name that ends with zeros; the descriptor that comes back is ours alone.
        #[allow(unsafe_code, reason = "no crate in use makes TUN devices")]
        unsafe {
            let descriptor = libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
            if descriptor < 0 {
                return Err(std::io::Error::last_os_error());
            }
            let file = File::from_raw_fd(descriptor);
            let mut request: libc::ifreq = std::mem::zeroed();
            for (to, from) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
                *to = from.cast_signed();
            }
            request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
            if libc::ioctl(descriptor, TUNSETIFF, &raw const request) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(file)
        }
    })
    .expect("a TUN device")
}

const TUNSETIFF: libc::c_ulong = 0x4004_54CA;

/// A packet on its way: the one that is due first comes first.
struct Packet {
    due: Instant,
    number: u64,
    bytes: Vec<u8>,
}

impl PartialEq for Packet {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Packet {}

impl PartialOrd for Packet {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Packet {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.due, other.number).cmp(&(self.due, self.number))
    }
}

#[derive(Default)]
struct Lane {
    packets: Mutex<BinaryHeap<Packet>>,
    arrived: Condvar,
}

/// Packets that wait at a router: about a quarter of a second at 100 Mbit/s.
const QUEUED_MAX: usize = 2000;

/// One direction.
fn lay((from, to): (&File, &File), way: Way, cable: &Arc<Cable>, carried: &Arc<AtomicU64>) {
    let seed = match way {
        Way::ToFar => 0x9E37_79B9_7F4A_7C15,
        Way::ToNear => 0xD1B5_4A32_D192_ED03,
    };
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    let lane = Arc::new(Lane::default());
    let (filled, taking, carried, ending) =
        (Arc::clone(&lane), Arc::clone(cable), Arc::clone(carried), Arc::clone(cable));
    std::thread::spawn(move || {
        let (mut random, mut number) = (seed, 0_u64);
        let mut chance = move |ppm: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % 1_000_000 < ppm
        };
        let (mut buffer, mut is_free_at) = (vec![0; 1 << 16], Instant::now());
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let mut bytes = buffer[..length].to_vec();
            let now = Instant::now();
            if taking.is_cut[way as usize].load(Relaxed) || chance(taking.lost_ppm.load(Relaxed)) {
                continue;
            }
            let rate = taking.rate_bits.load(Relaxed);
            is_free_at = is_free_at.max(now);
            if let Some(nanoseconds) = (length as u64 * 8 * 1_000_000_000).checked_div(rate) {
                // What waits for the wire longer than a router would keep it is lost.
                if is_free_at.duration_since(now) > Duration::from_millis(250) {
                    continue;
                }
                is_free_at += Duration::from_nanos(nanoseconds);
            }
            if taking.to_flip.load(Relaxed) > 0 && flip(&mut bytes) {
                taking.to_flip.fetch_sub(1, Relaxed);
            }
            let mut due = is_free_at + Duration::from_micros(taking.delay_us.load(Relaxed));
            if chance(taking.reordered_ppm.load(Relaxed)) {
                due += HELD_BACK;
            }
            carried.fetch_add(length as u64, Relaxed);
            number += 1;
            let mut packets = filled.packets.lock().unwrap();
            if rate > 0 || packets.len() < QUEUED_MAX * 10 {
                packets.push(Packet { due, number, bytes });
                filled.arrived.notify_one();
            }
        }
    });
    std::thread::spawn(move || {
        while !ending.ended.load(Relaxed) {
            let mut packets = lane.packets.lock().unwrap();
            let now = Instant::now();
            match packets.peek().map(|packet| packet.due) {
                Some(due) if due <= now => {
                    let packet = packets.pop().unwrap();
                    drop(packets);
                    drop(to.write(&packet.bytes));
                }
                Some(due) => drop(lane.arrived.wait_timeout(packets, due - now).unwrap()),
                None => drop(lane.arrived.wait_timeout(packets, Duration::from_millis(200)).unwrap()),
            }
        }
    });
}

/// Changes a bit in the middle of a TCP packet's payload, and its checksum so that TCP does not notice. Whether it has any.
fn flip(packet: &mut [u8]) -> bool {
    let header = usize::from(packet[0] & 0x0f) * 4;
    if packet[0] >> 4 != 4 || packet[9] != 6 || packet.len() < header + 20 {
        return false;
    }
    let payload = header + usize::from(packet[header + 12] >> 4) * 4;
    if packet.len() < payload + 64 {
        return false;
    }
    let at = (payload + packet.len()) / 2;
    packet[at] ^= 1;
    packet[header + 16..header + 18].fill(0);
    let mut sum = u32::try_from(packet.len() - header).unwrap() + 6;
    let words = packet[12..20].chunks(2).chain(packet[header..].chunks(2));
    for word in words {
        sum += u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[header + 16..header + 18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    true
}
