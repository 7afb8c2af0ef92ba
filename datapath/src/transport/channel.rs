//! A broker's end of a connection, whatever carries it.

use super::tcp::TcpConnection;
use super::verbs::VerbsEnd;
use super::{Connection, Landing, Outbox, Received, TransportError};
use crate::cxl::Native;
use std::os::fd::RawFd;

/// A TCP connection, with a queue pair beside it once the peer has asked for one.
pub struct Channel {
    // First, so that it is dropped first: the NIC lets go of memory before anybody else does.
    verbs: Option<Box<VerbsEnd>>,
    socket: TcpConnection,
}

impl Channel {
    /// A connection over TCP.
    #[must_use]
    pub fn new(socket: TcpConnection) -> Self {
        Self { verbs: None, socket }
    }

    /// Moves batches and frames over to a queue pair.
    pub fn upgrade(&mut self, verbs: VerbsEnd) {
        self.verbs = Some(Box::new(verbs));
    }

    /// The queue pair, if there is one.
    pub fn verbs(&mut self) -> Option<&mut VerbsEnd> {
        self.verbs.as_deref_mut()
    }

    /// True when batches go over a queue pair.
    #[must_use]
    pub fn is_verbs(&self) -> bool {
        self.verbs.is_some()
    }

    /// True when batches are in the region's memory once they are complete, and no cache of this host has to be flushed.
    #[must_use]
    pub fn writes_past_caches(&self) -> bool {
        self.verbs.as_ref().is_some_and(|verbs| verbs.writes_past_caches())
    }

    /// The socket, for a [`super::Poller`].
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.socket.descriptor()
    }

    /// Says that nothing more will be sent. The peer can still read what was.
    pub fn finish(&self) {
        self.socket.finish();
    }

    /// Reads and forgets what the peer still sends; true when it has closed.
    pub fn discard(&mut self) -> bool {
        self.socket.discard()
    }

    /// The peer is to write nothing more into the region: its landing windows close before this returns.
    pub fn close_windows(&mut self) {
        if let Some(verbs) = &mut self.verbs {
            verbs.close_windows();
        }
    }

    /// True when [`Connection::receive`] has something to take that the socket does not show.
    #[must_use]
    pub fn has_work(&self) -> bool {
        if let Some(verbs) = &self.verbs {
            return verbs.has_work();
        }
        false
    }

    /// True when [`Connection::send`] has something to do even if the outbox is empty.
    #[must_use]
    pub fn has_to_send(&self) -> bool {
        if let Some(verbs) = &self.verbs {
            return verbs.has_to_send();
        }
        false
    }

    /// True when what waits in `outbox` waits for room in the socket.
    #[must_use]
    pub fn waits_for_socket(&self, outbox: &Outbox) -> bool {
        if let Some(verbs) = &self.verbs {
            return verbs.waits_for_socket();
        }
        !outbox.is_empty()
    }
}

impl Connection for Channel {
    fn receive(&mut self, memory: &Native, landing: &mut impl Landing) -> Result<Received, TransportError> {
        if let Some(verbs) = &mut self.verbs {
            match verbs.receive(memory, landing)? {
                Received::Nothing => {}
                received => return Ok(received),
            }
        }
        self.socket.receive(memory, landing)
    }

    fn send(&mut self, memory: &Native, outbox: &mut Outbox) -> Result<u64, TransportError> {
        if let Some(verbs) = &mut self.verbs {
            return verbs.send(&mut self.socket, memory, outbox);
        }
        self.socket.send(memory, outbox)
    }
}
