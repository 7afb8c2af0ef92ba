//! Reports of results, as text, JSON or CSV.

use crate::cores::host_cores;
use anyhow::Result;
use serde_json::{Value, json};
use std::sync::Once;

/// One figure: the median of its runs.
pub(crate) struct Row {
    name: String,
    unit: &'static str,
    runs: Vec<f64>,
    ceiling: Option<(&'static str, f64)>,
    /// Quantiles and values, of all runs together.
    distribution: Vec<(f64, f64)>,
}

/// Median of values; not a number if there are none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Row {
    pub(crate) fn new(name: impl Into<String>, unit: &'static str, runs: &[f64]) -> Self {
        Self { name: name.into(), unit, runs: runs.to_vec(), ceiling: None, distribution: Vec::new() }
    }

    /// Median of the runs; not a number if there are none.
    pub(crate) fn median(&self) -> f64 {
        median(&self.runs)
    }

    /// Least and largest of the runs.
    pub(crate) fn spread(&self) -> (f64, f64) {
        let least = self.runs.iter().copied().fold(f64::INFINITY, f64::min);
        (least, self.runs.iter().copied().fold(f64::NEG_INFINITY, f64::max))
    }

    fn show(&self) {
        let show = |value: f64| human(value, self.unit);
        let (value, (least, most)) = (self.median(), self.spread());
        print!("{:<42} {} ({} to {}, {} runs)", self.name, show(value), show(least), show(most), self.runs.len());
        if let Some((name, ceiling)) = self.ceiling {
            print!("  {name} {}  ratio {:.2}", show(ceiling), value / ceiling);
        }
        println!();
    }

    pub(crate) fn with_ceiling(mut self, name: &'static str, runs: &[f64]) -> Self {
        self.ceiling = Some((name, median(runs)));
        self
    }

    /// Adds the distribution of all runs together, which only JSON shows.
    pub(crate) fn with_distribution(mut self, points: Vec<(f64, f64)>) -> Self {
        self.distribution = points;
        self
    }
}

/// Format of printed rows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Text in columns, for people.
    Text,
    /// One object per line.
    Json,
    /// Comma-separated values, with a header before the first row.
    Csv,
}

static CSV_HEADER: Once = Once::new();

/// Rows of one bench.
pub(crate) struct Report {
    parameters: Value,
    format: Format,
}

impl Report {
    pub(crate) fn new(parameters: Value, format: Format) -> Self {
        Self { parameters, format }
    }

    pub(crate) fn print(&self, rows: &[Row]) -> Result<()> {
        match self.format {
            Format::Text => rows.iter().for_each(Row::show),
            Format::Json => {
                for row in rows {
                    println!("{}", serde_json::to_string(&self.object(row))?);
                }
            }
            Format::Csv => self.print_csv(rows)?,
        }
        Ok(())
    }

    /// Encodes a row as JSON.
    pub(crate) fn object(&self, row: &Row) -> Value {
        let (value, (least, most)) = (row.median(), row.spread());
        let ceiling = row.ceiling.map(|(name, value)| json!({ "name": name, "value": value }));
        let mut object = json!({
            "name": row.name, "value": value, "unit": row.unit, "min": least, "max": most, "runs": row.runs.len(),
            "ceiling": ceiling, "ratio": row.ceiling.map(|(_, ceiling)| value / ceiling),
            "parameters": self.parameters, "commit": embarcadero::version::COMMIT, "machine": machine(),
        });
        if !row.distribution.is_empty() {
            object["distribution"] = json!(row.distribution);
        }
        object
    }

    fn print_csv(&self, rows: &[Row]) -> Result<()> {
        let mut out = csv::Writer::from_writer(std::io::stdout());
        let columns = ["name", "value", "unit", "min", "max", "runs", "ceiling", "ceiling_value", "ratio"];
        let mut failed = None;
        CSV_HEADER.call_once(|| {
            failed = out.write_record(columns.iter().chain(&["parameters", "commit", "machine"])).err();
        });
        failed.map_or(Ok(()), Err)?;
        for row in rows {
            let (value, (least, most)) = (row.median(), row.spread());
            let (ceiling, bound, ratio) = match row.ceiling {
                Some((name, bound)) => (name, bound.to_string(), (value / bound).to_string()),
                None => ("", String::new(), String::new()),
            };
            let (runs, parameters) = (row.runs.len().to_string(), self.parameters.to_string());
            let [value, least, most] = [value, least, most].map(|value| value.to_string());
            let figures: [&str; 9] = [&row.name, &value, row.unit, &least, &most, &runs, ceiling, &bound, &ratio];
            let of_run: [&str; 3] = [&parameters, embarcadero::version::COMMIT, &machine()];
            out.write_record(figures.iter().chain(&of_run))?;
        }
        out.flush()?;
        Ok(())
    }
}

/// Processor and cores of this host.
pub(crate) fn machine() -> String {
    let model = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            Some(text.lines().find(|line| line.starts_with("model name"))?.split(':').nth(1)?.trim().to_owned())
        })
        .unwrap_or_default();
    format!("{model}, {} cores", host_cores())
}

/// Value with a unit that suits its size, for people.
pub(crate) fn human(value: f64, unit: &str) -> String {
    match unit {
        "B/s" => format!("{:.0} MB/s", value / 1e6),
        "s" if value < 1e-6 => format!("{:.1} ns", value * 1e9),
        "s" if value >= 1.0 => format!("{value:.2} s"),
        "s" if value >= 1e-3 => format!("{:.2} ms", value * 1e3),
        "s" => format!("{:.1} us", value * 1e6),
        "1/s" => format!("{:.2} M/s", value / 1e6),
        "" => format!("{value:.3}"),
        _ => format!("{value:.4} {unit}"),
    }
}
