//! Broker's half of a transport, one per polling thread.

use crate::channel::Channel;
use crate::connection::{Connection, TransportError};
use crate::rdma::{RdmaConnection, RdmaDevice, RdmaQueue};
use crate::tcp::{SocketOptions, TcpConnection};
use embarcadero_cxl::{Fabric, Native};
use embarcadero_wire::{ErrorCode, RdmaConnect};
use std::collections::HashMap;
use std::io;
use std::net::TcpStream;
use std::os::fd::RawFd;
use std::sync::Arc;

/// Connections of a polling thread, by slot.
pub trait Slots<C> {
    /// Returns the connection in a slot, if there is one.
    fn connection(&mut self, slot: usize) -> Option<&mut C>;
}

/// Part of a transport that one polling thread of a broker has: it takes in connections, and hands completions to them.
///
/// The thread names its connections by slot. Transports without a device use the defaults.
pub trait Endpoint<F: Fabric>: Send {
    /// Broker's end of a connection.
    type Connection: Connection<F>;

    /// Takes in a connection that has come; `None` when there is no other. The error is that of one connection.
    fn accept(&mut self) -> Option<io::Result<Self::Connection>>;

    /// Gives the connection in a slot a queue pair, which its peer asks for.
    ///
    /// # Errors
    /// [`TransportError::Refused`] when there is no device, or no room on it.
    fn upgrade(
        &mut self,
        _slot: usize,
        _connection: &mut Self::Connection,
        _request: &RdmaConnect,
    ) -> Result<(), TransportError> {
        Err(no_device())
    }

    /// Hands all completions that have come to their connections. Returns the number of completions.
    ///
    /// # Errors
    /// The device is lost.
    fn complete(&mut self, _connections: &mut impl Slots<Self::Connection>) -> io::Result<usize> {
        Ok(0)
    }

    /// Forgets the connection that was in a slot. Call it after its drop, once [`Endpoint::complete`] finds nothing.
    fn forget(&mut self, _slot: usize) {}

    /// Descriptor that becomes readable when something has completed since [`Endpoint::arm`].
    fn descriptor(&self) -> Option<RawFd> {
        None
    }

    /// Makes [`Endpoint::descriptor`] readable when something completes from now on.
    ///
    /// # Errors
    /// The error of the device.
    fn arm(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Hands the events that the device announces to `each`: its name, and the event in words.
    ///
    /// # Errors
    /// The device is gone.
    fn take_events(&self, _each: impl FnMut(&str, String)) -> io::Result<()> {
        Ok(())
    }

    /// Lets go of a device that is lost. Returns the slots of the connections that need it.
    fn lose_device(&mut self) -> Vec<usize> {
        Vec::new()
    }
}

/// Returns the refusal of a client that asks for a queue pair at a broker without a device.
fn no_device() -> TransportError {
    let text = "this broker does not offer RDMA: start it with transport: verbs, roce or dpdk (its log says if it has lost its device)";
    TransportError::refused(ErrorCode::NoTransport, text)
}

/// Endpoint of real hosts: accepted sockets, and the completion queue of the broker's RDMA device.
pub struct SocketEndpoint {
    accepted: Box<dyn FnMut() -> Option<TcpStream> + Send>,
    options: SocketOptions,
    device: Option<Completions>,
}

/// Completion queue, and the slots of the connections whose queue pairs complete on it.
struct Completions {
    device: Arc<RdmaDevice>,
    queue: RdmaQueue,
    /// Slot of the connection by queue pair number.
    slots: HashMap<u32, usize>,
}

impl SocketEndpoint {
    /// Endpoint that takes in the sockets that `accepted` returns, and makes queue pairs on `device`.
    ///
    /// # Errors
    /// The device has no room for another completion queue.
    pub fn new(
        accepted: impl FnMut() -> Option<TcpStream> + Send + 'static,
        options: SocketOptions,
        device: Option<&Arc<RdmaDevice>>,
    ) -> io::Result<Self> {
        let completions = |device: &Arc<RdmaDevice>| {
            let queue = RdmaQueue::new(device).map_err(io::Error::other)?;
            Ok::<_, io::Error>(Completions { device: Arc::clone(device), queue, slots: HashMap::new() })
        };
        Ok(Self { accepted: Box::new(accepted), options, device: device.map(completions).transpose()? })
    }
}

impl Endpoint<Native> for SocketEndpoint {
    type Connection = Channel;

    fn accept(&mut self) -> Option<io::Result<Channel>> {
        let stream = (self.accepted)()?;
        Some(TcpConnection::new(stream, self.options).map(Channel::new))
    }

    fn upgrade(&mut self, slot: usize, connection: &mut Channel, request: &RdmaConnect) -> Result<(), TransportError> {
        let Completions { device, queue, slots } = self.device.as_mut().ok_or_else(no_device)?;
        let rdma = RdmaConnection::accept(device, queue, request)?;
        slots.insert(rdma.number(), slot);
        connection.upgrade(rdma);
        Ok(())
    }

    fn complete(&mut self, connections: &mut impl Slots<Channel>) -> io::Result<usize> {
        let Some(Completions { queue, slots, .. }) = &mut self.device else { return Ok(0) };
        queue.poll(|completion| {
            // Completions of queue pairs that are gone are of no interest.
            let slot = slots.get(&completion.queue_pair);
            if let Some(rdma) = slot.and_then(|slot| connections.connection(*slot)).and_then(Channel::rdma) {
                rdma.completed(completion);
            }
        })
    }

    fn forget(&mut self, slot: usize) {
        if let Some(device) = &mut self.device {
            device.slots.retain(|_, of| *of != slot);
        }
    }

    fn descriptor(&self) -> Option<RawFd> {
        self.device.as_ref().map(|device| device.queue.descriptor())
    }

    fn arm(&mut self) -> io::Result<()> {
        self.device.as_mut().map_or(Ok(()), |device| device.queue.arm())
    }

    fn take_events(&self, mut each: impl FnMut(&str, String)) -> io::Result<()> {
        let Some(Completions { device, .. }) = &self.device else { return Ok(()) };
        while let Some(event) = device.take_event() {
            each(device.device(), event);
        }
        if device.is_present() { Ok(()) } else { Err(io::Error::other("it was removed, or broke down")) }
    }

    fn lose_device(&mut self) -> Vec<usize> {
        self.device.take().map_or(Vec::new(), |device| device.slots.into_values().collect())
    }
}
