//! How the numbers are printed.

/// Rows under a title, their columns aligned.
pub(crate) struct Table {
    title: String,
    rows: Vec<Vec<String>>,
    notes: Vec<String>,
}

impl Table {
    pub(crate) fn new(title: &str, columns: &[&str]) -> Self {
        let header = columns.iter().map(|column| (*column).to_owned()).collect();
        Self { title: title.to_owned(), rows: vec![header], notes: Vec::new() }
    }

    pub(crate) fn row<const COLUMNS: usize>(&mut self, cells: [String; COLUMNS]) {
        self.rows.push(cells.into());
    }

    pub(crate) fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// A note about a number that should be reached. Whether it is.
    pub(crate) fn target(&mut self, what: &str, reached: f64, target: Target) -> bool {
        let (is_reached, sign, wanted) = match target {
            Target::AtLeast(wanted) => (reached >= wanted, ">=", wanted),
            Target::AtMost(wanted) => (reached <= wanted, "<=", wanted),
        };
        let verdict = if is_reached { "reached" } else { "NOT REACHED" };
        self.notes.push(format!("target: {what} {sign} {wanted:.2}: {reached:.2}, {verdict}"));
        is_reached
    }

    pub(crate) fn print(&self) {
        println!("\n{}", self.title);
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let cell =
                    if column == 0 { format!("  {cell:<width$}") } else { format!("  {cell:>width$}") };
                line.push_str(&cell);
            }
            println!("{}", line.trim_end());
        }
        for note in &self.notes {
            println!("  {note}");
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

/// The middle one, or the mean of the two in the middle; 0 of none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
    let lower = sorted.get((sorted.len().saturating_sub(1)) / 2).copied().unwrap_or_default();
    f64::midpoint(lower, upper)
}

/// The value that `per_mille` of all do not exceed; 0 of none.
pub(crate) fn percentile(values: &[f64], per_mille: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * per_mille).div_ceil(1000).saturating_sub(1);
    sorted.get(rank).copied().unwrap_or_default()
}

/// The lowest and the highest.
pub(crate) fn spread(values: &[f64]) -> String {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(0.0, f64::max);
    format!("{low:.0}..{high:.0}")
}
