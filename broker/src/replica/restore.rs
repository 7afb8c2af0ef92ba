//! Rebuilds topics in an empty region from replica files: after the region was lost, or the whole cluster.

use super::format::{Identity, Record};
use super::medium::{Directory, Medium};
use super::store::{Located, Scan, StoreError, read_batch, scan};
use crate::blog::{Blog, BlogId};
use crate::mirror::{self, MirroredTopic};
use bytemuck::Zeroable;
use embarcadero_cxl::layout::{
    AllocatorKind, CommitRecord, IndexEntry, LeaderArea, RegionRole, SESSION_WINDOW, SessionState,
};
use embarcadero_cxl::leadership::{activate_term, claim_term, latest_claim};
use embarcadero_cxl::order_index::{IndexOptions, OrderIndexWriter, ReadError, StreamId};
use embarcadero_cxl::region::{Region, RegionError};
use embarcadero_cxl::segment::{BitmapAllocator, PartitionAllocator, PoolError, SegmentAllocator};
use embarcadero_cxl::session_table::{Session, SessionCommit, publish_commits, publish_session, store_progress};
use embarcadero_cxl::topic_table::{TopicConfig, publish_topic};
use embarcadero_cxl::{CoherentFabric, Damage, Fabric, Site};
use embarcadero_wire::batch::MAX_BATCH_BYTES;
use embarcadero_wire::{
    BatchHeader, BrokerId, ClientId, FRAME_BYTES, Frame, Incarnation, Order, SessionSlot, Stream, Term, TopicId,
    WireError,
};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// The leader as whom a restored region is written, before it has any.
const RESTORED: LeaderArea = LeaderArea(BrokerId(0));
/// Its epoch.
const RESTORED_EPOCH: Term = Term(1);
/// Batches after which the index's tail is moved.
const GROUP: u64 = 1024;

