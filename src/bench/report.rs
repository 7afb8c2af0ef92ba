//! How results are printed.

use anyhow::Result;
use serde_json::{Value, json};

/// One figure: the median of its runs.
pub struct Row {
    name: &'static str,
    unit: &'static str,
    runs: Vec<f64>,
    ceiling: Option<(&'static str, f64)>,
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Row {
    pub fn new(name: &'static str, unit: &'static str, runs: &[f64]) -> Self {
        Self { name, unit, runs: runs.to_vec(), ceiling: None }
    }

    /// The median of its runs; not a number if there are none.
    pub fn median(&self) -> f64 {
        median(&self.runs)
    }

    pub fn with_ceiling(mut self, name: &'static str, runs: &[f64]) -> Self {
        self.ceiling = Some((name, median(runs)));
        self
    }
}

/// Rows of one bench.
pub struct Report {
    parameters: Value,
    json: bool,
}

impl Report {
    pub fn new(parameters: Value, json: bool) -> Self {
        Self { parameters, json }
    }

    pub fn print(&self, rows: &[Row]) -> Result<()> {
        let machine = std::fs::read_to_string("/proc/cpuinfo")
            .ok()
            .and_then(|text| {
                Some(text.lines().find(|line| line.starts_with("model name"))?.split(':').nth(1)?.trim().to_owned())
            })
            .unwrap_or_default();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for row in rows {
            let value = row.median();
            let least = row.runs.iter().copied().fold(f64::INFINITY, f64::min);
            let most = row.runs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            if self.json {
                let ceiling = row.ceiling.map(|(name, value)| json!({ "name": name, "value": value }));
                let line = json!({
                    "name": row.name, "value": value, "unit": row.unit, "min": least, "max": most,
                    "runs": row.runs.len(), "ceiling": ceiling, "ratio": row.ceiling.map(|(_, ceiling)| value / ceiling),
                    "parameters": self.parameters, "commit": env!("EMBARCADERO_COMMIT"),
                    "machine": format!("{machine}, {cores} cores"),
                });
                println!("{}", serde_json::to_string(&line)?);
                continue;
            }
            let show = |value: f64| human(value, row.unit);
            print!("{:<38} {} ({} to {}, {} runs)", row.name, show(value), show(least), show(most), row.runs.len());
            if let Some((name, ceiling)) = row.ceiling {
                print!("  {name} {}  ratio {:.2}", show(ceiling), value / ceiling);
            }
            println!();
        }
        Ok(())
    }
}

fn human(value: f64, unit: &str) -> String {
    match unit {
        "B/s" => format!("{:.0} MB/s", value / 1e6),
        "s" if value < 1e-6 => format!("{:.1} ns", value * 1e9),
        "s" => format!("{:.1} us", value * 1e6),
        "1/s" => format!("{:.2} M/s", value / 1e6),
        _ => format!("{value:.4} {unit}"),
    }
}
