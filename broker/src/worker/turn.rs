//! Turn of a connection in the loop: acknowledge, deliver, send, disconnect.

use super::connections::{Client, Role};
use super::{CLOSE_LINGER, Shared, Worker};
use crate::ack::SessionStatus;
use crate::ingest::PublisherSession;
use embarcadero_cxl::Fabric;
use embarcadero_os::{Clock, Now};
use embarcadero_transport::{Connection, Endpoint, Outbox, Outgoing, TransportError};
use embarcadero_wire::ErrorCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

impl<F: Fabric, E: Endpoint<F>, C: Clock> Worker<F, E, C> {
    /// Acknowledges batches that the delegation put into the broker's own order. Returns true when there were any.
    pub(super) fn local_acks(&mut self) -> bool {
        let mut any = false;
        while let Ok(ordered) = self.ordered.try_recv() {
            any = true;
            let Some(slot) = self.connections.slot_of(ordered.token) else { continue };
            if let Some(Client { role: Role::Publisher(session), outbox, .. }) = self.connections.get(slot)
                && session.wants_acks()
                && let Some(ack) = session.acks.local(&ordered)
            {
                outbox.push(Outgoing::frame(ack.encode()));
            }
        }
        any
    }

    /// Acknowledges, delivers and sends on one connection. Returns true when anything moved.
    ///
    /// `check` also looks whether the session is still open and the topic still live.
    pub(super) fn turn(&mut self, slot: usize, check: bool, now: Now) -> bool {
        let Some(client) = self.connections.get(slot) else { return false };
        let mut moved = match serve(&self.shared, client, check, now).and_then(|moved| Ok(moved | self.flush(slot)?)) {
            Ok(moved) => moved,
            Err(error) => {
                self.disconnect(slot, &error, now);
                return true;
            }
        };
        if self.shared.draining.load(Ordering::Relaxed) && self.is_drained(slot) {
            let text = "this broker is leaving; go to another";
            self.disconnect(slot, &TransportError::refused(ErrorCode::Unavailable, text), now);
            return true;
        }
        if self.connections.get(slot).is_some_and(|client| client.is_due()) {
            moved |= self.receive(slot, now);
        }
        moved | self.refuse_overdue(slot, now)
    }

    /// Refuses a connection without an opening frame once its time is over. Returns true if it did, or the frame was
    /// there after all: this thread may have stood still.
    fn refuse_overdue(&mut self, slot: usize, now: Now) -> bool {
        if !self.connections.get(slot).is_some_and(|client| client.is_overdue(now.instant)) {
            return false;
        }
        if !self.receive(slot, now) {
            let error = TransportError::refused(ErrorCode::Unavailable, "no opening frame in time");
            self.disconnect(slot, &error, now);
        }
        true
    }

    /// Sends what waits in the outbox, and watches for room if some of it has to wait on. Returns true when anything
    /// was sent.
    fn flush(&mut self, slot: usize) -> Result<bool, TransportError> {
        let Some(client) = self.connections.get(slot).filter(|client| client.has_to_send()) else { return Ok(false) };
        let sent = client.link.send(&self.memory, &mut client.outbox)?;
        self.connections.watch_room(slot)?;
        Ok(sent > 0)
    }

    /// Returns true when the connection can close without loss: every batch is acknowledged and no batch is half sent.
    fn is_drained(&mut self, slot: usize) -> bool {
        let Some(client) = self.connections.get(slot) else { return false };
        match &client.role {
            Role::New(_) => true,
            Role::Publisher(session) => session.acks.is_empty() && client.outbox.is_empty(),
            Role::Subscriber(_) => {
                client.outbox.drop_unsent_batches();
                !client.outbox.is_mid_way()
            }
            Role::Leaving(_) => false,
        }
    }

