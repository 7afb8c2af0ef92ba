//! Reader of an order index.

use super::{COMMITTED, Extent, StreamId, read_kept_directory};
use crate::fabric::{Fabric, LINE_BYTES, RegionOffset};
use crate::layout::{IndexEntry, MAX_BROKERS, RegionRole, commit_word, directory_word};
use crate::leadership::{NoLeader, leader_version};
use crate::region::Region;
use crate::row::Damage;
use crate::site::{Guard, Site};
use std::ops::Range;

/// Entries that are dropped from this host's cache at once.
const INVALIDATED_ENTRIES: u64 = 64;

/// Reason why an entry cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Retention took the entry.
    #[error("entry {position} is trimmed")]
    Trimmed {
        /// Position of the entry.
        position: u64,
    },
    /// The memory at the entry's place holds something else.
    #[error("order index entry {position}: {damage}")]
    Corrupt {
        /// Position of the entry.
        position: u64,
        /// Contents that were found.
        damage: Damage,
    },
    /// No broker leads at the moment.
    #[error(transparent)]
    NoLeader(#[from] NoLeader),
}

/// Segment that a reader found last.
#[derive(Clone, Copy)]
struct Found {
    ordinal: u64,
    segment: u32,
    /// Leader under which it was found.
    version: u64,
    /// Word of the directory that names it, while a leader may still put a copy in its place; `None` once it is full.
    named: Option<(RegionOffset, u64)>,
}

/// Reader of an order index. Positions at or above the trim point that a [`super::Pin`] returned are safe to read.
pub struct OrderIndexReader<F> {
    region: Region<F>,
    id: StreamId,
    committed: u64,
    /// Bounds of the entries that were dropped from this host's cache. The cache may hold others from an earlier use of
    /// their segment.
    fresh_from: u64,
    fresh_to: u64,
    found: Option<Found>,
    /// Brokers that an entry may name: ids below this.
    brokers: u32,
    /// Bounds of the memory that batches may lie in.
    batches: Range<u64>,
    commit_key: u64,
}

impl<F: Fabric> OrderIndexReader<F> {
    /// Returns a reader that has seen no entry yet.
    pub fn new(region: Region<F>, id: StreamId) -> Self {
        let (geometry, layout) = (region.geometry(), region.layout());
        let (brokers, batches) = match geometry.role {
            // The entries speak of brokers and of memory of the region that is mirrored.
            RegionRole::Mirror => (MAX_BROKERS, 0..u64::MAX),
            RegionRole::Single | RegionRole::Mirrored => (geometry.max_brokers, layout.segments..layout.region_bytes),
        };
        let commit_key = id.commit_key(&region);
        Self { region, id, committed: 0, fresh_from: 0, fresh_to: 0, found: None, brokers, batches, commit_key }
    }

    /// Reads how far the index reaches, which must be at least as far as an extent that was read before.
    ///
    /// # Errors
    /// [`NoLeader`] when the leader changed since.
    pub fn poll_beyond(&mut self, extent: &Extent) -> Result<u64, NoLeader> {
        let committed = self.poll();
        if committed < extent.committed { Err(NoLeader) } else { Ok(committed) }
    }

    /// Reads the position after the last complete entry from memory. Returns the last known one while there is no
    /// leader.
    #[inline]
    pub fn poll(&mut self) -> u64 {
        let Self { region, id, committed: known, .. } = self;
        let read = |area| {
            let at = id.tail(region, area).add(COMMITTED);
            // SYNC: pairs with `OrderIndexWriter::publish_tail`.
            let committed = region.fabric().observe(at, Site::TailRead);
            if committed != *known {
                region.fabric().ensure_in_memory(at, Site::TailFlush);
            }
            committed
        };
        self.committed = id.observe(region, read).unwrap_or(self.committed);
        self.committed
    }

