//! Posted work and its completion.

#[cfg(doc)]
use crate::attributes::Attributes;

/// Operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Sends the payload to the peer's next receive.
    Send {
        /// Immediate data for the peer.
        immediate: Option<u32>,
    },
    /// Writes the payload to the peer's memory.
    Write {
        /// Address of the first byte, as the peer counts.
        address: u64,
        /// Key to the memory.
        rkey: u32,
        /// Immediate data, whose arrival the peer notices; it takes one of the peer's receives.
        immediate: Option<u32>,
    },
    /// Reads the peer's memory; the payload is empty.
    Read {
        /// Address of the first byte, as the peer counts.
        address: u64,
        /// Key to the memory.
        rkey: u32,
        /// Number of bytes, at most 2^31.
        bytes: u32,
    },
}

/// Posted request. It keeps its payload until the peer acknowledges it.
#[derive(Debug)]
pub struct Work<B> {
    /// Number of the caller's choice; the completion has it.
    pub id: u64,
    /// Operation to carry out.
    pub operation: Operation,
    /// Bytes to send or write, at most 2^31.
    pub payload: B,
}

/// Refusal of work, which it gives back: the queue is full, the payload is too long, or a read has a payload.
#[derive(Debug)]
pub struct Full<B>(pub Work<B>);

/// Posted receive: the buffer for one message of the peer, or for the notice of one write with immediate data.
/// Such a notice leaves the buffer unchanged.
#[derive(Debug, PartialEq, Eq)]
pub struct Receive {
    /// Number of the caller's choice; the completion has it.
    pub id: u64,
    /// Buffer, as long as the longest message that it takes.
    pub buffer: Vec<u8>,
}

/// Completion of a posted request or receive.
#[derive(Debug, PartialEq, Eq)]
pub enum Completion {
    /// A send or write is complete at the peer.
    Done {
        /// Id of the work.
        id: u64,
    },
    /// A read is complete.
    Read {
        /// Id of the work.
        id: u64,
        /// Bytes of the peer's memory.
        bytes: Vec<u8>,
    },
    /// A message of the peer is complete.
    Received {
        /// Receive that was posted, its buffer cut to the length of the message.
        receive: Receive,
        /// Immediate data of the message.
        immediate: Option<u32>,
    },
    /// A write of the peer with immediate data is complete.
    Written {
        /// Receive that the notice took, unchanged.
        receive: Receive,
        /// Immediate data of the write.
        immediate: u32,
        /// Number of bytes written.
        bytes: u32,
    },
    /// The queue pair ended before this work was done. If a request of this side failed, it is the first one flushed.
    Flushed {
        /// Id of the work.
        id: u64,
        /// Reason of the end.
        failure: Failure,
    },
    /// The queue pair ended before this receive was used.
    Unused {
        /// Receive that was posted.
        receive: Receive,
    },
}

/// Reason why a queue pair ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The peer did not answer any of [`Attributes::retries`] sendings.
    #[error("the peer does not answer: it, its queue pair or the path is gone")]
    NoAnswer,
    /// The peer had no receive posted at any of [`Attributes::not_ready_retries`] sendings.
    #[error("the peer posts no receive for a request that needs one")]
    RnrRetryExceeded,
    /// The peer takes a request of this side for malformed.
    #[error("the peer refuses a request as invalid")]
    RemoteInvalidRequest,
    /// The peer gives no right to the memory that a request names.
    #[error("the peer gives no right to the memory that a request names")]
    RemoteAccess,
    /// The peer could not carry a request out.
    #[error("the peer could not carry out a request")]
    RemoteOperation,
    /// The peer answered with data that no read asked for.
    #[error("the peer answers with data that no read asked for")]
    BadResponse,
    /// The peer sent a malformed request, or a message longer than the receive for it.
    #[error("the peer sent an invalid request, or a message longer than the receive for it")]
    InvalidRequest,
    /// The peer requested memory to which it has no right.
    #[error("the peer requested memory to which it has no right")]
    Access,
}
