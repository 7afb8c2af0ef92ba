//! Writer of an order index: appending entries and publishing them.

use super::{
    BASE, BYTES, COMMITTED, INCARNATION, NEXT_OFFSET, StreamId, TERM, TRIMMED, TRIMMED_OFFSET, kept,
    read_kept_directory,
};
use crate::fabric::{Fabric, LINE_BYTES, RegionOffset};
use crate::layout::{IndexEntry, LeaderArea, TailLine, commit_word, directory_word};
use crate::owner::{SegmentUse, publish_owner, read_owner};
use crate::region::Region;
use crate::row::{Damage, Row};
use crate::segment::{PoolError, SegmentAllocator};
use crate::site::{Guard, Site};
use embarcadero_wire::{Incarnation, Term};
use std::collections::VecDeque;
use std::sync::Arc;

/// Index that an [`OrderIndexWriter`] continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexOptions {
    /// Stream of the index.
    pub id: StreamId,
    /// Incarnation of the topic.
    pub incarnation: Incarnation,
    /// Broker that writes it. For a global order this is the leader, which has copied its predecessor.
    pub writer: LeaderArea,
    /// Term of the leader; [`Term::NONE`] for a broker's own order.
    pub term: Term,
}

/// Segment of an index.
#[derive(Clone, Copy)]
pub(super) struct IndexSegment {
    pub(super) ordinal: u64,
    pub(super) segment: u32,
    /// This writer's own broker took it from the pool.
    pub(super) own: bool,
}

/// Only writer of an order index.
pub struct OrderIndexWriter<F> {
    pub(super) region: Region<F>,
    pub(super) id: StreamId,
    pub(super) writer: LeaderArea,
    pub(super) pool: Arc<dyn SegmentAllocator>,
    pub(super) incarnation: Incarnation,
    pub(super) tail_at: RegionOffset,
    pub(super) next: u64,
    pub(super) published: u64,
    pub(super) next_offset: u64,
    bytes: u64,
    /// First damaged entry among those that were kept when this writer opened the index.
    damage: Option<Damage>,
    pub(super) kept_bytes: u64,
    pub(super) trimmed: u64,
    pub(super) commit_key: u64,
    /// Segments in use, oldest first.
    pub(super) segments: VecDeque<IndexSegment>,
    /// True while the newest segment takes no more entries: an earlier leader may write into it.
    sealed: bool,
    /// Position before which entries fit into the newest segment; 0 while there is none, or it is sealed.
    pub(super) room_until: u64,
    /// Term under which the tail was last published.
    written_under: Term,
}

impl<F: Fabric> OrderIndexWriter<F> {
    /// Continues at the tail that the region shows, or begins the index of a new incarnation of its topic. Offsets then
    /// begin at 0; positions go on growing.
    ///
    /// # Errors
    /// [`Damage`] when the tail, the directory or the last entry is not what a writer made.
    pub fn open(region: Region<F>, options: IndexOptions, pool: Arc<dyn SegmentAllocator>) -> Result<Self, Damage> {
        let IndexOptions { id, incarnation, writer, .. } = options;
        let tail_at = id.tail(&region, writer);
        let mut tail: TailLine = region.fabric().observe_words(tail_at, Site::TailRead);
        let mut segments = VecDeque::new();
        if tail.incarnation > u64::from(u32::MAX) {
            return Err(Damage { structure: "TailLine", at: tail_at, what: "incarnation", value: tail.incarnation });
        }
        if tail.incarnation == incarnation.word() {
            kept(&region, tail_at, tail.base, tail.trimmed..tail.committed)?;
            segments = segments_of(&region, id, writer, &tail)?;
        } else {
            // An earlier writer may have died as it began another incarnation: the words belong to different ones.
            kept(&region, tail_at, 0, tail.trimmed.min(tail.committed)..tail.committed)?;
            let base = tail.committed.next_multiple_of(region.layout().entries_per_segment());
            tail = begin(&region, tail_at, &options, base);
        }
        let mut writer = Self::at(region, options, pool, &tail, segments);
        writer.take_stock(tail.trimmed_offset)?;
        Ok(writer)
    }

