//! Sequencer halves: a leader's progress in each broker's Batchlogs.

use crate::fabric::{Fabric, LINE_BYTES, RegionOffset};
use crate::layout::{LeaderArea, SequencerHalf};
use crate::region::Region;
use crate::site::Site;
use embarcadero_wire::{BrokerId, TopicId};
use serde::Serialize;
use std::mem::offset_of;

const ORDERED: u64 = offset_of!(SequencerHalf, ordered) as u64;
const ORDERED_OFFSET: u64 = offset_of!(SequencerHalf, ordered_offset) as u64;
const CONSUMED: u64 = offset_of!(SequencerHalf, consumed_through) as u64;
const DECIDED: u64 = offset_of!(SequencerHalf, decided_through) as u64;

/// Leader's progress in a broker's Batchlog of a topic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Consumed {
    /// Batches of the broker that are ordered.
    pub ordered: u64,
    /// Message offset after the newest ordered batch.
    pub ordered_offset: u64,
    /// Batchlog slots of entries below this index may be reused.
    pub consumed_through: u64,
    /// Batchlog entries below this index are committed or dropped.
    pub decided_through: u64,
}

/// Writer of a sequencer half: the leader.
pub struct ConsumedWriter<F> {
    region: Region<F>,
    at: RegionOffset,
    /// Progress, shown by [`ConsumedWriter::store`].
    pub consumed: Consumed,
}

impl<F: Fabric> ConsumedWriter<F> {
    /// Continues from the progress in the leader's area.
    pub fn recover(region: Region<F>, area: LeaderArea, topic: TopicId, broker: BrokerId) -> Self {
        let at = region.layout().sequencer_half(area, topic, broker);
        let consumed = read_consumed_at(&region, area, topic, broker);
        Self { region, at, consumed }
    }

    /// Writes the half and starts its write-back; the caller fences.
    #[inline]
    pub fn store(&self) {
        let fabric = self.region.fabric();
        fabric.store(self.at.add(ORDERED), self.consumed.ordered);
        fabric.store(self.at.add(ORDERED_OFFSET), self.consumed.ordered_offset);
        fabric.store(self.at.add(DECIDED), self.consumed.decided_through);
        fabric.store(self.at.add(CONSUMED), self.consumed.consumed_through);
        fabric.flush(self.at, LINE_BYTES, Site::ConsumedFlush);
    }
}

/// Reads a leader's progress in a broker's Batchlog from its area.
pub fn read_consumed_at<F: Fabric>(region: &Region<F>, area: LeaderArea, topic: TopicId, broker: BrokerId) -> Consumed {
    let (fabric, at) = (region.fabric(), region.layout().sequencer_half(area, topic, broker));
    fabric.invalidate(at, LINE_BYTES, Site::ConsumedRead);
    // In the reverse of the order in which they are stored.
    let consumed_through = fabric.load(at.add(CONSUMED));
    let decided_through = fabric.load(at.add(DECIDED));
    let ordered_offset = fabric.load(at.add(ORDERED_OFFSET));
    let ordered = fabric.load(at.add(ORDERED));
    fabric.ensure_in_memory(at, Site::ConsumedFlush);
    Consumed { ordered, ordered_offset, consumed_through, decided_through }
}
