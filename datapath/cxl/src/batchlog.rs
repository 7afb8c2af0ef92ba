//! The Batchlog: a broker's ring of batch entries of one topic, which the sequencer polls.

use crate::fabric::{Fabric, Guard, RegionOffset, Site};
use crate::layout::{BatchEntry, BrokerHalf, LeaderArea, SequencerHalf};
use crate::leadership::with_leader;
use crate::region::Region;
use embarcadero_wire::{BrokerId, TopicId};
use std::mem::offset_of;

/// Batchlog slots below this may be reused, as a head says.
fn consumed_through<F: Fabric>(region: &Region<F>, area: LeaderArea, topic: TopicId, broker: BrokerId) -> u64 {
    let half = region.layout().sequencer_half(region.geometry(), area, topic, broker);
    region.fabric().observe(half.add(offset_of!(SequencerHalf, consumed_through) as u64), Site::ConsumedRead)
}

const HEAD: u64 = offset_of!(BrokerHalf, batchlog_head) as u64;

fn ring<F: Fabric>(region: &Region<F>, topic: TopicId, broker: BrokerId) -> RegionOffset {
    let geometry = region.geometry();
    let index = u64::from(topic.0) * u64::from(geometry.max_brokers) + u64::from(broker.0);
    RegionOffset(region.layout().batchlogs + index * u64::from(geometry.batchlog_slots) * 64)
}

/// Counters that a broker publishes beside the head.
#[derive(Clone, Copy, Debug, Default)]
pub struct Written {
    /// Bytes ever reserved in the Blog.
    pub log_offset: u64,
    /// Messages ever published.
    pub messages: u64,
    /// End of the newest published batch.
    pub end: u64,
}

/// The broker's side of a Batchlog.
///
/// `[[DEVIATION_002]]` Entries are written without flushing; [`BatchlogWriter::publish`] flushes and fences a group at
/// once. The paper flushes and fences each write.
pub struct BatchlogWriter<F> {
    region: Region<F>,
    ring: RegionOffset,
    half: RegionOffset,
    topic: TopicId,
    broker: BrokerId,
    slots: u64,
    head: u64,
    published: u64,
    /// Slots below this may be reused, as last seen.
    consumed: u64,
}

impl<F: Fabric> BatchlogWriter<F> {
    /// Goes on where the region says that this broker stopped.
    pub fn new(region: Region<F>, topic: TopicId, broker: BrokerId) -> Self {
        let half = region.layout().offset_entry(topic, broker);
        let head = region.fabric().observe(half.add(HEAD), Site::BatchlogHeadRead);
        let ring = ring(&region, topic, broker);
        let slots = u64::from(region.geometry().batchlog_slots);
        // As if the ring was full: then it looks.
        let consumed = head.saturating_sub(slots);
        Self { region, ring, half, topic, broker, slots, head, published: head, consumed }
    }

    /// Index that the next entry gets. Indexes count the broker's batches of this topic slot, and never go back.
    #[inline]
    pub fn head(&self) -> u64 {
        self.head
    }

    /// Entries written but not yet published.
    #[inline]
    pub fn unpublished(&self) -> u64 {
        self.head - self.published
    }

    /// True when a slot is free: the sequencer consumed what was in it.
    #[inline]
    pub fn has_room(&mut self) -> bool {
        if self.head - self.consumed < self.slots {
            return true;
        }
        if !self.region.fabric().keeps(Guard::SlotReuse) {
            self.consumed = self.head;
            return true;
        }
        // SYNC: pairs with the flush of the sequencer half; a stale value is only too small.
        let Self { region, topic, broker, .. } = self;
        let Ok(consumed) = with_leader(region, |area| consumed_through(region, area, *topic, *broker)) else {
            return false;
        };
        self.consumed = consumed.max(self.consumed);
        assert!(self.consumed <= self.head, "consumed_through {} passed the head {}", self.consumed, self.head);
        self.head - self.consumed < self.slots
    }

    /// Writes an entry into the next slot. Call only after [`BatchlogWriter::has_room`] said yes.
    #[inline]
    pub fn append(&mut self, mut entry: BatchEntry) -> u64 {
        assert!(self.head - self.consumed < self.slots, "the Batchlog is full");
        entry.lap = lap_of(self.head, self.slots);
        self.region.fabric().store_line(self.ring.add(self.head % self.slots * 64), &entry);
        self.head += 1;
        self.head - 1
    }