    /// Begins the index without entries, whatever its tail and directory say. Offsets begin at 0; positions go on
    /// growing. The segments that it had are orphaned.
    ///
    /// For a copy of an order that is written again from its source.
    pub fn open_anew(region: Region<F>, options: IndexOptions, pool: Arc<dyn SegmentAllocator>) -> Self {
        let tail_at = options.id.tail(&region, options.writer);
        let found: TailLine = region.fabric().observe_words(tail_at, Site::TailRead);
        // A damaged tail says nothing about positions.
        let is_sound = kept(&region, tail_at, 0, found.committed..found.committed).is_ok();
        let committed = if is_sound { found.committed } else { 0 };
        let base = committed.next_multiple_of(region.layout().entries_per_segment());
        let tail = begin(&region, tail_at, &options, base);
        Self::at(region, options, pool, &tail, VecDeque::new())
    }

    /// Returns the writer of an index with this tail and these segments.
    fn at(
        region: Region<F>,
        options: IndexOptions,
        pool: Arc<dyn SegmentAllocator>,
        tail: &TailLine,
        segments: VecDeque<IndexSegment>,
    ) -> Self {
        let IndexOptions { id, incarnation, writer, .. } = options;
        let room_until = segments.back().map_or(0, |newest| room_until(&region, newest.ordinal));
        Self {
            tail_at: id.tail(&region, writer),
            commit_key: id.commit_key(&region),
            region,
            id,
            writer,
            pool,
            incarnation,
            next: tail.committed,
            published: tail.committed,
            next_offset: tail.next_offset,
            bytes: tail.bytes,
            damage: None,
            kept_bytes: 0,
            trimmed: tail.trimmed,
            segments,
            sealed: false,
            room_until,
            written_under: tail.term,
        }
    }

    /// Reads every entry that is kept, counts the bytes, and corrects the next offset. Another broker may have written
    /// the entries. `trimmed_offset` is the offset of the first one, or of the next entry if none is kept.
    fn take_stock(&mut self, trimmed_offset: u64) -> Result<(), Damage> {
        let per_segment = self.region.layout().entries_per_segment();
        // Own ones too: this broker may have run on another host when it wrote them.
        for IndexSegment { ordinal, segment, .. } in &self.segments {
            let used = (self.next - ordinal * per_segment).min(per_segment);
            let base = self.region.layout().segment(*segment);
            self.region.fabric().invalidate(base, used * LINE_BYTES, Site::IndexEntryRead);
        }
        for position in self.trimmed..self.next {
            match self.read_entry(position) {
                Ok(entry) => self.kept_bytes += u64::from(entry.bytes),
                // It counts for nothing: retention passes over it.
                Err(damage) => self.damage = self.damage.or(Some(damage)),
            }
        }
        let last = if self.next > self.trimmed { Some(self.read_entry(self.next - 1)?) } else { None };
        // The word in the tail may be ahead of the tail: its writer died, or was read, between the two stores.
        let next_offset = last.map_or(trimmed_offset, |last| last.first_offset + u64::from(last.message_count));
        if next_offset != self.next_offset {
            self.next_offset = next_offset;
            self.store_tail(&[(NEXT_OFFSET, next_offset)]);
        }
        Ok(())
    }

    /// Writes words of the tail; they are in memory when this returns.
    fn store_tail(&self, words: &[(u64, u64)]) {
        let fabric = self.region.fabric();
        for (word, value) in words {
            fabric.store(self.tail_at.add(*word), *value);
        }
        fabric.flush(self.tail_at, LINE_BYTES, Site::TailFlush);
        fabric.fence(Site::TailFlush);
    }

    /// Seals the segment that an earlier leader was filling, as that leader may go on and write into it. Its entries stay
    /// readable. No more are appended until [`OrderIndexWriter::make_room`] has put a copy in its place.
    ///
    /// Returns true if there is such a segment.
    pub fn seal_last(&mut self) -> bool {
        let is_open =
            !self.next.is_multiple_of(self.region.layout().entries_per_segment()) && !self.segments.is_empty();
        self.sealed = is_open && self.region.fabric().keeps(Guard::OwnSegment);
        if self.sealed {
            self.room_until = 0;
        }
        self.sealed
    }

