//! The order index: one 64-byte entry a batch, in the order that subscribers read.
//!
//! A topic with a global order has one, the global order index (GOI), written by the sequencer. With orders `none`
//! and `broker` each broker writes its own. Entries live in segments of the pool; a directory finds them.
//!
//! `[[DEVIATION_007]]` Order is kept a batch at a time: the paper gives every message a 64-byte header that the
//! sequencer touches.

use crate::fabric::{Fabric, Guard, RegionOffset, Site};
use crate::layout::{IndexEntry, Layout, LeaderArea, PinLine, SequencerHalf, TailLine};
use crate::leadership::{NoLeader, leader_version, with_leader};
use crate::region::Region;
use crate::segment::{PoolError, SegmentAllocator, SegmentUse, publish_owner, read_owner};
use bytemuck::Zeroable;
use embarcadero_wire::{BrokerId, Incarnation, Stream, Term, TopicId};
use serde::Serialize;
use std::collections::VecDeque;
use std::mem::offset_of;
use std::sync::Arc;

/// Which index: the slot of its topic, and the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamId {
    /// Topic slot.
    pub topic: TopicId,
    /// Stream of the topic.
    pub stream: Stream,
}

impl StreamId {
    /// The stream's tail; that of the global order as the leader `area` has it.
    fn tail<F: Fabric>(self, region: &Region<F>, area: LeaderArea) -> RegionOffset {
        match self.stream.broker() {
            None => region.layout().leader_topic(area, self.topic).add(128),
            Some(broker) => region.layout().offset_entry(self.topic, broker).add(128),
        }
    }

    fn directory_entry<F: Fabric>(self, region: &Region<F>, area: LeaderArea, ordinal: u64) -> RegionOffset {
        let (geometry, layout) = (region.geometry(), region.layout());
        let directory = match self.stream.broker() {
            None => {
                let index = u64::from(self.topic.0);
                layout.leader_area(area).add(layout.leader.directories + index * Layout::directory_bytes(geometry))
            }
            Some(broker) => {
                let index = u64::from(self.topic.0) * u64::from(geometry.max_brokers) + u64::from(broker.0);
                RegionOffset(layout.directories + index * Layout::directory_bytes(geometry))
            }
        };
        directory.add(ordinal % geometry.directory_slots() * 8)
    }

    /// Reads of a stream: one of the global order by way of the leader, one of a broker's own directly.
    #[inline]
    fn observe<F: Fabric, R>(self, region: &Region<F>, mut read: impl FnMut(LeaderArea) -> R) -> Result<R, NoLeader> {
        match self.stream.broker() {
            None => with_leader(region, read),
            Some(broker) => Ok(read(LeaderArea(broker))),
        }
    }
}

const fn field(offset: usize) -> u64 {
    offset as u64
}
const COMMITTED: u64 = field(offset_of!(TailLine, committed));
const NEXT_OFFSET: u64 = field(offset_of!(TailLine, next_offset));
const BASE: u64 = field(offset_of!(TailLine, base));
const TRIMMED: u64 = field(offset_of!(TailLine, trimmed));
const TRIMMED_OFFSET: u64 = field(offset_of!(TailLine, trimmed_offset));
const TERM: u64 = field(offset_of!(TailLine, term));
const BYTES: u64 = field(offset_of!(TailLine, bytes));
const INCARNATION: u64 = field(offset_of!(TailLine, incarnation));

fn entries_per_segment<F: Fabric>(region: &Region<F>) -> u64 {
    region.geometry().segment_bytes / 64
}

/// The index that an [`OrderIndexWriter`] goes on with, and as whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexOptions {
    /// Which.
    pub id: StreamId,
    /// Incarnation of the topic.
    pub incarnation: Incarnation,
    /// Broker that writes it: of a global order the leader, which has inherited everything.
    pub writer: LeaderArea,
    /// Epoch of the leader; [`Term::NONE`] for a broker's own order.
    pub term: Term,
}

