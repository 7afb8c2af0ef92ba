//! Sessions: opening, closing and fencing them.

use super::session::SessionOrder;
use super::{Group, Sequencer};
use embarcadero_cxl::broker_table::read_stalls;
use embarcadero_cxl::layout::SessionState;
use embarcadero_cxl::segment::free_segments;
use embarcadero_cxl::session_table::{Session, publish_session, read_session_at, store_progress, verified_progress_at};
use embarcadero_cxl::topic_table::TopicConfig;
use embarcadero_cxl::{Damage, Fabric, Row, Site};
use embarcadero_wire::{ClientId, Epoch, SessionSlot, TopicId};

/// Reason why a session cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The topic does not exist, or is being deleted.
    #[error("topic slot {0} is not live")]
    UnknownTopic(TopicId),
    /// The topic cannot be ordered.
    #[error("topic slot {0} cannot be ordered: {1}")]
    Damaged(TopicId, Damage),
    /// Nobody knows which of the client's batches are committed.
    #[error("the client's session {0} cannot go on: {1}; publish as another client")]
    DamagedSession(SessionSlot, Damage),
    /// Every slot is in use.
    #[error("all {0} sessions of the region are in use; close some, or create the region with a larger max_sessions")]
    TableFull(u32),
}

impl<F: Fabric> Sequencer<F> {
    /// Opens the next epoch of a client's session on a topic.
    pub(super) fn open_session(
        &mut self,
        topic: TopicId,
        client_id: ClientId,
        ack_level: u8,
        now_us: u64,
    ) -> Result<Session, SessionError> {
        // A client names the slot: it may not exist. One whose row is damaged has no configuration.
        if let Some(damage) = self.damaged.get(topic.index()).copied().flatten() {
            return Err(SessionError::Damaged(topic, damage));
        }
        let config = self.configs.get(topic.index()).and_then(Clone::clone).ok_or(SessionError::UnknownTopic(topic))?;
        let (slot, before, committed) = loop {
            let (slot, before) = self.slot_for(&config, client_id, now_us)?;
            if let Some(order) = &self.group.sessions[slot.index()] {
                break (slot, before, order.expected());
            }
            let shown = before.map_or(0, |before| before.committed);
            match verified_progress_at(&self.region, self.area, slot, shown) {
                Ok(committed) => break (slot, before, committed),
                Err(damage) => self.report_session(slot, damage),
            }
        };
        self.end_session(slot, SessionState::Fenced);
        // The word of an open session may have been damaged since.
        store_progress(&self.region, self.area, slot, committed);
        self.region.fabric().fence(Site::RecordFlush);
        let session = Session {
            slot,
            client_id,
            epoch: before.map_or(Epoch::default(), |before| before.epoch).next(),
            state: SessionState::Open,
            topic,
            topic_incarnation: config.incarnation,
            committed,
            ack_level,
        };
        self.show_session(&session);
        self.group.sessions[slot.index()] = Some(SessionOrder::new(session, config.order, committed, now_us));
        Ok(session)
    }