    /// Makes everything that was appended visible to the sequencer. The payload must be flushed already (the fence
    /// here covers it).
    #[inline]
    pub fn publish(&mut self, written: Written) {
        if self.published == self.head {
            return;
        }
        let fabric = self.region.fabric();
        let (from, to) = (self.published % self.slots, self.head % self.slots);
        if from < to {
            fabric.flush(self.ring.add(from * 64), (to - from) * 64, Site::BatchEntryFlush);
        } else {
            fabric.flush(self.ring.add(from * 64), (self.slots - from) * 64, Site::BatchEntryFlush);
            fabric.flush(self.ring, to * 64, Site::BatchEntryFlush);
        }
        // SYNC: entries and payload reach memory before the head that covers them; pairs with `BatchlogReader::poll`.
        fabric.fence(Site::BatchEntryFence);
        fabric.store(self.half.add(offset_of!(BrokerHalf, log_offset) as u64), written.log_offset);
        fabric.store(self.half.add(offset_of!(BrokerHalf, written) as u64), written.messages);
        fabric.store(self.half.add(offset_of!(BrokerHalf, written_addr) as u64), written.end);
        fabric.store(self.half.add(HEAD), self.head);
        fabric.flush(self.half, 64, Site::BatchlogHeadFlush);
        fabric.fence(Site::BatchlogHeadFlush);
        self.published = self.head;
    }
}

/// What an entry's lap says when it is entry `index` of a ring of `slots`.
#[inline]
#[must_use]
pub const fn lap_of(index: u64, slots: u64) -> u64 {
    index / slots + 1
}

/// The slot of entry `index`, as memory has it now: for inspection. Its lap tells whether it still is that entry.
pub fn peek_entry<F: Fabric>(region: &Region<F>, topic: TopicId, broker: BrokerId, index: u64) -> BatchEntry {
    let slots = u64::from(region.geometry().batchlog_slots);
    region.fabric().observe_line(ring(region, topic, broker).add(index % slots * 64), Site::BatchEntryRead)
}

/// The sequencer's side of a Batchlog.
pub struct BatchlogReader<F> {
    region: Region<F>,
    ring: RegionOffset,
    head_at: RegionOffset,
    slots: u64,
    next: u64,
    head: u64,
}

impl<F: Fabric> BatchlogReader<F> {
    /// Reads on from `next`, the consumed_through of the sequencer half.
    pub fn new(region: Region<F>, topic: TopicId, broker: BrokerId, next: u64) -> Self {
        let head_at = region.layout().offset_entry(topic, broker).add(HEAD);
        let ring = ring(&region, topic, broker);
        let slots = u64::from(region.geometry().batchlog_slots);
        Self { region, ring, head_at, slots, next, head: next }
    }

    /// Index of the next entry to read.
    #[inline]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// How many entries can be read now, at most `limit`; looks at the head only when it knows of none.
    #[inline]
    pub fn available(&mut self, limit: u64) -> u64 {
        if self.head == self.next {
            // SYNC: pairs with `BatchlogWriter::publish`.
            let head = self.region.fabric().observe(self.head_at, Site::BatchlogHeadRead);
            assert!(
                head >= self.next && head - self.next <= self.slots,
                "Batchlog head {head} does not follow {} in a ring of {}",
                self.next,
                self.slots
            );
            self.head = head;
            // Lines of the ring hold the lap before this one, or worse.
            self.invalidate(self.next, head);
        }
        (self.head - self.next).min(limit)
    }

    fn invalidate(&self, from: u64, to: u64) {
        if from == to {
            return;
        }
        let fabric = self.region.fabric();
        let (start, end) = (from % self.slots, to % self.slots);
        if start < end {
            fabric.invalidate(self.ring.add(start * 64), (end - start) * 64, Site::BatchEntryRead);
        } else {
            fabric.invalidate(self.ring.add(start * 64), (self.slots - start) * 64, Site::BatchEntryRead);
            fabric.invalidate(self.ring, end * 64, Site::BatchEntryRead);
        }
    }

    /// Takes the next entry. Call only as often as [`BatchlogReader::available`] said.
    ///
    /// # Panics
    /// When the entry is not of this lap: memory broke its promise, and ordering must stop rather than order garbage.
    #[inline]
    pub fn take(&mut self) -> BatchEntry {
        assert!(self.next < self.head, "nothing to take");
        let entry: BatchEntry = self.region.fabric().load_line(self.ring.add(self.next % self.slots * 64));
        let lap = lap_of(self.next, self.slots);
        assert!(entry.lap == lap, "Batchlog entry {} has lap {}, expected {lap}", self.next, entry.lap);
        self.next += 1;
        entry
    }
}
