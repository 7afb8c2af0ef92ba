//! Sessions: opening, closing and fencing them.

use super::session::SessionOrder;
use super::{Group, Sequencer};
use embarcadero_cxl::layout::{SESSION_WINDOW, SessionState};
use embarcadero_cxl::session_table::{
    Commit, Progress, Session, commits_ahead, publish_session, read_commit_at, store_progress, verified_progress_at,
};
use embarcadero_cxl::topic_table::TopicConfig;
use embarcadero_cxl::{Damage, Fabric, Guard, Row, Site};
use embarcadero_wire::{ClientId, Epoch, Order, SessionSlot, SessionToken, TopicId};

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
    /// The client asked to go on, and has no slot any more.
    #[error("client {:#x} has no session any more", .0.0)]
    Gone(ClientId),
    /// Another client has this id, and its session is in use.
    #[error("client {:#x} has a session already, and it is not idle; publish as another client", .0.0)]
    InUse(ClientId),
    /// Whoever asked is not the session's client.
    #[error("the session of client {:#x} has another token", .0.0)]
    NotHolder(ClientId),
    /// Every slot is in use.
    #[error("all {0} sessions of the region are in use; close some, or create the region with a larger max_sessions")]
    TableFull(u32),
}

/// Request for the next epoch of a client's session.
#[derive(Clone, Copy, Debug)]
pub struct SessionRequest {
    /// Topic slot.
    pub topic: TopicId,
    /// Client.
    pub client_id: ClientId,
    /// Acknowledgement level, 0 to 2.
    pub ack_level: u8,
    /// True to go on with the numbers of the client's session; nothing is opened if it has no slot any more. False for a
    /// client that knows of no batch that it sent.
    pub resume: bool,
    /// Token that the client has of its session; [`SessionToken::NONE`] if it has none.
    pub token: SessionToken,
    /// Token that the session gets if it has none: drawn at random, and not [`SessionToken::NONE`].
    pub new_token: SessionToken,
}

impl<F: Fabric> Sequencer<F> {
    /// Opens the next epoch of a client's session on a topic.
    pub(super) fn open_session(&mut self, request: &SessionRequest, now_us: u64) -> Result<Session, SessionError> {
        let SessionRequest { topic, client_id, ack_level, resume, token, new_token } = *request;
        // A client names the slot: it may not exist. One whose row is damaged has no configuration.
        if let Some(damage) = self.damaged.get(topic.index()).copied().flatten() {
            return Err(SessionError::Damaged(topic, damage));
        }
        let config = self.configs.get(topic.index()).and_then(Clone::clone).ok_or(SessionError::UnknownTopic(topic))?;
        let (slot, before, own, committed) = loop {
            let (slot, before) = self.slot_for(&config, client_id, now_us)?;
            let own = self.own_session(&config, before, request, now_us)?;
            if let Some(order) = &self.group.sessions[slot.index()] {
                break (slot, before, own, order.expected());
            }
            match verified_progress_at(&self.region, self.area, slot, before.as_ref()) {
                Ok(committed) => break (slot, before, own, committed),
                Err(damage) => self.report_session(slot, damage),
            }
        };
        self.end_session(slot, SessionState::Fenced);
        let epoch = before.map_or(Epoch::default(), |before| before.epoch).next();
        let resumed = own.filter(|_| resume);
        let (first_epoch, first_sequence) = match resumed {
            Some(before) => (before.first_epoch, before.first_sequence),
            // No sequence of a slot repeats. Who had it before, this client too, may have committed batches ahead of a
            // gap.
            None => {
                let used = |sequence: &u64| {
                    let commit = read_commit_at(&self.region, self.area, slot, *sequence);
                    !matches!(commit, Ok(Commit::Unknown | Commit::Forgotten(_)))
                };
                let newest = (committed..committed.saturating_add(SESSION_WINDOW)).rev().find(used);
                (epoch, newest.map_or(committed, |newest| newest + 1))
            }
        };
        let session = Session {
            slot,
            client_id,
            epoch,
            state: SessionState::Open,
            topic,
            topic_incarnation: config.incarnation,
            committed: committed.max(first_sequence),
            ack_level,
            first_epoch,
            first_sequence,
            // It stays for as long as its client names it: an answer that is lost then changes nothing. A session that
            // was restored has none until its client names the one that it had.
            token: match own {
                Some(own) if own.token != SessionToken::NONE => own.token,
                Some(_) if token != SessionToken::NONE => token,
                _ => new_token,
            },
        };
        if let Some(before) = before.filter(|_| own.is_none()) {
            // A row that is found half written names its client: it never mixes two.
            self.show_session(&Session { state: SessionState::Free, client_id: ClientId::default(), ..before });
        }
        let order = self.known_session(session, config.order, now_us);
        let session = order.session;
        self.show_session(&session);
        self.show_progress(slot, Progress { expected: session.committed, epoch });
        self.group.sessions[slot.index()] = Some(order);
        Ok(session)
    }

