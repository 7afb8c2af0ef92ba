//! Errors of the client library.

use embarcadero_transport::LinkError;
use embarcadero_verbs::VerbsError;
use embarcadero_wire::batch::BodyError;
use embarcadero_wire::{ClientId, ErrorCode, OutOfBounds, TopicId, WireError};
use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Error below an error of the client library, of a type that is no part of its interface.
pub type Cause = Arc<dyn Error + Send + Sync>;

/// Error of the client library.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// A value of the configuration is out of bounds.
    #[error(transparent)]
    Config(#[from] OutOfBounds),
    /// The device of the transport that was asked for cannot be used.
    #[error("transport is {transport}, but {source}")]
    Device {
        /// Name of the transport in the configuration.
        transport: &'static str,
        /// Reason for which the device cannot be used.
        source: Arc<VerbsError>,
    },
    /// A broker's answer has no meaning for this client: the two are of different versions.
    #[error("the brokers are of another version: {0}")]
    Incompatible(String),
    /// No broker can be reached that could do what was asked for.
    #[error("{reason}")]
    Unreachable {
        /// Broker that was tried last, and what went wrong there.
        reason: String,
        /// Error of the last attempt; `None` when there was no broker to try.
        source: Option<Cause>,
    },
    /// The control service refuses.
    #[error("{message}")]
    Control {
        /// Kind of refusal.
        code: ControlCode,
        /// Text of the control service.
        message: String,
        /// Error of the connection below the call; `None` when the service itself refuses.
        source: Option<Cause>,
    },
    /// A broker refuses on the data connection.
    #[error("{text}")]
    Broker {
        /// Kind of refusal.
        code: ErrorCode,
        /// Text of the broker.
        text: String,
    },
    /// The offset is not kept.
    #[error("{text}")]
    OffsetOutOfRange {
        /// First offset that is kept.
        earliest: u64,
        /// Text of the broker.
        text: String,
    },
    /// All batch buffers hold messages that are not acknowledged yet.
    #[error("the publish buffer is full: {bytes} bytes wait to be acknowledged; poll, wait, or raise buffer_bytes")]
    BufferFull {
        /// Capacity of the buffer, bytes.
        bytes: usize,
    },
    /// The message does not fit into a batch.
    #[error("the message has {bytes} bytes; the largest batch can hold {max}")]
    MessageTooLarge {
        /// Size of the message, bytes.
        bytes: usize,
        /// Size of the largest message that fits, bytes.
        max: usize,
    },
    /// Nothing was acknowledged or delivered in time.
    #[error("no progress in {waited:?}")]
    TimedOut {
        /// Time that was waited.
        waited: Duration,
        /// Error of the last attempt to reach a broker, if it failed.
        #[source]
        cause: Option<Arc<ClientError>>,
    },
    /// The brokers do not know this publisher's session any more: its slot went to another client, or the region was
    /// lost. [`crate::Publisher::poll`] tells which messages are acknowledged.
    #[error(
        "the brokers know this publisher's session no more: whether {in_doubt} batches, which were sent and not \
         acknowledged, are in the log is unknown"
    )]
    SessionLost {
        /// Number of batches that may or may not be in the log.
        in_doubt: u64,
    },
    /// The brokers know less of this publisher's session than they acknowledged, or more than it sent. The region was lost,
    /// and restored from disks that do not have everything.
    #[error(
        "the brokers expect batch {expected} of this publisher's session, which is acknowledged up to batch \
         {acknowledged} and has sent nothing from {next} on: acknowledged batches are lost"
    )]
    SessionChanged {
        /// Sequence that the brokers expect next.
        expected: u64,
        /// Sequence below which all batches are acknowledged.
        acknowledged: u64,
        /// Sequence of the next batch.
        next: u64,
    },
    /// The message id is not one of this publisher's.
    #[error("message id of batch {batch} was never given out")]
    UnknownId {
        /// Number of the batch in the message id.
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
    /// Delivered bytes are damaged. A subscriber that is called again goes on behind them.
    #[error("the messages from offset {offset} to {} cannot be read: {source}", end - 1)]
    Corrupt {
        /// First offset of the batch.
        offset: u64,
        /// Offset after its last message.
        end: u64,
        /// Check that failed.
        source: UnreadableBatch,
    },
    /// A peer does not speak the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The operating system reports an error.
    #[error("cannot {action}: {source}")]
    Io {
        /// Action that failed, as a verb: `connect to a broker`.
        action: &'static str,
        /// Error of the system.
        source: Arc<io::Error>,
    },
}