/// Bounds of what an order index keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Bytes of batches that are kept at most; 0 keeps all.
    pub bytes: u64,
    /// Time before which nothing is kept, microseconds since 1970.
    pub since_us: u64,
    /// Position at or above which everything is kept.
    pub limit: u64,
}

/// The only writer of an order index.
pub struct OrderIndexWriter<F> {
    region: Region<F>,
    id: StreamId,
    writer: LeaderArea,
    pool: Arc<dyn SegmentAllocator>,
    incarnation: Incarnation,
    tail_at: RegionOffset,
    next: u64,
    published: u64,
    next_offset: u64,
    bytes: u64,
    kept_bytes: u64,
    trimmed: u64,
    /// Segments in use, oldest first.
    segments: VecDeque<IndexSegment>,
}

#[derive(Clone, Copy)]
struct IndexSegment {
    ordinal: u64,
    segment: u32,
    /// This writer's own broker took it from the pool.
    own: bool,
}

impl<F: Fabric> OrderIndexWriter<F> {
    /// Goes on at the tail that the region shows, or starts the index of a new incarnation of its topic: offsets then
    /// begin at 0, positions go on growing.
    pub fn open(region: Region<F>, options: IndexOptions, pool: Arc<dyn SegmentAllocator>) -> Self {
        let IndexOptions { id, incarnation, writer, term } = options;
        let tail_at = id.tail(&region, writer);
        let mut tail: TailLine = region.fabric().observe_line(tail_at, Site::TailRead);
        let per_segment = entries_per_segment(&region);
        let mut segments = VecDeque::new();
        if tail.incarnation == incarnation.word() {
            if tail.committed > tail.base {
                for ordinal in tail.trimmed / per_segment..=(tail.committed - 1) / per_segment {
                    if let Some(segment) = read_directory(&region, id, writer, ordinal) {
                        let holder = match read_owner(&region, segment) {
                            SegmentUse::Index { holder, .. } => Some(holder),
                            _ => None,
                        };
                        segments.push_back(IndexSegment { ordinal, segment, own: holder == Some(writer.0) });
                    }
                }
            }
        } else {
            let base = tail.committed.next_multiple_of(per_segment);
            tail = TailLine {
                base,
                trimmed: base,
                committed: base,
                term,
                incarnation: incarnation.word(),
                ..TailLine::zeroed()
            };
            let fabric = region.fabric();
            for (at, value) in [
                (BASE, base),
                (TRIMMED, base),
                (TRIMMED_OFFSET, 0),
                (NEXT_OFFSET, 0),
                (BYTES, 0),
                (TERM, term.0),
                (COMMITTED, base),
                (INCARNATION, tail.incarnation),
            ] {
                // SYNC: the incarnation last; pairs with `read_extent`.
                fabric.store(tail_at.add(at), value);
            }
            fabric.flush(tail_at, 64, Site::TailFlush);
            fabric.fence(Site::TailFlush);
        }
        let mut writer = Self {
            region,
            id,
            writer,
            pool,
            incarnation,
            tail_at,
            next: tail.committed,
            published: tail.committed,
            next_offset: tail.next_offset,
            bytes: tail.bytes,
            kept_bytes: 0,
            trimmed: tail.trimmed,
            segments,
        };
        writer.take_stock(tail.trimmed_offset);
        writer
    }

