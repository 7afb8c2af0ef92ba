//! Session as the sequencer keeps it: the next sequence, the batches that wait for a gap to close, and duplicates.
//!
//! A gap is never skipped. One that outlives its lease fences the session, and the client resubmits exactly what did
//! not commit under the next epoch.

// [[DEVIATION_008]] The paper's sequencer skips a gap that does not close.

use super::SequencerLimits;
use embarcadero_cxl::layout::{BatchEntry, SESSION_WINDOW};
use embarcadero_cxl::session_connections::Connected;
use embarcadero_cxl::session_table::Session;
use embarcadero_wire::{BrokerId, Order};

/// Batch as the sequencer read it, with the broker that received it.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Batchlog entry.
    pub entry: BatchEntry,
    /// Broker that received it.
    pub broker: BrokerId,
    /// Index of the entry in that broker's Batchlog.
    pub index: u64,
}

/// Decision about a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The batch gets its place in the order now.
    Commit,
    /// The batch waits for those before it.
    Held,
    /// The batch is committed already.
    Duplicate,
    /// The sequence is further ahead than a session may be. Brokers refuse such a batch.
    OutOfWindow,
}

/// Open session. Its sequences continue where the session before it in the same slot stopped, so a sequence names one
/// batch for ever.
#[derive(Debug)]
pub struct SessionOrder {
    /// Row of the session table.
    pub session: Session,
    strong: bool,
    /// Sequence below which every batch is committed.
    expected: u64,
    /// Batches ahead of `expected`, at their sequence modulo the window.
    held: Box<[Option<Arrival>]>,
    held_count: u32,
    /// Sequence plus one of the batch that committed at each place of the window: total order commits out of turn.
    committed: Box<[u64]>,
    gap_since_us: u64,
    /// Time of the last arrival, microseconds.
    pub(crate) active_us: u64,
    /// Time at which the session was last seen to wait for room, microseconds.
    waited_us: u64,
    /// Time since which no broker was seen to have a connection of the session, microseconds; `None` while one has.
    alone_since_us: Option<u64>,
}

impl SessionOrder {
    /// Returns a session of which every batch below `expected` is committed.
    #[must_use]
    pub fn new(session: Session, order: Order, expected: u64, now_us: u64) -> Self {
        Self {
            session,
            strong: order == Order::Strong,
            expected,
            held: vec![None; SESSION_WINDOW as usize].into_boxed_slice(),
            held_count: 0,
            committed: vec![0; SESSION_WINDOW as usize].into_boxed_slice(),
            gap_since_us: now_us,
            active_us: now_us,
            waited_us: 0,
            alone_since_us: None,
        }
    }

    /// Records a batch that was committed ahead of a gap, before this leader or under an earlier epoch.
    pub(crate) fn committed_ahead(&mut self, sequence: u64) {
        if (self.expected..self.expected.saturating_add(SESSION_WINDOW)).contains(&sequence) {
            self.committed(sequence, self.gap_since_us);
        }
    }

    /// Sequence below which every batch is committed.
    #[inline]
    #[must_use]
    pub fn expected(&self) -> u64 {
        self.expected
    }

    /// Returns true if the client of the session has committed a batch.
    #[must_use]
    pub(crate) fn has_committed(&self) -> bool {
        self.expected > self.session.first_sequence || self.committed.iter().any(|tag| *tag > self.expected)
    }

    /// Returns true while batches wait for one that is missing. One that is due may wait, too: for room in the order.
    #[must_use]
    pub(crate) fn has_gap(&self) -> bool {
        self.held_count > 0 && self.held[Self::place(self.expected)].is_none()
    }

    /// Number of batches that wait.
    #[must_use]
    pub(crate) fn held_count(&self) -> u32 {
        self.held_count
    }

    /// Notes which connections the session is seen to have while it has a gap.
    pub(crate) fn note_connections(&mut self, connected: Connected, now_us: u64) {
        match connected {
            Connected::No => {
                self.alone_since_us.get_or_insert(now_us);
            }
            Connected::Open => self.alone_since_us = None,
            Connected::Waiting => {
                self.alone_since_us = None;
                self.waited_us = now_us;
            }
        }
    }

