//! `bench publish` and `bench end-to-end`: goodput.

use crate::args::{BenchArgs, RETENTION_BYTES};
use crate::ceiling;
use crate::cores::pin;
use crate::grid::GridArgs;
use crate::report::{Report, Row};
use anyhow::Result;
use embarcadero_client::{Client, Publisher, Start, TransportKind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Lead of publishers over a subscriber, bytes of messages.
#[derive(Default)]
pub(crate) struct Lead {
    published: AtomicU64,
    delivered: AtomicU64,
}

impl Lead {
    /// Returns true when the lead exceeds a quarter of the retention. Publishers then wait, so that nothing is trimmed
    /// before it is read.
    fn is_long(&self) -> bool {
        let delivered = self.delivered.load(Ordering::Relaxed);
        self.published.load(Ordering::Relaxed).saturating_sub(delivered) > RETENTION_BYTES / 4
    }
}

/// Publishes for `time`. Returns the bytes of acknowledged messages.
pub(crate) fn publish_for(publisher: &Publisher, message: &[u8], time: Duration, lead: Option<&Lead>) -> Result<u64> {
    const AT_A_TIME: u64 = 256;
    let begun = Instant::now();
    let mut bytes = 0;
    while begun.elapsed() < time {
        if lead.is_some_and(Lead::is_long) {
            publisher.wait(Duration::from_millis(1))?;
            continue;
        }
        for _ in 0..AT_A_TIME {
            publisher.publish_wait(message)?;
        }
        let more = AT_A_TIME * message.len() as u64;
        bytes += more;
        if let Some(lead) = lead {
            lead.published.fetch_add(more, Ordering::Relaxed);
        }
    }
    publisher.flush()?;
    Ok(bytes)
}

/// Goodput of one run with a thread per publisher, bytes per second.
fn goodput(args: &BenchArgs, client: &Client, topic: &str, lead: Option<&Lead>) -> Result<f64> {
    let time = Duration::from_secs_f64(args.seconds);
    let publishers = (0..args.publishers).map(|_| client.publisher(topic)).collect::<Result<Vec<_>, _>>()?;
    let message = vec![b'm'; args.message_bytes];
    let publish = |publisher| {
        pin(args.near_core())?;
        publish_for(publisher, &message, time, lead)
    };
    let publish = &publish;
    let begun = Instant::now();
    let bytes = std::thread::scope(|scope| {
        let threads: Vec<_> = publishers.iter().map(|publisher| scope.spawn(move || publish(publisher))).collect();
        let mut sum = 0;
        for thread in threads {
            sum += thread.join().map_err(|_| anyhow::anyhow!("a publisher thread died"))??;
        }
        Ok::<u64, anyhow::Error>(sum)
    })?;
    let rate = bytes as f64 / begun.elapsed().as_secs_f64();
    for publisher in publishers {
        publisher.close()?;
    }
    Ok(rate)
}

/// Goodput of one run on a fresh cluster, bytes per second.
pub(crate) fn publish_goodput(args: &BenchArgs) -> Result<f64> {
    let cluster = args.cluster()?;
    let client = args.client(&cluster)?;
    args.topic(&client, "bench")?;
    // The first pass touches memory.
    let warm = BenchArgs { seconds: args.seconds / 4.0, ..args.clone() };
    goodput(&warm, &client, "bench", None)?;
    goodput(args, &client, "bench", None)
}

pub(crate) fn run(args: &GridArgs) -> Result<()> {
    for point in args.points()? {
        let bench = &point.bench;
        let (mut ceilings, mut rates) = (Vec::new(), Vec::new());
        for _ in 0..bench.runs {
            ceilings.push(match bench.transport {
                TransportKind::Tcp => {
                    ceiling::tcp_receive_into_region(bench.cores(), bench.write_bytes(), bench.seconds)?
                }
                _ => ceiling::verbs_write(bench, bench.write_bytes())?,
            });
            rates.push(publish_goodput(bench)?);
        }
        let name = bench.ceiling_name("tcp_recv_into_region");
        let goodput = Row::new("publish.goodput", "B/s", &rates).with_ceiling(name, &ceilings);
        let messages: Vec<f64> = rates.iter().map(|rate| rate / bench.message_bytes as f64).collect();
        point.print(bench.parameters(), &[goodput, Row::new("publish.messages", "1/s", &messages)])?;
    }
    let bench = &args.bench;
    Report::new(bench.parameters(), bench.format()).print(&ceiling::of_the_machine(bench)?)
}

/// Publishes alone, then publishes and subscribes at once. Returns three goodputs in bytes per second: published alone,
/// published beside the subscriber, and delivered.
fn publish_and_subscribe(args: &BenchArgs) -> Result<(f64, f64, f64)> {
    let cluster = args.cluster()?;
    let client = args.client(&cluster)?;
    args.topic(&client, "alone")?;
    goodput(&BenchArgs { seconds: args.seconds / 4.0, ..args.clone() }, &client, "alone", None)?;
    let alone = goodput(args, &client, "alone", None)?;
    client.delete_topic("alone")?;
    args.topic(&client, "both")?;
    let mut subscriber = client.subscriber("both", Start::Earliest)?;
    let lead = Lead::default();
    let begun = Instant::now();
    let (published, delivered) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<(u64, Instant)> {
            let (mut bytes, mut last) = (0u64, Instant::now());
            loop {
                // Two seconds of silence end the run; they are not counted.
                match subscriber.next_batch(Duration::from_secs(2))? {
                    Some(batch) => {
                        bytes += u64::from(batch.payload_bytes);
                        lead.delivered.store(bytes, Ordering::Relaxed);
                        last = Instant::now();
                    }
                    None => return Ok((bytes, last)),
                }
            }
        });
        let published = goodput(args, &client, "both", Some(&lead))?;
        let (bytes, last) = reader.join().map_err(|_| anyhow::anyhow!("the subscriber thread died"))??;
        Ok::<_, anyhow::Error>((published, bytes as f64 / last.duration_since(begun).as_secs_f64()))
    })?;
    Ok((alone, published, delivered))
}

pub(crate) fn end_to_end(args: &GridArgs) -> Result<()> {
    for point in args.points()? {
        let bench = &point.bench;
        let (mut alone, mut published, mut delivered) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..bench.runs {
            let (a, p, d) = publish_and_subscribe(bench)?;
            alone.push(a);
            published.push(p);
            delivered.push(d);
        }
        let rows = [
            Row::new("end_to_end.goodput", "B/s", &delivered).with_ceiling("publish_in_the_same_run", &published),
            Row::new("end_to_end.goodput_vs_publish_alone", "B/s", &delivered).with_ceiling("publish_alone", &alone),
        ];
        point.print(bench.parameters(), &rows)?;
    }
    Ok(())
}
