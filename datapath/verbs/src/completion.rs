//! Completion queues, and what they say.

use super::device::Context;
#[cfg(rdma)]
use super::ibverbs;
use super::{either, softnic};
use embarcadero_roce::Failure;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

/// What became of a work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Number of the queue pair.
    pub queue_pair: u32,
    /// Id that the request was posted with.
    pub id: u64,
    /// How it ended.
    pub outcome: Outcome,
}

/// How a work request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A request of this side is done.
    Sent,
    /// The peer's SEND lies in the buffer posted under the id.
    Message {
        /// Its length.
        bytes: u32,
    },
    /// The peer's WRITE_WITH_IMM is complete.
    Written {
        /// Bytes written.
        bytes: u32,
        /// Its immediate data.
        immediate: u32,
    },
    /// It failed, and the queue pair with it.
    Failed(WorkError),
}

/// Why a work request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkError {
    /// A device of the host says so.
    #[cfg(rdma)]
    #[error("{} (vendor error {vendor:#x})", ibverbs::status_text(*.status))]
    Hardware {
        /// An `ibv_wc_status`.
        status: u32,
        /// What the device adds.
        vendor: u32,
    },
    /// The NIC in software says so.
    #[error(transparent)]
    Software(#[from] Failure),
}

impl WorkError {
    /// The queue pair had failed before: says nothing of its own.
    #[must_use]
    pub fn is_flush(&self) -> bool {
        match self {
            #[cfg(rdma)]
            Self::Hardware { status, .. } => ibverbs::is_flush(*status),
            Self::Software(_) => false,
        }
    }

    /// The peer's memory is not open for what was tried.
    #[must_use]
    pub fn is_remote_access(&self) -> bool {
        match self {
            #[cfg(rdma)]
            Self::Hardware { status, .. } => ibverbs::is_remote_access(*status),
            Self::Software(failure) => *failure == Failure::RemoteAccess,
        }
    }
}

/// A completion queue, polled by one thread.
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
    /// A queue for `depth` completions. The caller sees to it that no more can be outstanding: the device does not
    /// recover from an overrun.
    ///
    /// # Errors
    /// What the library reports.
    #[cfg_attr(not(rdma), allow(unused_variables))]
    pub fn new(context: &Arc<Context>, depth: u32) -> io::Result<Self> {
        let kind = match &**context {
            #[cfg(rdma)]
            Context::Hardware(device) => Queue::Hardware(ibverbs::CompletionQueue::new(device, depth)?),
            Context::Software(nic) => Queue::Software(softnic::Queue::new(nic)?),
        };
        Ok(Self { context: Arc::clone(context), kind })
    }

    /// Its device.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Readable when there are completions after [`CompletionQueue::arm`].
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.kind.descriptor()
    }

    /// Takes what is complete, at most 32; returns how many that was. Does not allocate.
    ///
    /// # Errors
    /// What `ibv_poll_cq` reports: the device is gone.
    #[inline]
    pub fn poll(&mut self, each: impl FnMut(Completion)) -> io::Result<usize> {
        self.kind.poll(each)
    }

    /// Makes [`CompletionQueue::descriptor`] readable at the next completion. Poll once more before waiting for it.
    ///
    /// # Errors
    /// What `ibv_req_notify_cq` reports.
    pub fn arm(&mut self) -> io::Result<()> {
        self.kind.arm()
    }
}
