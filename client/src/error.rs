//! What can go wrong for a client.

use embarcadero_verbs::VerbsError;
use embarcadero_wire::batch::BodyError;
use embarcadero_wire::{ErrorCode, OutOfBounds, WireError};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// An error of the client library.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// A value of the configuration.
    #[error(transparent)]
    Config(#[from] OutOfBounds),
    /// The device of the transport that was asked for cannot be used.
    #[error("transport is {transport}, but {source}")]
    Device {
        /// What was asked for, as it is configured.
        transport: &'static str,
        /// What is missing.
        source: Arc<VerbsError>,
    },
    /// A broker says what this client does not understand: they are of different versions.
    #[error("the brokers are of another version: {0}")]
    Incompatible(String),
    /// No broker's control service answers.
    #[error("no broker answers: {0}")]
    Unreachable(String),
    /// The control service refuses.
    #[error("{message}")]
    Control {
        /// gRPC code.
        code: String,
        /// What it says.
        message: String,
    },
    /// A broker refuses on the data connection.
    #[error("{text}")]
    Broker {
        /// Kind of refusal.
        code: ErrorCode,
        /// What it says.
        text: String,
    },
    /// The offset is not kept; `earliest` is the first that is.
    #[error("{text}")]
    OffsetOutOfRange {
        /// First offset that is kept.
        earliest: u64,
        /// What the broker says.
        text: String,
    },
    /// All batch buffers hold messages that are not acknowledged yet.
    #[error("the publish buffer is full: {bytes} bytes wait to be acknowledged; poll, wait, or raise buffer_bytes")]
    BufferFull {
        /// Bytes that it holds at most.
        bytes: usize,
    },
    /// The message does not fit into a batch.
    #[error("the message has {bytes} bytes; the largest batch can hold {max}")]
    MessageTooLarge {
        /// Its size.
        bytes: usize,
        /// Largest that fits.
        max: usize,
    },
    /// Nothing happened in time.
    #[error("no progress in {0:?}")]
    TimedOut(Duration),
    /// The id is not one of this publisher's.
    #[error("message id of batch {batch} was never given out")]
    UnknownId {
        /// Its batch.
        batch: u64,
    },
    /// The stream skipped or repeated offsets: order is broken.
    #[error("offset {found} came where {expected} was due")]
    Gap {
        /// Offset that was due.
        expected: u64,
        /// Offset that came.
        found: u64,
    },
    /// Delivered bytes are damaged.
    #[error("batch at offset {offset}: {source}")]
    Corrupt {
        /// First offset of the batch.
        offset: u64,
        /// What is wrong with it.
        source: BodyError,
    },
    /// A peer does not speak the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The system.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: Arc<io::Error>,
    },
}

impl ClientError {
    /// What a broker refused, and why.
    pub(crate) fn refused(code: ErrorCode, text: String, detail: u64) -> Self {
        match code {
            ErrorCode::OffsetOutOfRange => Self::OffsetOutOfRange { earliest: detail, text },
            _ => Self::Broker { code, text },
        }
    }

    pub(crate) fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { action, source: Arc::new(error) }
    }
}
