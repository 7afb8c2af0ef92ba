//! Report of `embarcadero region inspect`: what a region holds, as JSON.

use embarcadero_cxl::batchlog::peek_entry;
use embarcadero_cxl::broker_table::{BrokerInfo, read_broker, read_pulse, read_replica_state};
use embarcadero_cxl::layout::{
    BrokerHalf, Geometry, LAYOUT_HASH, LAYOUT_VERSION, Layout, LeaderArea, PinLine, ReplicaState, pinned_position,
};
use embarcadero_cxl::leadership::{LeaderInfo, last_active, read_leader_at};
use embarcadero_cxl::order_index::{Extent, OrderIndexReader, ReadError, StreamId, read_extent_at};
use embarcadero_cxl::owner::{SegmentUse, read_owner};
use embarcadero_cxl::replication::{Completion, Replication, read_completion_at, read_replicated};
use embarcadero_cxl::segment::free_segments;
use embarcadero_cxl::sequencer_half::{Consumed, read_consumed_at};
use embarcadero_cxl::session_connections::{Connected, ConnectionsReader};
use embarcadero_cxl::session_table::{Progress, Session, read_progress_at, read_session_at};
use embarcadero_cxl::topic_table::{TopicConfig, read_released, read_topic_at};
use embarcadero_cxl::{Damage, Fabric, Native, Region, Row, Site, damaged_lines};
use embarcadero_wire::{BrokerId, ClientId, Epoch, Incarnation, SessionSlot, Stream, TopicId};
use serde::Serialize;
use std::collections::BTreeMap;

/// Entries of a ring or an index that are shown.
const NEWEST: u64 = 4;

/// Contents of a region.
#[derive(Serialize)]
pub(super) struct Report {
    superblock: Superblock,
    layout: Layout,
    control_block: Option<LeaderInfo>,
    brokers: Vec<BrokerReport>,
    topics: Vec<TopicReport>,
    sessions: Vec<SessionReport>,
    segments: SegmentsReport,
    /// Contents that no writer of this layout made, one sentence each.
    damage: Vec<String>,
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
    /// Session slots of which the broker has connections.
    connected_sessions: Vec<SessionSlot>,
    /// Session slots of which a batch waits for room there.
    waiting_sessions: Vec<SessionSlot>,
}

#[derive(Serialize)]
struct TopicReport {
    #[serde(flatten)]
    config: TopicConfig,
    global_index: Option<Extent>,
    /// Newest entries of the global index, oldest first.
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
    #[serde(flatten)]
    consumed: Consumed,
    /// Lowest index position that a sender of this broker reads; null when none does.
    delivering_from: Option<u64>,
    released_incarnation: Incarnation,
    /// Position below which the entries of the stream by which this broker acknowledges are on enough disks, or lost.
    durable_through: u64,
    /// Positions between which retention took entries that were on no disk.
    lost_from: u64,
    lost_through: u64,
    /// Position up to which this broker, as a replica, has the batches of each source broker.
    replicated: BTreeMap<BrokerId, u64>,
    own_index: Option<Extent>,
    /// Newest entries of the Batchlog, oldest first.
    batchlog: Vec<BatchReport>,
}

/// Entry of a Batchlog.
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

/// Entry of an order index.
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

#[derive(Serialize)]
struct SessionReport {
    #[serde(flatten)]
    session: Session,
    expected: u64,
    /// Epoch that the word above belongs to.
    progress_epoch: Epoch,
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
    /// Reads the region as the leader has it, or as the last leader had it.
    pub(super) fn read(region: &Region<Native>) -> Self {
        let area = last_active(region).map_or(LeaderArea(BrokerId(0)), |(area, _)| area);
        let mut reader = Reader { region, area, damage: Vec::new() };
        let geometry = *region.geometry();
        let leader = read_leader_at(region, area);
        let lines = damaged_lines(region);
        Self {
            superblock: Superblock {
                uuid: region.uuid().to_string(),
                layout_version: LAYOUT_VERSION,
                layout_hash: format!("{LAYOUT_HASH:#018x}"),
                created_ms: region.created_ms(),
                geometry,
            },
            layout: *region.layout(),
            control_block: reader.used(leader),
            brokers: geometry.brokers().filter_map(|broker| reader.broker(broker)).collect(),
            topics: geometry.topics().filter_map(|topic| reader.topic(topic)).collect(),
            sessions: reader.sessions(),
            segments: reader.segments(),
            damage: reader.with_lines(&lines),
        }
    }
}