/// Reason why a batch cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnreadableBatch {
    /// The bytes are of another batch than the one that was ordered.
    #[error("memory holds batch {sequence} of client {:#x} and topic slot {topic} instead", client_id.0)]
    Foreign {
        /// Client that the bytes name.
        client_id: ClientId,
        /// Sequence that the bytes name.
        sequence: u64,
        /// Topic that the bytes name.
        topic: TopicId,
    },
    /// The header is damaged: the bytes at its place are none.
    #[error("no batch lies there: {0}")]
    Header(#[from] WireError),
    /// The body is damaged.
    #[error(transparent)]
    Body(#[from] BodyError),
}

/// Kind of a refusal by the control service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ControlCode {
    /// The request contradicts itself or the topic.
    InvalidArgument,
    /// The topic does not exist.
    NotFound,
    /// The topic exists already.
    AlreadyExists,
    /// The client has not proved who it is.
    Unauthenticated,
    /// The client may not do this.
    PermissionDenied,
    /// The service does not have the call.
    Unimplemented,
    /// Stored state is damaged.
    DataLoss,
    /// A table or the memory is full.
    ResourceExhausted,
    /// The service cannot answer now: there is no leader, it is stopping, or a call took too long.
    Unavailable,
}

impl ControlCode {
    /// Returns true when a repetition of the call can only fail again.
    fn is_permanent(self) -> bool {
        match self {
            Self::InvalidArgument
            | Self::NotFound
            | Self::AlreadyExists
            | Self::Unauthenticated
            | Self::PermissionDenied
            | Self::Unimplemented
            | Self::DataLoss => true,
            Self::ResourceExhausted | Self::Unavailable => false,
        }
    }
}

impl From<tonic::Code> for ControlCode {
    fn from(code: tonic::Code) -> Self {
        match code {
            tonic::Code::InvalidArgument | tonic::Code::OutOfRange => Self::InvalidArgument,
            tonic::Code::NotFound => Self::NotFound,
            tonic::Code::AlreadyExists => Self::AlreadyExists,
            tonic::Code::Unauthenticated => Self::Unauthenticated,
            tonic::Code::PermissionDenied => Self::PermissionDenied,
            tonic::Code::Unimplemented => Self::Unimplemented,
            tonic::Code::DataLoss => Self::DataLoss,
            tonic::Code::ResourceExhausted => Self::ResourceExhausted,
            tonic::Code::Ok
            | tonic::Code::Cancelled
            | tonic::Code::Unknown
            | tonic::Code::DeadlineExceeded
            | tonic::Code::FailedPrecondition
            | tonic::Code::Aborted
            | tonic::Code::Internal
            | tonic::Code::Unavailable => Self::Unavailable,
        }
    }
}

impl From<LinkError> for ClientError {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Lost(error) => Self::io("keep a connection to a broker")(error),
            LinkError::Wire(error) => error.into(),
            LinkError::Refused { code: Some(code), text, detail } => Self::refused(code, text, detail),
            LinkError::Refused { code: None, text, .. } => {
                Self::Incompatible(format!("a broker refuses for a reason that this client does not know: {text}"))
            }
        }
    }
}

impl ClientError {
    /// Returns true for a refusal of the control service that a repetition of the call cannot change.
    pub(crate) fn is_permanent(&self) -> bool {
        matches!(self, Self::Control { code, .. } if code.is_permanent())
    }

    /// Error for a call that no broker can answer. It has no cause: no broker was tried.
    pub(crate) fn unreachable(reason: impl Into<String>) -> Self {
        Self::Unreachable { reason: reason.into(), source: None }
    }

    /// Error of a wait without progress. `cause` is the error of the last attempt to reach a broker, if it failed.
    pub(crate) fn timed_out(waited: Duration, cause: Option<Self>) -> Self {
        Self::TimedOut { waited, cause: cause.map(Arc::new) }
    }

    /// Error for a refusal on a data connection.
    pub(crate) fn refused(code: ErrorCode, text: String, detail: u64) -> Self {
        match code {
            ErrorCode::OffsetOutOfRange => Self::OffsetOutOfRange { earliest: detail, text },
            _ => Self::Broker { code, text },
        }
    }

    /// Converts an error of the operating system. `action` is a verb, for example `connect to a broker`.
    pub(crate) fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { action, source: Arc::new(error) }
    }
}
