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
use embarcadero_datapath::cxl::{Mapping, Native, Region};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

const BROKERS: u32 = 4;
const SESSIONS: u32 = 16;

fn region(allocator: AllocatorKind, method: FlushMethod) -> Result<Region<Native>> {
    let tables = Geometry::with_segments_of(16 << 20, allocator);
    let geometry = Geometry { max_brokers: BROKERS, max_heads: 1, max_topics: 1, segment_count: 64, ..tables };
    let mapping = Mapping::anonymous(Layout::new(&geometry).region_bytes).context("cannot map memory")?;
    mapping.prefault().context("cannot map memory")?;
    Ok(Region::format(Native::new(mapping, method)?, &geometry, Uuid::new_v4(), 0)?)
}

/// Batches ordered a second, counting only the time inside the sequencer.
fn order(method: FlushMethod, seconds: f64) -> Result<f64> {
    let region = region(AllocatorKind::Partitioned, method)?;
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
    let (mut spent, mut batches) = (Duration::ZERO, 0u64);
    let per_round = (SESSION_WINDOW - 1).min(64);
    while spent.as_secs_f64() < seconds {
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
                logs[broker].0.append(entry);
                *next += 1;
            }
        }
        for (log, pulse) in &mut logs {
            log.publish(Written::default());
            pulse.announce(1);
        }
        let begun = Instant::now();
        let mut taken = 0;
        while taken < per_round * u64::from(SESSIONS) {
            taken += sequencer.poll(1, GROUP_BATCHES);
        }
        spent += begun.elapsed();
        batches += taken;
        sequencer.maintain(2);
    }
    anyhow::ensure!(sequencer.stats().ordered == batches, "not every batch was ordered");
    Ok(batches as f64 / spent.as_secs_f64())
}

/// Median time of allocating one segment, seconds.
fn allocation() -> Result<f64> {
    let allocator = BitmapAllocator::new(region(AllocatorKind::Bitmap, FlushMethod::None)?);
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
    let flushed = (0..args.runs).map(|_| order(method, args.seconds)).collect::<Result<Vec<_>>>()?;
    let coherent = (0..args.runs).map(|_| order(FlushMethod::None, args.seconds)).collect::<Result<Vec<_>>>()?;
    let allocations = (0..args.runs).map(|_| allocation()).collect::<Result<Vec<_>>>()?;
    let rows = [
        Row::new("sequencer.batches", "1/s", &flushed).with_ceiling("sequencer.batches.coherent", &coherent),
        Row::new("segment.allocate", "s", &allocations),
    ];
    let parameters = json!({ "brokers": BROKERS, "sessions": SESSIONS, "flush": method, "seconds": args.seconds });
    Report::new(parameters, args.json).print(&rows)
}
