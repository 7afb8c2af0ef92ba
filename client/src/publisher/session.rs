//! Session of a publisher, and the request that opens it.

use super::in_flight::InFlightBatches;
use crate::environment::Environment;
use crate::error::ClientError;
use crate::views::TopicView;
use embarcadero_control::v1 as proto;
use embarcadero_wire::batch::BatchOrigin;
use embarcadero_wire::{ClientId, Epoch, OpenPublish, SessionSlot, SessionToken};

/// Session of a publisher, as the brokers know it.
pub(super) struct Session {
    /// Header fields that all batches of the session share.
    pub(super) origin: BatchOrigin,
    /// Secret by which the brokers know the session's client.
    token: SessionToken,
    /// Acknowledgement level.
    pub(super) ack_level: u8,
    /// Difference between sequences on the wire and batch numbers: sequence = number + shift, wrapping.
    shift: u64,
    /// Batch number below which brokers have reported all batches as committed.
    pub(super) committed: u64,
    /// Number of batches that may be in flight.
    pub(super) window: usize,
}

/// Chooses the id of a client.
pub(super) fn new_client_id<E: Environment>(environment: &E) -> ClientId {
    ClientId(environment.random().max(1))
}

/// Request that opens a session on a topic as a new client.
pub(super) fn opening(topic: &str, client_id: ClientId, ack_level: u8) -> proto::OpenSessionRequest {
    let (topic, client_id, ack_level) = (topic.to_owned(), client_id.0, ack_level.into());
    proto::OpenSessionRequest { topic, client_id, ack_level, ..proto::OpenSessionRequest::default() }
}

fn origin(opened: &proto::OpenSessionResponse, topic: &TopicView, client_id: ClientId) -> BatchOrigin {
    BatchOrigin {
        client_id,
        session_epoch: Epoch(opened.epoch),
        session_slot: SessionSlot(opened.slot),
        topic: topic.id,
        topic_incarnation: topic.incarnation,
    }
}

impl Session {
    /// Session of the first epoch that a publisher opened.
    pub(super) fn new(
        opened: &proto::OpenSessionResponse,
        topic: &TopicView,
        client_id: ClientId,
        ack_level: u8,
    ) -> Self {
        Self {
            origin: origin(opened, topic, client_id),
            token: SessionToken(opened.token),
            ack_level,
            shift: opened.next_sequence,
            committed: 0,
            window: opened.window_batches as usize,
        }
    }

    /// Takes the next epoch of the same session.
    ///
    /// # Errors
    /// [`ClientError::SessionChanged`].
    pub(super) fn resumed(
        &mut self,
        opened: &proto::OpenSessionResponse,
        topic: &TopicView,
        in_flight: &mut InFlightBatches,
    ) -> Result<(), ClientError> {
        if topic.order.is_global() && self.ack_level == 0 {
            // Nobody learns what became of the batches that were sent.
            in_flight.give_up(|_, _| true);
            self.shift = opened.next_sequence.wrapping_sub(in_flight.first_unsent());
        } else if topic.order.is_global() {
            let (acknowledged, next) = (self.sequence(in_flight.first()), self.sequence(in_flight.next_number()));
            if !(acknowledged..=next).contains(&opened.next_sequence) {
                return Err(ClientError::SessionChanged { expected: opened.next_sequence, acknowledged, next });
            }
            self.committed = self.committed.max(self.number(opened.next_sequence));
        }
        self.origin = origin(opened, topic, self.origin.client_id);
        self.token = SessionToken(opened.token);
        Ok(())
    }

    /// Gives up a session that the brokers do not know any more.
    ///
    /// # Errors
    /// [`ClientError::SessionLost`] if batches may be in the log or not: they cannot be sent again.
    pub(super) fn lost(&self, topic: &TopicView, in_flight: &mut InFlightBatches) -> Result<(), ClientError> {
        if !topic.order.is_global() {
            return Ok(());
        }
        in_flight.give_up(|number, _| self.ack_level == 0 || number < self.committed);
        match in_flight.in_doubt() as u64 {
            0 => Ok(()),
            in_doubt => Err(ClientError::SessionLost { in_doubt }),
        }
    }

    /// Goes on as another client, after [`Session::lost`].
    pub(super) fn begun_anew(
        &mut self,
        opened: &proto::OpenSessionResponse,
        topic: &TopicView,
        client_id: ClientId,
        in_flight: &InFlightBatches,
    ) {
        let shift =
            opened.next_sequence.wrapping_sub(if topic.order.is_global() { in_flight.first_unsent() } else { 0 });
        *self = Self { shift, ..Self::new(opened, topic, client_id, self.ack_level) };
    }

    /// Sequence of a batch on the wire.
    pub(super) fn sequence(&self, number: u64) -> u64 {
        number.wrapping_add(self.shift)
    }

    /// Number of the batch that has a sequence on the wire.
    pub(super) fn number(&self, sequence: u64) -> u64 {
        sequence.wrapping_sub(self.shift)
    }