    /// Looks at all entries that are kept, which another may have written. The first of them, or the next that comes, has
    /// `trimmed_offset`.
    fn take_stock(&mut self, trimmed_offset: u64) {
        let per_segment = entries_per_segment(&self.region);
        for foreign in self.segments.iter().filter(|segment| !segment.own) {
            let used = (self.next - foreign.ordinal * per_segment).min(per_segment);
            let base = self.region.layout().segment(self.region.geometry(), foreign.segment);
            self.region.fabric().invalidate(base, used * 64, Site::IndexEntryRead);
        }
        self.kept_bytes =
            (self.trimmed..self.next).filter_map(|at| self.entry(at)).map(|entry| u64::from(entry.bytes)).sum();
        // The word in the tail may be ahead of the tail: whoever wrote it died, or was read, in between.
        let last = self.next.checked_sub(1).and_then(|last| self.entry(last));
        let next_offset = match last {
            Some(last) => last.first_offset + u64::from(last.message_count),
            None => trimmed_offset,
        };
        if next_offset != self.next_offset {
            self.next_offset = next_offset;
            let fabric = self.region.fabric();
            fabric.store(self.tail_at.add(NEXT_OFFSET), next_offset);
            fabric.flush(self.tail_at, 64, Site::TailFlush);
            fabric.fence(Site::TailFlush);
        }
    }

    /// Puts a copy in the place of the segment that an earlier leader was filling, where that leader may go on and write into
    /// it, whoever took it from the pool. Takes the segment for it from `spares` first.
    ///
    /// # Errors
    /// [`PoolError`] when there is none.
    pub fn replace_last(&mut self, spares: &mut Vec<u32>) -> Result<(), PoolError> {
        let per_segment = entries_per_segment(&self.region);
        let Some(IndexSegment { ordinal, segment, .. }) = self.segments.back().copied() else { return Ok(()) };
        if self.next.is_multiple_of(per_segment) || !self.region.fabric().keeps(Guard::OwnSegment) {
            return Ok(());
        }
        let copied = spares.pop().map_or_else(|| self.pool.allocate(), Ok)?;
        let place = |segment| self.region.layout().segment(self.region.geometry(), segment);
        let fabric = self.region.fabric();
        for at in (0..self.next % per_segment).map(|entry| entry * 64) {
            let entry: IndexEntry = fabric.load_line(place(segment).add(at));
            fabric.store_line(place(copied).add(at), &entry);
        }
        fabric.flush(place(copied), self.next % per_segment * 64, Site::IndexEntryFlush);
        fabric.fence(Site::IndexEntryFence);
        self.segments.pop_back();
        self.add_segment(ordinal, copied);
        Ok(())
    }

    /// Position of the next entry.
    #[inline]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Offset of the next message.
    #[inline]
    pub fn next_offset(&self) -> u64 {
        self.next_offset
    }

    /// Batch bytes ever indexed in this incarnation.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Offset of the first message that is kept, or of the next that comes.
    pub fn earliest_offset(&self) -> u64 {
        self.entry(self.trimmed).map_or(self.next_offset, |entry| entry.first_offset)
    }

    /// First position that is kept.
    pub fn trimmed(&self) -> u64 {
        self.trimmed
    }

    /// Has the first message of an empty index get `offset` instead of 0.
    pub fn begin_at(&mut self, offset: u64) {
        assert!(self.next == self.trimmed && self.segments.is_empty(), "the index is not empty");
        self.next_offset = offset;
        let fabric = self.region.fabric();
        fabric.store(self.tail_at.add(NEXT_OFFSET), offset);
        fabric.store(self.tail_at.add(TRIMMED_OFFSET), offset);
        fabric.flush(self.tail_at, 64, Site::TailFlush);
        fabric.fence(Site::TailFlush);
    }

    /// Makes sure that one more entry fits.
    ///
    /// # Errors
    /// [`PoolError`] when a further segment is needed and not to be had.
    #[inline]
    pub fn make_room(&mut self) -> Result<(), PoolError> {
        let per_segment = entries_per_segment(&self.region);
        let ordinal = self.next / per_segment;
        match self.segments.back() {
            Some(newest) if newest.ordinal == ordinal => Ok(()),
            _ => self.extend(ordinal),
        }
    }

    #[cold]
    fn extend(&mut self, ordinal: u64) -> Result<(), PoolError> {
        let segment = self.pool.allocate()?;
        self.add_segment(ordinal, segment);
        Ok(())
    }

