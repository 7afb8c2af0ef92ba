//! Messages and batches as a subscriber receives them, and the position at which it starts.

use embarcadero_wire::batch::{BatchView, Messages};
use embarcadero_wire::{BrokerId, ClientId};

/// Position at which a subscriber starts to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Start {
    /// First message that is kept.
    Earliest,
    /// Next message to come.
    Latest,
    /// Message at this offset.
    Offset(u64),
    /// First batch that was ordered at or after this time, microseconds since 1970.
    Timestamp(u64),
}

/// Received message, in place.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Message<'a> {
    /// Offset of the message in its stream.
    pub offset: u64,
    /// Broker whose stream the message is in; `None` for the global order.
    pub stream: Option<BrokerId>,
    /// Client that published the message.
    pub client_id: ClientId,
    /// Time at which the batch was ordered, microseconds since 1970.
    pub ordered_us: u64,
    /// Bytes of the message.
    pub payload: &'a [u8],
}

/// Received batch, in place.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Offset of the first message of [`Batch::messages`].
    pub first_offset: u64,
    /// Broker whose stream the batch is in; `None` for the global order.
    pub stream: Option<BrokerId>,
    /// Broker that received the batch from its publisher.
    pub broker: BrokerId,
    /// Time at which the batch was ordered, microseconds since 1970.
    pub ordered_us: u64,
    /// Client that published the batch.
    pub client_id: ClientId,
    /// Sequence of the batch in the client's session.
    pub sequence: u64,
    /// Bytes of all messages of the batch, those before `first_offset` included.
    pub payload_bytes: u32,
    /// True when the publisher gave the batch a checksum, which was checked.
    pub has_checksum: bool,
    pub(super) view: BatchView<'a>,
    /// Number of messages in front of `first_offset`.
    pub(super) skip: usize,
}

impl<'a> Batch<'a> {
    /// Iterates over the messages in order, from `first_offset` on.
    pub fn messages(&self) -> impl Iterator<Item = Message<'a>> + use<'a> {
        let Self { first_offset, stream, ordered_us, client_id, .. } = *self;
        let payloads: Messages<'a> = self.view.messages();
        let message = move |(payload, offset)| Message { offset, stream, client_id, ordered_us, payload };
        payloads.skip(self.skip).zip(first_offset..).map(message)
    }

    /// Number of messages that [`Batch::messages`] yields.
    #[must_use]
    pub fn message_count(&self) -> usize {
        self.view.len() - self.skip
    }
}
