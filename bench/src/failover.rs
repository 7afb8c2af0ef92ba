//! `bench failover`: longest time without an acknowledgement when a broker is killed.

use crate::args::BenchArgs;
use crate::publish::publish_for;
use crate::report::{Report, Row};
use anyhow::{Context, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Time from the start to the kill, after which the load is steady.
const SETTLED: Duration = Duration::from_millis(500);

pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    let args = BenchArgs { brokers: args.brokers.max(2), ..args.clone() };
    let (mut leader, mut other, mut quiet) = (vec![], vec![], vec![]);
    for _ in 0..args.runs {
        leader.push(longest_gap(&args, Some(0))?);
        other.push(longest_gap(&args, Some(1))?);
        quiet.push(longest_gap(&args, None)?);
    }
    let rows = [
        Row::new("failover.leader_killed.longest_gap", "s", &leader).with_ceiling("nobody killed", &quiet),
        Row::new("failover.broker_killed.longest_gap", "s", &other).with_ceiling("nobody killed", &quiet),
    ];
    Report::new(args.parameters(), args.format()).print(&rows)
}

/// Longest time without an acknowledgement, seconds, in one run on a fresh cluster. The broker `victim` is killed in it.
fn longest_gap(args: &BenchArgs, victim: Option<usize>) -> Result<f64> {
    let mut cluster = args.cluster()?;
    let client = args.client(&cluster)?;
    args.topic(&client, "bench")?;
    let publisher = client.publisher("bench")?;
    let message = vec![b'm'; args.message_bytes];
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let publishing = scope.spawn(|| {
            let published = publish_for(&publisher, &message, SETTLED + Duration::from_secs_f64(args.seconds), None);
            done.store(true, Ordering::Relaxed);
            published
        });
        let begun = Instant::now();
        let (mut seen, mut at, mut longest) = (0, begun, Duration::ZERO);
        let mut victim = victim;
        while !done.load(Ordering::Relaxed) {
            if begun.elapsed() > SETTLED
                && let Some(index) = victim.take()
            {
                cluster.brokers.get_mut(index).context("no such broker")?.kill()?;
            }
            let acknowledged = publisher.stats().batches_acknowledged;
            if acknowledged != seen {
                if begun.elapsed() > SETTLED / 2 {
                    longest = longest.max(at.elapsed());
                }
                (seen, at) = (acknowledged, Instant::now());
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        publishing.join().map_err(|_| anyhow::anyhow!("the publisher thread died"))??;
        Ok(longest.as_secs_f64())
    })
}