    fn add_segment(&mut self, ordinal: u64, segment: u32) {
        let StreamId { topic, stream } = self.id;
        let Self { incarnation, writer: LeaderArea(holder), .. } = *self;
        publish_owner(&self.region, segment, SegmentUse::Index { topic, incarnation, stream, ordinal, holder });
        let at = self.id.directory_entry(&self.region, self.writer, ordinal);
        let fabric = self.region.fabric();
        // SYNC: in memory before the tail that lets readers look for it; pairs with `read_directory`.
        fabric.store(at, (ordinal + 1) << 32 | u64::from(segment));
        fabric.flush(at, 8, Site::DirectoryFlush);
        fabric.fence(Site::DirectoryFlush);
        self.segments.push_back(IndexSegment { ordinal, segment, own: true });
    }

    /// Writes the next entry, filling in its offset and commit word. Call after [`OrderIndexWriter::make_room`].
    /// Returns the offset of the batch's first message.
    #[inline]
    pub fn append(&mut self, mut entry: IndexEntry) -> u64 {
        let per_segment = entries_per_segment(&self.region);
        let (ordinal, segment) = self.segments.back().map_or((u64::MAX, 0), |last| (last.ordinal, last.segment));
        assert!(ordinal == self.next / per_segment, "append without room");
        entry.first_offset = self.next_offset;
        entry.commit = commit_word(self.next);
        let at = self.region.layout().segment(self.region.geometry(), segment).add(self.next % per_segment * 64);
        self.region.fabric().store_line(at, &entry);
        self.next += 1;
        self.next_offset += u64::from(entry.message_count);
        self.bytes += u64::from(entry.bytes);
        self.kept_bytes += u64::from(entry.bytes);
        entry.first_offset
    }

    /// Flushes and fences the entries since the last publication. They stay invisible until
    /// [`OrderIndexWriter::publish_tail`].
    #[inline]
    pub fn write_back_entries(&mut self) {
        let per_segment = entries_per_segment(&self.region);
        let mut from = self.published;
        while from < self.next {
            let end = self.next.min((from / per_segment + 1) * per_segment);
            if let Some(holds) = self.segments.iter().rev().find(|holds| holds.ordinal == from / per_segment) {
                let base = self.region.layout().segment(self.region.geometry(), holds.segment);
                let at = base.add(from % per_segment * 64);
                self.region.fabric().flush(at, (end - from) * 64, Site::IndexEntryFlush);
            }
            from = end;
        }
        // SYNC: entries reach memory before the tail; pairs with `OrderIndexReader::poll`.
        self.region.fabric().fence(Site::IndexEntryFence);
    }

    /// Makes the entries visible. The caller fences (with whatever else it flushes) before it acts on that.
    #[inline]
    pub fn publish_tail(&mut self, term: Term) {
        let fabric = self.region.fabric();
        fabric.store(self.tail_at.add(NEXT_OFFSET), self.next_offset);
        fabric.store(self.tail_at.add(BYTES), self.bytes);
        fabric.store(self.tail_at.add(TERM), term.0);
        fabric.store(self.tail_at.add(COMMITTED), self.next);
        fabric.flush(self.tail_at, 64, Site::TailFlush);
        self.published = self.next;
    }

    /// Waits until the tail is in memory.
    #[inline]
    pub fn fence(&self) {
        self.region.fabric().fence(Site::TailFlush);
    }

    /// An entry that is still kept, as its writer sees it.
    pub fn entry(&self, position: u64) -> Option<IndexEntry> {
        if position < self.trimmed || position >= self.next {
            return None;
        }
        let per_segment = entries_per_segment(&self.region);
        let oldest = self.segments.front()?.ordinal;
        let holds = self.segments.get((position / per_segment).checked_sub(oldest)? as usize)?;
        let base = self.region.layout().segment(self.region.geometry(), holds.segment);
        let at = base.add(position % per_segment * 64);
        Some(self.region.fabric().load_line(at))
    }