    /// Returns true once the lease of the present gap is over. It runs from when the session last waited for room, and
    /// yet not longer than `gap_us` and `excuse_us` together.
    #[must_use]
    pub(crate) fn is_overdue(&self, limits: &SequencerLimits, now_us: u64) -> bool {
        let lasted_us = now_us.saturating_sub(self.gap_since_us);
        let unexcused_us = now_us.saturating_sub(self.gap_since_us.max(self.waited_us));
        unexcused_us > limits.gap_us || lasted_us > limits.gap_us.saturating_add(limits.excuse_us)
    }

    /// Returns true once no broker has had a connection of the session for `abandoned_us` of the present gap. A client
    /// without acknowledgements may leave in order, and what it sent counts.
    #[must_use]
    pub(crate) fn is_abandoned(&self, limits: &SequencerLimits, now_us: u64) -> bool {
        let alone = |since: u64| now_us.saturating_sub(since.max(self.gap_since_us)) > limits.abandoned_us;
        self.session.ack_level > 0 && self.alone_since_us.is_some_and(alone)
    }

    /// Returns the brokers that received batches which wait here, one bit each.
    #[must_use]
    pub(crate) fn holders(&self) -> u64 {
        self.held.iter().flatten().fold(0, |mask, held| mask | 1 << held.broker.0)
    }

    #[inline]
    fn place(sequence: u64) -> usize {
        (sequence % SESSION_WINDOW) as usize
    }

    /// Judges a batch. [`Verdict::Commit`] is followed by [`SessionOrder::committed`], and by
    /// [`SessionOrder::next_held`] until it gives none.
    #[inline]
    pub fn judge(&mut self, arrival: &Arrival, now_us: u64) -> Verdict {
        self.active_us = now_us;
        let sequence = arrival.entry.sequence;
        if sequence < self.expected {
            return Verdict::Duplicate;
        }
        if sequence - self.expected >= SESSION_WINDOW {
            return Verdict::OutOfWindow;
        }
        let place = Self::place(sequence);
        // It may be due already, and wait for room.
        if sequence == self.expected && (self.held_count == 0 || self.held[place].is_none()) {
            return Verdict::Commit;
        }
        if !self.strong {
            return if self.committed[place] == sequence + 1 { Verdict::Duplicate } else { Verdict::Commit };
        }
        if self.held[place].is_some() {
            return Verdict::Duplicate;
        }
        if self.held_count == 0 {
            self.gap_since_us = now_us;
        }
        self.held[place] = Some(*arrival);
        self.held_count += 1;
        Verdict::Held
    }

    /// Records that the batch `sequence` has its place in the order.
    #[inline]
    pub fn committed(&mut self, sequence: u64, now_us: u64) {
        self.committed[Self::place(sequence)] = sequence + 1;
        while self.committed[Self::place(self.expected)] == self.expected + 1 {
            self.expected += 1;
        }
        self.gap_since_us = now_us;
    }

    /// Takes the batch that waited for its turn and has it now.
    #[inline]
    pub fn next_held(&mut self) -> Option<Arrival> {
        if self.held_count == 0 {
            return None;
        }
        let arrival = self.held[Self::place(self.expected)].take()?;
        self.held_count -= 1;
        Some(arrival)
    }

    /// Puts back the batch that [`SessionOrder::next_held`] gave: it cannot be ordered now.
    pub(crate) fn hold_again(&mut self, arrival: Arrival) {
        self.held[Self::place(arrival.entry.sequence)] = Some(arrival);
        self.held_count += 1;
    }

