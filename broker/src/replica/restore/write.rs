//! Writing of a restored topic into an empty region.

use super::super::medium::Medium;
use super::super::store::read_batch;
use super::plan::{Piece, StoredBatch, StreamPlan, TopicPlan};
use super::{RESTORED, RESTORED_TERM, RestoreError};
use crate::blog::{Blog, BlogId};
use bytemuck::Zeroable;
use embarcadero_cxl::layout::{AllocatorKind, CommitRecord, IndexEntry, LeaderArea, SESSION_WINDOW, SessionState};
use embarcadero_cxl::order_index::{IndexOptions, OrderIndexWriter, StreamId};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::segment::{BitmapAllocator, PartitionAllocator, SegmentAllocator};
use embarcadero_cxl::session_table::{
    Progress, Session, SessionCommit, publish_commits, publish_session, store_progress,
};
use embarcadero_cxl::topic_table::{TopicConfig, publish_topic};
use embarcadero_cxl::{CoherentFabric, RegionOffset, Site};
use embarcadero_wire::batch::MAX_BATCH_BYTES;
use embarcadero_wire::{
    BatchHeader, BrokerId, ClientId, Epoch, FRAME_BYTES, Frame, Order, SessionSlot, SessionToken, Term, WireError,
};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// Batches after which the tail of an order index is published.
const GROUP: u64 = 1024;

/// Commits of one client, from the batches that were written.
#[derive(Default)]
struct ClientCommits {
    /// Slot that the client's session had in the lost region.
    slot: SessionSlot,
    /// Last batches, in the order in which they were ordered.
    newest: Vec<CommitRecord>,
}

impl ClientCommits {
    fn add(&mut self, slot: SessionSlot, commit: CommitRecord) {
        if self.slot != slot {
            // The client lost its slot, and its sequences began anew in another.
            self.newest.clear();
            self.slot = slot;
        }
        self.newest.push(commit);
        if self.newest.len() as u64 > 2 * SESSION_WINDOW {
            self.newest.drain(..SESSION_WINDOW as usize);
        }
    }
}

/// Writer of one topic.
pub(super) struct TopicWriter<'a, F: CoherentFabric> {
    region: &'a Region<F>,
    media: &'a [Box<dyn Medium>],
    plan: &'a TopicPlan,
    /// Blog of each broker that received batches.
    logs: BTreeMap<BrokerId, Blog<F>>,
    commits: BTreeMap<ClientId, ClientCommits>,
    /// Buffer for one batch.
    bytes: Vec<u8>,
}

impl<'a, F: CoherentFabric> TopicWriter<'a, F> {
    pub(super) fn new(region: &'a Region<F>, media: &'a [Box<dyn Medium>], plan: &'a TopicPlan) -> Self {
        Self { region, media, plan, logs: BTreeMap::new(), commits: BTreeMap::new(), bytes: Vec::new() }
    }

    /// Writes the topic. Its sessions get slots from `next_slot` on. `progress` gets the bytes of each batch.
    pub(super) fn write(
        mut self,
        next_slot: &mut SessionSlot,
        progress: &mut impl FnMut(u64),
    ) -> Result<(), RestoreError> {
        let plan = self.plan;
        for stream in &plan.streams {
            self.write_stream(stream, progress)?;
        }
        self.write_sessions(next_slot)?;
        publish_topic(self.region, RESTORED, &plan.config);
        Ok(())
    }

    fn write_stream(&mut self, stream: &StreamPlan, progress: &mut impl FnMut(u64)) -> Result<(), RestoreError> {
        // The first leader goes on in the segment that is open here: the term is that of its predecessor.
        let term = if self.plan.config.order.is_global() { RESTORED_TERM } else { Term::NONE };
        let mut index = self.open_index(stream, term)?;
        for piece in &stream.pieces {
            match piece {
                Piece::Lost(offsets) => self.leave_empty(&mut index, offsets)?,
                Piece::Batch(batch) => {
                    self.write_batch(&mut index, batch)?;
                    progress(u64::from(batch.record().bytes));
                    if index.next().is_multiple_of(GROUP) {
                        index.write_back_entries();
                        index.publish_tail(term);
                    }
                }
            }
        }
        index.write_back_entries();
        index.publish_tail(term);
        self.region.fabric().fence(Site::TailFlush);
        Ok(())
    }