    /// Returns the session that a client goes on with, or whose place its next one takes. `before` is the last one in the
    /// slot that it would get.
    fn own_session(
        &self,
        topic: &TopicConfig,
        before: Option<Session>,
        request: &SessionRequest,
        now_us: u64,
    ) -> Result<Option<Session>, SessionError> {
        let SessionRequest { client_id, resume, token, .. } = *request;
        let named = before.filter(|before| before.belongs_to(topic, client_id));
        let own = named.filter(|named| named.is_held_by(token) || named.token == SessionToken::NONE);
        match named {
            _ if own.is_some() => Ok(own),
            // Its own, if it had one, is gone; who else has the id goes on.
            _ if resume => Err(SessionError::Gone(client_id)),
            Some(named) if !self.is_given_up(&named, now_us) => Err(SessionError::InUse(client_id)),
            _ => Ok(None),
        }
    }

    /// Returns an open session with what its client has committed: everything below `session.committed`, and in total
    /// order batches ahead of a gap.
    pub(super) fn known_session(&self, session: Session, order: Order, now_us: u64) -> SessionOrder {
        let ahead = commits_ahead(&self.region, self.area, &session, session.committed);
        let mut known = SessionOrder::new(session, order, session.committed, now_us);
        for record in ahead.filter(|_| self.region.fabric().keeps(Guard::AheadOfGap)) {
            known.committed_ahead(record.tag - 1);
        }
        known.session.committed = known.expected();
        known
    }

    /// Names a session slot whose row or progress is damaged in the log, once.
    pub(super) fn report_session(&mut self, slot: SessionSlot, damage: Damage) {
        if self.damaged_sessions.insert(slot, damage).is_none() {
            tracing::error!(%slot, %damage, "the session slot stays unused");
        }
    }

    /// Ends the session of a client and an epoch in order, if it is the one that is open.
    pub(super) fn close_session(
        &mut self,
        slot: SessionSlot,
        of: (ClientId, Epoch),
        token: SessionToken,
    ) -> Result<(), SessionError> {
        // A client wrote the slot: it may not exist.
        let open = self.group.sessions.get(slot.index()).and_then(Option::as_ref).map(|order| order.session);
        let Some(session) = open.filter(|session| (session.client_id, session.epoch) == of) else { return Ok(()) };
        if !session.is_held_by(token) {
            return Err(SessionError::NotHolder(session.client_id));
        }
        self.end_session(slot, SessionState::Closed);
        Ok(())
    }

    /// Ends the session in a slot, if there is one. A batch that is not committed now will never be, under its epoch.
    pub(super) fn end_session(&mut self, slot: SessionSlot, state: SessionState) {
        let Some(order) = self.group.end(slot) else { return };
        let ended = &mut self.slots[slot.index()];
        (ended.ended_us, ended.used) = (self.now_us, order.has_committed());
        if state == SessionState::Fenced {
            self.group.stats.fenced += 1;
        }
        self.show_session(&Session { state, committed: order.expected(), ..order.session });
    }

    /// Writes a session's row, in the mirror first.
    pub(super) fn show_session(&mut self, session: &Session) {
        self.slots[session.slot.index()].row = Row::Used(*session);
        if let Some(mirror) = &self.mirror {
            mirror.session(session);
        }
        publish_session(&self.region, self.area, session);
    }

    /// Writes a slot's progress, in the mirror first.
    fn show_progress(&self, slot: SessionSlot, progress: Progress) {
        if let Some(mirror) = &self.mirror {
            mirror.progress(slot, progress);
        }
        store_progress(&self.region, self.area, slot, progress);
        self.region.fabric().fence(Site::RecordFlush);
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
