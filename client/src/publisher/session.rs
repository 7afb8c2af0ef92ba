//! Session of a publisher, and the call that opens it.

use crate::context::Context;
use crate::error::ClientError;
use crate::views::TopicView;
use embarcadero_control::v1 as proto;
use embarcadero_wire::batch::BatchOrigin;
use embarcadero_wire::{ClientId, Epoch, OpenPublish, SessionSlot};

/// Session of a publisher, as the brokers know it.
pub(super) struct Session {
    /// Header fields that all batches of the session share.
    pub(super) origin: BatchOrigin,
    /// Acknowledgement level.
    pub(super) ack_level: u8,
    /// Difference between sequences on the wire and batch numbers: sequence = number + shift, wrapping.
    shift: u64,
    /// Batch number below which brokers have reported all batches as committed.
    pub(super) committed: u64,
    /// Number of batches that may be in flight.
    pub(super) window: usize,
}

/// Opens the next epoch of a client's session on a topic.
pub(super) fn open_session(
    context: &Context,
    topic: &str,
    client_id: ClientId,
) -> Result<proto::OpenSessionResponse, ClientError> {
    let ack_level = context.config.ack_level.into();
    let request = proto::OpenSessionRequest { topic: topic.to_owned(), client_id: client_id.0, ack_level };
    context.control().leader(async |client| client.open_session(request.clone()).await)
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
            ack_level,
            shift: opened.next_sequence,
            committed: 0,
            window: opened.window_batches as usize,
        }
    }

    /// Takes the next epoch. `first` is the number of the first batch in flight.
    pub(super) fn reopened(&mut self, opened: &proto::OpenSessionResponse, topic: &TopicView, first: u64) {
        let slot_kept = SessionSlot(opened.slot) == self.origin.session_slot;
        self.origin = origin(opened, topic, self.origin.client_id);
        if !topic.order.is_global() {
            return;
        }
        if slot_kept {
            self.committed = self.committed.max(self.number(opened.next_sequence));
        } else {
            self.shift = opened.next_sequence.wrapping_sub(first);
        }
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
            ..OpenPublish::blank()
        }
    }
}
