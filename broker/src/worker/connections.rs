//! The connections of one polling thread.

use crate::delivery::SubscriberSession;
use crate::ingest::PublisherSession;
use embarcadero_cxl::Fabric;
use embarcadero_cxl::layout::SESSION_WINDOW;
use embarcadero_os::{Interest, Poller, Ready};
use embarcadero_transport::{Connection, Outbox, Slots};
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Largest number of frames in an outbox whose peer is still listened to. A window of acks that are replayed fits, and
/// one of new ones.
const OUTBOX_FRAMES: usize = 2 * SESSION_WINDOW as usize;

/// Role of a connection's peer.
pub(super) enum Role<F: Fabric> {
    /// The peer has not sent an opening frame yet. It has time until then.
    New(Instant),
    /// The peer publishes.
    Publisher(Box<PublisherSession<F>>),
    /// The peer subscribes.
    Subscriber(Box<SubscriberSession<F>>),
    /// The error is on its way to the peer; the connection closes at this time at the latest.
    Leaving(Instant),
}

/// Connection, and what this broker does for its peer.
pub(super) struct Client<F: Fabric, L> {
    // The first field is dropped first. After that nothing reads or writes the memory that the role lets go.
    pub(super) link: L,
    pub(super) role: Role<F>,
    pub(super) outbox: Outbox,
    /// True while the peer is not listened to: a batch waits, or the outbox is too long.
    pub(super) waiting: bool,
    /// True while the outbox needs room in the socket.
    needs_room: bool,
    /// Interest with which the poller watches the socket; `None` while it does not.
    watched: Option<Interest>,
    /// Name of the connection among all that its thread ever has.
    token: u64,
}

impl<F: Fabric, L: Connection<F>> Client<F, L> {
    /// Name of the connection among all that its thread ever has.
    pub(super) fn token(&self) -> u64 {
        self.token
    }

    /// Returns true when something is to be sent, or the poller watches for room in the socket.
    pub(super) fn has_to_send(&self) -> bool {
        !self.outbox.is_empty() || self.needs_room || self.link.has_to_send()
    }

    /// Returns true when the peer has so much to read that it is not listened to.
    pub(super) fn is_behind(&self) -> bool {
        self.outbox.len() > OUTBOX_FRAMES
    }

    /// Returns true when batches of the region wait to be sent to the peer, or are being sent.
    pub(super) fn reads_region(&self) -> bool {
        matches!(self.role, Role::Subscriber(_)) && self.outbox.lowest_position() != u64::MAX
    }

    /// Shows whether the peer is a publisher whose batch waits for memory or for the Batchlog.
    pub(super) fn show_wait(&mut self) {
        let is_behind = self.is_behind();
        if let Role::Publisher(session) = &mut self.role {
            session.show_wait(!is_behind);
        }
    }

    /// Returns true when the peer has sent no opening frame in time.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        matches!(self.role, Role::New(until) if now > until)
    }

    /// Interest with which the socket has to be watched; `None` when it shows nothing that matters now.
    fn interest(&self) -> Option<Interest> {
        // A publisher without acks may hand over and leave. Its waits are bounded, and what it sent counts.
        let may_leave = matches!(&self.role, Role::Publisher(session) if !session.wants_acks());
        if self.waiting && may_leave {
            return None;
        }
        Some(Interest { input: !self.waiting, room: self.needs_room })
    }

    /// Watches the socket for what it has to be watched for now.
    fn watch(&mut self, poller: &Poller) -> io::Result<()> {
        let Some(descriptor) = self.link.descriptor() else { return Ok(()) };
        let wanted = self.interest();
        match (self.watched, wanted) {
            (None, Some(interest)) => poller.add(descriptor, self.token, interest)?,
            (Some(watched), Some(interest)) if watched != interest => {
                poller.modify(descriptor, self.token, interest)?;
            }
            (Some(_), None) => poller.remove(descriptor)?,
            (None, None) | (Some(_), Some(_)) => {}
        }
        self.watched = wanted;
        Ok(())
    }

    /// Returns true when something may have come that no descriptor shows.
    pub(super) fn is_due(&self) -> bool {
        let is_shown = match self.role {
            // The opening frame comes through the socket, if there is one.
            Role::New(_) => self.link.descriptor().is_some(),
            Role::Leaving(_) => true,
            Role::Publisher(_) | Role::Subscriber(_) => false,
        };
        self.waiting || (!is_shown && self.link.has_work())
    }
}

