//! The connections of one polling thread.

use crate::delivery::SubscriberSession;
use crate::ingest::PublisherSession;
use embarcadero_cxl::Native;
use embarcadero_os::{Poller, Ready};
use embarcadero_transport::{Connection, Outbox, Slots};
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Role of a connection's peer.
pub(super) enum Role {
    /// The peer has not sent an opening frame yet.
    New,
    /// The peer publishes.
    Publisher(Box<PublisherSession>),
    /// The peer subscribes.
    Subscriber(Box<SubscriberSession>),
    /// The error is on its way to the peer; the connection closes at this time at the latest.
    Leaving(Instant),
}

/// Connection, and what this broker does for its peer.
pub(super) struct Client<L> {
    // The first field is dropped first. After that nothing reads or writes the memory that the role lets go.
    pub(super) link: L,
    pub(super) role: Role,
    pub(super) outbox: Outbox,
    /// True while a batch waits for room; the socket is not watched then.
    pub(super) waiting: bool,
    /// True while the poller watches for room in the socket.
    watches_room: bool,
    /// Name of the connection among all that its thread ever has.
    token: u64,
}

impl<L: Connection<Native>> Client<L> {
    /// Name of the connection among all that its thread ever has.
    pub(super) fn token(&self) -> u64 {
        self.token
    }

    /// Returns true when something is to be sent, or the poller watches for room in the socket.
    pub(super) fn has_to_send(&self) -> bool {
        !self.outbox.is_empty() || self.watches_room || self.link.has_to_send()
    }

    /// Returns true when something may have come that no descriptor shows.
    pub(super) fn is_due(&self) -> bool {
        let open = matches!(self.role, Role::Publisher(_) | Role::Subscriber(_));
        self.waiting || (open && self.link.has_work())
    }
}

/// Connections of one polling thread by slot, and the readiness of their sockets.
///
/// Slots are reused. A token names one connection only.
pub(super) struct Connections<L> {
    poller: Poller,
    clients: Vec<Option<Client<L>>>,
    free: Vec<usize>,
    /// Number of the last connection; it wraps.
    last_number: u32,
    /// Number of connections of all polling threads of the broker.
    count: Arc<AtomicUsize>,
}

/// Returns the token of the connection with number `number` in a slot.
const fn token(slot: usize, number: u32) -> u64 {
    (slot as u64) << 32 | number as u64
}

impl<L: Connection<Native>> Connections<L> {
    /// Returns an empty set. `count` is shared by all threads of the broker and counts their connections.
    pub(super) fn new(count: Arc<AtomicUsize>) -> io::Result<Self> {
        Ok(Self { poller: Poller::new()?, clients: Vec::new(), free: Vec::new(), last_number: 0, count })
    }

    /// Watches another descriptor beside the sockets.
    pub(super) fn watch_other(&self, descriptor: RawFd, token: u64) -> io::Result<()> {
        self.poller.add(descriptor, token, false)
    }

    /// Waits for sockets that are ready; [`Duration::ZERO`] only looks.
    pub(super) fn wait(&mut self, timeout: Duration, ready: &mut Vec<Ready>) -> io::Result<()> {
        self.poller.wait(timeout, ready)
    }

    /// Adds a connection.
    pub(super) fn insert(&mut self, link: L) -> io::Result<()> {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.clients.push(None);
            self.clients.len() - 1
        });
        self.last_number = self.last_number.wrapping_add(1);
        let token = token(slot, self.last_number);
        let watched = link.descriptor().map(|descriptor| self.poller.add(descriptor, token, false));
        if let Some(Err(error)) = watched {
            self.free.push(slot);
            return Err(error);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        let outbox = Outbox::default();
        self.clients[slot] = Some(Client { link, role: Role::New, outbox, waiting: false, watches_room: false, token });
        Ok(())
    }

    /// Range of all slots that were ever in use; some may be empty.
    pub(super) fn slots(&self) -> std::ops::Range<usize> {
        0..self.clients.len()
    }

    /// Returns the connection in a slot.
    pub(super) fn get(&mut self, slot: usize) -> Option<&mut Client<L>> {
        self.clients.get_mut(slot)?.as_mut()
    }

    /// Returns the slot of the connection that a token names, if it is still there.
    pub(super) fn slot_of(&self, token: u64) -> Option<usize> {
        let slot = (token >> 32) as usize;
        let client = self.clients.get(slot)?.as_ref()?;
        (client.token == token).then_some(slot)
    }

    /// Returns all connections.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Client<L>> {
        self.clients.iter().flatten()
    }

    /// Stops or resumes watching the socket of a connection that waits for room.
    pub(super) fn set_waiting(&mut self, slot: usize, waiting: bool) {
        let Some(Some(client)) = self.clients.get_mut(slot) else { return };
        if client.waiting == waiting {
            return;
        }
        client.waiting = waiting;
        let Some(descriptor) = client.link.descriptor() else { return };
        let result = if waiting {
            self.poller.remove(descriptor)
        } else {
            self.poller.add(descriptor, client.token, client.watches_room)
        };
        if let Err(error) = result {
            tracing::error!(%error, "a socket cannot be watched");
        }
    }

    /// Starts or stops watching for room in a socket, as its outbox needs it.
    pub(super) fn watch_room(&mut self, slot: usize) -> io::Result<()> {
        let Some(Some(client)) = self.clients.get_mut(slot) else { return Ok(()) };
        let watch = client.link.waits_for_socket(&client.outbox);
        if watch != client.watches_room {
            client.watches_room = watch;
            if !client.waiting
                && let Some(descriptor) = client.link.descriptor()
            {
                self.poller.modify(descriptor, client.token, watch)?;
            }
        }
        Ok(())
    }

    /// Removes and returns a connection. Drop it to free what it holds.
    pub(super) fn remove(&mut self, slot: usize) -> Option<Client<L>> {
        let client = self.clients.get_mut(slot)?.take()?;
        if !client.waiting
            && let Some(descriptor) = client.link.descriptor()
        {
            // The caller closes the socket next, which ends the watch, too.
            let _ = self.poller.remove(descriptor);
        }
        self.count.fetch_sub(1, Ordering::Relaxed);
        self.free.push(slot);
        Some(client)
    }
}

impl<L: Connection<Native>> Slots<L> for Connections<L> {
    fn connection(&mut self, slot: usize) -> Option<&mut L> {
        self.get(slot).map(|client| &mut client.link)
    }
}
