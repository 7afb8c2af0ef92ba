//! Names and status of published messages, and the counters of a publisher.

/// Name of a published message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId {
    /// Number of the message's batch, counted by this publisher from 0.
    pub batch: u64,
    /// Index of the message in the batch, from 0.
    pub index: u32,
}

/// Status of a published message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not acknowledged yet.
    Pending,
    /// Acknowledged at this offset. `None` when the offset is not known: at acknowledgement level 0, or long ago.
    Acknowledged(Option<u64>),
}

/// Counters of a publisher.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PublisherStats {
    /// Number of batches acknowledged.
    pub batches_acknowledged: u64,
    /// Number of batches sent again, on another connection or under another epoch.
    pub batches_resubmitted: u64,
    /// Number of times that the session was reopened under another epoch.
    pub sessions_reopened: u64,
    /// Number of connections lost.
    pub connections_lost: u64,
}
