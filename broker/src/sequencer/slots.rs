//! Session slots as the sequencer keeps them: what their rows say, without a read of the region for each request.

use super::{Sequencer, SessionError};
use embarcadero_cxl::layout::SessionState;
use embarcadero_cxl::leadership::read_leader_at;
use embarcadero_cxl::session_connections::{Connected, ConnectionsReader};
use embarcadero_cxl::session_table::Session;
use embarcadero_cxl::topic_table::TopicConfig;
use embarcadero_cxl::{Fabric, Row};
use embarcadero_wire::{ClientId, SessionSlot};

/// Session slot, as its row shows it. Only the leader writes rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    /// Row of the slot's last session.
    pub(super) row: Row<Session>,
    /// True if the client of a session that ended has committed batches, or may have.
    pub(super) used: bool,
    /// Time at which the last session ended, as far as this leader knows.
    pub(super) ended_us: u64,
}

impl Slot {
    /// Returns a slot that never had a session.
    pub(super) fn unused(now_us: u64) -> Self {
        Self { row: Row::Unused, used: false, ended_us: now_us }
    }
}

/// Slot that a client may get, with the last session in it.
type Found = (SessionSlot, Option<Session>);

impl<F: Fabric> Sequencer<F> {
    /// Finds the slot that this client had, else a free one, else that of a session which has been idle. Clients that never
    /// committed a batch lose theirs first, and of those the one that has been idle longest.
    pub(super) fn slot_for(
        &self,
        topic: &TopicConfig,
        client_id: ClientId,
        now_us: u64,
    ) -> Result<Found, SessionError> {
        let mut free = None;
        let mut idle: Option<((bool, u64), Found)> = None;
        for slot in self.region.geometry().sessions() {
            let damage = self.damaged_sessions.get(&slot);
            let session = match self.slots[slot.index()].row {
                Row::Used(session) => session,
                Row::Unused if damage.is_none() => {
                    free = free.or(Some((slot, None)));
                    continue;
                }
                // Its last epoch is not known, and must not come again.
                Row::Unused | Row::Unsettled | Row::Damaged(_) => continue,
            };
            let found = (slot, Some(session));
            match (session.belongs_to(topic, client_id), damage) {
                (true, None) => return Ok(found),
                (true, Some(damage)) => return Err(SessionError::DamagedSession(slot, *damage)),
                (false, None) => {}
                (false, Some(_)) => continue,
            }
            match session.state {
                // A fenced client comes back for its slot, and has as much time as one that is idle.
                SessionState::Open | SessionState::Fenced => {
                    if let Some(used) = self.idle_use_of(&session, now_us)
                        && idle.is_none_or(|(than, _)| used < than)
                    {
                        idle = Some((used, found));
                    }
                }
                SessionState::Free | SessionState::Closed => free = free.or(Some(found)),
            }
        }
        free.or(idle.map(|(_, found)| found)).ok_or(SessionError::TableFull(self.region.geometry().max_sessions))
    }

    /// Returns true if nobody holds a session any more, as far as the leader sees.
    pub(super) fn is_given_up(&self, session: &Session, now_us: u64) -> bool {
        match session.state {
            SessionState::Free | SessionState::Closed => true,
            SessionState::Open | SessionState::Fenced => self.idle_use_of(session, now_us).is_some(),
        }
    }

    /// Returns the use of a session whose client has been silent for so long that others may have the slot.
    fn idle_use_of(&self, session: &Session, now_us: u64) -> Option<(bool, u64)> {
        let (used, active_us) = self.use_of(session);
        let patience_us = if used { self.limits.idle_us } else { self.limits.idle_us.min(self.limits.gap_us) };
        let is_idle =
            now_us.saturating_sub(active_us) > patience_us && (self.sees(session) || !self.is_held(session.slot));
        is_idle.then_some((used, active_us))
    }

    /// Returns true if a live broker has a connection of the session in a slot.
    fn is_held(&self, slot: SessionSlot) -> bool {
        let live = read_leader_at(&self.region, self.area).used().map_or(u64::MAX, |said| said.broker_mask);
        ConnectionsReader::new(&self.region, live).of(slot) != Connected::No
    }

    /// Returns true if the leader sees the batches of a session. Without a global order it sees none.
    fn sees(&self, session: &Session) -> bool {
        let config = self.configs.get(session.topic.index()).and_then(Option::as_ref);
        config.is_some_and(|config| config.incarnation == session.topic_incarnation && config.order.is_global())
    }

    /// Returns whether the client of a session may have committed batches, and the time at which it was active last.
    fn use_of(&self, session: &Session) -> (bool, u64) {
        let slot = &self.slots[session.slot.index()];
        let seen = self.sees(session);
        match &self.group.sessions[session.slot.index()] {
            Some(order) => (!seen || order.has_committed(), order.active_us),
            None => (!seen || slot.used, slot.ended_us),
        }
    }
}