    /// As [`OrderIndexWriter::entry`], also of what is trimmed but was not given back before this leader took over.
    pub fn entry_or_trimmed(&self, position: u64) -> Option<IndexEntry> {
        if position >= self.trimmed {
            return self.entry(position);
        }
        let per_segment = entries_per_segment(&self.region);
        let segment = read_directory(&self.region, self.id, self.writer, position / per_segment)?;
        if segment >= self.region.geometry().segment_count {
            return None;
        }
        // It may serve something else by now.
        match read_owner(&self.region, segment) {
            SegmentUse::Index { topic, incarnation, stream, ordinal, .. }
                if (topic, incarnation) == (self.id.topic, self.incarnation)
                    && (stream, ordinal) == (self.id.stream, position / per_segment) => {}
            _ => return None,
        }
        let base = self.region.layout().segment(self.region.geometry(), segment);
        let entry: IndexEntry =
            self.region.fabric().observe_line(base.add(position % per_segment * 64), Site::IndexEntryRead);
        (entry.commit == commit_word(position)).then_some(entry)
    }

    /// Trims what the topic's retention does not keep.
    pub fn enforce_retention(&mut self, retention: Retention) {
        let Retention { bytes, since_us, limit } = retention;
        let mut position = self.trimmed;
        while position < self.published.min(limit) {
            let Some(entry) = self.entry(position) else { break };
            let too_much = bytes > 0 && self.kept_bytes > bytes;
            if !too_much && entry.ordered_us >= since_us {
                break;
            }
            self.kept_bytes -= u64::from(entry.bytes);
            position += 1;
        }
        self.trim(position);
    }

    /// Lets go of the entries whose messages are all below `offset`.
    pub fn trim_below(&mut self, offset: u64) {
        let below = |entry: &IndexEntry| entry.first_offset + u64::from(entry.message_count) <= offset;
        let mut position = self.trimmed;
        while let Some(entry) = self.entry(position).filter(below) {
            self.kept_bytes -= u64::from(entry.bytes);
            position += 1;
        }
        self.trim(position);
    }

    /// Lets go of the entries below `position`. Readers that come later are refused; segments return to the pool
    /// by [`OrderIndexWriter::reclaim`], once nobody reads them.
    fn trim(&mut self, position: u64) {
        if position <= self.trimmed {
            return;
        }
        let offset = self.entry(position).map_or(self.next_offset, |entry| entry.first_offset);
        self.trimmed = position;
        let fabric = self.region.fabric();
        fabric.store(self.tail_at.add(TRIMMED_OFFSET), offset);
        fabric.store(self.tail_at.add(TRIMMED), position);
        fabric.flush(self.tail_at, 64, Site::TrimFlush);
        // SYNC: in memory before any pin is looked at; pairs with `Pin::set`.
        fabric.full_fence(Site::TrimFlush);
    }

    /// Lets go of the segments whose entries are all below both the trim point and `pinned`. Its own go back to the pool;
    /// of a global order, only while this leader is in office ([`crate::leadership::still_leads`]): another may trim less.
    pub fn reclaim(&mut self, pinned: u64) {
        let floor = self.trimmed.min(pinned);
        let per_segment = entries_per_segment(&self.region);
        while let Some(oldest) = self.segments.front().copied() {
            if (oldest.ordinal + 1) * per_segment > floor {
                break;
            }
            self.segments.pop_front();
            self.release(oldest);
        }
    }

    fn release(&self, IndexSegment { segment, own, .. }: IndexSegment) {
        if own {
            publish_owner(&self.region, segment, SegmentUse::Free);
            let _ = self.pool.release(segment);
        }
    }

    /// Gives every segment back: the topic is gone.
    pub fn abandon(&mut self) {
        self.trim(self.published);
        for segment in std::mem::take(&mut self.segments) {
            self.release(segment);
        }
    }
}

