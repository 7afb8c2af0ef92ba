//! Batchlog: a broker's ring of batch entries of one topic, which the sequencer polls.

use crate::fabric::{Fabric, LINE_BYTES, RegionOffset};
use crate::layout::{BatchEntry, BatchlogRing, BrokerHalf, LeaderArea, SequencerHalf, lap_of};
use crate::leadership::with_leader;
use crate::region::Region;
use crate::row::Damage;
use crate::site::{Guard, Site};
use embarcadero_wire::{BrokerId, TopicId};
use std::mem::offset_of;

const LOG_OFFSET: u64 = offset_of!(BrokerHalf, log_offset) as u64;
const HEAD: u64 = offset_of!(BrokerHalf, batchlog_head) as u64;
const WRITTEN: u64 = offset_of!(BrokerHalf, written) as u64;
const WRITTEN_ADDR: u64 = offset_of!(BrokerHalf, written_addr) as u64;
const CONSUMED: u64 = offset_of!(SequencerHalf, consumed_through) as u64;

/// Reads the index below which Batchlog slots may be reused, from one leader's area.
fn consumed_through<F: Fabric>(region: &Region<F>, area: LeaderArea, topic: TopicId, broker: BrokerId) -> u64 {
    let half = region.layout().sequencer_half(area, topic, broker);
    let consumed = region.fabric().observe(half.add(CONSUMED), Site::ConsumedRead);
    region.fabric().ensure_in_memory(half, Site::ConsumedFlush);
    consumed
}

/// Calls `each` with the position and the bytes of the slots of entries `from..to`, at most one whole ring. Slots that
/// wrap around the end of the ring make two calls, others one.
#[inline]
fn runs(ring: &BatchlogRing, from: u64, to: u64, mut each: impl FnMut(RegionOffset, u64)) {
    if from == to {
        return;
    }
    let (start, end) = (from % ring.slots, to % ring.slots);
    if start < end {
        each(ring.slot(from), (end - start) * LINE_BYTES);
    } else {
        each(ring.slot(from), (ring.slots - start) * LINE_BYTES);
        if end > 0 {
            each(ring.slot(0), end * LINE_BYTES);
        }
    }
}

/// Counters that a broker publishes with the Batchlog's head.
#[derive(Clone, Copy, Debug, Default)]
pub struct Written {
    /// Bytes ever reserved in the Blog.
    pub log_offset: u64,
    /// Messages ever published.
    pub messages: u64,
    /// Position after the newest published batch.
    pub end: u64,
}

// [[DEVIATION_002]] The paper flushes and fences each write.

/// Broker's side of a Batchlog. Entries are stored without a flush; [`BatchlogWriter::publish`] flushes a group at
/// once.
pub struct BatchlogWriter<F> {
    region: Region<F>,
    ring: BatchlogRing,
    half: RegionOffset,
    topic: TopicId,
    broker: BrokerId,
    head: u64,
    published: u64,
    /// Slots of entries below this index may be reused, as last seen.
    consumed: u64,
}

impl<F: Fabric> BatchlogWriter<F> {
    /// Continues at the head that the broker published last.
    pub fn new(region: Region<F>, topic: TopicId, broker: BrokerId) -> Self {
        let half = region.layout().broker_half(topic, broker);
        let head = region.fabric().observe(half.add(HEAD), Site::BatchlogHeadRead);
        let ring = region.layout().batchlog(topic, broker);
        // As if the ring was full: the first append looks.
        let consumed = head.saturating_sub(ring.slots);
        Self { region, ring, half, topic, broker, head, published: head, consumed }
    }

    /// Index of the next entry. Indexes count the broker's batches of this topic slot, and never go back.
    #[inline]
    pub fn head(&self) -> u64 {
        self.head
    }

    /// Number of entries that are written and not yet published.
    #[inline]
    pub fn unpublished(&self) -> u64 {
        self.head - self.published
    }