/// Why a region cannot be rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A replica's.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A directory cannot be read.
    #[error("cannot list {path}: {source}")]
    List {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Nothing to do.
    #[error("there are no replica files in {0}")]
    Nothing(String),
    /// Replicas of several regions.
    #[error("the files are of {} regions; choose one with --uuid: {}", .0.len(), .0.join(", "))]
    SeveralRegions(Vec<String>),
    /// Acknowledged batches are missing.
    #[error("batches that were durable are missing:\n{0}\ngive the directories of all replicas, or accept the loss")]
    Lost(String),
    /// The region is in use, or was.
    #[error("the region has been used; make an empty one with `region create`")]
    NotEmpty,
    /// The region lacks what the topic had.
    #[error("the region has room for {found} {what}, the replicas need {needed}")]
    Geometry {
        /// Of what.
        what: &'static str,
        /// As created.
        found: u32,
        /// As needed.
        needed: u32,
    },
    /// The region is too small.
    #[error("{0}; make a larger region")]
    Pool(#[from] PoolError),
    /// The new region is damaged.
    #[error(transparent)]
    Damage(#[from] Damage),
    /// The mirror's memory is damaged.
    #[error("the mirror: {0}")]
    Mirror(#[from] ReadError),
    /// It is not a mirror, or another region's.
    #[error("the mirror: {0}")]
    OtherMirror(#[from] RegionError),
    /// A replica holds what is not a batch.
    #[error("position {position} of topic {topic} is not a batch: {source}")]
    Batch {
        /// Topic.
        topic: String,
        /// Position.
        position: u64,
        /// What is wrong.
        source: WireError,
    },
}

/// Finds the directories below `roots` that hold replica files.
///
/// # Errors
/// [`RestoreError::List`].
pub fn find_media(roots: &[PathBuf]) -> Result<Vec<Box<dyn Medium>>, RestoreError> {
    fn look(path: &Path, found: &mut Vec<Box<dyn Medium>>) -> Result<(), RestoreError> {
        let failed = |source| RestoreError::List { path: path.to_owned(), source };
        let mut files = false;
        for entry in std::fs::read_dir(path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_type().map_err(failed)?.is_dir() {
                look(&entry.path(), found)?;
            } else {
                files |= entry.path().extension().is_some_and(|extension| extension == "replica");
            }
        }
        if files {
            found.push(Box::new(Directory::new(path.to_owned(), false)));
        }
        Ok(())
    }
    let mut found = Vec::new();
    roots.iter().try_for_each(|root| look(root, &mut found))?;
    Ok(found)
}

/// Where a batch is: which medium, and where on it.
type Copy = (usize, Located);

/// A stream that will be rebuilt.
struct StreamPlan {
    stream: Stream,
    /// Each begins at the offset at which the one before it ends.
    pieces: Vec<Piece>,
}

/// A part of a stream.
enum Piece {
    Batch(Copy),
    /// Offsets of which the messages are lost.
    Lost(Range<u64>),
}

impl StreamPlan {
    fn batches(&self) -> impl Iterator<Item = &Copy> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Batch(copy) => Some(copy),
            Piece::Lost(_) => None,
        })
    }

    /// The offset at which it begins.
    fn first_offset(&self) -> Option<u64> {
        self.pieces.first().map(|piece| match piece {
            Piece::Batch((_, batch)) => batch.record.first_offset,
            Piece::Lost(offsets) => offsets.start,
        })
    }
}

/// A topic that will be rebuilt.
pub struct TopicPlan {
    /// As it was.
    pub config: TopicConfig,
    streams: Vec<StreamPlan>,
    /// What the mirror says of its sessions, and what each expected next.
    sessions: Vec<(Session, u64)>,
    /// Offsets that were durable, or are in the mirror, and in none of the files: the stream, and from where to where.
    pub lost: Vec<(Stream, Range<u64>)>,
    /// Batches behind the first that is missing of those that nobody was promised.
    pub unacknowledged: u64,
}

impl TopicPlan {
    /// Batches and their bytes.
    #[must_use]
    pub fn size(&self) -> (u64, u64) {
        let batches = self.streams.iter().flat_map(StreamPlan::batches);
        batches.fold((0, 0), |(count, bytes), (_, batch)| (count + 1, bytes + u64::from(batch.record.bytes)))
    }
}

/// What replica files give.
pub struct Plan {
    media: Vec<Box<dyn Medium>>,
    /// The region that was.
    pub region: Uuid,
    /// Topics.
    pub topics: Vec<TopicPlan>,
    /// What is wrong with the files, in words.
    pub damage: Vec<String>,
}

impl Plan {
    /// Reads and verifies all files. Of each topic, takes what is contiguous: behind a batch that is in no file, nothing
    /// was acknowledged, unless it had been durable, or gone by retention. Then what was before it is left out; and if it
    /// had been durable, its offsets are lost. With the `mirror` of the region that was lost, all that the mirror has and no
    /// file is lost, and nothing else is left out.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn read<F: Fabric>(
        media: Vec<Box<dyn Medium>>,
        mirror: Option<&Region<F>>,
        region: Option<Uuid>,
    ) -> Result<Self, RestoreError> {
        let mut mirrored = Vec::new();
        if let Some(mirror) = mirror {
            mirror.require_role(RegionRole::Mirror)?;
            region.map_or(Ok(()), |region| mirror.require_uuid(region))?;
            mirrored = mirror::read(mirror)?;
        }
        let region = region.or(mirror.map(Region::uuid));
        let mut scans: Vec<(usize, Identity, Scan)> = Vec::new();
        let mut damage = Vec::new();
        for (index, medium) in media.iter().enumerate() {
            let mut scan = scan(&**medium)?;
            damage.extend(scan.damage.iter().map(|damage| format!("{}: {damage}", medium.name())));
            if let Some(identity) = scan.identity.take() {
                scans.push((index, identity, scan));
            }
        }
        let regions: BTreeSet<Uuid> = scans.iter().map(|(_, of, _)| Uuid::from_bytes(of.region)).collect();
        let region = match (region, regions.len()) {
            (Some(region), _) if mirror.is_some() || regions.contains(&region) => region,
            (None, 1) => regions.first().copied().unwrap_or_default(),
            (None, 2..) => return Err(RestoreError::SeveralRegions(regions.iter().map(Uuid::to_string).collect())),
            _ => {
                let names: Vec<String> = media.iter().map(|medium| medium.name()).collect();
                return Err(RestoreError::Nothing(names.join(", ")));
            }
        };
        scans.retain(|(_, of, _)| of.region == *region.as_bytes());
        // Of several topics that had a slot one after another, the last.
        let mut newest: BTreeMap<TopicId, Incarnation> = BTreeMap::new();
        let of_files = scans.iter().map(|(_, of, _)| &of.topic);
        for config in of_files.chain(mirrored.iter().map(|topic| &topic.config)) {
            let known = newest.entry(config.id).or_default();
            *known = (*known).max(config.incarnation);
        }
        let mut topics = Vec::new();
        for (id, incarnation) in newest {
            let of_topic = scans.iter().filter(|(_, of, _)| (of.topic.id, of.topic.incarnation) == (id, incarnation));
            let mut streams: BTreeMap<Stream, Vec<(usize, &Scan)>> = BTreeMap::new();
            let mirror = mirrored.iter().find(|topic| (topic.config.id, topic.config.incarnation) == (id, incarnation));
            let mut config = mirror.map(|topic| topic.config.clone());
            if mirror.is_some() {
                streams.entry(Stream::GLOBAL).or_default();
            }
            for (medium, of, scan) in of_topic {
                streams.entry(of.stream).or_default().push((*medium, scan));
                config = Some(of.topic.clone());
            }
            let Some(config) = config else { continue };
            let sessions = mirror.map_or_else(Vec::new, |topic| topic.sessions.clone());
            let mut topic = TopicPlan { config, streams: Vec::new(), sessions, lost: Vec::new(), unacknowledged: 0 };
            for (stream, copies) in streams {
                topic.add_stream(&media, stream, &copies, mirror.filter(|_| stream == Stream::GLOBAL))?;
            }
            topics.push(topic);
        }
        Ok(Self { media, region, topics, damage })
    }

    /// The offsets that are lost, in words; `None` when none are.
    #[must_use]
    pub fn losses(&self) -> Option<String> {
        let lines: Vec<String> = self.topics.iter().flat_map(TopicPlan::losses).collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    }

    /// Writes the topics into an empty region. `progress` is told the bytes of each batch.
    ///
    /// # Errors
    /// [`RestoreError`]. What was begun is of no use then: make the region anew.
    pub fn write<F: CoherentFabric>(
        &self,
        region: &Region<F>,
        mut progress: impl FnMut(u64),
    ) -> Result<(), RestoreError> {
        let geometry = region.geometry();
        if latest_claim(region) > Term::NONE {
            return Err(RestoreError::NotEmpty);
        }
        let mut next_slot = SessionSlot(0);
        for topic in &self.topics {
            let (found, needed) = (geometry.max_topics, topic.config.id.0 + 1);
            if needed > found {
                return Err(RestoreError::Geometry { what: "topics", found, needed });
            }
            topic.write(region, &self.media, &mut next_slot, &mut progress)?;
        }
        // The first leader inherits it.
        claim_term(region, RESTORED, RESTORED_EPOCH);
        activate_term(region, RESTORED, RESTORED_EPOCH);
        Ok(())
    }
}

