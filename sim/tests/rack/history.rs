//! Record of a schedule, kept apart from the code that it judges: what clients were told, what readers saw and what disks
//! hold.

use embarcadero_client::PublisherStats;
use embarcadero_wire::Order;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Publisher of an application, counted among all that the rack ever has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Instance(pub u64);

/// Content of a message: its publisher, and its number among the messages of the application, from 0.
pub(crate) type Content = (Instance, u64);

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
    pub publishers: usize,
    pub lost_sessions: usize,
    pub closed: usize,
    pub reopened: usize,
    pub resubmitted: usize,
    pub broken_links: usize,
    pub delivered: usize,
    pub trimmed: usize,
    pub skips: usize,
}

impl Tally {
    fn all(&mut self) -> [&mut usize; 18] {
        let Self { ordered, acknowledged, crashes, kills, pauses, takeovers, departures, .. } = self;
        let Self { disk_failures, client_crashes, publishers, lost_sessions, closed, reopened, .. } = self;
        let Self { resubmitted, broken_links, delivered, trimmed, skips, .. } = self;
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
            publishers,
            lost_sessions,
            closed,
            reopened,
            resubmitted,
            broken_links,
            delivered,
            trimmed,
            skips,
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
    /// Offset of each message as its application was told it, if that is known.
    acknowledged: Mutex<BTreeMap<Content, Option<u64>>>,
    /// Message that readers saw at each offset.
    order: Mutex<BTreeMap<u64, Content>>,
    /// Messages that readers were told are gone.
    skipped: Mutex<Vec<Range<u64>>>,
    /// Hosts on whose disks each message was made durable.
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

    /// Adds what a publisher went through.
    pub fn note(&self, stats: PublisherStats) {
        let mut tally = lock(&self.tally);
        tally.reopened += stats.sessions_reopened as usize;
        tally.resubmitted += stats.batches_resubmitted as usize;
        tally.broken_links += stats.connections_lost as usize;
    }

    /// Returns the counts.
    pub fn tally(&self) -> Tally {
        *lock(&self.tally)
    }

    /// Records that an application heard of a message that it is in the order.
    pub(crate) fn acknowledged(&self, content: Content, offset: Option<u64>) {
        let told = lock(&self.acknowledged).insert(content, offset);
        assert!(told.is_none(), "{content:?} was acknowledged twice");
    }

    /// Records that a reader saw a message. All readers must see the same.
    pub(crate) fn read(&self, offset: u64, content: Content) {
        let agreed = *lock(&self.order).entry(offset).or_insert(content);
        assert_eq!(agreed, content, "readers disagree at offset {offset}");
    }

    /// Records that a disk made messages durable.
    pub fn synced(&self, disk: u32, offsets: impl Iterator<Item = u64>) {
        let mut durable = lock(&self.durable);
        for offset in offsets {
            durable.entry(offset).or_default().insert(disk);
        }
    }

    /// Checks that a message is durable on `copies` disks, as a broker acknowledges it at level 2.
    pub fn must_be_durable(&self, offset: u64, copies: usize) {
        let disks = lock(&self.durable).get(&offset).map_or(0, BTreeSet::len);
        assert!(disks >= copies, "offset {offset} is acknowledged and on {disks} disks of {copies}");
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
            let is_gone = told.is_some_and(|offset| skipped.iter().any(|gone| gone.contains(&offset)));
            assert!(!is_gone, "{content:?} at {told:?} is gone from all disks");
        }
    }

    /// Judges the order, of which `kept` are the messages from offset `trimmed` on. Readers have seen the others, or
    /// retention was faster than they.
    pub(crate) fn judge(&self, trimmed: u64, kept: &[Content], promised: Order) {
        for (offset, content) in (trimmed..).zip(kept) {
            self.read(offset, *content);
        }
        let order = lock(&self.order);
        let mut places: BTreeMap<Content, u64> = BTreeMap::new();
        let mut last: BTreeMap<Instance, u64> = BTreeMap::new();
        for (offset, content) in order.iter() {
            let before = places.insert(*content, *offset);
            assert!(before.is_none(), "{content:?} is in the order twice, at {before:?} and {offset}");
            let before = last.insert(content.0, content.1);
            let in_turn = promised != Order::Strong || before.is_none_or(|before| before < content.1);
            assert!(in_turn, "{:?}: {} after {before:?}", content.0, content.1);
        }
        let acknowledged = lock(&self.acknowledged);
        for (content, told) in acknowledged.iter() {
            let place = places.get(content);
            let holds = match (place, told) {
                (Some(place), Some(told)) => place == told,
                (Some(_), None) => true,
                // Retention took it before a reader came.
                (None, Some(told)) => *told < trimmed && !order.contains_key(told),
                (None, None) => trimmed > 0,
            };
            assert!(holds, "{content:?} was acknowledged at {told:?} and is at {place:?}");
        }
        let mut tally = lock(&self.tally);
        tally.trimmed = trimmed as usize;
        tally.ordered = trimmed as usize + kept.len();
        tally.acknowledged = acknowledged.len();
    }
}