/// Reads the parts of a region, and collects what is damaged.
struct Reader<'a> {
    region: &'a Region<Native>,
    area: LeaderArea,
    damage: Vec<String>,
}

impl Reader<'_> {
    fn used<T>(&mut self, row: Row<T>) -> Option<T> {
        if let Row::Damaged(damage) = &row {
            self.damage.push(damage.to_string());
        }
        row.used()
    }

    /// Returns everything that is damaged, with `lines`, which may have been found before.
    fn with_lines(mut self, lines: &[Damage]) -> Vec<String> {
        for damage in lines.iter().map(Damage::to_string) {
            if !self.damage.contains(&damage) {
                self.damage.push(damage);
            }
        }
        self.damage
    }

    fn intact<T>(&mut self, read: Result<T, Damage>) -> Option<T> {
        read.map_err(|damage| self.damage.push(damage.to_string())).ok()
    }

    fn broker(&mut self, broker: BrokerId) -> Option<BrokerReport> {
        let info = self.used(read_broker(self.region, broker))?;
        let (heartbeat, batches_published) = read_pulse(self.region, broker);
        let replica = read_replica_state(self.region, broker).unwrap_or_else(|damage| {
            self.damage.push(damage.to_string());
            ReplicaState::Failed
        });
        let mut connections = ConnectionsReader::new(self.region, 1 << broker.0);
        let sessions = self.region.geometry().sessions().map(|slot| (slot, connections.of(slot)));
        let connected: Vec<_> = sessions.filter(|(_, connected)| *connected != Connected::No).collect();
        let waiting = connected.iter().filter(|(_, connected)| *connected == Connected::Waiting);
        Some(BrokerReport {
            info,
            heartbeat,
            batches_published,
            replica,
            waiting_sessions: waiting.map(|(slot, _)| *slot).collect(),
            connected_sessions: connected.iter().map(|(slot, _)| *slot).collect(),
        })
    }

    fn topic(&mut self, id: TopicId) -> Option<TopicReport> {
        let config = self.used(read_topic_at(self.region, self.area, id))?;
        let (region, area) = (self.region, self.area);
        let extent = |reader: &mut Self, stream| {
            let extent = read_extent_at(region, area, StreamId { topic: id, stream });
            reader.intact(extent.batches(region))?;
            (extent.incarnation == config.incarnation).then_some(extent)
        };
        let brokers = region.geometry().brokers().filter(|broker| read_broker(region, *broker).used().is_some());
        let offset_entries = brokers.filter_map(|broker| {
            let own_index = extent(self, Stream::of(broker));
            self.offset_entry(id, broker, own_index)
        });
        let offset_entries = offset_entries.collect();
        let global_index = extent(self, Stream::GLOBAL);
        let global_index_entries = global_index.map_or_else(Vec::new, |extent| self.newest_entries(id, &extent));
        Some(TopicReport { global_index, global_index_entries, offset_entries, config })
    }

    fn newest_entries(&mut self, topic: TopicId, extent: &Extent) -> Vec<IndexEntryReport> {
        let mut reader = OrderIndexReader::new(self.region.clone(), StreamId { topic, stream: Stream::GLOBAL });
        let committed = reader.poll();
        let mut entries = Vec::new();
        for position in extent.trimmed.max(committed.saturating_sub(NEWEST))..committed {
            match reader.read(position) {
                Ok(entry) => entries.push(IndexEntryReport {
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
                }),
                Err(ReadError::Corrupt { damage, .. }) => self.damage.push(damage.to_string()),
                // The leader of a live region may trim the entry meanwhile.
                Err(ReadError::Trimmed { .. } | ReadError::NoLeader(_)) => {}
            }
        }
        entries
    }

    fn offset_entry(
        &mut self,
        topic: TopicId,
        broker: BrokerId,
        own_index: Option<Extent>,
    ) -> Option<OffsetEntryReport> {
        let (region, area) = (self.region, self.area);
        let (fabric, layout) = (region.fabric(), region.layout());
        let half = fabric.observe_line::<BrokerHalf>(layout.broker_half(topic, broker), Site::BatchlogHeadRead);
        let pins = fabric.observe_line::<PinLine>(layout.pin(topic, broker), Site::PinRead);
        let (half, pins) = match (half, pins) {
            (Ok(half), Ok(pins)) => (half, pins),
            (Err(damage), _) | (_, Err(damage)) => {
                self.damage.push(damage.to_string());
                return None;
            }
        };
        let Completion { durable_through, lost_from, lost_through, .. } =
            read_completion_at(region, area, topic, broker);
        let progress = |source| {
            let position = read_replicated(region, Replication { topic, replica: broker, source });
            (position > 0).then_some((source, position))
        };
        let newest = half.batchlog_head.saturating_sub(NEWEST)..half.batchlog_head;
        let batchlog = newest.filter_map(|index| {
            let entry = self.intact(peek_entry(region, topic, broker, index))??;
            Some(BatchReport {
                index,
                location: entry.location,
                client_id: entry.client_id,
                sequence: entry.sequence,
                session_epoch: entry.session_epoch,
                bytes: entry.bytes,
                message_count: entry.message_count,
                lap: entry.lap,
            })
        });
        let batchlog = batchlog.collect();
        let pinned = pinned_position(pins.delivering_from);
        let released_incarnation = self.intact(read_released(region, topic, broker))?;
        Some(OffsetEntryReport {
            broker,
            log_offset: half.log_offset,
            batchlog_head: half.batchlog_head,
            written: half.written,
            written_addr: half.written_addr,
            consumed: read_consumed_at(region, area, topic, broker),
            delivering_from: (pinned < u64::MAX).then_some(pinned),
            released_incarnation,
            durable_through,
            lost_from,
            lost_through,
            replicated: region.geometry().brokers().filter_map(progress).collect(),
            own_index,
            batchlog,
        })
    }

    fn sessions(&mut self) -> Vec<SessionReport> {
        let (region, area) = (self.region, self.area);
        let report = |slot| {
            let session = self.used(read_session_at(region, area, slot))?;
            let Progress { expected, epoch: progress_epoch } = read_progress_at(region, area, slot);
            Some(SessionReport { session, expected, progress_epoch })
        };
        region.geometry().sessions().filter_map(report).collect()
    }

    fn segments(&mut self) -> SegmentsReport {
        let region = self.region;
        let global = Stream::of(BrokerId(region.geometry().max_brokers));
        let mut used = Vec::new();
        for segment in 0..region.geometry().segment_count {
            match self.used(read_owner(region, segment)) {
                None | Some(SegmentUse::Free) => {}
                // As in the owner line: one past the last broker's id stands for the global stream.
                Some(SegmentUse::Index { topic, incarnation, stream: Stream::GLOBAL, ordinal, holder }) => {
                    let owner = SegmentUse::Index { topic, incarnation, stream: global, ordinal, holder };
                    used.push(SegmentReport { segment, owner });
                }
                Some(owner) => used.push(SegmentReport { segment, owner }),
            }
        }
        SegmentsReport { total: region.geometry().segment_count, free: free_segments(region), used }
    }
}