/// The lowest position that any of `brokers` pins in a stream; `u64::MAX` when none does.
pub fn lowest_pin<F: Fabric>(region: &Region<F>, topic: TopicId, brokers: impl Iterator<Item = BrokerId>) -> u64 {
    brokers
        .map(|broker| match region.fabric().observe(region.layout().pin(topic, broker), Site::PinRead) {
            // Zero is a line never written; positions are stored plus one.
            0 => u64::MAX,
            stored => stored - 1,
        })
        .min()
        .unwrap_or(u64::MAX)
}

/// What a broker's senders read right now, so that nobody reclaims it below them.
pub struct Pin<F> {
    region: Region<F>,
    at: RegionOffset,
    id: StreamId,
    position: u64,
}

impl<F: Fabric> Pin<F> {
    /// The pin of `broker` on a stream; nothing is pinned yet.
    pub fn new(region: Region<F>, id: StreamId, broker: BrokerId) -> Self {
        let at = region.layout().pin(id.topic, broker).add(field(offset_of!(PinLine, delivering_from)));
        let mut pin = Self { region, at, id, position: 0 };
        // Whether or not there is a leader.
        let _ = pin.set(u64::MAX);
        pin
    }

    /// Pins everything from `position` on (`u64::MAX` pins nothing) and returns the trim point seen afterwards:
    /// what lies at or above it stays until the pin moves on.
    ///
    /// # Errors
    /// [`NoLeader`], for a global order: nobody can say what is trimmed.
    #[inline]
    pub fn set(&mut self, position: u64) -> Result<u64, NoLeader> {
        let fabric = self.region.fabric();
        if position != self.position {
            self.position = position;
            fabric.store(self.at, position.saturating_add(1));
            fabric.flush(self.at, 8, Site::PinFlush);
            // SYNC: the pin reaches memory before the trim point is read; the trimmer stores its point before it
            // reads pins (`OrderIndexWriter::trim`). So at least one of the two sees the other.
            fabric.full_fence(Site::PinFlush);
        }
        let (region, id) = (&self.region, self.id);
        id.observe(region, |area| fabric.observe(id.tail(region, area).add(TRIMMED), Site::TrimRead))
    }

    /// What is pinned.
    #[inline]
    pub fn position(&self) -> u64 {
        self.position
    }
}

/// What the tail line of a stream shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Extent {
    /// Incarnation of the topic that the rest speaks of.
    pub incarnation: Incarnation,
    /// First position of the incarnation.
    pub base: u64,
    /// First position kept.
    pub trimmed: u64,
    /// One past the last.
    pub committed: u64,
    /// Offset of the first message kept.
    pub earliest_offset: u64,
    /// Offset after the last message.
    pub next_offset: u64,
    /// Batch bytes ever indexed.
    pub bytes: u64,
}

impl Extent {
    /// True when everything in the segment `ordinal` of the index is trimmed.
    pub fn is_past<F: Fabric>(&self, region: &Region<F>, ordinal: u64) -> bool {
        self.trimmed >= (ordinal + 1) * entries_per_segment(region)
    }
}

/// Reads the extent of a stream.
///
/// # Errors
/// [`NoLeader`], for a global order.
pub fn read_extent<F: Fabric>(region: &Region<F>, id: StreamId) -> Result<Extent, NoLeader> {
    id.observe(region, |area| read_extent_at(region, area, id))
}

/// As [`read_extent`], as a certain leader has it.
pub fn read_extent_at<F: Fabric>(region: &Region<F>, area: LeaderArea, id: StreamId) -> Extent {
    let tail: TailLine = region.fabric().observe_line(id.tail(region, area), Site::TailRead);
    Extent {
        incarnation: Incarnation::from_word(tail.incarnation),
        base: tail.base,
        trimmed: tail.trimmed,
        committed: tail.committed,
        earliest_offset: tail.trimmed_offset,
        next_offset: tail.next_offset,
        bytes: tail.bytes,
    }
}

