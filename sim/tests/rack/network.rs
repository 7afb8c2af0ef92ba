//! The network between clients and brokers. Control calls and packets of NICs are lost, repeated, and overtake each other.
//! Packets are damaged too. Connections of sockets are slow, and break.

use super::fate::{one_in, random};
use super::nic::Port;
use embarcadero_control::v1 as proto;
use embarcadero_roce::packet::SCRATCH_BYTES;
use embarcadero_sim::Weather;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Call to the control service of a broker.
#[derive(Clone, Debug)]
pub enum Call {
    /// Asks for brokers and topics.
    Cluster,
    /// Opens the next epoch of a client's session, if the broker leads.
    Open(proto::OpenSessionRequest),
    /// Closes a session, if the broker leads.
    Close(proto::CloseSessionRequest),
}

/// Call, the client that calls, and the number that tells its answer from others.
#[derive(Clone, Debug)]
pub struct Request {
    pub client: usize,
    pub number: u64,
    pub call: Call,
}

/// Outcome of a call.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Brokers and topics.
    Cluster(proto::MetadataResponse),
    /// A session was opened, or is gone.
    Opened(proto::OpenSessionResponse),
    /// Another client has the id, as far as the leader can tell.
    InUse,
    /// The session is closed.
    Closed,
}

/// Answer to a call.
#[derive(Clone, Debug)]
pub struct Answer {
    pub number: u64,
    pub outcome: Outcome,
}

struct Wire<T> {
    under_way: Vec<T>,
}

/// Calls and packets that are under way.
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
        lock(&self.requests[host]).send(request, self.is_calm());
    }

    pub fn take_request(&self, host: usize) -> Option<Request> {
        lock(&self.requests[host]).receive(self.is_calm())
    }

    /// Drops everything that is under way to a host.
    pub fn cut(&self, host: usize) {
        lock(&self.requests[host]).under_way.clear();
        lock(&self.packets[Port::of_host(host).0]).under_way.clear();
    }

    /// Drops the answers that are under way to a client.
    pub fn hang_up(&self, client: usize) {
        lock(&self.answers[client]).under_way.clear();
    }

    pub fn packet(&self, to: Port, mut packet: Vec<u8>) {
        if !self.is_calm() && one_in(64) {
            let at = random(SCRATCH_BYTES as u64..packet.len() as u64) as usize;
            packet[at] ^= 1 << random(0..8);
        }
        lock(&self.packets[to.0]).send(packet, self.is_calm());
    }

    pub fn take_packet(&self, at: Port) -> Option<Vec<u8>> {
        lock(&self.packets[at.0]).receive(self.is_calm())
    }

    pub fn answer(&self, client: usize, answer: Answer) {
        lock(&self.answers[client]).send(answer, self.is_calm());
    }

    pub fn take_answer(&self, client: usize) -> Option<Answer> {
        lock(&self.answers[client]).receive(self.is_calm())
    }
}
