//! Completion queues and completions.

use super::device::Context;
#[cfg(rdma)]
use super::ibverbs;
use super::{either, softnic};
use embarcadero_roce::Failure;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

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
    #[error("{} (vendor error {vendor:#x})", ibverbs::status_text(*.status))]
    Hardware {
        /// Status of the completion, an `ibv_wc_status`.
        status: u32,
        /// Error code of the device's vendor.
        vendor: u32,
    },
    /// Failure that a NIC in software reports.
    #[error(transparent)]
    Software(#[from] Failure),
}

impl WorkError {
    /// Whether the request only failed because the queue pair had failed before.
    #[must_use]
    pub fn is_flush(&self) -> bool {
        match self {
            #[cfg(rdma)]
            Self::Hardware { status, .. } => ibverbs::is_flush(*status),
            Self::Software(_) => false,
        }
    }

    /// Whether the peer's memory is not open for the request.
    #[must_use]
    pub fn is_remote_access(&self) -> bool {
        match self {
            #[cfg(rdma)]
            Self::Hardware { status, .. } => ibverbs::is_remote_access(*status),
            Self::Software(failure) => *failure == Failure::RemoteAccess,
        }
    }
}

/// Completion queue. One thread polls it.
pub struct CompletionQueue {
    context: Arc<Context>,
    pub(super) kind: Queue,
}

pub(super) enum Queue {
    #[cfg(rdma)]
    Hardware(ibverbs::CompletionQueue),
    Software(softnic::Queue),
}

impl Queue {
    fn descriptor(&self) -> RawFd {
        either!(self, queue => queue.descriptor())
    }

    #[inline]
    fn poll(&mut self, each: impl FnMut(Completion)) -> io::Result<usize> {
        either!(self, queue => queue.poll(each))
    }

    fn arm(&mut self) -> io::Result<()> {
        either!(self, queue => queue.arm())
    }
}

impl CompletionQueue {
    /// Makes a queue for `depth` completions. The caller ensures that no more can be outstanding: a device does not
    /// recover from an overrun.
    ///
    /// # Errors
    /// The error that the library reports.
    #[cfg_attr(not(rdma), allow(unused_variables))]
    pub fn new(context: &Arc<Context>, depth: u32) -> io::Result<Self> {
        let kind = match &**context {
            #[cfg(rdma)]
            Context::Hardware(device) => Queue::Hardware(ibverbs::CompletionQueue::new(device, depth)?),
            Context::Software(nic) => Queue::Software(softnic::Queue::new(nic)?),
        };
        Ok(Self { context: Arc::clone(context), kind })
    }

    /// Device of the queue.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Descriptor that becomes readable when a completion comes after [`CompletionQueue::arm`].
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.kind.descriptor()
    }

    /// Hands completions to `each`, and returns their number. A device of the host hands over at most 32 in one call.
    ///
    /// # Errors
    /// The error of `ibv_poll_cq` or of the sockets: the device is gone.
    #[inline]
    pub fn poll(&mut self, each: impl FnMut(Completion)) -> io::Result<usize> {
        self.kind.poll(each)
    }

    /// Makes [`CompletionQueue::descriptor`] readable at the next completion. Poll once more before waiting for it.
    ///
    /// # Errors
    /// The error of `ibv_req_notify_cq`.
    pub fn arm(&mut self) -> io::Result<()> {
        self.kind.arm()
    }
}