    /// Finds the slot that this client had, else a free one, else that of the session which has been idle longest.
    /// Returns it with the last session in it.
    fn slot_for(
        &mut self,
        topic: &TopicConfig,
        client_id: ClientId,
        now_us: u64,
    ) -> Result<(SessionSlot, Option<Session>), SessionError> {
        let mut free = None;
        let mut idle = None;
        for slot in self.region.geometry().sessions() {
            let session = match read_session_at(&self.region, self.area, slot) {
                Row::Used(session) => session,
                Row::Unused => {
                    if !self.damaged_sessions.contains_key(&slot) {
                        free = free.or(Some((slot, None)));
                    }
                    continue;
                }
                // Its last epoch is not known, and must not come again.
                Row::Unsettled => continue,
                Row::Damaged(damage) => {
                    self.report_session(slot, damage);
                    continue;
                }
            };
            let found = (slot, Some(session));
            let owner = (session.topic, session.topic_incarnation, session.client_id);
            match (owner == (topic.id, topic.incarnation, client_id), self.damaged_sessions.get(&slot)) {
                (true, None) => return Ok(found),
                (true, Some(damage)) => return Err(SessionError::DamagedSession(slot, *damage)),
                (false, None) => {}
                (false, Some(_)) => continue,
            }
            match session.state {
                SessionState::Open => {
                    let active = self.group.sessions[slot.index()].as_ref().map_or(0, |order| order.active_us);
                    let longest = idle.is_none_or(|(than, _)| active < than);
                    if now_us.saturating_sub(active) > self.leases.idle_us && longest {
                        idle = Some((active, found));
                    }
                }
                // A fenced client comes back for its slot: give it time.
                SessionState::Fenced => idle = idle.or(Some((u64::MAX, found))),
                SessionState::Free | SessionState::Closed => free = free.or(Some(found)),
            }
        }
        free.or(idle.map(|(_, slot)| slot)).ok_or(SessionError::TableFull(self.region.geometry().max_sessions))
    }

    /// Names a session slot whose row or progress is damaged in the log, once.
    pub(super) fn report_session(&mut self, slot: SessionSlot, damage: Damage) {
        if self.damaged_sessions.insert(slot, damage).is_none() {
            tracing::error!(%slot, %damage, "the session slot stays unused");
        }
    }

    /// Ends a session in order, if it is the one that is open.
    pub(super) fn close_session(&mut self, slot: SessionSlot, client_id: ClientId, epoch: Epoch) {
        // A client wrote the slot: it may not exist.
        let open = self.group.sessions.get(slot.index()).and_then(Option::as_ref);
        if open.is_some_and(|order| (order.session.client_id, order.session.epoch) == (client_id, epoch)) {
            self.end_session(slot, SessionState::Closed);
        }
    }

    /// Ends the session in a slot, if there is one. A batch that is not committed now will never be, under its epoch.
    pub(super) fn end_session(&mut self, slot: SessionSlot, state: SessionState) {
        let Some(order) = self.group.end(slot) else { return };
        if state == SessionState::Fenced {
            self.group.stats.fenced += 1;
        }
        self.show_session(&Session { state, committed: order.expected(), ..order.session });
    }

    /// Writes a session's row, in the mirror first.
    pub(super) fn show_session(&self, session: &Session) {
        if let Some(mirror) = &self.mirror {
            mirror.session(session);
        }
        publish_session(&self.region, self.area, session);
    }

    /// Fences the sessions whose gap has lasted too long.
    pub(super) fn expire_gaps(&mut self, now_us: u64) {
        // A broker that has no room leaves batches unread, perhaps the one that is missing: no lease runs then.
        let mut stalled = self.group.starved || free_segments(&self.region) == 0;
        for (broker, seen) in self.region.geometry().brokers().zip(&mut self.stalls) {
            let stalls = read_stalls(&self.region, broker);
            stalled |= *seen != stalls;
            *seen = stalls;
        }
        if self.group.held == 0 {
            return;
        }
        let mut expired = Vec::new();
        for (slot, order) in self.region.geometry().sessions().zip(&mut self.group.sessions) {
            let Some(order) = order.as_mut().filter(|order| order.has_gap()) else { continue };
            if stalled {
                order.restart_gap_timer(now_us);
            } else if now_us.saturating_sub(order.gap_since_us()) > self.leases.gap_us {
                expired.push(slot);
            }
        }
        for slot in expired {
            self.end_session(slot, SessionState::Fenced);
        }
    }
}

impl Group {
    /// Forgets the session in a slot, with the batches that it holds.
    fn end(&mut self, slot: SessionSlot) -> Option<SessionOrder> {
        let order = self.sessions[slot.index()].take()?;
        self.held -= order.held_count();
        Some(order)
    }
}