impl TopicPlan {
    fn losses(&self) -> impl Iterator<Item = String> {
        self.lost.iter().map(|(stream, offsets)| {
            let stream = stream.broker().map_or(String::new(), |broker| format!(" of broker {broker}"));
            format!("topic {}{stream}: offsets {} to {}", self.config.name, offsets.start, offsets.end - 1)
        })
    }

    fn add_stream(
        &mut self,
        media: &[Box<dyn Medium>],
        stream: Stream,
        copies: &[(usize, &Scan)],
        mirror: Option<&MirroredTopic>,
    ) -> Result<(), RestoreError> {
        let mut known: BTreeMap<u64, Copy> = BTreeMap::new();
        for (medium, scan) in copies {
            for batch in scan.batches(&*media[*medium])? {
                known.entry(batch.record.position).or_insert((*medium, batch));
            }
        }
        let pieces = match mirror {
            Some(mirror) => self.compare(mirror, known),
            None => self.contiguous(stream, copies, known),
        };
        self.streams.push(StreamPlan { stream, pieces });
        Ok(())
    }

    /// What is on disks, by position, as far as it can be known to be all.
    fn contiguous(&mut self, stream: Stream, copies: &[(usize, &Scan)], known: BTreeMap<u64, Copy>) -> Vec<Piece> {
        let durable = copies.iter().map(|(_, scan)| scan.durable_through).max().unwrap_or(0);
        let lost = copies.iter().map(|(_, scan)| scan.lost_through).max().unwrap_or(0);
        let mut pieces: Vec<Piece> = Vec::new();
        // Position and offset that are due.
        let mut end = None;
        for (position, copy) in known {
            let record = &copy.1.record;
            match end {
                Some((due, offset)) if due < position => {
                    if due >= durable {
                        self.unacknowledged += 1;
                        continue;
                    }
                    if position > lost {
                        self.lost.push((stream, offset..record.first_offset));
                    }
                    pieces.clear();
                }
                _ => {}
            }
            end = Some((position + 1, end_offset(record)));
            pieces.push(Piece::Batch(copy));
        }
        pieces
    }

