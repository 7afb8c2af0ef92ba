//! Writer of an order index: trimming what retention does not keep, and giving segments back.

use super::writer::{IndexSegment, OrderIndexWriter};
use super::{TRIMMED, TRIMMED_OFFSET};
use crate::fabric::{Fabric, LINE_BYTES};
use crate::layout::IndexEntry;
use crate::owner::{SegmentUse, publish_owner};
use crate::row::Damage;
use crate::site::Site;

/// Bounds of what an order index keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Most bytes of batches that are kept; 0 keeps all.
    pub bytes: u64,
    /// Time before which nothing is kept, microseconds since 1970.
    pub since_us: u64,
    /// Position below which nothing is kept.
    pub below: u64,
    /// Position at or above which everything is kept.
    pub limit: u64,
}

impl<F: Fabric> OrderIndexWriter<F> {
    /// Trims what the topic's retention does not keep. Returns the damage of an entry that was trimmed, if there was any.
    pub fn enforce_retention(&mut self, retention: Retention) -> Option<Damage> {
        let Retention { bytes, since_us, below, limit } = retention;
        let until = self.published.min(limit);
        self.trim_while(until, |position, entry, kept| {
            (bytes > 0 && kept > bytes) || entry.ordered_us < since_us || position < below
        })
    }

    /// Trims the entries whose messages are all below `offset`.
    pub fn trim_below(&mut self, offset: u64) {
        self.trim_while(self.next, |_, entry, _| entry.first_offset + u64::from(entry.message_count) <= offset);
    }

    /// Trims entries below position `until` while they are `past`, which gets the position, the entry and
    /// the bytes that are kept.
    ///
    /// A damaged entry goes with the next one that can be read. Returns the first damage among the trimmed entries.
    fn trim_while(&mut self, until: u64, past: impl Fn(u64, &IndexEntry, u64) -> bool) -> Option<Damage> {
        let (mut through, mut trimmed_damage, mut damaged) = (self.trimmed, None, None);
        for position in self.trimmed..until {
            match self.entry(position) {
                Ok(Some(entry)) if past(position, &entry, self.kept_bytes) => {
                    // A damaged entry can claim more than there is.
                    self.kept_bytes = self.kept_bytes.saturating_sub(entry.bytes.into());
                    through = position + 1;
                    trimmed_damage = trimmed_damage.or(damaged);
                }
                Ok(_) => break,
                Err(damage) => damaged = damaged.or(Some(damage)),
            }
        }
        self.trim(through);
        trimmed_damage
    }

    /// Trims the entries below `position`. Readers that come later are refused. Segments return to the pool by
    /// [`OrderIndexWriter::reclaim`], once nobody reads them.
    fn trim(&mut self, position: u64) {
        if position <= self.trimmed {
            return;
        }
        self.trimmed = position;
        let offset = self.earliest_offset();
        let fabric = self.region.fabric();
        fabric.store(self.tail_at.add(TRIMMED_OFFSET), offset);
        fabric.store(self.tail_at.add(TRIMMED), position);
        fabric.flush(self.tail_at, LINE_BYTES, Site::TrimFlush);
        // SYNC: in memory before any pin is read; pairs with `Pin::set`.
        fabric.full_fence(Site::TrimFlush);
    }

    /// Gives back the segments whose entries are all below the trim point and below `pinned`. Only this broker's own go
    /// to the pool. For a global order, call it only while this leader leads ([`crate::leadership::still_leads`]):
    /// another may trim less.
    pub fn reclaim(&mut self, pinned: u64) {
        let floor = self.trimmed.min(pinned);
        let per_segment = self.region.layout().entries_per_segment();
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
            // The leader's allocator may be out of reach: then the segment is orphaned, and found again by its broker.
            let _ = self.pool.release(segment);
        }
    }

    /// Gives every segment back: the topic is gone.
    pub fn abandon(&mut self) {
        self.trim(self.published);
        self.room_until = 0;
        for segment in std::mem::take(&mut self.segments) {
            self.release(segment);
        }
    }
}