/// Connections of one polling thread by slot, and the readiness of their sockets.
///
/// Slots are reused. A token names one connection only.
pub(super) struct Connections<F: Fabric, L> {
    poller: Poller,
    clients: Vec<Option<Client<F, L>>>,
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

impl<F: Fabric, L: Connection<F>> Connections<F, L> {
    /// Returns an empty set. `count` is shared by all threads of the broker and counts their connections.
    pub(super) fn new(count: Arc<AtomicUsize>) -> io::Result<Self> {
        Ok(Self { poller: Poller::new()?, clients: Vec::new(), free: Vec::new(), last_number: 0, count })
    }

    /// Watches another descriptor beside the sockets.
    pub(super) fn watch_other(&self, descriptor: RawFd, token: u64) -> io::Result<()> {
        self.poller.add(descriptor, token, Interest::INPUT)
    }

    /// Waits for sockets that are ready; [`Duration::ZERO`] only looks.
    pub(super) fn wait(&mut self, timeout: Duration, ready: &mut Vec<Ready>) -> io::Result<()> {
        self.poller.wait(timeout, ready)
    }

    /// Adds a connection, whose peer has to send an opening frame by `until`.
    pub(super) fn insert(&mut self, link: L, until: Instant) -> io::Result<()> {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.clients.push(None);
            self.clients.len() - 1
        });
        self.last_number = self.last_number.wrapping_add(1);
        let token = token(slot, self.last_number);
        let (role, outbox) = (Role::New(until), Outbox::default());
        let mut client = Client { link, role, outbox, waiting: false, needs_room: false, watched: None, token };
        if let Err(error) = client.watch(&self.poller) {
            self.free.push(slot);
            return Err(error);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.clients[slot] = Some(client);
        Ok(())
    }

    /// Range of all slots that were ever in use; some may be empty.
    pub(super) fn slots(&self) -> std::ops::Range<usize> {
        0..self.clients.len()
    }

    /// Returns the connection in a slot.
    pub(super) fn get(&mut self, slot: usize) -> Option<&mut Client<F, L>> {
        self.clients.get_mut(slot)?.as_mut()
    }

    /// Returns the slot of the connection that a token names, if it is still there.
    pub(super) fn slot_of(&self, token: u64) -> Option<usize> {
        let slot = (token >> 32) as usize;
        let client = self.clients.get(slot)?.as_ref()?;
        (client.token == token).then_some(slot)
    }

    /// Shows which publishers wait for memory or for the Batchlog.
    pub(super) fn show_waits(&mut self) {
        self.clients.iter_mut().flatten().for_each(Client::show_wait);
    }

    /// Stops or resumes listening to a peer. While it is not listened to, only its hang-up is watched for.
    pub(super) fn set_waiting(&mut self, slot: usize, waiting: bool) {
        let Some(Some(client)) = self.clients.get_mut(slot) else { return };
        client.waiting = waiting;
        if let Err(error) = client.watch(&self.poller) {
            tracing::error!(%error, "a socket cannot be watched");
        }
    }

    /// Starts or stops watching for room in a socket, as its outbox needs it.
    pub(super) fn watch_room(&mut self, slot: usize) -> io::Result<()> {
        let Some(Some(client)) = self.clients.get_mut(slot) else { return Ok(()) };
        client.needs_room = client.link.waits_for_socket(&client.outbox);
        client.watch(&self.poller)
    }

    /// Removes and returns a connection. Drop it to free what it holds.
    pub(super) fn remove(&mut self, slot: usize) -> Option<Client<F, L>> {
        let client = self.clients.get_mut(slot)?.take()?;
        if client.watched.is_some()
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

impl<F: Fabric, L: Connection<F>> Slots<L> for Connections<F, L> {
    fn connection(&mut self, slot: usize) -> Option<&mut L> {
        self.get(slot).map(|client| &mut client.link)
    }
}
