//! Entries of an order index, as its writer reads them again.

use super::writer::OrderIndexWriter;
use super::{StreamId, read_directory};
use crate::fabric::{Fabric, LINE_BYTES, RegionOffset};
use crate::layout::{IndexEntry, commit_word};
use crate::owner::{SegmentUse, read_owner};
use crate::row::{Damage, Row};
use crate::site::Site;

impl<F: Fabric> OrderIndexWriter<F> {
    /// Reads an entry that is kept.
    pub(super) fn read_entry(&self, position: u64) -> Result<IndexEntry, Damage> {
        let tail =
            Damage { structure: "TailLine", at: self.tail_at, what: "a position without a segment", value: position };
        self.load_entry(self.entry_at(position).ok_or(tail)?, position)
    }

    /// Position in the region of an entry, if its segment is in use.
    #[inline]
    pub(super) fn entry_at(&self, position: u64) -> Option<RegionOffset> {
        let layout = self.region.layout();
        let oldest = self.segments.front()?.ordinal;
        let ordinal = position / layout.entries_per_segment();
        let holds = self.segments.get(ordinal.checked_sub(oldest)? as usize)?;
        Some(layout.index_entry(holds.segment, position))
    }

    /// Returns the time of the newest entry, microseconds since 1970; 0 if none is kept.
    ///
    /// # Errors
    /// [`Damage`] when something else is at its place.
    pub fn newest_us(&self) -> Result<u64, Damage> {
        let newest = self.next.checked_sub(1).map_or(Ok(None), |newest| self.entry(newest))?;
        Ok(newest.map_or(0, |newest| newest.ordered_us))
    }

    /// Returns an entry, as its writer sees it; `None` when it is trimmed or not written yet.
    ///
    /// # Errors
    /// [`Damage`] when something else is at its place.
    pub fn entry(&self, position: u64) -> Result<Option<IndexEntry>, Damage> {
        if (self.trimmed..self.next).contains(&position) { self.read_entry(position).map(Some) } else { Ok(None) }
    }

    /// Returns an entry that is kept, or that was trimmed and not given back before this leader took over; `None` for
    /// any other.
    ///
    /// # Errors
    /// [`Damage`] when something else is at the place of an entry whose segment is still the index's.
    pub fn entry_or_trimmed(&self, position: u64) -> Result<Option<IndexEntry>, Damage> {
        if position >= self.trimmed {
            return self.entry(position);
        }
        let layout = self.region.layout();
        let at_ordinal = position / layout.entries_per_segment();
        let Some(segment) = read_directory(&self.region, self.id, self.writer, at_ordinal)? else { return Ok(None) };
        // It may have another use by now.
        let has_it = || match read_owner(&self.region, segment) {
            Row::Used(SegmentUse::Index { topic, incarnation, stream, ordinal, .. }) => {
                (StreamId { topic, stream }, incarnation, ordinal) == (self.id, self.incarnation, at_ordinal)
            }
            _ => false,
        };
        if !has_it() {
            return Ok(None);
        }
        let at = layout.index_entry(segment, position);
        self.region.fabric().invalidate(at, LINE_BYTES, Site::IndexEntryRead);
        match self.load_entry(at, position) {
            Ok(entry) => Ok(Some(entry)),
            Err(damage) if has_it() => Err(damage),
            Err(_) => Ok(None),
        }
    }

    /// Reads the entry of a position, which lies at `at`.
    fn load_entry(&self, at: RegionOffset, position: u64) -> Result<IndexEntry, Damage> {
        let entry: IndexEntry = self.region.fabric().load_line(at)?;
        if entry.commit == commit_word(self.commit_key, position) {
            Ok(entry)
        } else {
            Err(Damage { structure: "IndexEntry", at, what: "commit", value: entry.commit.into() })
        }
    }
}
