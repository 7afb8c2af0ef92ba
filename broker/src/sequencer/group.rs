//! Group of batches: each is judged by its session, and gets its place or waits.

use super::SequencerStats;
use super::session::{Arrival, SessionOrder, Verdict};
use super::topic::TopicOrder;
use bytemuck::Zeroable;
use embarcadero_cxl::layout::{CommitRecord, IndexEntry};
use embarcadero_cxl::session_table::SessionCommit;
use embarcadero_cxl::{Damage, Fabric, Guard};
use embarcadero_wire::{BrokerId, Term};

/// Term and time under which a group is ordered.
#[derive(Clone, Copy)]
pub(super) struct Stamp {
    pub(super) term: Term,
    /// Steady clock, microseconds.
    pub(super) now_us: u64,
}

/// State that ordering changes, beside the topic's own.
pub(super) struct Group {
    /// Open sessions, by slot.
    pub(super) sessions: Vec<Option<SessionOrder>>,
    /// Commits of the present group. Sessions show them once the index shows the batches.
    pub(super) commits: Vec<SessionCommit>,
    /// Batches that wait for a gap to close, over all sessions.
    pub(super) held: u32,
    /// True when held batches had their turn, and the index had no room for them.
    pub(super) starved: bool,
    /// True when held batches had their turn, and the group was full.
    pub(super) overdue: bool,
    /// Most batches in a group.
    pub(super) limit: u64,
    /// True when there may be more to order, whatever the brokers' counters say.
    pub(super) backlog: bool,
    /// Counters since the start.
    pub(super) stats: SequencerStats,
}

impl Group {
    pub(super) fn new(max_sessions: u32, limit: u64) -> Self {
        Self {
            sessions: (0..max_sessions).map(|_| None).collect(),
            commits: Vec::with_capacity(limit as usize),
            held: 0,
            starved: false,
            overdue: false,
            limit,
            backlog: true,
            stats: SequencerStats::default(),
        }
    }

    /// Orders batches that earlier leaders took and had not decided, in the order in which they were taken, as far as there
    /// is room.
    pub(super) fn retake<F: Fabric>(&mut self, fabric: &F, topic: &mut TopicOrder<F>, stamp: Stamp) {
        while !topic.undecided.is_empty() {
            if self.is_full(fabric) || !topic.make_room() {
                self.backlog = true;
                return;
            }
            let Some(arrival) = topic.undecided.pop_front() else { return };
            self.order(fabric, topic, arrival, stamp);
        }
    }

    /// Takes at most `budget` batches from a broker's Batchlog and orders them. Returns how many it took.
    pub(super) fn take_from<F: Fabric>(
        &mut self,
        fabric: &F,
        topic: &mut TopicOrder<F>,
        broker: BrokerId,
        stamp: Stamp,
        budget: u64,
    ) -> u64 {
        let available = topic.brokers[broker.index()].reader.available(budget).unwrap_or_else(|damage| {
            self.set_damaged(topic, broker, damage);
            0
        });
        let bound = self.bound(fabric);
        for taken in 0..available {
            // One entry can release a whole window of held ones, for which `order` makes room itself.
            if self.commits.len() >= bound || !topic.make_room() {
                self.backlog = true;
                return taken;
            }
            let state = &mut topic.brokers[broker.index()];
            let index = state.reader.next();
            let entry = match state.reader.take() {
                Ok(entry) => entry,
                Err(damage) => {
                    self.set_damaged(topic, broker, damage);
                    return taken;
                }
            };
            state.dirty = true;
            self.order(fabric, topic, Arrival { entry, broker, index }, stamp);
        }
        available
    }

    /// Reports that a broker's Batchlog of a topic is damaged, and that batches in it cannot be ordered.
    pub(super) fn set_damaged<F: Fabric>(&mut self, topic: &mut TopicOrder<F>, broker: BrokerId, damage: Damage) {
        let state = &mut topic.brokers[broker.index()];
        if state.damage.replace(damage) != Some(damage) {
            tracing::error!(topic = topic.config.name, %broker, %damage, "batches of this broker are not ordered");
            self.stats.damaged += 1;
        }
    }