    /// What the mirror has, each batch from a disk if one has it; and what disks have of before.
    fn compare(&mut self, mirror: &MirroredTopic, known: BTreeMap<u64, Copy>) -> Vec<Piece> {
        let mut known: BTreeMap<u64, Copy> =
            known.into_values().map(|copy| (copy.1.record.first_offset, copy)).collect();
        let earliest = mirror.batches.first().map_or(mirror.next_offset, |(first, _)| *first);
        let mut kept = known.split_off(&earliest);
        // Only what leads up to what the mirror has, without a gap.
        let mut before = VecDeque::new();
        let mut due = earliest;
        for (first, copy) in known.into_iter().rev() {
            if end_offset(&copy.1.record) != due {
                break;
            }
            due = first;
            before.push_front(Piece::Batch(copy));
        }
        let mut pieces: Vec<Piece> = before.into();
        for (first, messages) in &mirror.batches {
            let end = first + u64::from(*messages);
            match (kept.remove(first), pieces.last_mut()) {
                (Some(copy), _) if end_offset(&copy.1.record) == end => pieces.push(Piece::Batch(copy)),
                (_, Some(Piece::Lost(offsets))) => offsets.end = end,
                _ => pieces.push(Piece::Lost(*first..end)),
            }
        }
        self.unacknowledged += kept.len() as u64;
        let lost = pieces.iter().filter_map(|piece| match piece {
            Piece::Lost(offsets) => Some((Stream::GLOBAL, offsets.clone())),
            Piece::Batch(_) => None,
        });
        self.lost.extend(lost);
        if pieces.is_empty() && earliest > 0 {
            // Offsets go on from where they stood.
            pieces.push(Piece::Lost(earliest..earliest));
        }
        pieces
    }