    /// Position after the last complete entry, as last seen.
    #[inline]
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Reads an entry. Its broker is one of the region, and its batch lies in the pool.
    ///
    /// # Errors
    /// [`ReadError`].
    ///
    /// # Panics
    /// When `position` is not below [`OrderIndexReader::committed`].
    #[inline]
    pub fn read(&mut self, position: u64) -> Result<IndexEntry, ReadError> {
        assert!(position < self.committed, "entry {position} is not committed");
        let ordinal = position / self.region.layout().entries_per_segment();
        let segment = match self.found {
            Some(found) if found.ordinal == ordinal && self.is_current(found) => found.segment,
            _ => self.find(position, ordinal)?,
        };
        let at = self.region.layout().index_entry(segment, position);
        if !(self.fresh_from..self.fresh_to).contains(&position) {
            let end = (ordinal + 1) * self.region.layout().entries_per_segment();
            let end = self.committed.min(end).min(position + INVALIDATED_ENTRIES);
            self.region.fabric().invalidate(at, (end - position) * LINE_BYTES, Site::IndexEntryRead);
            (self.fresh_from, self.fresh_to) = (position, end);
        }
        let entry: IndexEntry =
            self.region.fabric().load_line(at).map_err(|damage| ReadError::Corrupt { position, damage })?;
        if entry.commit != commit_word(self.commit_key, position) {
            return Err(self.corrupt(position, "commit", entry.commit.into()));
        }
        if u32::from(entry.broker) >= self.brokers {
            return Err(self.corrupt(position, "broker", entry.broker.into()));
        }
        let end = entry.location.saturating_add(entry.bytes.into());
        if entry.location < self.batches.start || end > self.batches.end {
            return Err(self.corrupt(position, "location", entry.location));
        }
        Ok(entry)
    }

    /// Returns the error of an entry that was read and whose `what` is not possible.
    #[must_use]
    pub fn corrupt(&self, position: u64, what: &'static str, value: u64) -> ReadError {
        let segment = self.found.map_or(0, |found| found.segment);
        let at = self.region.layout().index_entry(segment, position);
        ReadError::Corrupt { position, damage: Damage { structure: "IndexEntry", at, what, value } }
    }

    /// Returns true when no other leader was seen since the segment was found, and the leader has not put a copy in its
    /// place.
    // SYNC: a leader that took over may have put another segment in this one's place. A reader that has set its pin, or
    // has polled, has seen that leader. A leader that found no room then does so later: the directory is read after the
    // pin was set, and after the tail. Pairs with `OrderIndexWriter::make_room`, and with `OrphanedSegments::poll` of the
    // broker.
    #[inline]
    fn is_current(&self, found: Found) -> bool {
        let fabric = self.region.fabric();
        let is_named = |(at, word)| fabric.observe(at, Site::DirectoryRead) == word;
        (found.version == leader_version(&self.region) && found.named.is_none_or(is_named))
            || !fabric.keeps(Guard::SegmentOfLeader)
    }

    fn find(&mut self, position: u64, ordinal: u64) -> Result<u32, ReadError> {
        let Self { region, id, .. } = self;
        // Read first: another thread may see the next leader meanwhile.
        let version = leader_version(region);
        let read = |area| (id.directory_word(region, area, ordinal), read_kept_directory(region, *id, area, position));
        let (at, found) = id.observe(region, read)?;
        let segment = found.map_err(|damage| ReadError::Corrupt { position, damage })?;
        let segment = segment.ok_or(ReadError::Trimmed { position })?;
        let is_full = self.committed >= (ordinal + 1) * region.layout().entries_per_segment();
        let may_change = id.stream.broker().is_none() && !is_full;
        let named = may_change.then(|| (at, directory_word(ordinal, segment)));
        self.found = Some(Found { ordinal, segment, version, named });
        self.fresh_to = self.fresh_from;
        Ok(segment)
    }

    /// Finds the first position in `low..high` whose entry satisfies `after`; entries must be sorted by it.
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
