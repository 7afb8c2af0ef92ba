//! Board of sessions: the connections that this broker has of each session, over all its workers.
//!
//! The delegation shows it to the leader (`embarcadero_cxl::session_connections`), which excuses gaps of sessions that
//! wait, and gives up sessions that nobody holds.

use embarcadero_cxl::session_connections::Connected;
use embarcadero_wire::SessionSlot;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One connection that waits, in the word of a slot. The lower half of the word counts all connections.
const WAITING: u64 = 1 << 32;

/// Connections of each session at this broker, by session slot.
pub struct SessionBoard {
    slots: Box<[AtomicU64]>,
}

impl SessionBoard {
    /// Returns a board of `max_sessions` slots without connections.
    pub(crate) fn new(max_sessions: u32) -> Self {
        Self { slots: (0..max_sessions).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Counts a connection of the session in a slot that the region has.
    pub fn hold(self: &Arc<Self>, slot: SessionSlot) -> SessionHold {
        self.slots[slot.index()].fetch_add(1, Ordering::Relaxed);
        SessionHold { board: Arc::clone(self), slot, waits: false }
    }

    /// Returns the connections of the session in a slot.
    pub(crate) fn connected(&self, slot: SessionSlot) -> Connected {
        match self.slots[slot.index()].load(Ordering::Relaxed) {
            0 => Connected::No,
            1..WAITING => Connected::Open,
            WAITING.. => Connected::Waiting,
        }
    }
}

/// Connection of a session, which counts until this is dropped.
pub struct SessionHold {
    board: Arc<SessionBoard>,
    slot: SessionSlot,
    waits: bool,
}

impl SessionHold {
    /// Notes whether a batch of the connection waits for room: memory, or the Batchlog.
    pub fn set_waiting(&mut self, waits: bool) {
        if self.waits == waits {
            return;
        }
        self.waits = waits;
        let count = &self.board.slots[self.slot.index()];
        if waits {
            count.fetch_add(WAITING, Ordering::Relaxed);
        } else {
            count.fetch_sub(WAITING, Ordering::Relaxed);
        }
    }
}

impl Drop for SessionHold {
    fn drop(&mut self) {
        self.set_waiting(false);
        self.board.slots[self.slot.index()].fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_waits_while_one_of_its_connections_does() {
        let (board, slot) = (Arc::new(SessionBoard::new(2)), SessionSlot(1));
        let [mut first, mut second] = [board.hold(slot), board.hold(slot)];
        assert_eq!(board.connected(slot), Connected::Open);
        // To say it twice changes nothing.
        for _ in 0..2 {
            first.set_waiting(true);
            second.set_waiting(true);
        }
        second.set_waiting(false);
        assert_eq!(board.connected(slot), Connected::Waiting);
        drop(first);
        assert_eq!(board.connected(slot), Connected::Open);
        drop(second);
        assert_eq!([0, 1].map(|slot| board.connected(SessionSlot(slot))), [Connected::No; 2]);
    }
}