    /// Term under which the tail was last published. A leader that could not leave a shared segment has not published it:
    /// another leader may still write into the segment.
    pub fn written_under(&self) -> Term {
        self.written_under
    }

    /// Puts a copy of the sealed segment in its place, in the segment `copied` of the pool.
    ///
    /// Readers may know the sealed one: they look at the directory again before they read behind the copied entries.
    fn replace_sealed(&mut self, IndexSegment { ordinal, segment, .. }: IndexSegment, copied: u32) {
        let layout = self.region.layout();
        let used = self.next % layout.entries_per_segment();
        let (from, to) = (layout.segment(segment), layout.segment(copied));
        let fabric = self.region.fabric();
        for at in (0..used).map(|entry| entry * LINE_BYTES) {
            fabric.store_words(to.add(at), &fabric.load_words(from.add(at)));
        }
        fabric.flush(to, used * LINE_BYTES, Site::IndexEntryFlush);
        fabric.fence(Site::IndexEntryFence);
        self.sealed = false;
        self.segments.pop_back();
        self.add_segment(ordinal, copied);
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

    /// Bytes of all batches that were ever indexed in this incarnation.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Damage of the first entry that nobody can read, among those that were kept when this writer opened the index.
    pub fn damage(&self) -> Option<Damage> {
        self.damage
    }

    /// Offset of the first message that is kept and readable, or of the next message if there is none.
    pub fn earliest_offset(&self) -> u64 {
        let first = (self.trimmed..self.next).find_map(|position| self.read_entry(position).ok());
        first.map_or(self.next_offset, |entry| entry.first_offset)
    }

    /// First position that is kept.
    pub fn trimmed(&self) -> u64 {
        self.trimmed
    }

    /// Gives the first message of an empty index the offset `offset` instead of 0.
    ///
    /// # Panics
    /// When the index has entries.
    pub fn begin_at(&mut self, offset: u64) {
        assert!(self.next == self.trimmed && self.segments.is_empty(), "the index is not empty");
        self.next_offset = offset;
        self.store_tail(&[(NEXT_OFFSET, offset), (TRIMMED_OFFSET, offset)]);
    }

    /// Makes sure that one more entry fits.
    ///
    /// # Errors
    /// [`PoolError`] when another segment is needed and there is none.
    #[inline]
    pub fn make_room(&mut self) -> Result<(), PoolError> {
        if self.has_room() { Ok(()) } else { self.extend() }
    }

    /// Returns true when one more entry fits.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.next < self.room_until
    }

    #[cold]
    fn extend(&mut self) -> Result<(), PoolError> {
        let segment = self.pool.allocate()?;
        match self.segments.back().copied().filter(|_| self.sealed) {
            Some(sealed) => self.replace_sealed(sealed, segment),
            None => self.add_segment(self.next / self.region.layout().entries_per_segment(), segment),
        }
        Ok(())
    }

    fn add_segment(&mut self, ordinal: u64, segment: u32) {
        let StreamId { topic, stream } = self.id;
        let Self { incarnation, writer: LeaderArea(holder), .. } = *self;
        publish_owner(&self.region, segment, SegmentUse::Index { topic, incarnation, stream, ordinal, holder });
        let at = self.id.directory_word(&self.region, self.writer, ordinal);
        let fabric = self.region.fabric();
        // SYNC: in memory before the tail that lets readers look for it; pairs with `read_directory`.
        fabric.store(at, directory_word(ordinal, segment));
        fabric.flush(at, 8, Site::DirectoryFlush);
        fabric.fence(Site::DirectoryFlush);
        self.segments.push_back(IndexSegment { ordinal, segment, own: true });
        self.room_until = room_until(&self.region, ordinal);
    }