    fn write<F: CoherentFabric>(
        &self,
        region: &Region<F>,
        media: &[Box<dyn Medium>],
        next_slot: &mut SessionSlot,
        progress: &mut impl FnMut(u64),
    ) -> Result<(), RestoreError> {
        let TopicConfig { id, incarnation, .. } = self.config;
        let brokers = region.geometry().max_brokers;
        let mut logs: BTreeMap<BrokerId, Blog<F>> = BTreeMap::new();
        // By client: its row in the session table, and its last batches.
        let mut sessions: BTreeMap<ClientId, (SessionSlot, Vec<CommitRecord>)> = BTreeMap::new();
        let mut bytes = Vec::new();
        for plan in &self.streams {
            let of_broker = plan.stream.broker().unwrap_or(RESTORED.0);
            let needed = plan.batches().map(|(_, batch)| batch.record.source.0 + 1).max().unwrap_or(0);
            let needed = needed.max(of_broker.0 + 1);
            if needed > brokers {
                return Err(RestoreError::Geometry { what: "brokers", found: brokers, needed });
            }
            let options = IndexOptions {
                id: StreamId { topic: id, stream: plan.stream },
                incarnation,
                writer: LeaderArea(of_broker),
                term: Term::NONE,
            };
            let mut index = OrderIndexWriter::open(region.clone(), options, allocator(region, of_broker))?;
            if let Some(first) = plan.first_offset() {
                index.begin_at(first);
            }
            for piece in &plan.pieces {
                let (medium, batch) = match piece {
                    Piece::Batch(copy) => copy,
                    Piece::Lost(offsets) => {
                        leave_empty(&mut index, region, offsets)?;
                        continue;
                    }
                };
                read_batch(&*media[*medium], batch, &mut bytes)?;
                let record = &batch.record;
                let failed =
                    |source| RestoreError::Batch { topic: self.config.name.clone(), position: record.position, source };
                let header = decode_header(&bytes).map_err(failed)?;
                index.make_room()?;
                let log = match logs.entry(record.source) {
                    Entry::Occupied(log) => log.into_mut(),
                    Entry::Vacant(place) => {
                        let pool = allocator(region, record.source);
                        let log = BlogId { topic: id, incarnation, broker: record.source };
                        place.insert(Blog::new(region.clone(), log, 0, pool))
                    }
                };
                let at = log.reserve(bytes.len() as u64)?;
                region.fabric().write_bytes(at, &bytes);
                region.fabric().flush(at, bytes.len() as u64, Site::PayloadFlush);
                log.settle(at);
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
                if self.config.order.is_global() {
                    let commit = CommitRecord {
                        first_offset,
                        position,
                        broker: record.source,
                        session_epoch: header.session_epoch,
                        tag: header.sequence + 1,
                    };
                    let (row, newest) = sessions.entry(header.client_id).or_default();
                    if *row != header.session_slot {
                        // It lost its row, and its numbers began anew in another.
                        newest.clear();
                        *row = header.session_slot;
                    }
                    newest.push(commit);
                    if newest.len() as u64 > 2 * SESSION_WINDOW {
                        newest.drain(..SESSION_WINDOW as usize);
                    }
                }
                progress(u64::from(record.bytes));
                if (position + 1).is_multiple_of(GROUP) {
                    index.write_back_entries();
                    index.publish_tail(Term::NONE);
                }
            }
            index.write_back_entries();
            index.publish_tail(Term::NONE);
            region.fabric().fence(Site::TailFlush);
        }
        for (session, expected) in &self.sessions {
            // At level 2, a client was promised what is on disks; it sends the rest again.
            if session.ack_level < 2 {
                let (_, commits) = sessions.remove(&session.client_id).unwrap_or_default();
                let session =
                    Session { slot: *next_slot, committed: *expected, state: SessionState::Fenced, ..*session };
                self.check_slot(region, *next_slot)?;
                show_session(region, &session, &commits);
                next_slot.0 += 1;
            }
        }
        for (client_id, (_, commits)) in sessions {
            self.check_slot(region, *next_slot)?;
            self.write_session(region, *next_slot, client_id, &commits);
            next_slot.0 += 1;
        }
        publish_topic(region, RESTORED, &self.config);
        Ok(())
    }

