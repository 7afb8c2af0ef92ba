//! Connections of sessions: which sessions have connections at a broker, and which of these wait for room.
//!
//! Each broker has two bits per session slot. A word has both bits of 32 slots: the lower half tells of connections,
//! the upper half of those that wait. So nobody sees one bit without the other. Bits go back and forth. An old one makes the
//! leader decide for a while as it would have decided before, and leases bound that while.

use crate::fabric::{Fabric, LINE_BYTES, RegionOffset, WORD_BYTES};
use crate::layout::{Layout, SESSIONS_PER_WORD};
use crate::region::Region;
use crate::row::Damage;
use crate::site::Site;
use embarcadero_wire::{BrokerId, SessionSlot};

/// Words of a line.
const WORDS: usize = (LINE_BYTES / WORD_BYTES) as usize;
/// Session slots of a line.
const SESSIONS_PER_LINE: u32 = SESSIONS_PER_WORD * WORDS as u32;

/// Connections of a session, at one broker or at several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connected {
    /// The session has no connection.
    No,
    /// The session has connections, and none of them waits for room.
    Open,
    /// A batch of the session waits for room: memory, or the Batchlog.
    Waiting,
}

impl Connected {
    /// Bits of slot 0 in a word.
    pub(crate) const fn bits(self) -> u64 {
        match self {
            Self::No => 0,
            Self::Open => 1,
            Self::Waiting => 1 << SESSIONS_PER_WORD | 1,
        }
    }
}

/// Returns a word of a broker's connections of sessions. `of` tells them of each of its slots.
fn word_of(word: u32, of: impl Fn(SessionSlot) -> Connected) -> u64 {
    (0..SESSIONS_PER_WORD).fold(0, |bits, slot| bits | of(SessionSlot(word * SESSIONS_PER_WORD + slot)).bits() << slot)
}

/// Number of words that tell of the slots of a region, filled up to whole lines.
fn words<F: Fabric>(region: &Region<F>) -> u32 {
    (Layout::connections_bytes(region.geometry()) / WORD_BYTES) as u32
}

/// Writer of a broker's connections of sessions.
pub struct ConnectionsWriter<F> {
    region: Region<F>,
    broker: BrokerId,
    /// Words that the region has; empty before the first publication.
    shown: Vec<u64>,
}

impl<F: Fabric> ConnectionsWriter<F> {
    /// Returns a writer that has published nothing. Until it does, the region shows what an earlier process of the
    /// broker published.
    pub fn new(region: Region<F>, broker: BrokerId) -> Self {
        Self { region, broker, shown: Vec::new() }
    }

    /// Shows the connections that `of` tells of each slot. Writes what has changed, and everything the first time: an
    /// earlier process may have written the lines, perhaps on another host.
    pub fn publish(&mut self, of: impl Fn(SessionSlot) -> Connected) {
        let (fabric, sessions) = (self.region.fabric(), self.region.geometry().max_sessions);
        let of = |slot: SessionSlot| if slot.0 < sessions { of(slot) } else { Connected::No };
        let is_first = self.shown.is_empty();
        self.shown.resize(words(&self.region) as usize, 0);
        let mut changed = false;
        for (word, shown) in (0..).zip(&mut self.shown) {
            let bits = word_of(word, of);
            if is_first || bits != *shown {
                let at = self.region.layout().connections_word(self.broker, word);
                fabric.store(at, bits);
                fabric.flush(at, WORD_BYTES, Site::PulseFlush);
                (*shown, changed) = (bits, true);
            }
        }
        if changed {
            // SYNC: pairs with `ConnectionsReader::of`.
            fabric.fence(Site::PulseFlush);
        }
    }
}

/// Reader of what several brokers show together. It reads a line of each when the first slot of that line is asked for.
pub struct ConnectionsReader<'a, F> {
    region: &'a Region<F>,
    /// Brokers that count, one bit each.
    brokers: u64,
    /// Line that was read last: its number in each broker's lines, and the bits of all of them.
    line: Option<(u32, [u64; WORDS])>,
}

impl<'a, F: Fabric> ConnectionsReader<'a, F> {
    /// Returns a reader of what the brokers of the mask `brokers` show.
    pub fn new(region: &'a Region<F>, brokers: u64) -> Self {
        Self { region, brokers, line: None }
    }

