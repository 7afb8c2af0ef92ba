//! DEV-006: pause, yield and sleep, beside busy polling. DEV-009: no spinning where threads outnumber cores.

use super::args::DeviationArgs;
use super::comparison::{Better, Comparison};
use crate::args::BenchArgs;
use crate::idle::idle_cpu;
use crate::latency::one_at_a_time;
use crate::publish::publish_goodput;
use anyhow::Result;

fn with_setting(args: &BenchArgs, name: &str, value: &str) -> BenchArgs {
    let environment = vec![(format!("EMBARCADERO_BROKER_THREADS__{name}"), value.to_owned())];
    BenchArgs { environment, ..args.clone() }
}

pub(super) fn compare(args: &DeviationArgs) -> Result<Vec<Comparison>> {
    let with_policy = |policy| with_setting(&args.bench, "POLL", policy);
    let [busy, yielding, adaptive] = ["busy", "yield", "adaptive"].map(with_policy);
    let mut idle =
        Comparison::new("DEV-006", "processors that an idle broker takes; paper: busy", "", (Better::Less, 0.5));
    let mut median = Comparison::new("DEV-006", "publish to ack, p50; paper: busy", "s", (Better::Less, 1.5));
    let mut tail = Comparison::new("DEV-006", "publish to ack, p99; paper: busy", "s", (Better::Less, 2.0));
    let mut beside_yield =
        Comparison::new("DEV-006", "publish to ack, p50, beside a yield loop", "s", (Better::Less, 1.5));
    let mut goodput = Comparison::new("DEV-006", "publish goodput; paper: busy", "B/s", (Better::More, 0.95));
    for _ in 0..args.bench.runs {
        idle.add(idle_cpu(&busy, args.bench.seconds)?, idle_cpu(&adaptive, args.bench.seconds)?);
        let [of_busy, of_yielding, of_adaptive] = [&busy, &yielding, &adaptive].map(one_at_a_time);
        let (of_busy, of_yielding, of_adaptive) = (of_busy?, of_yielding?, of_adaptive?);
        let seconds =
            |histogram: &hdrhistogram::Histogram<u64>, quantile| histogram.value_at_quantile(quantile) as f64 / 1e9;
        median.add(seconds(&of_busy, 0.5), seconds(&of_adaptive, 0.5));
        tail.add(seconds(&of_busy, 0.99), seconds(&of_adaptive, 0.99));
        beside_yield.add(seconds(&of_yielding, 0.5), seconds(&of_adaptive, 0.5));
        goodput.add(publish_goodput(&busy)?, publish_goodput(&adaptive)?);
    }
    Ok(vec![idle, median, tail, beside_yield, goodput])
}

pub(super) fn compare_spin(args: &DeviationArgs) -> Result<Vec<Comparison>> {
    let ours = BenchArgs { brokers: 4, ..args.bench.clone() };
    let paper = with_setting(&ours, "SPIN_US", "1000");
    let mut goodput =
        Comparison::new("DEV-009", "publish goodput, 4 brokers; baseline: spins of 1 ms", "B/s", (Better::More, 1.05));
    for _ in 0..args.bench.runs {
        goodput.add(publish_goodput(&paper)?, publish_goodput(&ours)?);
    }
    Ok(vec![goodput])
}
