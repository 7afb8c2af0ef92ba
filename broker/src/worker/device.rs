//! The RDMA device, as one polling thread uses it.

use super::connections::Connections;
use embarcadero_transport::TransportError;
use embarcadero_transport::rdma::{RdmaConnection, RdmaDevice, RdmaQueue};
use embarcadero_wire::{ErrorCode, RdmaConnect};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

/// Token of the completion queue's descriptor.
const COMPLETIONS: u64 = u64::MAX;

/// Completion queue of the thread, and the connections whose queue pairs complete on it.
pub(super) struct DeviceQueue {
    device: Arc<RdmaDevice>,
    queue: RdmaQueue,
    /// Slot of the connection by queue pair number.
    slots: HashMap<u32, usize>,
}

impl DeviceQueue {
    /// Makes a queue on the device, which is watched beside the sockets of `connections`.
    pub(super) fn new(device: &Arc<RdmaDevice>, connections: &Connections) -> io::Result<Self> {
        let queue = RdmaQueue::new(device).map_err(io::Error::other)?;
        connections.watch_other(queue.descriptor(), COMPLETIONS)?;
        Ok(Self { device: Arc::clone(device), queue, slots: HashMap::new() })
    }

    /// Makes the device wake the thread at the next completion.
    pub(super) fn arm(&mut self) -> io::Result<()> {
        self.queue.arm()
    }

    /// Hands completions to their connections. Returns the number of completions.
    ///
    /// # Errors
    /// The device is lost.
    pub(super) fn poll(&mut self, connections: &mut Connections) -> io::Result<usize> {
        let slots = &self.slots;
        self.queue.poll(|completion| {
            // Completions of queue pairs that are gone are of no interest.
            let slot = slots.get(&completion.queue_pair).copied();
            if let Some(rdma) = slot.and_then(|slot| connections.get(slot)).and_then(|client| client.link.rdma()) {
                rdma.completed(completion);
            }
        })
    }

    /// Makes a queue pair for a connection that asks for one.
    pub(super) fn upgrade(
        &mut self,
        slot: usize,
        connections: &mut Connections,
        request: &RdmaConnect,
    ) -> Result<(), TransportError> {
        let Some(client) = connections.get(slot) else { return Ok(()) };
        let rdma = RdmaConnection::accept(&self.device, &self.queue, request)?;
        self.slots.insert(rdma.number(), slot);
        client.link.upgrade(rdma);
        Ok(())
    }

    /// Forgets a queue pair. Call it once nothing more completes under its number, which another queue pair may get.
    pub(super) fn forget(&mut self, number: u32) {
        self.slots.remove(&number);
    }

    /// Slots of the connections that have a queue pair.
    pub(super) fn slots(&self) -> Vec<usize> {
        self.slots.values().copied().collect()
    }

    /// Logs the events that the device announces.
    ///
    /// # Errors
    /// The device is gone.
    pub(super) fn take_events(&self) -> io::Result<()> {
        while let Some(event) = self.device.take_event() {
            tracing::warn!(device = self.device.device(), event, "the RDMA device announces");
        }
        if self.device.is_present() { Ok(()) } else { Err(io::Error::other("it was removed, or broke down")) }
    }
}

/// Returns the refusal of a client that asks for a queue pair at a broker without a device.
pub(super) fn no_device() -> TransportError {
    let text = "this broker does not offer RDMA: start it with transport: verbs, roce or dpdk (its log says if it has lost its device)";
    TransportError::refused(ErrorCode::NoTransport, text)
}
