//! The table of positions and lag.
//!
//! Owns how the numbers look and the memory of when the primary was where, from which lag in time follows. Asks nobody.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    time::{Duration, Instant},
};

use crate::wal::Lsn;

/// An hour of samples; who is further behind is shown with a `>`.
const SAMPLES_MAX: usize = 36_000;

/// One row.
pub(super) struct Node {
    pub(super) name: String,
    pub(super) received: Option<Lsn>,
    pub(super) written: Option<Lsn>,
    pub(super) flushed: Option<Lsn>,
    pub(super) replayed: Option<Lsn>,
    /// The position by which it is behind: the last thing it does.
    pub(super) reached: Option<Lsn>,
}

pub(super) struct Table {
    redraws: bool,
    lines_drawn: usize,
    /// When the primary had flushed up to where; only those where it had moved.
    samples: VecDeque<(Instant, Lsn)>,
    now: Instant,
}

impl Table {
    /// On a terminal each table replaces the one before.
    pub(super) fn new(redraws: bool) -> Self {
        Self { redraws, lines_drawn: 0, samples: VecDeque::new(), now: Instant::now() }
    }

    pub(super) fn note_primary(&mut self, now: Instant, position: Option<Lsn>) {
        self.now = now;
        let Some(position) = position else { return };
        if self.samples.back().is_some_and(|(_, last)| *last >= position) {
            return;
        }
        if self.samples.len() == SAMPLES_MAX {
            self.samples.pop_front();
        }
        self.samples.push_back((now, position));
    }

    pub(super) fn draw(&mut self, elapsed: Duration, title: &str, nodes: &[Node]) {
        let text = self.text(elapsed, title, nodes);
        if self.redraws && self.lines_drawn > 0 {
            // Up to the first line of the last table, and clear to the end of the screen.
            print!("\x1b[{}A\x1b[J", self.lines_drawn);
        }
        self.lines_drawn = text.lines().count();
        print!("{text}");
    }

    fn text(&self, elapsed: Duration, title: &str, nodes: &[Node]) -> String {
        let mut text = String::new();
        let primary = self.samples.back().map(|(_, position)| *position);
        // Writing to a String does not fail.
        let _infallible = writeln!(text, "{:>4} s  {title}", elapsed.as_secs());
        let header = row(["", "received", "written", "flushed", "replayed", "behind", "lag"]);
        let own = shown(primary);
        let first = row(["primary", "", &own, &own, "", "", ""]);
        let _infallible = write!(text, "{header}{first}");
        for node in nodes {
            let behind = primary.zip(node.reached).map(|(primary, reached)| primary.bytes_since(reached));
            text.push_str(&row([
                &node.name,
                &shown(node.received),
                &shown(node.written),
                &shown(node.flushed),
                &shown(node.replayed),
                &behind.map_or_else(|| "-".to_owned(), bytes_shown),
                &self.lag_shown(node.reached),
            ]));
        }
        text
    }

    /// How long ago the primary first had something that `reached` has not.
    fn lag_shown(&self, reached: Option<Lsn>) -> String {
        let Some(reached) = reached else { return "-".to_owned() };
        let held = self.samples.partition_point(|(_, position)| *position <= reached);
        let Some((since, _)) = self.samples.get(held) else { return "0.0 s".to_owned() };
        // Before the first sample we do not know.
        let sign = if held == 0 { ">" } else { "" };
        format!("{sign}{:.1} s", self.now.duration_since(*since).as_secs_f64())
    }
}

fn row(cells: [&str; 7]) -> String {
    let [name, received, written, flushed, replayed, behind, lag] = cells;
    let line = format!(
        "  {name:<8} {received:>12} {written:>12} {flushed:>12} {replayed:>12} {behind:>10} {lag:>8}"
    );
    format!("{}\n", line.trim_end())
}

fn shown(position: Option<Lsn>) -> String {
    position.map_or_else(String::new, |position| position.to_string())
}

fn bytes_shown(bytes: u64) -> String {
    match bytes {
        0..10_240 => format!("{bytes} B"),
        10_240..10_485_760 => format!("{} kB", bytes >> 10),
        _ => format!("{} MB", bytes >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lsn(raw: u64) -> Option<Lsn> {
        Lsn::new(raw)
    }

    #[test]
    fn lag_in_time_counts_from_when_the_primary_passed_the_position() {
        let begun = Instant::now();
        let mut table = Table::new(false);
        for (second, position) in [(0, 100), (1, 200), (2, 300), (3, 300)] {
            table.note_primary(begun + Duration::from_secs(second), lsn(position));
        }
        assert_eq!(table.lag_shown(lsn(300)), "0.0 s");
        assert_eq!(table.lag_shown(lsn(299)), "1.0 s");
        assert_eq!(table.lag_shown(lsn(100)), "2.0 s");
        assert_eq!(table.lag_shown(lsn(99)), ">3.0 s");
        assert_eq!(table.lag_shown(None), "-");
    }

    #[test]
    fn each_node_has_a_row_with_its_own_words() {
        let mut table = Table::new(false);
        table.note_primary(Instant::now(), lsn(0x0100_5000));
        let node = Node {
            name: "standby".to_owned(),
            received: lsn(0x0100_4000),
            written: None,
            flushed: lsn(0x0100_4000),
            replayed: lsn(0x0100_1000),
            reached: lsn(0x0100_1000),
        };
        let text = table.text(Duration::from_secs(7), "load", &[node]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        let words: Vec<&str> = lines[3].split_whitespace().collect();
        assert_eq!(words[..6], ["standby", "0/1004000", "0/1004000", "0/1001000", "16", "kB"]);
    }
}
