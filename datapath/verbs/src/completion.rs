//! Completion queues.

use crate::device::{Context, Device};
use crate::either::either;
#[cfg(rdma)]
use crate::ibverbs;
use crate::outcome::Completion;
use crate::softnic;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

/// Completion queue. One thread polls it.
pub struct CompletionQueue {
    context: Arc<Context>,
    pub(crate) kind: Queue,
}

/// Completion queue of either kind of device.
pub(crate) enum Queue {
    #[cfg(rdma)]
    Hardware(ibverbs::CompletionQueue),
    Software(softnic::Queue),
}

impl CompletionQueue {
    /// Makes a queue for `depth` completions. The caller ensures that no more can be outstanding: a device does not
    /// recover from an overrun.
    ///
    /// # Errors
    /// The error that the library reports.
    #[cfg_attr(not(rdma), allow(unused_variables))]
    pub fn new(context: &Arc<Context>, depth: u32) -> io::Result<Self> {
        let kind = match &context.device {
            #[cfg(rdma)]
            Device::Hardware(device) => Queue::Hardware(ibverbs::CompletionQueue::new(device, depth)?),
            Device::Software(nic) => Queue::Software(softnic::Queue::new(nic)?),
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
        either!(&self.kind, Queue, queue => queue.descriptor())
    }

    /// Hands completions to `each`, and returns their number. A device of the host hands over at most 32 in one call.
    ///
    /// # Errors
    /// The error of `ibv_poll_cq` or of the sockets: the device is gone.
    #[inline]
    pub fn poll(&mut self, each: impl FnMut(Completion)) -> io::Result<usize> {
        either!(&mut self.kind, Queue, queue => queue.poll(each))
    }

    /// Makes [`CompletionQueue::descriptor`] readable at the next completion. Poll once more before waiting for it.
    ///
    /// # Errors
    /// The error of `ibv_req_notify_cq`.
    pub fn arm(&mut self) -> io::Result<()> {
        either!(&mut self.kind, Queue, queue => queue.arm())
    }
}
