//! DEV-001: batch sizes that follow the load, beside the paper's 512 KiB.

use super::args::DeviationArgs;
use super::comparison::{Better, Comparison};
use crate::args::BenchArgs;
use crate::idle::cpu_seconds;
use crate::latency::{Outcome, Pace, open_loop};
use anyhow::Result;
use embarcadero::cluster::Cluster;
use embarcadero_client::Client;

const PAPER_BYTES: usize = 512 << 10;
/// Upper bound of the bytes that a message takes in a batch beside its payload.
const FRAMING: usize = 64;
/// Light load, as a part of the goodput that both designs reach. Batches do not queue at it.
const LIGHT: f64 = 0.1;
/// Load to which steps go, as a part of the goodput that both designs reach. Batches do not queue at it.
const STEP_TO: f64 = 0.6;

struct Side {
    args: BenchArgs,
    client: Client,
}

impl Side {
    fn p99(&self, pace: Pace) -> Result<f64> {
        let Outcome { to_ack, .. } = open_loop(&self.args, &self.client, pace, false)?;
        Ok(to_ack.value_at_quantile(0.99) as f64 / 1e9)
    }

    /// Highest goodput, bytes per second, and seconds of all processors per gigabyte.
    fn most(&self, cluster: &Cluster) -> Result<(f64, f64)> {
        let processes =
            || cluster.brokers.iter().map(embarcadero::cluster::BrokerProcess::id).chain([std::process::id()]);
        let spent = || processes().map(cpu_seconds).sum::<Result<f64>>();
        let before = spent()?;
        let Outcome { goodput, bytes, .. } = open_loop(&self.args, &self.client, Pace::Most, false)?;
        Ok((goodput, (spent()? - before) / bytes as f64 * 1e9))
    }
}

pub(super) fn compare(args: &DeviationArgs) -> Result<Vec<Comparison>> {
    let bench = &args.bench;
    let what = "publish to ack at 10 % load, p99; paper: 512 KB, when full";
    let mut light = Comparison::new("DEV-001", what, "s", (Better::Less, 0.63));
    let what = "the same; baseline: 512 KB, at once when nothing is under way";
    let mut idle = Comparison::new("DEV-001", what, "s", (Better::Less, 2.0));
    let mut steps =
        Comparison::new("DEV-001", "the same with steps between 10 and 60 % load", "s", (Better::Less, 2.0));
    let mut heavy = Comparison::new("DEV-001", "goodput at most", "B/s", (Better::More, 1.0));
    let mut cpu = Comparison::new("DEV-001", "processor time per GB", "s", (Better::Less, 1.05));
    for _ in 0..bench.runs {
        let cluster = bench.cluster()?;
        let side = |batch_size| -> Result<Side> {
            let args = BenchArgs { batch_size, buffer_bytes: Some(16 << 20), ..bench.clone() };
            Ok(Side { client: args.client(&cluster)?, args })
        };
        let (ours, paper) = (side(None)?, side(Some(PAPER_BYTES))?);
        let mut when_full = side(Some(PAPER_BYTES))?;
        when_full.args.messages_at_once = (PAPER_BYTES / (bench.message_bytes + FRAMING)) as u64;
        // The first pass touches memory.
        paper.most(&cluster)?;
        let (paper_most, ours_most) = (paper.most(&cluster)?, ours.most(&cluster)?);
        heavy.add(paper_most.0, ours_most.0);
        cpu.add(paper_most.1, ours_most.1);
        let rate = |part: f64| paper_most.0.min(ours_most.0) * part / bench.message_bytes as f64;
        let ours_light = ours.p99(Pace::Rate(rate(LIGHT)))?;
        light.add(when_full.p99(Pace::Rate(rate(LIGHT)))?, ours_light);
        idle.add(paper.p99(Pace::Rate(rate(LIGHT)))?, ours_light);
        let pace = Pace::Steps(rate(LIGHT), rate(STEP_TO));
        steps.add(paper.p99(pace)?, ours.p99(pace)?);
    }
    Ok(vec![light, idle, steps, heavy, cpu])
}
