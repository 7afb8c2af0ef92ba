//! Connections of real hosts: a socket, with a queue pair beside it once the client has asked for one.

use crate::connection::{Connection, Landing, Received, TransportError};
use crate::link::{Item, LinkError, PublisherLink, SubscriberLink};
use crate::options::LinkOptions;
use crate::outbox::Outbox;
use crate::rdma::{RdmaConnection, RdmaPublisher, RdmaSubscriber};
use crate::send_buffer::SendBuffer;
use crate::tcp::{TcpConnection, TcpPublisher, TcpSubscriber, connect};
use embarcadero_cxl::{Native, RegionOffset};
use embarcadero_wire::batch::BatchBuilder;
use embarcadero_wire::{FRAME_BYTES, Frame, OpenPublish, Subscribe};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::RawFd;

/// Broker's end of a connection. Its descriptor is that of the socket.
pub struct Channel {
    // First, so that it is dropped first: the NIC lets go of memory before anybody else does.
    rdma: Option<Box<RdmaConnection>>,
    socket: TcpConnection,
}

impl Channel {
    /// Connection over TCP alone.
    pub(crate) fn new(socket: TcpConnection) -> Self {
        Self { rdma: None, socket }
    }

    /// Moves batches and frames over to a queue pair.
    pub(crate) fn upgrade(&mut self, rdma: RdmaConnection) {
        self.rdma = Some(Box::new(rdma));
    }

    /// Queue pair of the connection, if the client asked for one.
    pub(crate) fn rdma(&mut self) -> Option<&mut RdmaConnection> {
        self.rdma.as_deref_mut()
    }
}

impl Connection<Native> for Channel {
    fn receive<L: Landing>(
        &mut self,
        memory: &Native,
        landing: &mut L,
        budget: usize,
    ) -> Result<Received, TransportError> {
        if let Some(rdma) = &mut self.rdma {
            match rdma.receive(memory, landing, budget)? {
                Received::Nothing => {}
                received => return Ok(received),
            }
        }
        self.socket.receive(memory, landing, budget)
    }

    fn send(&mut self, memory: &Native, outbox: &mut Outbox) -> Result<u64, TransportError> {
        match &mut self.rdma {
            Some(rdma) => rdma.send(&mut self.socket, memory, outbox),
            None => self.socket.send(memory, outbox),
        }
    }

    fn descriptor(&self) -> Option<RawFd> {
        self.socket.descriptor()
    }

    fn has_work(&self) -> bool {
        self.rdma.as_ref().is_some_and(|rdma| rdma.has_work())
    }

    fn has_to_send(&self) -> bool {
        self.rdma.as_ref().is_some_and(|rdma| rdma.has_to_send())
    }

    fn waits_for_socket(&self, outbox: &Outbox) -> bool {
        match &self.rdma {
            Some(rdma) => rdma.waits_for_socket(),
            None => self.socket.waits_for_socket(outbox),
        }
    }

    fn finish(&mut self) {
        self.socket.finish();
    }

    fn discard(&mut self) -> bool {
        self.socket.discard()
    }

    fn windows(&self) -> impl Iterator<Item = RegionOffset> {
        self.rdma.iter().flat_map(|rdma| rdma.windows())
    }

    fn arriving(&self) -> Option<u64> {
        self.socket.arriving()
    }

    fn close_windows(&mut self) {
        if let Some(rdma) = &mut self.rdma {
            rdma.close_windows();
        }
    }
}

/// Publisher's end of a connection.
pub struct PublisherChannel {
    rdma: Option<Box<RdmaPublisher>>,
    socket: TcpPublisher,
}

impl PublisherChannel {
    pub(crate) fn connect(broker: SocketAddr, options: &LinkOptions, open: &OpenPublish) -> io::Result<Self> {
        let mut stream = connect(broker, options.timeout, options.sockets)?;
        let rdma = match &options.device {
            Some(client) => Some(Box::new(RdmaPublisher::connect(client, &mut stream, options)?)),
            None => None,
        };
        stream.write_all(&open.encode())?;
        Ok(Self { rdma, socket: TcpPublisher::new(stream)? })
    }
}

impl PublisherLink for PublisherChannel {
    fn write(&mut self, batch: &mut BatchBuilder<SendBuffer>, written: usize) -> io::Result<usize> {
        match &mut self.rdma {
            Some(rdma) => rdma.stage(batch).map(|staged| if staged { batch.bytes().len() } else { 0 }),
            None => self.socket.write(batch, written),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.rdma {
            Some(rdma) => rdma.flush(),
            None => Ok(()),
        }
    }

    fn poll(&mut self, frames: &mut Vec<Frame>) -> Result<(), LinkError> {
        let over_rdma = self.rdma.as_mut().map_or(Ok(()), |rdma| rdma.poll(frames));
        // The socket may know why a queue pair broke.
        self.socket.poll(frames)?;
        over_rdma
    }

    fn batches_in_use(&mut self) -> usize {
        self.rdma.as_mut().map_or(0, |rdma| rdma.in_use())
    }

    fn arm(&mut self) -> io::Result<()> {
        self.rdma.as_mut().map_or(Ok(()), |rdma| rdma.arm())
    }

    fn descriptors(&self, writable: bool) -> impl Iterator<Item = (RawFd, bool)> + use<> {
        let rdma = self.rdma.as_ref().map(|rdma| (rdma.descriptor(), false));
        self.socket.descriptors(writable && rdma.is_none()).chain(rdma)
    }
}

/// Subscriber's end of a connection.
pub struct SubscriberChannel {
    rdma: Option<Box<RdmaSubscriber>>,
    socket: TcpSubscriber,
}

impl SubscriberChannel {
    pub(crate) fn connect(broker: SocketAddr, options: &LinkOptions, request: &Subscribe) -> io::Result<Self> {
        let mut stream = connect(broker, options.timeout, options.sockets)?;
        let rdma = match &options.device {
            Some(client) => Some(Box::new(RdmaSubscriber::connect(client, &mut stream, options)?)),
            None => None,
        };
        stream.write_all(&request.encode())?;
        Ok(Self { rdma, socket: TcpSubscriber::new(stream)? })
    }
}

impl SubscriberLink for SubscriberChannel {
    fn take(&mut self) -> Result<Item, LinkError> {
        let over_rdma = match &mut self.rdma {
            Some(rdma) => rdma.take(),
            None => Ok(Item::Nothing),
        };
        match over_rdma {
            Ok(Item::Nothing) => self.socket.take(),
            // The socket may know why a queue pair broke.
            Err(error @ LinkError::Lost(_)) => self.socket.take().and(Err(error)),
            other => other,
        }
    }

    fn bytes(&self) -> &[u8] {
        match &self.rdma {
            Some(rdma) => rdma.bytes(),
            None => self.socket.bytes(),
        }
    }

    fn send(&mut self, frame: &[u8; FRAME_BYTES]) -> io::Result<bool> {
        self.socket.send(frame)
    }

    fn received_bytes(&self) -> u64 {
        self.socket.received_bytes()
    }

    fn arm(&mut self) -> io::Result<()> {
        self.rdma.as_mut().map_or(Ok(()), |rdma| rdma.arm())
    }

    fn descriptors(&self) -> impl Iterator<Item = RawFd> + use<> {
        self.socket.descriptors().chain(self.rdma.as_ref().map(|rdma| rdma.descriptor()))
    }
}