    fn check_slot<F: Fabric>(&self, region: &Region<F>, slot: SessionSlot) -> Result<(), RestoreError> {
        let (found, needed) = (region.geometry().max_sessions, slot.0 + 1);
        if needed > found {
            return Err(RestoreError::Geometry { what: "sessions", found, needed });
        }
        Ok(())
    }

    /// A session of which these were the last batches to be ordered. It is fenced: its client opens the next epoch, and
    /// hears what is committed.
    fn write_session<F: Fabric>(
        &self,
        region: &Region<F>,
        slot: SessionSlot,
        client_id: ClientId,
        commits: &[CommitRecord],
    ) {
        let committed: BTreeMap<u64, &CommitRecord> = commits.iter().map(|record| (record.tag - 1, record)).collect();
        let epoch = commits.iter().map(|record| record.session_epoch).max().unwrap_or_default();
        let newest = committed.last_key_value().map_or(0, |(sequence, _)| *sequence);
        let oldest = committed.first_key_value().map_or(0, |(sequence, _)| *sequence);
        let expected = if self.config.order == Order::Strong {
            newest + 1
        } else {
            // In total order batches commit out of turn; the window before the newest is all that can be open.
            let from = oldest.max((newest + 1).saturating_sub(SESSION_WINDOW));
            (from..).find(|sequence| !committed.contains_key(sequence)).unwrap_or(newest + 1)
        };
        let TopicConfig { id: topic, incarnation: topic_incarnation, ack_level, .. } = self.config;
        let state = SessionState::Fenced;
        let session =
            Session { slot, client_id, epoch, state, topic, topic_incarnation, committed: expected, ack_level };
        show_session(region, &session, commits);
    }
}

/// Writes a session, and the records of its last batches.
fn show_session<F: Fabric>(region: &Region<F>, session: &Session, commits: &[CommitRecord]) {
    let newest = commits.iter().map(|record| record.tag).max().unwrap_or(0);
    let kept = commits.iter().filter(|record| record.tag + SESSION_WINDOW > newest);
    let (slot, expected) = (session.slot, session.committed);
    let committed: Vec<_> = kept.map(|record| SessionCommit { slot, record: *record, expected }).collect();
    publish_commits(region, RESTORED, &committed);
    store_progress(region, RESTORED, session.slot, session.committed);
    region.fabric().fence(Site::RecordFlush);
    publish_session(region, RESTORED, session);
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

/// Offset after the last message of a batch.
fn end_offset(record: &Record) -> u64 {
    record.first_offset + u64::from(record.message_count)
}

/// Index entries without bytes for offsets whose messages are lost; if there are none, they only go on from there.
fn leave_empty<F: Fabric>(
    index: &mut OrderIndexWriter<F>,
    region: &Region<F>,
    offsets: &Range<u64>,
) -> Result<(), RestoreError> {
    let mut due = offsets.start;
    let last = index.next().checked_sub(1).map_or(Ok(None), |last| index.entry(last))?;
    let ordered_us = last.map_or(0, |last| last.ordered_us);
    while due < offsets.end {
        let message_count = (offsets.end - due).min(u32::MAX.into()) as u32;
        index.make_room()?;
        let location = region.layout().segments;
        index.append(IndexEntry { location, message_count, ordered_us, ..IndexEntry::zeroed() });
        due += u64::from(message_count);
    }
    Ok(())
}

/// The allocator by which `broker` would take segments.
fn allocator<F: CoherentFabric>(region: &Region<F>, broker: BrokerId) -> Arc<dyn SegmentAllocator> {
    match region.geometry().allocator {
        AllocatorKind::Bitmap => Arc::new(BitmapAllocator::new(region.clone())),
        AllocatorKind::Partitioned => Arc::new(PartitionAllocator::of_broker(region.clone(), broker)),
        AllocatorKind::Leader => Arc::new(PartitionAllocator::of_leader(region.clone())),
    }
}
