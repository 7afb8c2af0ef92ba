//! `bench latency` and `bench latency-vs-load`: from publish to acknowledgement, and to delivery.
//!
//! In the open loop, messages are due at a fixed rate, even when the system does not keep up. The latency of each counts
//! from the moment at which it was due, not from the moment at which it was sent (no coordinated omission).

use crate::args::{BenchArgs, RETENTION_BYTES};
use crate::cores::pin;
use crate::report::{Format, Report, Row};
use crate::{ceiling, histogram};
use anyhow::{Context, Result, bail};
use clap::Args;
use embarcadero_client::{Client, ClientError, MessageId, Publisher, Start, Status, Subscriber, TransportKind};
use hdrhistogram::Histogram;
use serde_json::json;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Quantiles that are reported of a distribution.
const QUANTILES: [(f64, &str); 5] = [(0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (0.999, "p99.9"), (0.9999, "p99.99")];
/// Number of points of a distribution per halving of the rest.
const DISTRIBUTION_STEPS: u32 = 4;
/// Most messages that are published before acknowledgements and deliveries are taken.
const BURST: u64 = 64;
/// Longest wait for the last acknowledgements and deliveries.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Args, Clone)]
pub(crate) struct LatencyArgs {
    #[command(flatten)]
    bench: BenchArgs,
    /// Rates in messages per second, with a set of runs for each; without, one message at a time.
    #[arg(long, value_delimiter = ',', value_parser = positive)]
    rates: Vec<f64>,
}

#[derive(Args, Clone)]
pub(crate) struct LoadArgs {
    #[command(flatten)]
    bench: BenchArgs,
    /// Loads, as parts of the highest goodput that the same run reached.
    #[arg(long, value_delimiter = ',', value_parser = positive, default_value = "0.05,0.1,0.25,0.5,0.75,0.9,1")]
    loads: Vec<f64>,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if value > 0.0 => Ok(value),
        _ => Err("must be a number greater than 0".to_owned()),
    }
}

/// Publishes one message at a time for `time`. Returns the latencies from publish to acknowledgement.
fn publish_one_by_one(publisher: &Publisher, message: &[u8], time: Duration) -> Result<Histogram<u64>> {
    let mut histogram = histogram::of_nanoseconds()?;
    let begun = Instant::now();
    while begun.elapsed() < time {
        let sent = Instant::now();
        let id = publisher.publish_wait(message)?;
        while publisher.poll(id)? == Status::Pending {
            std::hint::spin_loop();
        }
        histogram.record(sent.elapsed().as_nanos() as u64)?;
    }
    Ok(histogram)
}

/// Runs `work` in a thread on the publishers' core.
fn on_near_core<R: Send>(args: &BenchArgs, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            pin(args.near_core())?;
            work()
        });
        thread.join().map_err(|_| anyhow::anyhow!("the publisher thread died"))?
    })
}

/// Latencies from publish to acknowledgement, one message at a time, in one run on a fresh cluster.
pub(crate) fn one_at_a_time(args: &BenchArgs) -> Result<Histogram<u64>> {
    let message = vec![b'm'; args.message_bytes];
    let cluster = args.cluster()?;
    let client = args.client(&cluster)?;
    args.topic(&client, "bench")?;
    let publisher = client.publisher("bench")?;
    on_near_core(args, || publish_one_by_one(&publisher, &message, Duration::from_secs_f64(args.seconds)))
}

/// Pace at which messages are due.
#[derive(Clone, Copy)]
pub(crate) enum Pace {
    /// Constant rate, messages per second.
    Rate(f64),
    /// Highest rate at which messages can be published.
    Most,
    /// Two rates in messages per second, which alternate ten times in a run.
    Steps(f64, f64),
}

/// Outcome of a run.
pub(crate) struct Outcome {
    /// Time from the moment at which each message was due to its acknowledgement, nanoseconds. Has no meaning with
    /// [`Pace::Most`].
    pub to_ack: Histogram<u64>,
    /// Time from the moment at which each message was due to its delivery, nanoseconds. Empty without a subscriber.
    pub to_delivery: Histogram<u64>,
    /// Bytes of all messages.
    pub bytes: u64,
    /// Bytes of messages per second.
    pub goodput: f64,
}