    /// Returns the connections of a session at all these brokers.
    pub fn of(&mut self, slot: SessionSlot) -> Connected {
        let number = slot.0 / SESSIONS_PER_LINE;
        let words = match self.line {
            Some((known, words)) if known == number => words,
            _ => self.line.insert((number, self.read(number))).1,
        };
        let word = words[(slot.0 % SESSIONS_PER_LINE / SESSIONS_PER_WORD) as usize] >> (slot.0 % SESSIONS_PER_WORD);
        if word & 1 == 0 {
            Connected::No
        } else if word >> SESSIONS_PER_WORD & 1 == 0 {
            Connected::Open
        } else {
            Connected::Waiting
        }
    }

    /// Reads a line of each broker from memory, and returns all their bits.
    fn read(&self, number: u32) -> [u64; WORDS] {
        let mut all = [0; WORDS];
        for broker in self.region.geometry().brokers().filter(|broker| self.brokers & 1 << broker.0 != 0) {
            let at = self.region.layout().connections_word(broker, number * WORDS as u32);
            // SYNC: pairs with `ConnectionsWriter::publish`.
            self.region.fabric().invalidate(at, LINE_BYTES, Site::PulseRead);
            let words = self.region.fabric().load_words(at);
            all.iter_mut().zip(words).for_each(|(all, bits)| *all |= bits);
        }
        all
    }
}

/// Reads a broker's connections of sessions, and returns the words that no writer of this layout made.
pub(crate) fn damaged_words<F: Fabric>(region: &Region<F>, broker: BrokerId) -> impl Iterator<Item = Damage> {
    (0..words(region)).filter_map(move |word| {
        let at: RegionOffset = region.layout().connections_word(broker, word);
        let value = region.fabric().observe(at, Site::PulseRead);
        let (open, waiting) = (value as u32, (value >> SESSIONS_PER_WORD) as u32);
        let slots = region.geometry().max_sessions.saturating_sub(word * SESSIONS_PER_WORD).min(SESSIONS_PER_WORD);
        let valid = (1u64 << slots) - 1;
        let is_damaged = u64::from(open) & !valid != 0 || waiting & !open != 0;
        is_damaged.then_some(Damage { structure: "connections of sessions", at, what: "a word", value })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::FlushMethod;
    use crate::layout::{AllocatorKind, Geometry};
    use crate::{Mapping, Native};
    use uuid::Uuid;

    #[test]
    fn every_slot_has_bits_of_its_own() {
        // More than two lines of slots.
        let geometry = Geometry {
            max_brokers: 3,
            max_leaders: 1,
            max_topics: 1,
            max_sessions: 600,
            ..Geometry::with_segments_of(1 << 20, AllocatorKind::Bitmap)
        };
        let mapping = Mapping::anonymous(Layout::new(&geometry).region_bytes).unwrap();
        let native = Native::new(mapping, FlushMethod::None).unwrap();
        let region = Region::format(native, &geometry, Uuid::nil(), 0).unwrap();
        let open = |slot: SessionSlot| if slot.0.is_multiple_of(3) { Connected::Open } else { Connected::No };
        let waiting = |slot: SessionSlot| if slot.0.is_multiple_of(5) { Connected::Waiting } else { Connected::No };
        ConnectionsWriter::new(region.clone(), BrokerId(0)).publish(open);
        let mut second = ConnectionsWriter::new(region.clone(), BrokerId(2));
        second.publish(waiting);
        let seen = |brokers| -> Vec<Connected> {
            let mut reader = ConnectionsReader::new(&region, brokers);
            geometry.sessions().map(|slot| reader.of(slot)).collect()
        };
        let expected = |of: fn(Connected, Connected) -> Connected| -> Vec<Connected> {
            geometry.sessions().map(|slot| of(open(slot), waiting(slot))).collect()
        };
        assert_eq!(seen(0b001), expected(|first, _| first));
        assert_eq!(seen(0b100), expected(|_, second| second));
        assert_eq!(seen(0b010), expected(|_, _| Connected::No));
        let both = expected(|first, second| if second == Connected::No { first } else { second });
        assert_eq!(seen(0b111), both);
        assert!(geometry.brokers().all(|broker| damaged_words(&region, broker).next().is_none()));
        second.publish(|_| Connected::No);
        assert_eq!(seen(0b111), expected(|first, _| first));
    }
}
