//! Broker's RDMA device, and the completion queue of each of its polling threads.

use super::SEND_DEPTH;
use super::windows::WindowBounds;
use crate::config::Isolation;
use embarcadero_cxl::{Fabric, Native, RegionOffset};
use embarcadero_verbs::{
    Completion, CompletionQueue, Context, LocalPort, MemoryRegion, MemoryWindow, ProtectionDomain, RemoteRange,
    SharedReceiveQueue, VerbsError, windows_are_enforced,
};
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

/// Receives that the connections of one thread share. The NIC of a peer that finds none tries again.
const RECEIVES: u32 = 1024;
/// Most entries of a thread's completion queue.
const QUEUE: u32 = 128 << 10;

/// Number of connections that a completion queue of `entries` has room for.
///
/// A queue pair that fails completes all of its work, also what asked for no completion (IBTA 1.4, 10.3.1: error state).
/// Those of a thread may fail together, and a queue that overruns is of no use any more.
const fn connections(entries: u32) -> usize {
    (entries.saturating_sub(RECEIVES) as u64 / SEND_DEPTH) as usize
}

/// Broker's RDMA device, with the region registered on it.
pub struct RdmaDevice {
    pub(super) context: Arc<Context>,
    pub(super) port: LocalPort,
    pub(super) domain: Arc<ProtectionDomain>,
    pub(super) region: MemoryRegion,
    memory: Native,
    pub(super) windows: bool,
    pub(super) bounds: WindowBounds,
}

impl RdmaDevice {
    /// Registers the whole region on a device. `bounds` are those of landing windows.
    ///
    /// # Errors
    /// [`VerbsError`] when the region cannot be registered, or the trial of memory windows fails.
    pub fn open(
        memory: &Native,
        (context, port): (Arc<Context>, LocalPort),
        isolation: Isolation,
        bounds: WindowBounds,
    ) -> Result<Arc<Self>, VerbsError> {
        let domain = ProtectionDomain::new(&context).map_err(context.error("make a protection domain"))?;
        let whole = (memory, RegionOffset(0), memory.bytes());
        let region = MemoryRegion::for_windows(&domain, &whole).map_err(context.error("register the region"))?;
        let windows = match isolation {
            Isolation::Windows => true,
            Isolation::Registrations => false,
            Isolation::Auto => {
                windows_are_enforced(&context, &port).map_err(context.error("try the memory windows"))?
            }
        };
        Ok(Arc::new(Self { context, port, domain, region, memory: memory.clone(), windows, bounds }))
    }

    /// Name of the device.
    #[must_use]
    pub fn device(&self) -> &str {
        self.context.name()
    }

    /// Takes an asynchronous event of the device, in words, as [`Context::take_event`] does.
    #[must_use]
    pub(crate) fn take_event(&self) -> Option<String> {
        self.context.take_event()
    }

    /// Returns false once the device has announced that it breaks down or is removed.
    #[must_use]
    pub(crate) fn is_present(&self) -> bool {
        self.context.is_present()
    }

    /// Largest message of the port, bytes.
    #[must_use]
    pub fn max_message_bytes(&self) -> u64 {
        self.port.max_message_bytes.into()
    }

    /// Means of isolation in use: `memory windows` or `registrations`.
    #[must_use]
    pub fn isolation(&self) -> &'static str {
        if self.windows { "memory windows" } else { "registrations" }
    }

    pub(super) fn grant_access(
        &self,
        domain: &Arc<ProtectionDomain>,
        at: RegionOffset,
        bytes: u64,
    ) -> io::Result<RemoteAccess> {
        Ok(if self.windows {
            RemoteAccess::Window(MemoryWindow::new(&self.region, at.0, bytes)?)
        } else {
            RemoteAccess::Registration(MemoryRegion::writable(domain, &(&self.memory, at, bytes))?)
        })
    }
}

/// Completion queue of a polling thread.
pub(crate) struct RdmaQueue {
    pub(super) queue: CompletionQueue,
    pub(super) receives: Arc<SharedReceiveQueue>,
    /// Token of each connection.
    pub(super) connections: Arc<()>,
    /// Most connections.
    most: usize,
}

impl RdmaQueue {
    /// Makes a completion queue and a receive queue on the broker's device.
    ///
    /// # Errors
    /// [`VerbsError`] when the device has no room for them.
    pub(crate) fn new(host: &RdmaDevice) -> Result<Self, VerbsError> {
        let entries =
            host.context.max_completions().map_err(host.context.error("ask for the size of queues"))?.min(QUEUE);
        let queue =
            CompletionQueue::new(&host.context, entries).map_err(host.context.error("make a completion queue"))?;
        let receives =
            SharedReceiveQueue::new(&host.domain, RECEIVES).map_err(host.context.error("make a receive queue"))?;
        Ok(Self { queue, receives, connections: Arc::new(()), most: connections(entries) })
    }

    /// Returns true while one more connection cannot overrun the queue.
    pub(super) fn has_room(&self) -> bool {
        // One of the tokens is the queue's own.
        Arc::strong_count(&self.connections) <= self.most
    }

    /// Takes completions and replaces the receives that they used. Returns the number of completions.
    ///
    /// # Errors
    /// The device is gone.
    pub(crate) fn poll(&mut self, mut each: impl FnMut(Completion)) -> io::Result<usize> {
        let mut received = 0;
        let count = self.queue.poll(|completion| {
            // Requests of this side count from 1; shared receives have no number.
            received += usize::from(completion.id == 0);
            each(completion);
        })?;
        self.receives.post(received)?;
        Ok(count)
    }

    /// Makes [`RdmaQueue::descriptor`] readable when something completes from now on.
    ///
    /// # Errors
    /// The error of `ibv_req_notify_cq`.
    pub(crate) fn arm(&mut self) -> io::Result<()> {
        self.queue.arm()
    }

    /// Descriptor that becomes readable when something has completed since [`RdmaQueue::arm`].
    #[must_use]
    pub(crate) fn descriptor(&self) -> RawFd {
        self.queue.descriptor()
    }
}

/// Permission of a peer to write. When the drop returns, the permission has ended.
pub(super) enum RemoteAccess {
    Window(MemoryWindow),
    Registration(MemoryRegion),
}

impl RemoteAccess {
    pub(super) fn remote(&self) -> RemoteRange {
        match self {
            Self::Window(window) => window.remote(),
            Self::Registration(region) => region.remote(0, region.len() as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_fail_together_do_not_overrun_the_completion_queue() {
        // Queues of rxe have at most 32767 entries, those of mlx5 millions.
        for entries in [0, RECEIVES, RECEIVES + SEND_DEPTH as u32, (32 << 10) - 1, QUEUE] {
            let completions = connections(entries) as u64 * SEND_DEPTH + u64::from(RECEIVES);
            assert!(completions <= u64::from(entries.max(RECEIVES)), "{entries}");
        }
        assert_eq!((connections(RECEIVES), connections((32 << 10) - 1), connections(QUEUE)), (0, 247, 1016));
    }
}