    /// Returns true when the next slot is free: the sequencer has taken the entry that was in it.
    ///
    /// # Errors
    /// [`Damage`] when the sequencer took entries that this broker never wrote.
    #[inline]
    pub fn has_room(&mut self) -> Result<bool, Damage> {
        if self.head - self.consumed < self.ring.slots {
            return Ok(true);
        }
        if !self.region.fabric().keeps(Guard::SlotReuse) {
            self.consumed = self.head;
            return Ok(true);
        }
        // SYNC: pairs with the flush of the sequencer half; a stale value is only too small.
        let Self { region, topic, broker, .. } = self;
        let consumed = with_leader(region, |area| {
            (region.layout().sequencer_half(area, *topic, *broker), consumed_through(region, area, *topic, *broker))
        });
        let Ok((at, consumed)) = consumed else { return Ok(false) };
        if consumed > self.head {
            return Err(Damage { structure: "SequencerHalf", at, what: "consumed_through", value: consumed });
        }
        self.consumed = consumed.max(self.consumed);
        Ok(self.head - self.consumed < self.ring.slots)
    }

    /// Writes an entry into the next slot, and returns its index.
    ///
    /// # Panics
    /// When no slot is free: ask [`BatchlogWriter::has_room`] first.
    #[inline]
    pub fn append(&mut self, mut entry: BatchEntry) -> u64 {
        assert!(self.head - self.consumed < self.ring.slots, "the Batchlog is full");
        entry.lap = lap_of(self.head, self.ring.slots);
        self.region.fabric().store_line(self.ring.slot(self.head), &entry);
        self.head += 1;
        self.head - 1
    }

    /// Makes every appended entry visible to the sequencer. The caller has started to flush the payload; the fence here
    /// completes that flush too.
    #[inline]
    pub fn publish(&mut self, written: Written) {
        if self.published == self.head {
            return;
        }
        let fabric = self.region.fabric();
        runs(&self.ring, self.published, self.head, |at, bytes| fabric.flush(at, bytes, Site::BatchEntryFlush));
        // SYNC: entries and payload reach memory before the head that covers them; pairs with
        // `BatchlogReader::available`.
        fabric.fence(Site::BatchEntryFence);
        fabric.store(self.half.add(LOG_OFFSET), written.log_offset);
        fabric.store(self.half.add(WRITTEN), written.messages);
        fabric.store(self.half.add(WRITTEN_ADDR), written.end);
        fabric.store(self.half.add(HEAD), self.head);
        fabric.flush(self.half, LINE_BYTES, Site::BatchlogHeadFlush);
        fabric.fence(Site::BatchlogHeadFlush);
        self.published = self.head;
    }
}

/// Reads entry `index` of a Batchlog from memory; `None` when its slot holds a later entry.
///
/// # Errors
/// [`Damage`] when the slot holds neither. The entry must have been published, so its slot never holds an earlier one.
pub fn peek_entry<F: Fabric>(
    region: &Region<F>,
    topic: TopicId,
    broker: BrokerId,
    index: u64,
) -> Result<Option<BatchEntry>, Damage> {
    let ring = region.layout().batchlog(topic, broker);
    let (at, lap) = (ring.slot(index), lap_of(index, ring.slots));
    let entry: BatchEntry = region.fabric().observe_line(at, Site::BatchEntryRead)?;
    if entry.lap < lap {
        return Err(Damage { structure: "BatchEntry", at, what: "lap", value: entry.lap });
    }
    Ok((entry.lap == lap).then_some(entry))
}

/// Sequencer's side of a Batchlog.
pub struct BatchlogReader<F> {
    region: Region<F>,
    ring: BatchlogRing,
    half: RegionOffset,
    next: u64,
    head: u64,
}

impl<F: Fabric> BatchlogReader<F> {
    /// Reads on from entry `next`, which is the `consumed_through` of the sequencer half.
    pub fn new(region: Region<F>, topic: TopicId, broker: BrokerId, next: u64) -> Self {
        let half = region.layout().broker_half(topic, broker);
        let ring = region.layout().batchlog(topic, broker);
        Self { region, ring, half, next, head: next }
    }

