//! `embarcadero region`.

use crate::settings::parse_bytes;
use anyhow::Result;
use clap::{Subcommand, ValueEnum};
use embarcadero_datapath::cxl::cache::FlushMethod;
use embarcadero_datapath::cxl::layout::BrokerHalf;
use embarcadero_datapath::cxl::layout::{AllocatorKind, Geometry};
use embarcadero_datapath::cxl::order_index::{Extent, StreamId, read_extent, read_sequencer_half};
use embarcadero_datapath::cxl::region::RegionFile;
use embarcadero_datapath::cxl::segment::{SegmentUse, free_segments, read_owner};
use embarcadero_datapath::cxl::session_table::{Session, read_progress, read_session};
use embarcadero_datapath::cxl::tables::{
    BrokerInfo, Headship, TopicConfig, read_broker, read_headship, read_pulse, read_topic,
};
use embarcadero_datapath::cxl::{Fabric, Native, Region, Site};
use serde::Serialize;
use std::path::PathBuf;

#[derive(Clone, Copy, ValueEnum)]
pub enum Allocator {
    /// One atomic bitmap (coherent platforms).
    Bitmap,
    /// A bitmap partition for each broker.
    Partitioned,
    /// The head allocates, by RPC.
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
        /// Most topics.
        #[arg(long, default_value_t = 32)]
        max_topics: u32,
        /// Most publisher sessions.
        #[arg(long, default_value_t = 1024)]
        max_sessions: u32,
        /// Batchlog entries of each topic and broker, a power of two.
        #[arg(long, default_value_t = 1024)]
        batchlog_slots: u32,
        /// Do not allocate the pages now.
        #[arg(long)]
        sparse: bool,
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
            max_topics,
            max_sessions,
            batchlog_slots,
            sparse,
            force,
        } => {
            let tables = Geometry::with_segments_of(segment_size, allocator.into());
            let geometry = Geometry { max_brokers, max_topics, max_sessions, batchlog_slots, ..tables }.fit(size)?;
            let file = RegionFile::create(&path, &geometry, FlushMethod::None, !sparse, force)?;
            println!(
                "created {} ({}, {} segments of {} bytes)",
                path.display(),
                file.region().uuid(),
                geometry.segment_count,
                geometry.segment_bytes
            );
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
        RegionCommand::Destroy { path, force } => {
            RegionFile::open(&path, FlushMethod::None)?.destroy(force)?;
            println!("destroyed {}", path.display());
            Ok(())
        }
    }
}

#[derive(Serialize)]
struct Report {
    superblock: Superblock,
    layout: embarcadero_datapath::cxl::layout::Layout,
    control_block: Option<Headship>,
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
}

#[derive(Serialize)]
struct TopicReport {
    #[serde(flatten)]
    config: TopicConfig,
    global_index: Option<Extent>,
    offset_entries: Vec<OffsetEntryReport>,
}

#[derive(Serialize)]
struct OffsetEntryReport {
    broker: u32,
    log_offset: u64,
    batchlog_head: u64,
    written: u64,
    written_addr: u64,
    ordered: u64,
    ordered_offset: u64,
    consumed_through: u64,
    decided_through: u64,
    own_index: Option<Extent>,
}

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

impl Report {
    fn read(region: &Region<Native>) -> Self {
        let geometry = *region.geometry();
        let brokers = (0..geometry.max_brokers).filter_map(|broker| {
            let (heartbeat, batches_published) = read_pulse(region, broker);
            Some(BrokerReport { info: read_broker(region, broker)?, heartbeat, batches_published })
        });
        let used = (0..geometry.segment_count)
            .map(|segment| SegmentReport { segment, owner: read_owner(region, segment) })
            .filter(|report| report.owner != SegmentUse::Free);
        let sessions = (0..geometry.max_sessions).filter_map(|slot| {
            Some(SessionReport { session: read_session(region, slot)?, expected: read_progress(region, slot) })
        });
        Self {
            superblock: Superblock {
                uuid: region.uuid().to_string(),
                layout_version: embarcadero_datapath::cxl::layout::LAYOUT_VERSION,
                layout_hash: format!("{:#018x}", embarcadero_datapath::cxl::layout::LAYOUT_HASH),
                created_ms: region.created_ms(),
                geometry,
            },
            layout: *region.layout(),
            control_block: read_headship(region),
            brokers: brokers.collect(),
            topics: (0..geometry.max_topics).filter_map(|id| TopicReport::read(region, id)).collect(),
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
    fn read(region: &Region<Native>, id: u32) -> Option<Self> {
        let config = read_topic(region, id)?;
        let extent = |stream| {
            let extent = read_extent(region, StreamId { topic: id, stream });
            (extent.incarnation == u64::from(config.incarnation)).then_some(extent)
        };
        let entries =
            (0..region.geometry().max_brokers).filter(|broker| read_broker(region, *broker).is_some()).map(|broker| {
                let half: BrokerHalf =
                    region.fabric().observe_line(region.layout().offset_entry(id, broker), Site::BatchlogHeadRead);
                let sequencer = read_sequencer_half(region, id, broker);
                OffsetEntryReport {
                    broker,
                    log_offset: half.log_offset,
                    batchlog_head: half.batchlog_head,
                    written: half.written,
                    written_addr: half.written_addr,
                    ordered: sequencer.ordered,
                    ordered_offset: sequencer.ordered_offset,
                    consumed_through: sequencer.consumed_through,
                    decided_through: sequencer.decided_through,
                    own_index: extent(broker),
                }
            });
        Some(Self { global_index: extent(StreamId::GLOBAL), offset_entries: entries.collect(), config })
    }
}