    /// Begins the order index of a stream.
    fn open_index(&self, stream: &StreamPlan, term: Term) -> Result<OrderIndexWriter<F>, RestoreError> {
        let TopicConfig { id: topic, incarnation, .. } = self.plan.config;
        let writer = stream.stream.broker().unwrap_or(RESTORED.0);
        let sources = stream.batches().map(|batch| batch.record().source);
        let needed = sources.max().map_or(0, |highest| highest.0 + 1).max(writer.0 + 1);
        let found = self.region.geometry().max_brokers;
        if needed > found {
            return Err(RestoreError::Geometry { what: "brokers", found, needed });
        }
        let id = StreamId { topic, stream: stream.stream };
        let options = IndexOptions { id, incarnation, writer: LeaderArea(writer), term };
        let mut index = OrderIndexWriter::open(self.region.clone(), options, allocator(self.region, writer))?;
        if let Some(first) = stream.first_offset() {
            index.begin_at(first);
        }
        Ok(index)
    }

    /// Copies a batch from its medium into the Blog of the broker that received it, and appends it to the index.
    fn write_batch(&mut self, index: &mut OrderIndexWriter<F>, batch: &StoredBatch) -> Result<(), RestoreError> {
        let record = batch.record();
        read_batch(&*self.media[batch.medium], &batch.located, &mut self.bytes)?;
        let header = decode_header(&self.bytes).map_err(|source| RestoreError::Batch {
            topic: self.plan.config.name.clone(),
            position: record.position,
            source,
        })?;
        index.make_room()?;
        let at = self.write_payload(record.source)?;
        let position = index.next();
        let first_offset = index.append(IndexEntry {
            location: at.0,
            client_id: header.client_id,
            sequence: header.sequence,
            ordered_us: record.ordered_us,
            bytes: record.bytes,
            message_count: record.message_count,
            session_epoch: header.session_epoch,
            term: record.term,
            broker: record.source.byte(),
            replicas: 1,
            ..IndexEntry::zeroed()
        });
        if self.plan.config.order.is_global() {
            let commit = CommitRecord {
                first_offset,
                position,
                broker: record.source,
                session_epoch: header.session_epoch,
                tag: header.sequence + 1,
            };
            self.commits.entry(header.client_id).or_default().add(header.session_slot, commit);
        }
        Ok(())
    }

    /// Writes the batch in the buffer into a broker's Blog.
    fn write_payload(&mut self, broker: BrokerId) -> Result<RegionOffset, RestoreError> {
        let log = match self.logs.entry(broker) {
            Entry::Occupied(log) => log.into_mut(),
            Entry::Vacant(place) => {
                let TopicConfig { id: topic, incarnation, .. } = self.plan.config;
                let pool = allocator(self.region, broker);
                place.insert(Blog::new(self.region.clone(), BlogId { topic, incarnation, broker }, 0, pool))
            }
        };
        let bytes = self.bytes.len() as u64;
        let at = log.reserve(bytes)?;
        self.region.fabric().write_bytes(at, &self.bytes);
        self.region.fabric().flush(at, bytes, Site::PayloadFlush);
        log.settle(at);
        Ok(at)
    }

    /// Appends index entries without bytes for offsets whose messages are lost. An empty range changes nothing.
    fn leave_empty(&self, index: &mut OrderIndexWriter<F>, offsets: &Range<u64>) -> Result<(), RestoreError> {
        let mut due = offsets.start;
        let last = index.next().checked_sub(1).map_or(Ok(None), |last| index.entry(last))?;
        let ordered_us = last.map_or(0, |last| last.ordered_us);
        let location = self.region.layout().segments;
        while due < offsets.end {
            let message_count = (offsets.end - due).min(u32::MAX.into()) as u32;
            index.make_room()?;
            index.append(IndexEntry { location, message_count, ordered_us, ..IndexEntry::zeroed() });
            due += u64::from(message_count);
        }
        Ok(())
    }