    /// Index of the next entry.
    #[inline]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Returns the number of entries that can be taken now, at most `limit`. Reads the head from memory only when every
    /// known entry was taken.
    ///
    /// # Errors
    /// [`Damage`] when the head lies below the next entry, or more than a ring above it.
    #[inline]
    pub fn available(&mut self, limit: u64) -> Result<u64, Damage> {
        if self.head == self.next {
            // SYNC: pairs with `BatchlogWriter::publish`.
            let (fabric, at) = (self.region.fabric(), self.half.add(HEAD));
            let head = fabric.observe(at, Site::BatchlogHeadRead);
            if head < self.next || head - self.next > self.ring.slots {
                return Err(Damage { structure: "BrokerHalf", at, what: "batchlog_head", value: head });
            }
            if head > self.next {
                fabric.ensure_in_memory(at, Site::BatchlogHeadFlush);
            }
            self.head = head;
            // This host may have cached lines of the ring from an earlier lap.
            runs(&self.ring, self.next, head, |at, bytes| fabric.invalidate(at, bytes, Site::BatchEntryRead));
        }
        Ok((self.head - self.next).min(limit))
    }

    /// Returns true when the broker has no slot for another entry until some are taken. Reads the head from memory.
    pub fn is_full(&self) -> bool {
        let head = self.region.fabric().observe(self.half.add(HEAD), Site::BatchlogHeadRead);
        head.saturating_sub(self.next) >= self.ring.slots
    }

    /// Takes the next entry.
    ///
    /// # Errors
    /// [`Damage`] when the entry is not of this lap, or a reserved byte is set. The entry then stays the next one.
    ///
    /// # Panics
    /// When [`BatchlogReader::available`] did not promise an entry.
    #[inline]
    pub fn take(&mut self) -> Result<BatchEntry, Damage> {
        assert!(self.next < self.head, "nothing to take");
        let at = self.ring.slot(self.next);
        let entry: BatchEntry = self.region.fabric().load_line(at)?;
        if entry.lap != lap_of(self.next, self.ring.slots) {
            return Err(Damage { structure: "BatchEntry", at, what: "lap", value: entry.lap });
        }
        self.next += 1;
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::AllocatorKind;
    use crate::leadership::{activate_term, claim_term};
    use crate::segment::tests::region;
    use crate::sequencer_half::ConsumedWriter;
    use bytemuck::Zeroable;
    use embarcadero_wire::Term;

    #[test]
    fn a_damaged_entry_is_not_an_absent_one() {
        let (region, topic, broker) = (region(1, AllocatorKind::Bitmap), TopicId(0), BrokerId(1));
        let mut writer = BatchlogWriter::new(region.clone(), topic, broker);
        for sequence in 0..16 {
            writer.append(BatchEntry { sequence, ..BatchEntry::zeroed() });
        }
        writer.publish(Written::default());
        let peek = |index| peek_entry(&region, topic, broker, index).map(|entry| entry.map(|entry| entry.sequence));
        assert_eq!(peek(3), Ok(Some(3)));
        assert_eq!(peek(19).map_err(|damage| damage.what), Err("lap"), "the entry was never written");
        let slot = |index| region.layout().batchlog(topic, broker).slot(index);
        region.fabric().store(slot(3).add(offset_of!(BatchEntry, lap) as u64), 2);
        assert_eq!(peek(3), Ok(None), "the slot holds a later entry");
        region.fabric().store(slot(5).add(offset_of!(BatchEntry, reserved) as u64), 1);
        assert_eq!(peek(5).map_err(|damage| damage.what), Err("a reserved byte"));
    }
    #[test]
    fn entries_that_were_never_written_cannot_be_consumed() {
        let (region, topic, broker) = (region(1, AllocatorKind::Bitmap), TopicId(0), BrokerId(1));
        let (area, term) = (LeaderArea(BrokerId(0)), Term(1));
        claim_term(&region, area, term);
        activate_term(&region, area, term);
        let mut writer = BatchlogWriter::new(region.clone(), topic, broker);
        for _ in 0..16 {
            writer.append(BatchEntry::zeroed());
        }
        let mut leader = ConsumedWriter::recover(region, area, topic, broker);
        for (consumed_through, has_room) in [(0, Ok(false)), (17, Err("consumed_through")), (16, Ok(true))] {
            leader.consumed.consumed_through = consumed_through;
            leader.store();
            assert_eq!(writer.has_room().map_err(|damage| damage.what), has_room);
        }
    }
}