    /// Ends a connection. The peer is told why if its stream of frames allows that.
    pub(super) fn disconnect(&mut self, slot: usize, error: &TransportError, now: Now) {
        let Some(client) = self.connections.get(slot) else { return };
        if !matches!(client.role, Role::Leaving(_))
            && client.outbox.drop_batches()
            && let Some(frame) = error.frame()
        {
            tracing::debug!(%error, "refusing a connection");
            // The windows close before the role lets go of the memory behind them.
            client.link.close_windows();
            client.outbox.push(Outgoing::bytes(frame));
            client.role = Role::Leaving(now.instant + CLOSE_LINGER);
            self.connections.set_waiting(slot, false);
            return;
        }
        tracing::debug!(%error, "a connection ended");
        self.free(slot, now);
    }

    /// Closes the connection in a slot at once, and frees what it holds.
    pub(super) fn free(&mut self, slot: usize, now: Now) {
        let Some(client) = self.connections.remove(slot) else { return };
        drop(client);
        // Its queue pair is gone, so that no completion is added under its number, which another queue pair may get.
        while self.complete(now) {}
        self.endpoint.forget(slot);
    }
}

/// Acknowledges or delivers, as the role of the peer asks for. Returns true when anything moved.
fn serve<F: Fabric, L: Connection<F>>(
    shared: &Shared<F>,
    client: &mut Client<F, L>,
    check: bool,
    now: Now,
) -> Result<bool, TransportError> {
    let Client { link, role, outbox, .. } = client;
    match role {
        Role::New(_) => Ok(false),
        Role::Publisher(session) => {
            let moved = acknowledge(shared, session, outbox)?;
            if check {
                check_session(shared, session, link, outbox, now.instant)?;
            }
            Ok(moved)
        }
        Role::Subscriber(session) => {
            session.poll(outbox, &shared.archive, shared.delivery_patience, now.instant).map(|queued| queued > 0)
        }
        Role::Leaving(until) => {
            if outbox.is_empty() && !link.has_to_send() {
                link.finish();
            }
            if link.discard() || now.instant > *until { Err(TransportError::Closed) } else { Ok(false) }
        }
    }
}

/// Queues the acks of batches that are committed, and durable if they have to be. Returns true when there were any.
fn acknowledge<F: Fabric>(
    shared: &Shared<F>,
    session: &mut PublisherSession<F>,
    outbox: &mut Outbox,
) -> Result<bool, TransportError> {
    if session.acks.is_empty() {
        return Ok(false);
    }
    let (region, broker) = (shared.topics.region(), shared.topics.broker());
    let sent = session.acks.poll(region, broker, |ack| outbox.push(Outgoing::frame(ack.encode())));
    let sent = sent.map_err(|error| TransportError::refused(error.code(), error.to_string()))?;
    Ok(sent > 0)
}

/// Checks that a session is still open, that its topic is still live, and that the publisher keeps no memory in vain.
fn check_session<F: Fabric, L: Connection<F>>(
    shared: &Shared<F>,
    session: &mut PublisherSession<F>,
    link: &L,
    outbox: &mut Outbox,
    now: Instant,
) -> Result<(), TransportError> {
    session.topic().check()?;
    if session.is_idle_holding(link.windows(), shared.window_idle, now) {
        let text = "landing windows of an idle session are taken back; connect again to get others";
        return Err(TransportError::refused(ErrorCode::Unavailable, text));
    }
    if session.is_late(link.arriving(), now) {
        let text = "the batch did not come in time; connect again and send it again";
        return Err(TransportError::refused(ErrorCode::Unavailable, text));
    }
    match session.acks.status(shared.topics.region()) {
        SessionStatus::Open => Ok(()),
        SessionStatus::Fenced(fenced) => {
            shared.topics.check_live(session.topic())?;
            outbox.push(Outgoing::frame(fenced.encode()));
            let text = format!("session epoch {} is fenced", fenced.session_epoch);
            Err(TransportError::refused(ErrorCode::UnknownSession, text))
        }
        SessionStatus::Damaged(damage) => Err(TransportError::refused(ErrorCode::Corrupt, damage.to_string())),
    }
}