    /// Judges a batch. Commits it, and the batches that waited for it.
    // Two callers would keep the compiler from inlining it: 27 instructions more per batch.
    #[inline(always)]
    pub(super) fn order<F: Fabric>(&mut self, fabric: &F, topic: &mut TopicOrder<F>, arrival: Arrival, stamp: Stamp) {
        let Self { sessions, commits, stats, .. } = self;
        let entry = &arrival.entry;
        let slot = entry.session_slot.index();
        // Any broker wrote the entry: the slot may not exist.
        let Some(Some(order)) = sessions.get_mut(slot) else {
            stats.rejected += 1;
            return;
        };
        let session = &order.session;
        if session.client_id != entry.client_id
            || session.epoch != entry.session_epoch
            || session.topic != topic.config.id
            || session.topic_incarnation != entry.topic_incarnation
        {
            stats.rejected += 1;
            return;
        }
        match order.judge(&arrival, stamp.now_us) {
            Verdict::Commit => {}
            Verdict::Held => {
                self.held += 1;
                return;
            }
            Verdict::Duplicate if !fabric.keeps(Guard::DedupCompare) => {}
            Verdict::Duplicate => {
                stats.duplicates += 1;
                return;
            }
            Verdict::OutOfWindow => {
                stats.rejected += 1;
                return;
            }
        }
        commits.push(commit(topic, order, &arrival, stamp));
        stats.ordered += 1;
        if self.held > 0 {
            self.drain(fabric, topic, slot, stamp);
        }
    }

    /// Most batches in a group: as many as a successor looks for in the index.
    fn bound<F: Fabric>(&self, fabric: &F) -> usize {
        if fabric.keeps(Guard::GroupBound) { self.limit as usize } else { usize::MAX }
    }

    /// Returns true when the group can take no more batches.
    fn is_full<F: Fabric>(&self, fabric: &F) -> bool {
        self.commits.len() >= self.bound(fabric)
    }

    /// Commits the batches of a session of this topic that waited and have their turn now.
    fn drain<F: Fabric>(&mut self, fabric: &F, topic: &mut TopicOrder<F>, slot: usize, stamp: Stamp) {
        let bound = self.bound(fabric);
        let Some(order) = &mut self.sessions[slot] else { return };
        if order.session.topic != topic.config.id {
            return;
        }
        while let Some(held) = order.next_held() {
            let full = self.commits.len() >= bound;
            if full || !topic.make_room() {
                order.hold_again(held);
                self.overdue |= full;
                self.starved |= !full;
                self.backlog = true;
                return;
            }
            self.held -= 1;
            self.commits.push(commit(topic, order, &held, stamp));
            self.stats.ordered += 1;
        }
    }

    /// Commits the batches of every session of this topic that waited and have their turn now.
    pub(super) fn drain_all<F: Fabric>(&mut self, fabric: &F, topic: &mut TopicOrder<F>, stamp: Stamp) {
        for slot in 0..self.sessions.len() {
            self.drain(fabric, topic, slot, stamp);
        }
    }
}

/// Gives a batch its place in the order.
#[inline]
fn commit<F: Fabric>(
    topic: &mut TopicOrder<F>,
    order: &mut SessionOrder,
    arrival: &Arrival,
    stamp: Stamp,
) -> SessionCommit {
    let entry = &arrival.entry;
    let position = topic.index.next();
    let first_offset = topic.append(IndexEntry {
        location: entry.location,
        client_id: entry.client_id,
        sequence: entry.sequence,
        ordered_us: topic.last_ordered_us,
        bytes: entry.bytes,
        message_count: entry.message_count,
        session_epoch: entry.session_epoch,
        term: stamp.term.0 as u32,
        broker: arrival.broker.byte(),
        replicas: 1,
        ..IndexEntry::zeroed()
    });
    let state = &mut topic.brokers[arrival.broker.index()];
    state.consumed.consumed.ordered += 1;
    state.consumed.consumed.ordered_offset = first_offset + u64::from(entry.message_count);
    state.dirty = true;
    order.committed(entry.sequence, stamp.now_us);
    let record = CommitRecord {
        first_offset,
        position,
        broker: arrival.broker,
        session_epoch: entry.session_epoch,
        tag: entry.sequence + 1,
    };
    SessionCommit { slot: order.session.slot, record, expected: order.expected() }
}
