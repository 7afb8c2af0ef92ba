//! `bench deviations`: for each entry of the deviation register, this design beside the paper's.
//!
//! Both are measured in turn, in one process. The results are the table at the end of the register.

mod args;
mod batching;
mod comparison;
mod flushing;
mod polling;
mod pool;
mod receiving;

pub(crate) use args::DeviationArgs;

use crate::args::BenchArgs;
use crate::report::{Format, Report, Row, machine};
use anyhow::{Context, Result, bail};
use comparison::Comparison;
use serde_json::json;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

/// Rows of the table that follow from the layout, without a measurement.
const BY_CONSTRUCTION: [(&str, &str); 4] = [
    (
        "DEV-003",
        "| DEV-003 | copies of a payload by a broker's CPU | 2 | 1 (TCP), 0 (verbs) | 0.5, 0 | | by construction |",
    ),
    (
        "DEV-008",
        "| DEV-008 | bytes written per batch by the sequencer, for exactly once | 0 | 40 | | | by construction |",
    ),
    (
        "DEV-010",
        "| DEV-010 | messages from disk to durable | length of the chain | 1 word per replica | | | by construction |",
    ),
    ("DEV-011", "| DEV-011 | bytes of tables per broker that can be the leader | 0 | 4.5 MB | | | by construction |"),
];

type Measure = fn(&DeviationArgs) -> Result<Vec<Comparison>>;

/// Entry of the register that is measured.
struct Entry {
    id: &'static str,
    /// Version of the measured behaviour. A change that an entry's figures depend on adds one here, and measures again.
    /// Moving or renaming code does not.
    behaviour: u32,
    measure: Measure,
}

const MEASURED: [Entry; 8] = [
    Entry { id: "DEV-001", behaviour: 1, measure: batching::compare },
    Entry { id: "DEV-002", behaviour: 1, measure: flushing::compare },
    Entry { id: "DEV-003", behaviour: 2, measure: receiving::compare },
    Entry { id: "DEV-004", behaviour: 1, measure: flushing::compare_metadata },
    Entry { id: "DEV-005", behaviour: 1, measure: pool::compare },
    Entry { id: "DEV-006", behaviour: 1, measure: polling::compare },
    Entry { id: "DEV-007", behaviour: 1, measure: flushing::compare_headers },
    Entry { id: "DEV-009", behaviour: 1, measure: polling::compare_spin },
];

/// Versions of the behaviour with which a table is measured: `DEV-001 1, DEV-002 1, ..`.
fn behaviours() -> String {
    MEASURED.map(|Entry { id, behaviour, .. }| format!("{id} {behaviour}")).join(", ")
}

const TABLE: &str = "\n## Metrics\n";

fn write(register: &Path, bench: &BenchArgs, comparisons: &[Comparison]) -> Result<()> {
    let text = std::fs::read_to_string(register)?;
    let (entries, _) = text.split_once(TABLE).context("the register has no table")?;
    let date = Command::new("date").arg("+%F").output().context("cannot run date")?.stdout;
    let mut table = format!("{entries}{TABLE}\n");
    let date = String::from_utf8_lossy(&date);
    writeln!(
        table,
        "`embarcadero bench deviations --write docs/deviations.md`, {}, {}, {} runs of each in turn: medians (least to most).\n\
         Behaviour that was measured, by version: {}.\n\n\
         | id | what is compared | baseline | ours | ratio | to stay | |\n|---|---|---|---|---|---|---|",
        date.trim(),
        machine(),
        bench.runs,
        behaviours(),
    )?;
    let mut rows: Vec<(&str, String)> = comparisons.iter().map(|one| (one.id, one.line())).collect();
    rows.extend(BY_CONSTRUCTION.iter().map(|(id, row)| (*id, (*row).to_owned())));
    rows.sort_by_key(|(id, _)| *id);
    rows.iter().for_each(|(_, row)| {
        table.push_str(row);
        table.push('\n');
    });
    Ok(std::fs::write(register, table)?)
}

pub(crate) fn run(args: &DeviationArgs) -> Result<()> {
    if let Some(unknown) = args.only.iter().find(|id| !MEASURED.iter().any(|entry| entry.id == **id)) {
        bail!("--only {unknown}: not an entry that is measured");
    }
    let mut all = Vec::new();
    for Entry { id, measure, .. } in MEASURED {
        if !args.only.is_empty() && !args.only.iter().any(|only| only == id) {
            continue;
        }
        let comparisons = measure(args).with_context(|| format!("cannot measure {id}"))?;
        for one in &comparisons {
            if args.bench.format() == Format::Text {
                println!("{}", one.line());
                continue;
            }
            let mut parameters = args.bench.parameters();
            parameters["compared"] = json!(one.what);
            parameters["verdict"] = json!(one.verdict());
            let row = Row::new(format!("deviations.{id}"), one.unit, &one.ours).with_ceiling("baseline", &one.baseline);
            Report::new(parameters, args.bench.format()).print(&[row])?;
        }
        all.extend(comparisons);
    }
    args.write.as_ref().map_or(Ok(()), |register| write(register, &args.bench, &all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_the_rows_by_construction() {
        let register = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/deviations.md");
        let text = std::fs::read_to_string(register).unwrap();
        for (id, row) in BY_CONSTRUCTION {
            assert!(text.lines().any(|line| line == row), "{id}: the table has no line {row}");
        }
    }

    /// The register's table was measured with the behaviour that is here.
    #[test]
    fn the_table_is_of_this_behaviour() {
        let register = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/deviations.md");
        let text = std::fs::read_to_string(register).unwrap();
        let table = text.split_once(TABLE).unwrap().1;
        let measured = format!("Behaviour that was measured, by version: {}.", behaviours());
        assert!(table.contains(&measured), "measure again: `embarcadero bench deviations --write docs/deviations.md`");
    }
}
