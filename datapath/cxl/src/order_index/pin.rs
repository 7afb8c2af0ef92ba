//! Pins: positions that a broker is reading, so that nobody gives back the memory below it.

use super::{StreamId, TRIMMED};
use crate::fabric::{Fabric, RegionOffset};
use crate::layout::{PinLine, pin_word, pinned_position};
use crate::leadership::NoLeader;
use crate::region::Region;
use crate::site::Site;
use embarcadero_wire::{BrokerId, TopicId};
use std::mem::offset_of;

const DELIVERING_FROM: u64 = offset_of!(PinLine, delivering_from) as u64;

/// Reads the lowest position that any of `brokers` pins in a topic; `u64::MAX` when none does.
pub fn lowest_pin<F: Fabric>(region: &Region<F>, topic: TopicId, brokers: impl Iterator<Item = BrokerId>) -> u64 {
    let at = |broker| region.layout().pin(topic, broker).add(DELIVERING_FROM);
    let pins = brokers.map(|broker| pinned_position(region.fabric().observe(at(broker), Site::PinRead)));
    pins.min().unwrap_or(u64::MAX)
}

/// Pin of a broker on a stream.
pub struct Pin<F> {
    region: Region<F>,
    at: RegionOffset,
    id: StreamId,
    position: u64,
}

impl<F: Fabric> Pin<F> {
    /// Returns the pin of `broker` on a stream. Nothing is pinned yet.
    pub fn new(region: Region<F>, id: StreamId, broker: BrokerId) -> Self {
        let at = region.layout().pin(id.topic, broker).add(DELIVERING_FROM);
        let mut pin = Self { region, at, id, position: 0 };
        // The pin is written whether or not there is a leader.
        let _ = pin.set(u64::MAX);
        pin
    }

    /// Pins everything from `position` on (`u64::MAX` pins nothing), and returns the trim point seen afterwards. What
    /// lies at or above it stays until the pin moves on.
    ///
    /// # Errors
    /// [`NoLeader`], for a global order: nobody can say what is trimmed.
    #[inline]
    pub fn set(&mut self, position: u64) -> Result<u64, NoLeader> {
        let fabric = self.region.fabric();
        if position != self.position {
            self.position = position;
            fabric.store(self.at, pin_word(position));
            fabric.flush(self.at, 8, Site::PinFlush);
            // SYNC: the pin is in memory before the trim point is read; pairs with `OrderIndexWriter::trim`, which
            // stores its trim point before it reads pins. So at least one of the two sees the other.
            fabric.full_fence(Site::PinFlush);
        }
        let (region, id) = (&self.region, self.id);
        id.observe(region, |area| fabric.observe(id.tail(region, area).add(TRIMMED), Site::TrimRead))
    }

    /// Position that is pinned; `u64::MAX` for none.
    #[inline]
    pub fn position(&self) -> u64 {
        self.position
    }
}