impl Pace {
    /// Moment at which message `index` is due in a run of `time`, nanoseconds from the start of the run.
    fn due(self, index: u64, time: Duration) -> u64 {
        match self {
            Self::Rate(rate) => (index as f64 / rate * 1e9) as u64,
            Self::Most => 0,
            Self::Steps(low, high) => {
                let step = time.as_secs_f64() / 20.0;
                let cycle = (low + high) * step;
                let (cycles, rest) = ((index as f64 / cycle).floor(), index as f64 % cycle);
                let within = if rest < low * step { rest / low } else { step + (rest - low * step) / high };
                ((cycles * 2.0 * step + within) * 1e9) as u64
            }
        }
    }
}

/// Batches under way, each with its last message and the range of its messages' indices.
#[derive(Default)]
struct UnderWay {
    batches: VecDeque<(MessageId, std::ops::Range<u64>)>,
}

impl UnderWay {
    fn add(&mut self, id: MessageId, index: u64) {
        match self.batches.back_mut() {
            Some((last, indices)) if last.batch == id.batch => {
                *last = id;
                indices.end = index + 1;
            }
            _ => self.batches.push_back((id, index..index + 1)),
        }
    }
}

struct Loop<'a> {
    args: &'a BenchArgs,
    pace: Pace,
    time: Duration,
    begun: Instant,
    outcome: Outcome,
    sent: u64,
    acked: u64,
    delivered: u64,
}

impl Loop<'_> {
    fn now(&self) -> u64 {
        self.begun.elapsed().as_nanos() as u64
    }

    fn since_due(&self, index: u64, now: u64) -> u64 {
        now.saturating_sub(self.pace.due(index, self.time))
    }

    fn publish(
        &mut self,
        publisher: &Publisher,
        message: &mut [u8],
        under_way: &mut UnderWay,
        ahead: u64,
    ) -> Result<()> {
        let now = self.now();
        let at_once = self.args.messages_at_once.max(1);
        if now >= self.time.as_nanos() as u64 || self.pace.due(self.sent + at_once - 1, self.time) > now {
            return Ok(());
        }
        for _ in 0..BURST.max(at_once) {
            if self.pace.due(self.sent, self.time) > now || self.sent - self.delivered > ahead {
                break;
            }
            message[..8].copy_from_slice(&self.sent.to_le_bytes());
            match publisher.publish(message) {
                Ok(id) => under_way.add(id, self.sent),
                Err(ClientError::BufferFull { .. }) => break,
                Err(error) => return Err(error.into()),
            }
            self.sent += 1;
        }
        Ok(())
    }

    fn acknowledge(&mut self, publisher: &Publisher, under_way: &mut UnderWay) -> Result<()> {
        while let Some((last, indices)) = under_way.batches.front().cloned() {
            if publisher.poll(last)? == Status::Pending {
                break;
            }
            let now = self.now();
            for index in indices.clone() {
                let waited = self.since_due(index, now);
                self.outcome.to_ack.record(waited)?;
            }
            self.acked += indices.end - indices.start;
            under_way.batches.pop_front();
        }
        Ok(())
    }

    fn deliver(&mut self, subscriber: &mut Subscriber) -> Result<()> {
        while let Some(batch) = subscriber.next_batch(Duration::ZERO)? {
            let now = self.now();
            for message in batch.messages() {
                let index = message.payload.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
                anyhow::ensure!(index == Some(self.delivered), "message {index:?} came as message {}", self.delivered);
                let waited = self.since_due(self.delivered, now);
                self.outcome.to_delivery.record(waited)?;
                self.delivered += 1;
            }
            if self.begun.elapsed() < self.time {
                break;
            }
        }
        Ok(())
    }
}

