//! `bench replication`: cost of durability, beside the disk's rate.

use crate::args::BenchArgs;
use crate::ceiling;
use crate::publish::publish_goodput;
use crate::report::{Report, Row};
use anyhow::{Context, Result};
use std::path::PathBuf;

/// Directory that is removed afterwards, as a few runs would fill a disk.
struct Scratch(PathBuf);

impl Scratch {
    /// Creates the directory, or empties it.
    fn renew(&self) -> Result<()> {
        let _ = std::fs::remove_dir_all(&self.0);
        std::fs::create_dir_all(&self.0).with_context(|| format!("cannot make {}", self.0.display()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    let on = args.replicas.as_ref().context("--replicas is missing: a directory on the disk to be measured")?;
    let scratch = Scratch(on.join(format!("embarcadero-bench-{}", std::process::id())));
    let directory = &scratch.0;
    let copies = args.replication_factor.max(2);
    let without = BenchArgs { ack: 1, replication_factor: 1, replicas: None, ..args.clone() };
    let visible = BenchArgs { ack: 1, replication_factor: copies, replicas: Some(directory.clone()), ..args.clone() };
    let durable = BenchArgs { ack: 2, ..visible.clone() };
    let (mut disk, mut off, mut level_1, mut level_2, mut bound) = (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..args.runs {
        scratch.renew()?;
        // Every message is written as often as there are copies on disks, here to one disk.
        let written = ceiling::disk_write(directory, args.seconds)? / f64::from(copies - 1);
        let visible_without = publish_goodput(&without)?;
        disk.push(written);
        off.push(visible_without);
        level_1.push(publish_goodput(&visible)?);
        level_2.push(publish_goodput(&durable)?);
        bound.push(written.min(visible_without));
    }
    let rows = [
        Row::new("disk.fdatasynced_write", "B/s", &disk),
        Row::new("replication.ack_1", "B/s", &level_1).with_ceiling("without replication", &off),
        Row::new("replication.ack_2", "B/s", &level_2).with_ceiling("min(ack 1 without replication, disk)", &bound),
    ];
    Report::new(durable.parameters(), args.format()).print(&rows)
}
