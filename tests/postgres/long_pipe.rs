//! A fat pipe that is long: how much of it one connection between two sites fills, and by which of the kernel's settings.

use std::time::{Duration, Instant};

use crate::support::MB;
use crate::support::compare::assert_same_wal;
use crate::support::lab::Installation;
use crate::support::relay::Relay;
use crate::support::two_sites::TwoSites;

const ROUND_TRIP: Duration = Duration::from_millis(200);
const RATE_BITS: u64 = 1_000_000_000;
/// Linux's own limits of what it gives a connection, in bytes, and ones that hold what is under way on this pipe (25 MB).
const LIMITS: [(&str, u64, u64); 2] =
    [("Linux's defaults", 4 << 20, 6 << 20), ("raised", 64 << 20, 64 << 20)];

#[test]
fn a_long_pipe_is_filled_as_far_as_the_kernels_limits_let_a_connection_grow() {
    let Some(installation) = Installation::in_turn(2) else { return };
    let Some(mut sites) = TwoSites::new(&installation, ROUND_TRIP) else { return };
    // Fewer packets to carry for this process, which is the cable.
    sites.wan.set_packet_bytes(9000);
    sites.near.wait_flushed(sites.primary.flushed());
    sites.far.start();
    sites.far.wait_flushed(sites.primary.flushed());
    println!("| tcp_wmem, tcp_rmem | MB | s | MB/s |");
    let mut rates = Vec::new();
    for (what, send, receive) in LIMITS {
        sites.far.terminate();
        sites.wan.set_buffer_limits(send, receive);
        let from = sites.primary.flushed();
        let to = crate::far_site::write_incompressible_wal(&sites.primary, 64 * MB);
        sites.near.wait_flushed(to);
        sites.wan.cable.set_rate(RATE_BITS);
        let mut far = std::mem::replace(&mut sites.far, Relay::new("nobody", 1));
        let begun = Instant::now();
        far.launch();
        far.wait_flushed(to);
        let seconds = begun.elapsed().as_secs_f64();
        sites.far = far;
        sites.wan.cable.set_rate(0);
        assert_same_wal(&sites.far.wal_dir(), &sites.primary, to);
        let megabytes = (to - from) as f64 / MB as f64;
        println!("| {what} | {megabytes:.0} | {seconds:.2} | {:.1} |", megabytes / seconds);
        rates.push(megabytes / seconds);
    }
    // Not by how much: this process may be what limits it then.
    assert!(rates[1] > rates[0], "{rates:?}");
}