/// Runs an open loop. One thread publishes, takes acknowledgements and, if `delivered` is set, deliveries: on a host with
/// few cores nothing then waits for the scheduler.
pub(crate) fn open_loop(args: &BenchArgs, client: &Client, pace: Pace, delivered: bool) -> Result<Outcome> {
    if args.message_bytes < 8 || args.ack == 0 {
        bail!("--message-bytes must be at least 8 and --ack at least 1: messages carry their number and are timed");
    }
    args.topic(client, "open-loop")?;
    let publisher = client.publisher("open-loop")?;
    let mut subscriber = delivered.then(|| client.subscriber("open-loop", Start::Earliest)).transpose()?;
    let outcome = Outcome {
        to_ack: histogram::of_nanoseconds()?,
        to_delivery: histogram::of_nanoseconds()?,
        bytes: 0,
        goodput: 0.0,
    };
    let time = Duration::from_secs_f64(args.seconds);
    // A subscriber must not fall behind retention.
    let ahead = if delivered { RETENTION_BYTES / 4 / args.message_bytes as u64 } else { u64::MAX };
    let outcome = on_near_core(args, || {
        let mut message = vec![b'm'; args.message_bytes];
        let mut under_way = UnderWay::default();
        let (begun, delivered) = (Instant::now(), 0);
        let mut at = Loop { args, pace, time, begun, outcome, sent: 0, acked: 0, delivered };
        loop {
            at.publish(&publisher, &mut message, &mut under_way, ahead)?;
            at.acknowledge(&publisher, &mut under_way)?;
            if let Some(subscriber) = &mut subscriber {
                at.deliver(subscriber)?;
            }
            let elapsed = at.begun.elapsed();
            let all = at.acked == at.sent && (subscriber.is_none() || at.delivered == at.sent);
            if elapsed >= time && all {
                at.outcome.bytes = at.sent * at.args.message_bytes as u64;
                at.outcome.goodput = at.outcome.bytes as f64 / elapsed.as_secs_f64();
                return Ok(at.outcome);
            }
            anyhow::ensure!(elapsed < time + PATIENCE, "{} of {} messages are acknowledged", at.acked, at.sent);
        }
    })?;
    publisher.close()?;
    drop(subscriber);
    client.delete_topic("open-loop")?;
    Ok(outcome)
}

/// Quantiles of each run, and the distribution of all runs together.
struct Quantiles {
    runs: [Vec<f64>; QUANTILES.len()],
    together: Histogram<u64>,
}

impl Quantiles {
    fn new() -> Result<Self> {
        Ok(Self { runs: Default::default(), together: histogram::of_nanoseconds()? })
    }

    fn add(&mut self, histogram: &Histogram<u64>) -> Result<()> {
        for ((quantile, _), runs) in QUANTILES.iter().zip(&mut self.runs) {
            runs.push(histogram.value_at_quantile(*quantile) as f64 / 1e9);
        }
        Ok(self.together.add(histogram)?)
    }

    /// One row per quantile. The first also has the distribution.
    fn rows(&self, what: &str) -> Vec<Row> {
        let steps = self.together.iter_quantiles(DISTRIBUTION_STEPS);
        let mut points: Vec<_> = steps.map(|step| (step.quantile(), step.value_iterated_to() as f64 / 1e9)).collect();
        let rows = QUANTILES.iter().zip(&self.runs);
        rows.map(|((_, name), runs)| {
            Row::new(format!("{what}.{name}"), "s", runs).with_distribution(std::mem::take(&mut points))
        })
        .collect()
    }

    /// One row per quantile, beside that quantile of a loop that had nothing to do.
    fn rows_beside(&self, what: &str, nothing: &Self) -> Vec<Row> {
        let rows = self.rows(what).into_iter().zip(&nothing.runs);
        rows.map(|(row, runs)| row.with_ceiling(ceiling::NOTHING_TO_DO, runs)).collect()
    }
}

