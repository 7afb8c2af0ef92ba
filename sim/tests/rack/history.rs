//! Record of a schedule, kept apart from the code that it judges: what clients were told, what readers saw and what disks
//! hold.

use embarcadero_wire::{ClientId, Order, UNKNOWN_OFFSET};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Content of a batch: the id under which its client published it, and its number among the batches of that client, from 0.
pub(crate) type Content = (ClientId, u64);

/// Entry of the order as a reader saw it: the batch's content and its offset.
pub(crate) type Seen = (Content, u64);

/// Counts of what happened. A rack in which something never happens tests too little.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub ordered: usize,
    pub acknowledged: usize,
    pub crashes: usize,
    pub kills: usize,
    pub pauses: usize,
    pub takeovers: usize,
    pub departures: usize,
    pub disk_failures: usize,
    pub client_crashes: usize,
    pub epochs: usize,
    pub lost_sessions: usize,
    pub ids_in_use: usize,
    pub links: usize,
    pub delivered: usize,
    pub trimmed: usize,
    pub skips: usize,
    pub broken_links: usize,
}

impl Tally {
    fn all(&mut self) -> [&mut usize; 17] {
        let Self { ordered, acknowledged, crashes, kills, pauses, takeovers, departures, .. } = self;
        let Self {
            disk_failures,
            client_crashes,
            epochs,
            lost_sessions,
            ids_in_use,
            links,
            delivered,
            trimmed,
            skips,
            broken_links,
            ..
        } = self;
        [
            ordered,
            acknowledged,
            crashes,
            kills,
            pauses,
            takeovers,
            departures,
            disk_failures,
            client_crashes,
            epochs,
            lost_sessions,
            ids_in_use,
            links,
            delivered,
            trimmed,
            skips,
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
    /// Messages that readers were told are gone.
    skipped: Mutex<Vec<Range<u64>>>,
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
    pub fn acknowledged(&self, client: ClientId, content: u64, first_offset: u64) {
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

    /// Records that a reader was told that messages are gone.
    pub fn skipped(&self, offsets: Range<u64>) {
        self.count(|tally| &mut tally.skips);
        lock(&self.skipped).push(offsets);
    }

    /// Checks that what readers were told is gone was never acknowledged as durable.
    pub fn must_not_skip_acknowledged(&self) {
        let skipped = lock(&self.skipped);
        for (content, told) in lock(&self.acknowledged).iter() {
            assert!(!skipped.iter().any(|gone| gone.contains(told)), "{content:?} at {told} is gone from all disks");
        }
    }

    /// Judges the order, of which `kept` are the batches from position `trimmed` on. Readers have seen the others, or
    /// retention was faster than they.
    pub fn judge(&self, trimmed: u64, kept: &[Seen], promised: Order) {
        for (position, seen) in (trimmed..).zip(kept) {
            self.read(position, *seen);
        }
        let order = lock(&self.order);
        let mut places: BTreeMap<Content, u64> = BTreeMap::new();
        let mut last: BTreeMap<ClientId, u64> = BTreeMap::new();
        for (position, (content, offset)) in order.iter() {
            assert_eq!(offset, position, "offsets follow positions: batches have one message each");
            let before = places.insert(*content, *offset);
            assert!(before.is_none(), "{content:?} is in the order twice, at {before:?} and {offset}");
            let before = last.insert(content.0, content.1);
            let in_turn = promised != Order::Strong || before.is_none_or(|before| before < content.1);
            assert!(in_turn, "client {}: {} after {before:?}", content.0, content.1);
        }
        let acknowledged = lock(&self.acknowledged);
        for (content, told) in acknowledged.iter() {
            match places.get(content) {
                Some(place) => {
                    assert!([*place, UNKNOWN_OFFSET].contains(told), "{content:?} was said to be at {told}: {place}");
                }
                None if *told == UNKNOWN_OFFSET => {
                    assert!(trimmed > 0, "{content:?} was acknowledged and is not in the order");
                }
                None => {
                    let is_gone = *told < trimmed && !order.contains_key(told);
                    assert!(is_gone, "{content:?} was acknowledged at {told} and is not in the order");
                }
            }
        }
        let mut tally = lock(&self.tally);
        tally.trimmed = trimmed as usize;
        tally.ordered = trimmed as usize + kept.len();
        tally.acknowledged = acknowledged.len();
    }
}
