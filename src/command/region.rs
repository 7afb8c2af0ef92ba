//! `embarcadero region`.

use crate::settings::parse_bytes;
use anyhow::Result;
use clap::{Subcommand, ValueEnum};
use embarcadero_broker::replica::restore::{Plan, RestoreError, find_media};
use embarcadero_cxl::batchlog::peek_entry;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::{
    AllocatorKind, BatchEntry, BrokerHalf, DEFAULT_LEADERS, Geometry, LeaderArea, PinLine, RegionRole,
};
use embarcadero_cxl::leadership::{LeaderInfo, last_active, read_leader_at};
use embarcadero_cxl::order_index::{Extent, OrderIndexReader, StreamId, read_extent_at, read_sequencer_half_at};
use embarcadero_cxl::region::{Creation, RegionFile};
use embarcadero_cxl::replication::{Completion, Replication, read_completion_at, read_replicated};
use embarcadero_cxl::segment::{SegmentUse, free_segments, read_owner};
use embarcadero_cxl::session_table::{Session, read_progress_at, read_session_at};
use embarcadero_cxl::tables::{
    BrokerInfo, ReplicaState, TopicConfig, read_broker, read_pulse, read_replica_state, read_topic_at,
};
use embarcadero_cxl::{Fabric, Native, Region, Site};
use embarcadero_wire::{BrokerId, ClientId, Epoch, Incarnation, Stream, TopicId};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, ValueEnum)]
pub enum Allocator {
    /// One atomic bitmap (coherent platforms).
    Bitmap,
    /// A bitmap partition for each broker.
    Partitioned,
    /// The leader allocates, by RPC.
    Leader,
}

impl From<Allocator> for AllocatorKind {
    fn from(allocator: Allocator) -> Self {
        match allocator {
            Allocator::Bitmap => Self::Bitmap,
            Allocator::Partitioned => Self::Partitioned,
            Allocator::Leader => Self::Leader,
        }
    }
}