/// The segment that holds the entries of `ordinal`, as a certain leader has it.
pub fn read_directory<F: Fabric>(region: &Region<F>, id: StreamId, area: LeaderArea, ordinal: u64) -> Option<u32> {
    let at = id.directory_entry(region, area, ordinal);
    let word = region.fabric().observe(at, Site::DirectoryRead);
    (word >> 32 == ordinal + 1).then_some(word as u32)
}

/// True when the leader of that area was filling a segment of a global order: [`OrderIndexWriter::replace_last`] needs another.
pub fn is_open<F: Fabric>(region: &Region<F>, id: StreamId, area: LeaderArea) -> bool {
    let extent = read_extent_at(region, area, id);
    extent.committed > extent.base && !extent.committed.is_multiple_of(entries_per_segment(region))
}

fn commit_word(position: u64) -> u32 {
    (position + 1) as u32
}

/// Why an entry cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Retention took it.
    #[error("entry {position} is trimmed")]
    Trimmed {
        /// Which.
        position: u64,
    },
    /// What is there is not that entry: memory broke its promise.
    #[error("order index entry {position} holds commit word {found:#x}")]
    Corrupt {
        /// Which.
        position: u64,
        /// What it holds.
        found: u32,
    },
    /// Between two leaders.
    #[error(transparent)]
    NoLeader(#[from] NoLeader),
}

/// Reads an order index. Positions at or above the trim point that a [`Pin`] returned are safe to read.
pub struct OrderIndexReader<F> {
    region: Region<F>,
    id: StreamId,
    committed: u64,
    /// Entries from here on may be in this host's cache from an earlier life of their segment.
    fresh_from: u64,
    fresh_to: u64,
    /// The segment last read from: its ordinal, and under which leader.
    segment: Option<(u64, u32, u64)>,
}

impl<F: Fabric> OrderIndexReader<F> {
    /// A reader that has seen nothing.
    pub fn new(region: Region<F>, id: StreamId) -> Self {
        Self { region, id, committed: 0, fresh_from: 0, fresh_to: 0, segment: None }
    }

    /// As [`OrderIndexReader::poll`], at least as far as an extent that was read before.
    ///
    /// # Errors
    /// [`NoLeader`]: the leader has changed since, and nobody can say.
    pub fn poll_beyond(&mut self, extent: &Extent) -> Result<u64, NoLeader> {
        let committed = self.poll();
        if committed < extent.committed { Err(NoLeader) } else { Ok(committed) }
    }

    /// One past the last complete entry, as memory says now; as before, while there is no leader.
    #[inline]
    pub fn poll(&mut self) -> u64 {
        let Self { region, id, .. } = self;
        // SYNC: pairs with `OrderIndexWriter::publish_tail`.
        let read = |area| region.fabric().observe(id.tail(region, area).add(COMMITTED), Site::TailRead);
        self.committed = id.observe(region, read).unwrap_or(self.committed);
        self.committed
    }

