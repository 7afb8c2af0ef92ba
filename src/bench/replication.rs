//! `bench replication`: what durability costs, beside what the disk can do.

use super::report::{Report, Row};
use super::{BenchArgs, ceiling, publish_goodput};
use anyhow::{Context, Result};

pub fn run(args: &BenchArgs) -> Result<()> {
    let directory = args.replicas.as_ref().context("--replicas is missing: a directory on the disk to be measured")?;
    let copies = args.replication_factor.max(2);
    let without = BenchArgs { ack: 1, replication_factor: 1, replicas: None, ..args.clone() };
    let visible = BenchArgs { ack: 1, replication_factor: copies, ..args.clone() };
    let durable = BenchArgs { ack: 2, ..visible.clone() };
    let (mut disk, mut off, mut level_1, mut level_2, mut bound) = (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..args.runs {
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
    Report::new(durable.parameters(), args.json).print(&rows)
}