#[derive(Subcommand)]
pub enum RegionCommand {
    /// Make a region: a file on tmpfs or hugetlbfs, or on a device-dax node.
    Create {
        /// Where.
        #[arg(long, default_value = "/dev/shm/embarcadero")]
        path: PathBuf,
        /// Size, for example 4GiB.
        #[arg(long, value_parser = parse_bytes, default_value = "1GiB")]
        size: u64,
        /// Size of a segment, a power of two from 1MiB to 16GiB.
        #[arg(long, value_parser = parse_bytes, default_value = "16MiB")]
        segment_size: u64,
        /// Segment allocator.
        #[arg(long, value_enum, default_value = "bitmap")]
        allocator: Allocator,
        /// Most brokers.
        #[arg(long, default_value_t = 32)]
        max_brokers: u32,
        /// Brokers that can be the leader, those with the lowest ids; unset means 4, or all where there are fewer.
        #[arg(long)]
        max_leaders: Option<u32>,
        /// Most topics.
        #[arg(long, default_value_t = 32)]
        max_topics: u32,
        /// Most publisher sessions.
        #[arg(long, default_value_t = 1024)]
        max_sessions: u32,
        /// Batchlog entries of each topic and broker, a power of two.
        #[arg(long, default_value_t = 1024)]
        batchlog_slots: u32,
        /// A mirror beside it, on another unit of memory: what its leaders write, twice.
        #[arg(long)]
        mirror: Option<PathBuf>,
        /// Size of the mirror: 64 bytes a batch that the region keeps, for each leader, and its tables.
        #[arg(long, value_parser = parse_bytes, default_value = "64MiB")]
        mirror_size: u64,
        /// Do not allocate the pages now.
        #[arg(long)]
        sparse: bool,
        /// NUMA node to take the pages from: CXL memory that is online as system-ram.
        #[arg(long)]
        numa_node: Option<u32>,
        /// Overwrite what a device holds.
        #[arg(long)]
        force: bool,
    },
    /// Print every structure, also of a region in use.
    Inspect {
        /// Where.
        #[arg(long, default_value = "/dev/shm/embarcadero")]
        path: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Rebuild topics in an empty region from replica files: after the region, or the whole cluster, was lost.
    Restore {
        /// The region, as `region create` made it.
        #[arg(long, default_value = "/dev/shm/embarcadero")]
        path: PathBuf,
        /// Directories with replica files, of all brokers.
        #[arg(long, required_unless_present = "mirror", num_args = 1..)]
        from: Vec<PathBuf>,
        /// The mirror of the region that was lost: then what is missing is known to the last message.
        #[arg(long)]
        mirror: Option<PathBuf>,
        /// The region that was lost, if the files are of several.
        #[arg(long)]
        uuid: Option<uuid::Uuid>,
        /// Go on although messages that were there are in none of the files; their offsets stay empty.
        #[arg(long)]
        accept_loss: bool,
        /// Only say what would be restored.
        #[arg(long)]
        dry_run: bool,
    },
    /// Remove a region.
    Destroy {
        /// Where.
        #[arg(long, default_value = "/dev/shm/embarcadero")]
        path: PathBuf,
        /// Even while brokers use it.
        #[arg(long)]
        force: bool,
    },
}

pub fn run(command: RegionCommand) -> Result<()> {
    match command {
        RegionCommand::Create {
            path,
            size,
            segment_size,
            allocator,
            max_brokers,
            max_leaders,
            max_topics,
            max_sessions,
            batchlog_slots,
            mirror,
            mirror_size,
            sparse,
            numa_node,
            force,
        } => {
            let tables = Geometry::with_segments_of(segment_size, allocator.into());
            let max_leaders = max_leaders.unwrap_or(DEFAULT_LEADERS.min(max_brokers));
            let role = if mirror.is_some() { RegionRole::Mirrored } else { RegionRole::Single };
            let geometry =
                Geometry { max_brokers, max_leaders, max_topics, max_sessions, batchlog_slots, role, ..tables }
                    .fit(size)?;
            let of_mirror = mirror.as_ref().map(|_| geometry.of_mirror(mirror_size)).transpose()?;
            let creation = Creation { reserve: !sparse, numa_node, force, uuid: None };
            let file = RegionFile::create(&path, &geometry, FlushMethod::None, creation)?;
            if let (Some(mirror), Some(of_mirror)) = (&mirror, of_mirror) {
                let creation = Creation { reserve: !sparse, numa_node: None, force, uuid: Some(file.region().uuid()) };
                if let Err(error) = RegionFile::create(mirror, &of_mirror, FlushMethod::None, creation) {
                    file.destroy(true)?;
                    return Err(error.into());
                }
            }
            println!(
                "created {} ({}, {} segments of {} bytes)",
                path.display(),
                file.region().uuid(),
                geometry.segment_count,
                geometry.segment_bytes
            );
            if let Some(mirror) = mirror {
                println!("created its mirror {}", mirror.display());
            }
            Ok(())
        }
        RegionCommand::Inspect { path, json } => {
            let file = RegionFile::open(&path, FlushMethod::None)?;
            let report = Report::read(file.region());
            if json {
                println!("{}", serde_json::to_string_pretty(&report)?);
            } else {
                // The JSON's structure, in a form that is easier on the eye.
                print!("{}", serde_yaml::to_string(&report)?);
            }
            Ok(())
        }
        RegionCommand::Restore { path, from, mirror, uuid, accept_loss, dry_run } => {
            let mirror = mirror.map(|mirror| RegionFile::open(&mirror, FlushMethod::None)).transpose()?;
            let plan = Plan::read(find_media(&from)?, mirror.as_ref().map(RegionFile::region), uuid)?;
            restore(&path, &plan, RestoreOptions { accept_loss, dry_run })
        }
        RegionCommand::Destroy { path, force } => {
            RegionFile::open(&path, FlushMethod::None)?.destroy(force)?;
            println!("destroyed {}", path.display());
            Ok(())
        }
    }
}

struct RestoreOptions {
    /// Go on although messages are lost.
    accept_loss: bool,
    /// Only say what would be restored.
    dry_run: bool,
}

fn restore(path: &Path, plan: &Plan, options: RestoreOptions) -> Result<()> {
    for damage in &plan.damage {
        eprintln!("{damage}");
    }
    let mut total = 0;
    println!("region {}:", plan.region);
    for topic in &plan.topics {
        let (batches, bytes) = topic.size();
        total += bytes;
        let left = topic.unacknowledged;
        println!(
            "topic {}: {batches} batches, {bytes} bytes; {left} that were not acknowledged are left out",
            topic.config.name
        );
    }
    if let Some(losses) = plan.losses() {
        if !options.accept_loss {
            return Err(RestoreError::Lost(losses).into());
        }
        println!("lost:\n{losses}");
    }
    if options.dry_run {
        return Ok(());
    }
    let file = RegionFile::open(path, FlushMethod::None)?;
    let bar = indicatif::ProgressBar::new(total)
        .with_style(indicatif::ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes} ({bytes_per_sec})")?);
    plan.write(file.region(), |bytes| bar.inc(bytes))?;
    bar.finish();
    println!("restored to {}", path.display());
    Ok(())
}

#[derive(Serialize)]
struct Report {
    superblock: Superblock,
    layout: embarcadero_cxl::layout::Layout,
    control_block: Option<LeaderInfo>,
    brokers: Vec<BrokerReport>,
    topics: Vec<TopicReport>,
    sessions: Vec<SessionReport>,
    segments: SegmentsReport,
}

#[derive(Serialize)]
struct Superblock {
    uuid: String,
    layout_version: u32,
    layout_hash: String,
    created_ms: u64,
    geometry: Geometry,
}

#[derive(Serialize)]
struct BrokerReport {
    #[serde(flatten)]
    info: BrokerInfo,
    heartbeat: u64,
    batches_published: u64,
    replica: ReplicaState,
}

#[derive(Serialize)]
struct TopicReport {
    #[serde(flatten)]
    config: TopicConfig,
    global_index: Option<Extent>,
    /// The newest entries of the global index, oldest first.
    global_index_entries: Vec<IndexEntryReport>,
    offset_entries: Vec<OffsetEntryReport>,
}

#[derive(Serialize)]
struct OffsetEntryReport {
    broker: BrokerId,
    log_offset: u64,
    batchlog_head: u64,
    written: u64,
    written_addr: u64,
    ordered: u64,
    ordered_offset: u64,
    consumed_through: u64,
    decided_through: u64,
    /// Lowest index position that a sender of this broker reads; null when none does.
    delivering_from: Option<u64>,
    released_incarnation: Incarnation,
    /// Entries of the stream that this broker acknowledges from below this are on enough disks, unless they are lost.
    durable_through: u64,
    lost_through: u64,
    /// How far this broker, as a replica, is with the batches of each source broker.
    replicated: BTreeMap<BrokerId, u64>,
    own_index: Option<Extent>,
    /// The newest entries of the Batchlog, oldest first.
    batchlog: Vec<BatchReport>,
}

/// A Batchlog entry.
#[derive(Serialize)]
struct BatchReport {
    index: u64,
    location: u64,
    client_id: ClientId,
    sequence: u64,
    session_epoch: Epoch,
    bytes: u32,
    message_count: u32,
    lap: u64,
}

/// An entry of an order index.
#[derive(Serialize)]
struct IndexEntryReport {
    position: u64,
    first_offset: u64,
    message_count: u32,
    broker: BrokerId,
    location: u64,
    bytes: u32,
    client_id: ClientId,
    sequence: u64,
    session_epoch: Epoch,
    term: u32,
    ordered_us: u64,
}

/// Entries of a ring or an index that are shown.
const NEWEST: u64 = 4;

#[derive(Serialize)]
struct SessionReport {
    #[serde(flatten)]
    session: Session,
    expected: u64,
}

#[derive(Serialize)]
struct SegmentsReport {
    total: u32,
    free: u32,
    used: Vec<SegmentReport>,
}

#[derive(Serialize)]
struct SegmentReport {
    segment: u32,
    #[serde(flatten)]
    owner: SegmentUse,
}

/// The use of a segment as its owner line has it, where one past the last broker's id stands for the global stream.
fn owner(region: &Region<Native>, segment: u32) -> SegmentUse {
    let mut owner = read_owner(region, segment);
    if let SegmentUse::Index { stream, .. } = &mut owner
        && *stream == Stream::GLOBAL
    {
        *stream = Stream::of(BrokerId(region.geometry().max_brokers));
    }
    owner
}

impl Report {
    /// What is there, as the leader has it, or the one that was it last.
    fn read(region: &Region<Native>) -> Self {
        let geometry = *region.geometry();
        let area = last_active(region).map_or(LeaderArea(BrokerId(0)), |(area, _)| area);
        let brokers = geometry.brokers().filter_map(|broker| {
            let (heartbeat, batches_published) = read_pulse(region, broker);
            let replica = read_replica_state(region, broker);
            Some(BrokerReport { info: read_broker(region, broker)?, heartbeat, batches_published, replica })
        });
        let used = (0..geometry.segment_count)
            .map(|segment| SegmentReport { segment, owner: owner(region, segment) })
            .filter(|report| report.owner != SegmentUse::Free);
        let sessions = geometry.sessions().filter_map(|slot| {
            let (session, expected) = (read_session_at(region, area, slot)?, read_progress_at(region, area, slot));
            Some(SessionReport { session, expected })
        });
        Self {
            superblock: Superblock {
                uuid: region.uuid().to_string(),
                layout_version: embarcadero_cxl::layout::LAYOUT_VERSION,
                layout_hash: format!("{:#018x}", embarcadero_cxl::layout::LAYOUT_HASH),
                created_ms: region.created_ms(),
                geometry,
            },
            layout: *region.layout(),
            control_block: read_leader_at(region, area),
            brokers: brokers.collect(),
            topics: geometry.topics().filter_map(|id| TopicReport::read(region, area, id)).collect(),
            sessions: sessions.collect(),
            segments: SegmentsReport {
                total: geometry.segment_count,
                free: free_segments(region),
                used: used.collect(),
            },
        }
    }
}

impl TopicReport {
    fn read(region: &Region<Native>, area: LeaderArea, id: TopicId) -> Option<Self> {
        let config = read_topic_at(region, area, id)?;
        let extent = |stream| {
            let extent = read_extent_at(region, area, StreamId { topic: id, stream });
            (extent.incarnation == config.incarnation).then_some(extent)
        };
        let brokers = region.geometry().brokers();
        let entries = brokers
            .filter(|broker| read_broker(region, *broker).is_some())
            .map(|broker| OffsetEntryReport::read(region, area, id, broker, extent(Stream::of(broker))))
            .collect();
        let global_index = extent(Stream::GLOBAL);
        let global_index_entries = global_index.map_or_else(Vec::new, |extent| newest_entries(region, id, &extent));
        Some(Self { global_index, global_index_entries, offset_entries: entries, config })
    }
}

fn newest_entries(region: &Region<Native>, topic: TopicId, extent: &Extent) -> Vec<IndexEntryReport> {
    let mut reader = OrderIndexReader::new(region.clone(), StreamId { topic, stream: Stream::GLOBAL });
    let committed = reader.poll();
    (extent.trimmed.max(committed.saturating_sub(NEWEST))..committed)
        .filter_map(|position| {
            // On a live region the entry may be trimmed under our eyes; then it is not shown.
            let entry = reader.read(position).ok()?;
            Some(IndexEntryReport {
                position,
                first_offset: entry.first_offset,
                message_count: entry.message_count,
                broker: entry.broker.into(),
                location: entry.location,
                bytes: entry.bytes,
                client_id: entry.client_id,
                sequence: entry.sequence,
                session_epoch: entry.session_epoch,
                term: entry.term,
                ordered_us: entry.ordered_us,
            })
        })
        .collect()
}

impl OffsetEntryReport {
    fn read(
        region: &Region<Native>,
        area: LeaderArea,
        topic: TopicId,
        broker: BrokerId,
        own_index: Option<Extent>,
    ) -> Self {
        let fabric = region.fabric();
        let half: BrokerHalf = fabric.observe_line(region.layout().offset_entry(topic, broker), Site::BatchlogHeadRead);
        let pins: PinLine = fabric.observe_line(region.layout().pin(topic, broker), Site::PinRead);
        let Completion { durable_through, lost_through, .. } = read_completion_at(region, area, topic, broker);
        let of = |source| Replication { topic, replica: broker, source };
        let sources = region.geometry().brokers();
        let replicated =
            sources.map(|source| (source, read_replicated(region, of(source)))).filter(|(_, position)| *position > 0);
        let sequencer = read_sequencer_half_at(region, area, topic, broker);
        let newest = half.batchlog_head.saturating_sub(NEWEST)..half.batchlog_head;
        let batchlog = newest.map(|index| {
            let entry: BatchEntry = peek_entry(region, topic, broker, index);
            BatchReport {
                index,
                location: entry.location,
                client_id: entry.client_id,
                sequence: entry.sequence,
                session_epoch: entry.session_epoch,
                bytes: entry.bytes,
                message_count: entry.message_count,
                lap: entry.lap,
            }
        });
        Self {
            broker,
            log_offset: half.log_offset,
            batchlog_head: half.batchlog_head,
            written: half.written,
            written_addr: half.written_addr,
            ordered: sequencer.ordered,
            ordered_offset: sequencer.ordered_offset,
            consumed_through: sequencer.consumed_through,
            decided_through: sequencer.decided_through,
            // Stored plus one; all ones stand for nothing.
            delivering_from: (1..u64::MAX).contains(&pins.delivering_from).then(|| pins.delivering_from - 1),
            released_incarnation: Incarnation::from_word(pins.released),
            durable_through,
            lost_through,
            replicated: replicated.collect(),
            own_index,
            batchlog: batchlog.collect(),
        }
    }
}