    /// Writes the topic's sessions: first those of the mirror, then those that only batches tell of.
    fn write_sessions(&mut self, next_slot: &mut SessionSlot) -> Result<(), RestoreError> {
        // Only the mirror has tokens: batches do not tell them.
        let mut tokens = BTreeMap::new();
        for (session, expected) in &self.plan.sessions {
            tokens.insert(session.client_id, session.token);
            // A client of level 2 was promised only what is on disks. It sends the rest again.
            if session.ack_level < 2 {
                let ClientCommits { newest, .. } = self.commits.remove(&session.client_id).unwrap_or_default();
                let slot = self.take_slot(next_slot)?;
                let session = Session { slot, committed: *expected, state: SessionState::Fenced, ..*session };
                self.write_session(&session, &newest);
            }
        }
        for (client_id, ClientCommits { newest, .. }) in std::mem::take(&mut self.commits) {
            let slot = self.take_slot(next_slot)?;
            let token = tokens.get(&client_id).copied().unwrap_or(SessionToken::NONE);
            self.write_session(&Session { token, ..self.session_of(slot, client_id, &newest) }, &newest);
        }
        Ok(())
    }

    /// Takes the next session slot.
    fn take_slot(&self, next_slot: &mut SessionSlot) -> Result<SessionSlot, RestoreError> {
        let slot = *next_slot;
        let (found, needed) = (self.region.geometry().max_sessions, slot.0 + 1);
        if needed > found {
            return Err(RestoreError::Geometry { what: "sessions", found, needed });
        }
        next_slot.0 = needed;
        Ok(slot)
    }

    /// Returns the session whose last batches are `commits`. It is fenced: its client opens the next epoch, and learns
    /// what is committed.
    fn session_of(&self, slot: SessionSlot, client_id: ClientId, commits: &[CommitRecord]) -> Session {
        let TopicConfig { id: topic, incarnation: topic_incarnation, ack_level, order, .. } = self.plan.config;
        let sequences: BTreeSet<u64> = commits.iter().map(|record| record.tag - 1).collect();
        let newest = sequences.last().copied().unwrap_or(0);
        let oldest = sequences.first().copied().unwrap_or(0);
        let committed = if order == Order::Strong {
            newest + 1
        } else {
            // In total order batches commit out of turn. Only the window before the newest can have gaps.
            let from = oldest.max((newest + 1).saturating_sub(SESSION_WINDOW));
            (from..).find(|sequence| !sequences.contains(sequence)).unwrap_or(newest + 1)
        };
        let epoch = commits.iter().map(|record| record.session_epoch).max().unwrap_or_default();
        let state = SessionState::Fenced;
        Session {
            slot,
            client_id,
            epoch,
            state,
            topic,
            topic_incarnation,
            committed,
            ack_level,
            first_epoch: Epoch::default().next(),
            first_sequence: 0,
            token: SessionToken::NONE,
        }
    }

    /// Writes a session, and the records of its last batches.
    fn write_session(&self, session: &Session, commits: &[CommitRecord]) {
        let Session { slot, committed: expected, .. } = *session;
        let newest = commits.iter().map(|record| record.tag).max().unwrap_or(0);
        let kept = commits.iter().filter(|record| record.tag + SESSION_WINDOW > newest);
        let kept: Vec<_> = kept.map(|record| SessionCommit { slot, record: *record, expected }).collect();
        publish_commits(self.region, RESTORED, &kept);
        publish_session(self.region, RESTORED, session);
        store_progress(self.region, RESTORED, slot, Progress { expected, epoch: session.epoch });
        self.region.fabric().fence(Site::RecordFlush);
    }
}

/// Decodes the header of a batch that fills `bytes`.
fn decode_header(bytes: &[u8]) -> Result<BatchHeader, WireError> {
    let out_of_bounds =
        |value| WireError::Field { field: "batch bytes", value, low: FRAME_BYTES as u64, high: MAX_BATCH_BYTES };
    let frame = bytes.first_chunk().ok_or_else(|| out_of_bounds(bytes.len() as u64))?;
    match Frame::decode(frame)? {
        Frame::BatchHeader(header) => header.check(bytes.len() as u64).map(|()| header),
        other => Err(WireError::Kind { found: other.kind() }),
    }
}

/// Returns the allocator by which `broker` would take segments.
fn allocator<F: CoherentFabric>(region: &Region<F>, broker: BrokerId) -> Arc<dyn SegmentAllocator> {
    match region.geometry().allocator {
        AllocatorKind::Bitmap => Arc::new(BitmapAllocator::new(region.clone())),
        AllocatorKind::Partitioned => Arc::new(PartitionAllocator::of_broker(region.clone(), broker)),
        AllocatorKind::Leader => Arc::new(PartitionAllocator::of_leader(region.clone())),
    }
}