    /// Opening frame of a connection. `first` is the number of the first batch in flight.
    pub(super) fn opening(&self, first: u64) -> OpenPublish {
        let BatchOrigin { client_id, session_epoch, session_slot, topic, topic_incarnation } = self.origin;
        OpenPublish {
            client_id,
            resume_from: self.sequence(first),
            session_epoch,
            session_slot,
            topic,
            topic_incarnation,
            ack_level: self.ack_level.into(),
            token: self.token,
            ..OpenPublish::blank()
        }
    }

    /// Request that opens the session's next epoch. Nothing is opened, and the answer's epoch is 0, if the brokers do not
    /// know the client any more.
    pub(super) fn resumption(&self, topic: &TopicView) -> proto::OpenSessionRequest {
        let request = opening(&topic.name, self.origin.client_id, self.ack_level);
        proto::OpenSessionRequest { resume: true, token: self.token.0, ..request }
    }

    /// Request that closes the session.
    pub(super) fn closing(&self) -> proto::CloseSessionRequest {
        let BatchOrigin { client_id, session_epoch, session_slot, .. } = self.origin;
        proto::CloseSessionRequest {
            slot: session_slot.0,
            client_id: client_id.0,
            epoch: session_epoch.0,
            token: self.token.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publisher::buffers::Buffers;
    use embarcadero_control::v1::OpenSessionResponse;
    use embarcadero_wire::Order;

    fn opened(slot: u32, epoch: u32, next_sequence: u64) -> OpenSessionResponse {
        OpenSessionResponse {
            slot,
            epoch,
            next_sequence,
            window_batches: 128,
            token: 70 + u64::from(epoch),
            ..OpenSessionResponse::default()
        }
    }

    /// Session that began at sequence 10, with three batches in flight: two of them sent, and batch 0 acknowledged.
    fn session(ack_level: u8) -> (Session, InFlightBatches) {
        let session = Session::new(&opened(3, 1, 10), &TopicView::of_order(Order::Strong), ClientId(7), ack_level);
        let (mut in_flight, mut buffers) = (InFlightBatches::new(4), Buffers::new(4, 16 << 10));
        for number in 0..4 {
            let mut batch = buffers.get(4096).unwrap().unwrap();
            batch.push(b"message");
            let header = batch.seal(&session.origin, session.sequence(number), false);
            in_flight.push(batch, header);
        }
        for number in 0..3 {
            in_flight.pop_queued();
            in_flight.send(number, 0);
        }
        in_flight.acknowledge(0, 5);
        in_flight.retire(|_| false);
        (session, in_flight)
    }

    #[test]
    fn a_session_that_goes_on_keeps_its_numbers() {
        let (mut session, mut in_flight) = session(1);
        session.resumed(&opened(3, 2, 12), &TopicView::of_order(Order::Strong), &mut in_flight).unwrap();
        assert_eq!((session.committed, session.sequence(1)), (2, 11));
        let tokens = [session.opening(0).token.0, session.closing().token];
        assert_eq!((tokens, session.resumption(&TopicView::of_order(Order::Strong)).token), ([72; 2], 72));
        // The row may have moved, after a restore for example.
        session.resumed(&opened(4, 9, 13), &TopicView::of_order(Order::Strong), &mut in_flight).unwrap();
        assert_eq!((session.committed, session.sequence(1), session.origin.session_slot), (3, 11, SessionSlot(4)));
    }

    /// Brokers that know less than they acknowledged have lost batches; brokers that know more know another client's.
    #[test]
    fn a_session_that_the_brokers_know_otherwise_ends() {
        for expected in [0, 10, 15, u64::MAX] {
            let (mut session, mut in_flight) = session(1);
            let resumed = session.resumed(&opened(3, 2, expected), &TopicView::of_order(Order::Strong), &mut in_flight);
            assert!(
                matches!(resumed, Err(ClientError::SessionChanged { expected: told, acknowledged: 11, next: 14 })
                    if told == expected),
                "{expected}: {resumed:?}"
            );
            assert_eq!(session.committed, 0);
        }
    }

    /// The slot went to another client, and its number says nothing: batches in doubt are not sent again in silence.
    #[test]
    fn a_lost_session_ends_while_batches_are_in_doubt() {
        let (mut session, mut in_flight) = session(1);
        let lost = session.lost(&TopicView::of_order(Order::Strong), &mut in_flight);
        assert!(matches!(lost, Err(ClientError::SessionLost { in_doubt: 2 })), "{lost:?}");
        // What is known to be committed is not in doubt.
        session.committed = 3;
        session.lost(&TopicView::of_order(Order::Strong), &mut in_flight).unwrap();
        session.begun_anew(&opened(3, 6, 40), &TopicView::of_order(Order::Strong), ClientId(8), &in_flight);
        assert_eq!((session.origin.client_id, session.sequence(3)), (ClientId(8), 40), "batch 3 was never sent");
        // Nothing is recognized as a duplicate in a broker's own order.
        session.committed = 0;
        session.lost(&TopicView::of_order(Order::Broker), &mut in_flight).unwrap();
    }

    #[test]
    fn without_acknowledgements_a_session_goes_on_with_what_was_not_sent() {
        let (mut session, mut in_flight) = session(0);
        session.resumed(&opened(3, 2, 11), &TopicView::of_order(Order::Strong), &mut in_flight).unwrap();
        assert_eq!((session.sequence(3), in_flight.in_doubt()), (11, 0), "batch 3 fills the gap");
    }
}
