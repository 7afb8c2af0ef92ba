//! The network between clients and brokers. Control calls and packets of NICs are lost, repeated, and overtake each other.
//! Packets are damaged too. Connections of sockets are slow, and break.

use super::CLIENTS;
use super::fate::{one_in, random};
use super::nic::Port;
use embarcadero_cxl::session_table::Session;
use embarcadero_roce::packet::SCRATCH_BYTES;
use embarcadero_sim::Weather;
use embarcadero_wire::{ClientId, SessionToken};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Returns the id of a client that has lost `lost` sessions: after each it goes on as another.
pub(crate) fn id_of(client: usize, lost: u64) -> ClientId {
    ClientId(1 + client as u64 + lost * CLIENTS as u64)
}

/// Returns the client that has, or had, an id.
pub(crate) fn client_of(id: ClientId) -> usize {
    ((id.0 - 1) % CLIENTS as u64) as usize
}

/// Call to the control service of a broker.
#[derive(Clone, Copy, Debug)]
pub enum Request {
    /// Opens the next epoch of a client's session, if the broker leads.
    OpenSession {
        /// Id of the client that asks.
        id: ClientId,
        /// True if it can only go on with the session that it had.
        resume: bool,
        /// Token that the client has of its session.
        token: SessionToken,
        /// Number that tells late answers from those that are waited for.
        attempt: u64,
    },
}

/// Answer to a client's call.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// Another client has the id, as far as the leader can tell.
    InUse {
        /// Attempt that is answered.
        attempt: u64,
    },
    /// A session was opened.
    Opened {
        /// Attempt that is answered.
        attempt: u64,
        /// Session as the session table has it; `None` if the client's session is gone.
        session: Option<Session>,
    },
}

struct Wire<T> {
    under_way: Vec<T>,
}

/// Messages and packets that are under way.
pub struct Network {
    requests: Vec<Mutex<Wire<Request>>>,
    answers: Vec<Mutex<Wire<Answer>>>,
    /// Packets of RoCEv2 to each NIC, behind scratch bytes.
    packets: Vec<Mutex<Wire<Vec<u8>>>>,
    calm: AtomicBool,
}

impl Weather for Network {
    fn delays(&self) -> bool {
        !self.is_calm() && one_in(4)
    }

    fn breaks(&self) -> bool {
        !self.is_calm() && one_in(300)
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T: Clone> Wire<T> {
    fn new() -> Mutex<Self> {
        Mutex::new(Self { under_way: Vec::new() })
    }

    fn send(&mut self, message: T, calm: bool) {
        if calm {
            self.under_way.push(message);
            return;
        }
        let copies = if one_in(16) { 0 } else { 1 + u64::from(one_in(16)) };
        (0..copies).for_each(|_| self.under_way.push(message.clone()));
    }

    fn receive(&mut self, calm: bool) -> Option<T> {
        if self.under_way.is_empty() {
            return None;
        }
        if calm || !one_in(4) {
            return Some(self.under_way.remove(0));
        }
        let overtakes = random(0..self.under_way.len() as u64) as usize;
        Some(self.under_way.remove(overtakes))
    }
}

impl Network {
    pub fn new(hosts: usize, clients: usize) -> Self {
        Self {
            requests: (0..hosts).map(|_| Wire::new()).collect(),
            answers: (0..clients).map(|_| Wire::new()).collect(),
            packets: (0..hosts + clients).map(|_| Wire::new()).collect(),
            calm: AtomicBool::new(false),
        }
    }

    /// Ends all faults: nothing is lost any more, and everything comes in turn.
    pub fn calm(&self) {
        self.calm.store(true, Ordering::Relaxed);
    }

    fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    pub fn request(&self, host: usize, request: Request) {
        let calm = self.is_calm();
        lock(&self.requests[host]).send(request, calm);
    }

    pub fn take_request(&self, host: usize) -> Option<Request> {
        let calm = self.is_calm();
        lock(&self.requests[host]).receive(calm)
    }

    /// Drops everything that is under way to a host.
    pub fn cut(&self, host: usize) {
        lock(&self.requests[host]).under_way.clear();
        lock(&self.packets[Port::of_host(host).0]).under_way.clear();
    }

    pub fn packet(&self, to: Port, mut packet: Vec<u8>) {
        let calm = self.is_calm();
        if !calm && one_in(64) {
            let at = random(SCRATCH_BYTES as u64..packet.len() as u64) as usize;
            packet[at] ^= 1 << random(0..8);
        }
        lock(&self.packets[to.0]).send(packet, calm);
    }

    pub fn take_packet(&self, at: Port) -> Option<Vec<u8>> {
        let calm = self.is_calm();
        lock(&self.packets[at.0]).receive(calm)
    }

    pub fn answer(&self, client: usize, answer: Answer) {
        let calm = self.is_calm();
        lock(&self.answers[client]).send(answer, calm);
    }

    pub fn take_answer(&self, client: usize) -> Option<Answer> {
        let calm = self.is_calm();
        lock(&self.answers[client]).receive(calm)
    }
}
