//! Record of a schedule, kept apart from the code that it judges: what clients were told, what readers saw and what disks
//! hold.

use embarcadero_wire::{Order, UNKNOWN_OFFSET};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Content of a batch: its client, and its number among the batches of that client, from 0.
pub(crate) type Content = (usize, u64);

/// Entry of the order as a reader saw it: the batch's content and its offset.
pub(crate) type Seen = (Content, u64);

/// Counts of what happened. A rack in which something never happens tests too little.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub ordered: usize,
    pub acknowledged: usize,
    pub crashes: usize,
    pub pauses: usize,
    pub takeovers: usize,
    pub departures: usize,
    pub disk_failures: usize,
    pub client_crashes: usize,
    pub epochs: usize,
    pub lost_sessions: usize,
    pub links: usize,
    pub delivered: usize,
    pub broken_links: usize,
}

impl Tally {
    fn all(&mut self) -> [&mut usize; 13] {
        let Self { ordered, acknowledged, crashes, pauses, takeovers, departures, .. } = self;
        let Self { disk_failures, client_crashes, epochs, lost_sessions, links, delivered, broken_links, .. } = self;
        [
            ordered,
            acknowledged,
            crashes,
            pauses,
            takeovers,
            departures,
            disk_failures,
            client_crashes,
            epochs,
            lost_sessions,
            links,
            delivered,
            broken_links,
        ]
    }

    /// Returns true when everything happened at least once.
    pub fn is_complete(mut self) -> bool {
        self.all().iter().all(|count| **count > 0)
    }

    /// Adds the counts of another schedule.
    pub fn add(&mut self, mut other: Self) {
        self.all().into_iter().zip(other.all()).for_each(|(own, other)| *own += *other);
    }
}

#[derive(Default)]
pub struct History {
    tally: Mutex<Tally>,
    /// Offset of each batch as its client was told it.
    acknowledged: Mutex<BTreeMap<Content, u64>>,
    /// Entry that readers saw at each position.
    order: Mutex<BTreeMap<u64, Seen>>,
    /// Hosts on whose disks each position was made durable.
    durable: Mutex<BTreeMap<u64, BTreeSet<u32>>>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl History {
    /// Counts that something happened.
    pub fn count(&self, what: impl FnOnce(&mut Tally) -> &mut usize) {
        *what(&mut lock(&self.tally)) += 1;
    }

    /// Returns the counts.
    pub fn tally(&self) -> Tally {
        *lock(&self.tally)
    }

    /// Records that a client heard of a batch that it is in the order.
    pub fn acknowledged(&self, client: usize, content: u64, first_offset: u64) {
        let told = lock(&self.acknowledged).insert((client, content), first_offset);
        assert!(told.is_none(), "client {client} heard twice of batch {content}");
    }

    /// Records that a reader saw an entry. All readers must see the same.
    pub fn read(&self, position: u64, seen: Seen) {
        let agreed = *lock(&self.order).entry(position).or_insert(seen);
        assert_eq!(agreed, seen, "readers disagree at position {position}");
    }

    /// Records that a disk made positions durable.
    pub fn synced(&self, disk: u32, positions: impl Iterator<Item = u64>) {
        let mut durable = lock(&self.durable);
        for position in positions {
            durable.entry(position).or_default().insert(disk);
        }
    }

    /// Checks that a position is durable on `copies` disks, as a broker acknowledges it at level 2.
    pub fn must_be_durable(&self, position: u64, copies: usize) {
        let disks = lock(&self.durable).get(&position).map_or(0, BTreeSet::len);
        assert!(disks >= copies, "position {position} is acknowledged and on {disks} disks of {copies}");
    }

    /// Judges the whole order, which a reader has seen from end to end.
    pub fn judge(&self, order: &[Seen], promised: Order) {
        let mut places: BTreeMap<Content, u64> = BTreeMap::new();
        for (position, seen) in (0..).zip(order) {
            self.read(position, *seen);
            let (content, offset) = *seen;
            assert_eq!(offset, position, "offsets follow positions: batches have one message each");
            let before = places.insert(content, offset);
            assert!(before.is_none(), "{content:?} is in the order twice, at {before:?} and {offset}");
        }
        let mut last: BTreeMap<usize, u64> = BTreeMap::new();
        for ((client, content), _) in order {
            let before = last.insert(*client, *content);
            let in_turn = promised != Order::Strong || before.is_none_or(|before| before < *content);
            assert!(in_turn, "client {client}: {content} after {before:?}");
        }
        let acknowledged = lock(&self.acknowledged);
        for (content, told) in acknowledged.iter() {
            let place = places.get(content);
            assert!(place.is_some(), "{content:?} was acknowledged and is not in the order");
            assert!(*told == UNKNOWN_OFFSET || place == Some(told), "{content:?} was said to be at {told}: {place:?}");
        }
        let mut tally = lock(&self.tally);
        (tally.ordered, tally.acknowledged) = (order.len(), acknowledged.len());
    }
}
