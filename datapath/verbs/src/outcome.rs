//! Completions of work requests.

use embarcadero_roce::Failure;
#[cfg(rdma)]
use std::ffi::CStr;

/// Completion of a work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Number of the queue pair.
    pub queue_pair: u32,
    /// Id that the request was posted with.
    pub id: u64,
    /// Outcome of the request.
    pub outcome: Outcome,
}

/// Outcome of a work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The request of this side is done.
    Sent,
    /// A SEND of the peer lies in the buffer that was posted under the id.
    Message {
        /// Length of the message, bytes.
        bytes: u32,
    },
    /// A WRITE_WITH_IMM of the peer is complete.
    Written {
        /// Number of bytes written.
        bytes: u32,
        /// Immediate data of the write.
        immediate: u32,
    },
    /// The request failed, and the queue pair with it.
    Failed(WorkError),
}

/// Reason why a work request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkError {
    /// Failure that a device of the host reports.
    #[cfg(rdma)]
    #[error("{} (vendor error {vendor:#x})", .text.to_string_lossy())]
    Hardware {
        /// Kind of the failure.
        kind: HardwareFailure,
        /// Text of libibverbs for the status of the completion.
        text: &'static CStr,
        /// Error code of the device's vendor.
        vendor: u32,
    },
    /// Failure that a NIC in software reports.
    #[error(transparent)]
    Software(#[from] Failure),
}

/// Kind of a failure that a device of the host reports.
#[cfg(rdma)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HardwareFailure {
    /// The queue pair had failed before.
    Flushed,
    /// The peer's memory is not open for the request.
    RemoteAccess,
    /// The peer does not answer.
    NoAnswer,
    /// Any other failure, which the text names.
    Other,
}

impl WorkError {
    /// Returns true when the request only failed because the queue pair had failed before.
    #[must_use]
    pub fn is_flush(&self) -> bool {
        match self {
            #[cfg(rdma)]
            Self::Hardware { kind, .. } => *kind == HardwareFailure::Flushed,
            Self::Software(_) => false,
        }
    }

    /// Returns true when the peer's memory is not open for the request.
    #[must_use]
    pub fn is_remote_access(&self) -> bool {
        match self {
            #[cfg(rdma)]
            Self::Hardware { kind, .. } => *kind == HardwareFailure::RemoteAccess,
            Self::Software(failure) => *failure == Failure::RemoteAccess,
        }
    }

    /// Returns true when the peer does not answer: the peer, or the path to it, is gone.
    #[must_use]
    pub(crate) fn is_no_answer(&self) -> bool {
        match self {
            #[cfg(rdma)]
            Self::Hardware { kind, .. } => *kind == HardwareFailure::NoAnswer,
            Self::Software(failure) => *failure == Failure::NoAnswer,
        }
    }
}