    /// Writes the next entry with its offset and commit word, and returns the offset of the batch's first message.
    ///
    /// # Panics
    /// When there is no room: call [`OrderIndexWriter::make_room`] first.
    #[inline]
    pub fn append(&mut self, mut entry: IndexEntry) -> u64 {
        let layout = self.region.layout();
        assert!(self.has_room(), "append without room");
        let Some(IndexSegment { segment, .. }) = self.segments.back().copied() else { unreachable!("there is room") };
        entry.first_offset = self.next_offset;
        entry.commit = commit_word(self.commit_key, self.next);
        self.region.fabric().store_line(layout.index_entry(segment, self.next), &entry);
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
        let per_segment = self.region.layout().entries_per_segment();
        let mut from = self.published;
        while from < self.next {
            let end = self.next.min((from / per_segment + 1) * per_segment);
            let Some(at) = self.entry_at(from) else { unreachable!("entry {from} is to be published, not given back") };
            self.region.fabric().flush(at, (end - from) * LINE_BYTES, Site::IndexEntryFlush);
            from = end;
        }
        // SYNC: entries reach memory before the tail; pairs with `OrderIndexReader::poll`.
        self.region.fabric().fence(Site::IndexEntryFence);
    }

    /// Makes the entries visible. The caller fences, with whatever else it flushes, before it acts on that.
    #[inline]
    pub fn publish_tail(&mut self, term: Term) {
        let fabric = self.region.fabric();
        fabric.store(self.tail_at.add(NEXT_OFFSET), self.next_offset);
        fabric.store(self.tail_at.add(BYTES), self.bytes);
        fabric.store(self.tail_at.add(TERM), term.0);
        fabric.store(self.tail_at.add(COMMITTED), self.next);
        fabric.flush(self.tail_at, LINE_BYTES, Site::TailFlush);
        self.published = self.next;
        self.written_under = term;
    }

    /// Waits until the tail is in memory.
    #[inline]
    pub fn fence(&self) {
        self.region.fabric().fence(Site::TailFlush);
    }
}

/// Returns the position after the last entry of an index's segment.
fn room_until<F: Fabric>(region: &Region<F>, ordinal: u64) -> u64 {
    (ordinal + 1) * region.layout().entries_per_segment()
}

/// Finds the segments of an index from its directory.
fn segments_of<F: Fabric>(
    region: &Region<F>,
    id: StreamId,
    writer: LeaderArea,
    tail: &TailLine,
) -> Result<VecDeque<IndexSegment>, Damage> {
    let per_segment = region.layout().entries_per_segment();
    let mut segments = VecDeque::new();
    if tail.committed == tail.base {
        return Ok(segments);
    }
    for ordinal in tail.trimmed / per_segment..=(tail.committed - 1) / per_segment {
        let first = tail.trimmed.max(ordinal * per_segment);
        // Another process of the writer may go on, and trim.
        let Some(segment) = read_kept_directory(region, id, writer, first)? else { continue };
        let owner = read_owner(region, segment);
        let own = matches!(owner, Row::Used(SegmentUse::Index { holder, .. }) if holder == writer.0);
        segments.push_back(IndexSegment { ordinal, segment, own });
    }
    Ok(segments)
}

/// Writes the tail of an index without entries, whose first position is `base`.
fn begin<F: Fabric>(region: &Region<F>, at: RegionOffset, options: &IndexOptions, base: u64) -> TailLine {
    let fabric = region.fabric();
    let tail = TailLine {
        committed: base,
        next_offset: 0,
        base,
        trimmed: base,
        trimmed_offset: 0,
        term: options.term,
        bytes: 0,
        incarnation: options.incarnation.word(),
    };
    // SYNC: the incarnation is stored last; pairs with `read_extent_at`.
    for (word, value) in [
        (BASE, tail.base),
        (TRIMMED, tail.trimmed),
        (TRIMMED_OFFSET, tail.trimmed_offset),
        (NEXT_OFFSET, tail.next_offset),
        (BYTES, tail.bytes),
        (TERM, tail.term.0),
        (COMMITTED, tail.committed),
        (INCARNATION, tail.incarnation),
    ] {
        fabric.store(at.add(word), value);
    }
    fabric.flush(at, LINE_BYTES, Site::TailFlush);
    fabric.fence(Site::TailFlush);
    tail
}