    /// One past the last complete entry, as last seen.
    #[inline]
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Reads an entry below [`OrderIndexReader::committed`].
    ///
    /// # Errors
    /// [`ReadError`].
    #[inline]
    pub fn read(&mut self, position: u64) -> Result<IndexEntry, ReadError> {
        assert!(position < self.committed, "entry {position} is not committed");
        let per_segment = entries_per_segment(&self.region);
        let ordinal = position / per_segment;
        // SYNC: a leader that took over may have put another segment in this one's place; whoever pinned what it reads, or
        // polled, saw that leader. Pairs with `OrphanedSegments::poll` of the broker.
        let mark = leader_version(&self.region);
        let segment = match self.segment {
            Some((known, segment, under))
                if known == ordinal && (under == mark || !self.region.fabric().keeps(Guard::SegmentOfLeader)) =>
            {
                segment
            }
            _ => {
                let Self { region, id, .. } = self;
                let found = id.observe(region, |area| read_directory(region, *id, area, ordinal));
                let segment = found?.ok_or(ReadError::Trimmed { position })?;
                if segment >= self.region.geometry().segment_count {
                    return Err(ReadError::Corrupt { position, found: segment });
                }
                self.segment = Some((ordinal, segment, leader_version(&self.region)));
                self.fresh_to = self.fresh_from;
                segment
            }
        };
        let base = self.region.layout().segment(self.region.geometry(), segment);
        let at = base.add(position % per_segment * 64);
        if !(self.fresh_from..self.fresh_to).contains(&position) {
            let end = self.committed.min((ordinal + 1) * per_segment).min(position + 64);
            self.region.fabric().invalidate(at, (end - position) * 64, Site::IndexEntryRead);
            (self.fresh_from, self.fresh_to) = (position, end);
        }
        let entry: IndexEntry = self.region.fabric().load_line(at);
        if entry.commit != commit_word(position) {
            return Err(ReadError::Corrupt { position, found: entry.commit });
        }
        Ok(entry)
    }

    /// First position in `low..high` whose entry satisfies `after`; entries must be sorted by it.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn partition_point(
        &mut self,
        mut low: u64,
        mut high: u64,
        after: impl Fn(&IndexEntry) -> bool,
    ) -> Result<u64, ReadError> {
        while low < high {
            let middle = low + (high - low) / 2;
            if after(&self.read(middle)?) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        Ok(low)
    }
}

/// The sequencer half of an offset entry, as its writer keeps it.
pub struct ConsumedWriter<F> {
    region: Region<F>,
    at: RegionOffset,
    /// Batches of the broker that are ordered.
    pub ordered: u64,
    /// Offset after the newest of them.
    pub ordered_offset: u64,
    /// Batchlog slots below this may be reused.
    pub consumed_through: u64,
    /// Batchlog entries below this are committed or dropped.
    pub decided_through: u64,
}

impl<F: Fabric> ConsumedWriter<F> {
    /// Goes on from what the region shows.
    pub fn recover(region: Region<F>, area: LeaderArea, topic: TopicId, broker: BrokerId) -> Self {
        let at = region.layout().sequencer_half(region.geometry(), area, topic, broker);
        let half: SequencerHalf = region.fabric().observe_line(at, Site::TailRead);
        Self {
            region,
            at,
            ordered: half.ordered,
            ordered_offset: half.ordered_offset,
            consumed_through: half.consumed_through,
            decided_through: half.decided_through,
        }
    }

    /// Writes the half and starts its write-back; the caller fences.
    #[inline]
    pub fn store(&self) {
        let fabric = self.region.fabric();
        fabric.store(self.at.add(field(offset_of!(SequencerHalf, ordered))), self.ordered);
        fabric.store(self.at.add(field(offset_of!(SequencerHalf, ordered_offset))), self.ordered_offset);
        fabric.store(self.at.add(field(offset_of!(SequencerHalf, decided_through))), self.decided_through);
        fabric.store(self.at.add(field(offset_of!(SequencerHalf, consumed_through))), self.consumed_through);
        fabric.flush(self.at, 64, Site::ConsumedFlush);
    }
}

/// How far the sequencer is with a broker's Batchlog.
///
/// # Errors
/// [`NoLeader`].
pub fn read_sequencer_half<F: Fabric>(
    region: &Region<F>,
    topic: TopicId,
    broker: BrokerId,
) -> Result<SequencerHalf, NoLeader> {
    with_leader(region, |area| read_sequencer_half_at(region, area, topic, broker))
}

/// As [`read_sequencer_half`], as a certain leader has it.
pub fn read_sequencer_half_at<F: Fabric>(
    region: &Region<F>,
    area: LeaderArea,
    topic: TopicId,
    broker: BrokerId,
) -> SequencerHalf {
    let at = region.layout().sequencer_half(region.geometry(), area, topic, broker);
    region.fabric().observe_line(at, Site::ConsumedRead)
}