pub(crate) fn run(args: &LatencyArgs) -> Result<()> {
    let bench = &args.bench;
    if args.rates.is_empty() {
        let (mut ceilings, mut quantiles) = (Vec::new(), Quantiles::new()?);
        for _ in 0..bench.runs {
            ceilings.push(match bench.transport {
                TransportKind::Tcp => ceiling::tcp_ping_pong(bench.cores(), bench.message_bytes, bench.seconds)?,
                _ => 2.0 * ceiling::verbs_ping_pong(bench, bench.message_bytes)?,
            });
            quantiles.add(&one_at_a_time(bench)?)?;
        }
        let ceiling = bench.ceiling_name("tcp_ping_pong.p50");
        let mut rows = quantiles.rows("latency.publish_to_ack");
        let first = rows.remove(0).with_ceiling(ceiling, &ceilings);
        rows.insert(0, first);
        return Report::new(bench.parameters(), bench.format()).print(&rows);
    }
    for rate in &args.rates {
        let (mut to_ack, mut to_delivery, mut nothing) = (Quantiles::new()?, Quantiles::new()?, Quantiles::new()?);
        for _ in 0..bench.runs {
            nothing.add(&ceiling::nothing_to_do(bench.cores(), bench.seconds)?)?;
            let cluster = bench.cluster()?;
            let client = bench.client(&cluster)?;
            let outcome = open_loop(bench, &client, Pace::Rate(*rate), true)?;
            to_ack.add(&outcome.to_ack)?;
            to_delivery.add(&outcome.to_delivery)?;
        }
        let mut parameters = bench.parameters();
        parameters["rate"] = json!(rate);
        let mut rows = to_ack.rows_beside("latency.publish_to_ack", &nothing);
        rows.extend(to_delivery.rows_beside("latency.publish_to_delivery", &nothing));
        Report::new(parameters, bench.format()).print(&rows)?;
    }
    Ok(())
}

/// Results at one load, of all runs.
struct Loaded {
    quantiles: Quantiles,
    offered: Vec<f64>,
    goodput: Vec<f64>,
}

pub(crate) fn versus_load(args: &LoadArgs) -> Result<()> {
    for (delivered, what) in [(false, "latency_vs_load.publish_to_ack"), (true, "latency_vs_load.publish_to_delivery")]
    {
        let bench = &args.bench;
        let loaded = || Ok(Loaded { quantiles: Quantiles::new()?, offered: Vec::new(), goodput: Vec::new() });
        let mut nothing = Quantiles::new()?;
        let mut by_load = args.loads.iter().map(|_| loaded()).collect::<Result<Vec<_>>>()?;
        for _ in 0..bench.runs {
            nothing.add(&ceiling::nothing_to_do(bench.cores(), bench.seconds)?)?;
            let cluster = bench.cluster()?;
            let client = bench.client(&cluster)?;
            // The first pass touches memory.
            open_loop(bench, &client, Pace::Most, delivered)?;
            let most = open_loop(bench, &client, Pace::Most, delivered)?.goodput;
            for (load, loaded) in args.loads.iter().zip(&mut by_load) {
                let rate = most * load / bench.message_bytes as f64;
                let outcome = open_loop(bench, &client, Pace::Rate(rate), delivered)
                    .with_context(|| format!("at load {load}, {rate:.0} messages per second"))?;
                loaded.quantiles.add(if delivered { &outcome.to_delivery } else { &outcome.to_ack })?;
                loaded.offered.push(most * load);
                loaded.goodput.push(outcome.goodput);
            }
        }
        for (load, loaded) in args.loads.iter().zip(&by_load) {
            let mut parameters = bench.parameters();
            parameters["load"] = json!(load);
            if bench.format() == Format::Text {
                println!("load {load}");
            }
            let goodput = Row::new(format!("{what}.goodput"), "B/s", &loaded.goodput);
            let goodput = goodput.with_ceiling("offered", &loaded.offered);
            let rows: Vec<_> = std::iter::once(goodput).chain(loaded.quantiles.rows_beside(what, &nothing)).collect();
            Report::new(parameters, bench.format()).print(&rows)?;
        }
    }
    Ok(())
}
