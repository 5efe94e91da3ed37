//! A relay that serves links: what catching up costs it, for one and for eight at once.

use std::{thread, time::Instant};

use anyhow::{Result, anyhow};

use crate::client::{Client, Event, USER};
use crate::lab::{Lab, gigabytes};
use crate::table::{Table, Target};
use crate::usage::cpu_of;

/// A client to which a relay sends WAL compressed.
const LINK: [(&str, &str); 4] = [
    ("user", USER),
    ("replication", "true"),
    ("application_name", "bench"),
    ("_pq_.walrelay_link", "1;zstd"),
];

/// Drains the whole range from a relay that holds it, over one link and over eight. Whether its target is reached.
pub(crate) fn run(lab: &mut Lab) -> Result<bool> {
    // This machine's own network is faster than any codec.
    let settings = lab.prepare_relay("relay")?.downstream("link_adapt", false).store("wal_keep_size", "64GB");
    let mut relay = lab.spawn_relay(&settings)?;
    relay.wait_until_ready()?;
    let end = lab.range.end();
    lab.wait("the relay to have all WAL", |_| Ok(relay.positions()?.flushed >= Some(end)))?;
    let mut table = Table::new(
        "a relay from which links catch up (zstd:1; CPU seconds of the relay for a GB that it holds)",
        &["links", "MB/s to each", "CPU", "times"],
    );
    let gigabytes = gigabytes(lab.range.bytes());
    let (mut one, mut is_reached) = (None, true);
    for links in [1, 8] {
        let before = cpu_of(relay.id())?;
        let began = Instant::now();
        let drain = |_| {
            let (address, start) = (relay.address(), lab.range.start());
            thread::spawn(move || -> Result<()> {
                let mut client = Client::connect(address, &LINK)?;
                client.start_replication(start)?;
                let mut received = start.get();
                while received < end.get() {
                    if let Event::Wal { end } = client.event(received)? {
                        received = end;
                    }
                }
                Ok(())
            })
        };
        let drains: Vec<_> = (0..links).map(drain).collect();
        for drain in drains {
            drain.join().map_err(|_| anyhow!("a link's thread has panicked"))??;
        }
        let time = began.elapsed().as_secs_f64();
        let cpu = cpu_of(relay.id())?.saturating_sub(before).as_secs_f64() / gigabytes;
        let times = cpu / *one.get_or_insert(cpu);
        let speed = gigabytes * 1e3 / time;
        table.row([links.to_string(), format!("{speed:.0}"), format!("{cpu:.2}"), format!("{times:.2}")]);
        if links > 1 {
            is_reached = table.target("CPU for eight links by that for one", times, Target::AtMost(1.5));
        }
    }
    table.print();
    relay.stop()?;
    Ok(is_reached)
}