    /// Lowest Batchlog index of a broker's batches that wait here.
    #[must_use]
    pub(crate) fn lowest_held(&self, broker: BrokerId) -> Option<u64> {
        if self.held_count == 0 {
            return None;
        }
        self.held.iter().flatten().filter(|held| held.broker == broker).map(|held| held.index).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytemuck::Zeroable;
    use embarcadero_cxl::layout::SessionState;
    use embarcadero_wire::{ClientId, Epoch, Incarnation, SessionSlot, SessionToken, TopicId};
    use proptest::prelude::*;

    fn session(order: Order, expected: u64) -> SessionOrder {
        let identity = Session {
            slot: SessionSlot(0),
            client_id: ClientId(1),
            epoch: Epoch(1),
            state: SessionState::Open,
            topic: TopicId(0),
            topic_incarnation: Incarnation(1),
            committed: expected,
            ack_level: 1,
            first_epoch: Epoch(1),
            first_sequence: 0,
            token: SessionToken(1),
        };
        SessionOrder::new(identity, order, expected, 0)
    }

    fn arrival(sequence: u64) -> Arrival {
        Arrival { entry: BatchEntry { sequence, ..BatchEntry::zeroed() }, broker: BrokerId(0), index: sequence }
    }

    fn feed(state: &mut SessionOrder, sequence: u64, out: &mut Vec<u64>) {
        if state.judge(&arrival(sequence), 0) == Verdict::Commit {
            state.committed(sequence, 0);
            out.push(sequence);
            while let Some(held) = state.next_held() {
                state.committed(held.entry.sequence, 0);
                out.push(held.entry.sequence);
            }
        }
    }

    proptest! {
        #[test]
        fn strong_commits_each_once_and_in_order(
            start in 0u64..1_000_000, swaps in prop::collection::vec((0usize..100, 0usize..100), 0..200),
            again in prop::collection::vec(0u64..100, 0..50),
        ) {
            let mut sequences: Vec<u64> = (0..100).collect();
            for (a, b) in swaps { sequences.swap(a, b); }
            for (at, sequence) in again.into_iter().enumerate() { sequences.insert(at * 2 % sequences.len(), sequence); }
            let mut state = session(Order::Strong, start);
            let mut out = Vec::new();
            for sequence in sequences { feed(&mut state, start + sequence, &mut out); }
            prop_assert_eq!(out, (start..start + 100).collect::<Vec<_>>());
            prop_assert!(!state.has_gap());
            prop_assert_eq!(state.expected(), start + 100);
        }

        #[test]
        fn total_commits_each_once_at_once(
            start in 0u64..1_000_000, swaps in prop::collection::vec((0usize..100, 0usize..100), 0..200),
        ) {
            let mut sequences: Vec<u64> = (0..100).collect();
            for (a, b) in swaps { sequences.swap(a, b); }
            let mut state = session(Order::Total, start);
            let mut out = Vec::new();
            for sequence in sequences.iter().chain(sequences.iter()) { feed(&mut state, start + sequence, &mut out); }
            prop_assert_eq!(&out, &sequences.iter().map(|sequence| start + sequence).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_session_is_unused_until_its_client_commits() {
        for (order, first) in [(Order::Strong, 0), (Order::Total, 0), (Order::Total, 1)] {
            let mut state = session(order, 7);
            state.session.first_sequence = 7;
            // A strong batch ahead of a gap waits.
            assert_eq!(state.judge(&arrival(8), 0) == Verdict::Held, order == Order::Strong);
            assert!(!state.has_committed());
            state.committed(7 + first, 0);
            assert!(state.has_committed());
        }
        // Numbers of clients before it do not count, its own under earlier epochs do.
        assert!(session(Order::Strong, 7).has_committed());
    }

    #[test]
    fn a_batch_that_is_due_and_waits_for_room_is_no_gap() {
        let mut state = session(Order::Strong, 0);
        assert_eq!(state.judge(&arrival(1), 0), Verdict::Held);
        assert!(state.has_gap());
        state.committed(0, 0);
        let due = state.next_held().unwrap();
        state.hold_again(due);
        assert!(!state.has_gap());
        assert_eq!((state.held_count(), state.holders()), (1, 0b1));
    }

    #[test]
    fn a_sequence_beyond_the_window_is_not_held() {
        let mut state = session(Order::Strong, 10);
        assert_eq!(state.judge(&arrival(10 + SESSION_WINDOW), 0), Verdict::OutOfWindow);
        assert_eq!(state.judge(&arrival(10 + SESSION_WINDOW - 1), 0), Verdict::Held);
        assert_eq!(state.lowest_held(BrokerId(0)), Some(10 + SESSION_WINDOW - 1));
        assert_eq!(state.lowest_held(BrokerId(1)), None);
    }
}
