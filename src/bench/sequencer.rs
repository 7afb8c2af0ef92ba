//! The sequencer alone: Batchlogs are filled, then the time is taken that ordering them needs.

use super::BenchArgs;
use super::report::{Report, Row};
use anyhow::{Context, Result};
use crossbeam_channel::{bounded, unbounded};
use embarcadero_broker::sequencer::{Command, GROUP_BATCHES, Leases, Memory, Predecessor, Sequencer};
use embarcadero_datapath::cxl::batchlog::{BatchlogWriter, Written};
use embarcadero_datapath::cxl::cache::{FlushMethod, FlushSupport};
use embarcadero_datapath::cxl::layout::{AllocatorKind, BatchEntry, Geometry, Layout, SESSION_WINDOW, Seat};
use embarcadero_datapath::cxl::segment::{BitmapAllocator, PartitionAllocator, SegmentAllocator};
use embarcadero_datapath::cxl::tables::{Order, Pulse, TopicConfig, TopicState};
use embarcadero_datapath::cxl::{Fabric, Mapping, Native, Region};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

const BROKERS: u32 = 4;
const SESSIONS: u32 = 16;
/// Entries that are published together, as brokers do by default.
const GROUP: u64 = 8;

/// A region in memory that nobody else maps, behind the fabric that `wrap` makes of it.
pub fn region<F: Fabric>(
    allocator: AllocatorKind,
    method: FlushMethod,
    wrap: impl FnOnce(Native) -> F,
) -> Result<Region<F>> {
    let tables = Geometry::with_segments_of(16 << 20, allocator);
    let geometry = Geometry { max_brokers: BROKERS, max_heads: 1, max_topics: 1, segment_count: 64, ..tables };
    let mapping = Mapping::anonymous(Layout::new(&geometry).region_bytes).context("cannot map memory")?;
    mapping.prefault().context("cannot map memory")?;
    Ok(Region::format(wrap(Native::new(mapping, method)?), &geometry, Uuid::new_v4(), 0)?)
}

/// What ordering took.
pub struct Ordered {
    pub batches: u64,
    /// In the brokers: entries of Batchlogs, published in groups.
    pub appending: Duration,
    /// In the sequencer.
    pub ordering: Duration,
}

impl Ordered {
    /// Batches a second of the sequencer alone.
    pub fn rate(&self) -> f64 {
        self.batches as f64 / self.ordering.as_secs_f64()
    }
}

/// Has batches of several sessions appended at several brokers and ordered, one after the other, until the sequencer has
/// worked for `seconds`.
pub fn order<F: Fabric>(region: Region<F>, seconds: f64) -> Result<Ordered> {
    let pool: Arc<dyn SegmentAllocator> = Arc::new(PartitionAllocator::of_broker(region.clone(), 0));
    let (commands, queue) = unbounded();
    let leases = Leases { gap_us: u64::MAX / 2, idle_us: u64::MAX / 2 };
    let memory = Memory { region: region.clone(), pool, mirror: None };
    let mut sequencer = Sequencer::recover(memory, (Seat(0), 1), Predecessor::Gone, leases, queue, 0)?;
    let config = TopicConfig {
        id: 0,
        incarnation: 1,
        state: TopicState::Live,
        name: "bench".to_owned(),
        order: Order::Strong,
        ack_level: 1,
        replication_factor: 1,
        // Entries of this size keep half of the broker's index segments in use.
        retention_bytes: 1 << 20,
        retention_ms: 0,
        created_ms: 0,
    };
    let (reply, _opened) = bounded(1);
    commands.send(Command::OpenTopic(config, reply)).context("the sequencer is gone")?;
    let mut sessions = Vec::new();
    for client_id in 1..=u64::from(SESSIONS) {
        let (reply, answer) = bounded(1);
        commands
            .send(Command::OpenSession { topic: 0, client_id, ack_level: 1, reply })
            .context("the sequencer is gone")?;
        sequencer.poll(0, 1);
        sessions.push(answer.recv().context("no session")??);
    }
    let mut logs: Vec<_> = (0..BROKERS)
        .map(|broker| (BatchlogWriter::new(region.clone(), 0, broker), Pulse::new(region.clone(), broker)))
        .collect();
    let mut sequences = vec![0u64; SESSIONS as usize];
    let mut ordered = Ordered { batches: 0, appending: Duration::ZERO, ordering: Duration::ZERO };
    let per_round = (SESSION_WINDOW - 1).min(64);
    while ordered.ordering.as_secs_f64() < seconds {
        let begun = Instant::now();
        for (session, next) in sessions.iter().zip(&mut sequences) {
            for _ in 0..per_round {
                let broker = (*next % u64::from(BROKERS)) as usize;
                let entry = BatchEntry {
                    client_id: session.client_id,
                    sequence: *next,
                    session_epoch: session.epoch,
                    session_slot: session.slot,
                    topic_incarnation: 1,
                    bytes: 1,
                    message_count: 1,
                    ..bytemuck::Zeroable::zeroed()
                };
                anyhow::ensure!(logs[broker].0.has_room(), "the Batchlog is too small for the bench");
                let appended = logs[broker].0.append(entry);
                *next += 1;
                // A group of entries has one flush of the head.
                if (appended + 1).is_multiple_of(GROUP) {
                    logs[broker].0.publish(Written::default());
                }
            }
        }
        for (log, pulse) in &mut logs {
            log.publish(Written::default());
            pulse.announce(1);
        }
        ordered.appending += begun.elapsed();
        let begun = Instant::now();
        let mut taken = 0;
        while taken < per_round * u64::from(SESSIONS) {
            taken += sequencer.poll(1, GROUP_BATCHES);
        }
        ordered.ordering += begun.elapsed();
        ordered.batches += taken;
        sequencer.maintain(2);
    }
    anyhow::ensure!(sequencer.stats().ordered == ordered.batches, "not every batch was ordered");
    Ok(ordered)
}

/// Median time of allocating one segment, seconds.
pub fn allocation() -> Result<f64> {
    let allocator = BitmapAllocator::new(region(AllocatorKind::Bitmap, FlushMethod::None, |native| native)?);
    let mut times = Vec::new();
    for _ in 0..2000 {
        let begun = Instant::now();
        let taken: Vec<u32> = (0..32).map(|_| allocator.allocate()).collect::<Result<_, _>>()?;
        times.push(begun.elapsed().as_secs_f64() / 32.0);
        for segment in taken {
            allocator.release(segment)?;
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

pub fn run(args: &BenchArgs) -> Result<()> {
    let method = FlushSupport::detect().best().context("this CPU has no flush instruction")?;
    let rate = |method| -> Result<f64> {
        Ok(order(region(AllocatorKind::Partitioned, method, |native| native)?, args.seconds)?.rate())
    };
    let flushed = (0..args.runs).map(|_| rate(method)).collect::<Result<Vec<_>>>()?;
    let coherent = (0..args.runs).map(|_| rate(FlushMethod::None)).collect::<Result<Vec<_>>>()?;
    let allocations = (0..args.runs).map(|_| allocation()).collect::<Result<Vec<_>>>()?;
    let rows = [
        Row::new("sequencer.batches", "1/s", &flushed).with_ceiling("sequencer.batches.coherent", &coherent),
        Row::new("segment.allocate", "s", &allocations),
    ];
    let parameters = json!({ "brokers": BROKERS, "sessions": SESSIONS, "flush": method, "seconds": args.seconds });
    Report::new(parameters, args.format()).print(&rows)
}
