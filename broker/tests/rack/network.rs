//! The network between clients and brokers: messages are lost, repeated, and overtake each other.

use super::fate::{one_in, random};
use embarcadero_datapath::cxl::session_table::Session;
use embarcadero_datapath::wire::Ack;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A batch on its way: the session's identity, its sequence, and what it holds.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    /// Session that it was sent in.
    pub session: Session,
    /// Its sequence.
    pub sequence: u64,
    /// The `content`-th that its client published, from 0.
    pub content: u64,
    /// First sequence of which the client wants to hear.
    pub resume_from: u64,
}

/// To a broker.
#[derive(Clone, Copy, Debug)]
pub enum Request {
    /// Order this.
    Publish(Batch),
    /// Open the next epoch of a client's session, if you are the head.
    OpenSession {
        /// Which client.
        client: usize,
        /// Tells late answers from those that are waited for.
        attempt: u64,
    },
}

/// To a client.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// A batch is committed, and as durable as it has to be.
    Ack(Ack),
    /// The session of this epoch has ended.
    Fenced(u32),
    /// A session was opened.
    Opened {
        /// The attempt that it answers.
        attempt: u64,
        /// As the table has it.
        session: Session,
    },
}

struct Wire<T> {
    under_way: Vec<T>,
}

/// Everything that is under way.
pub struct Network {
    requests: Vec<Mutex<Wire<Request>>>,
    answers: Vec<Mutex<Wire<Answer>>>,
    calm: Mutex<bool>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T: Copy> Wire<T> {
    fn send(&mut self, message: T, calm: bool) {
        if calm {
            self.under_way.push(message);
            return;
        }
        let copies = if one_in(16) { 0 } else { 1 + u64::from(one_in(16)) };
        (0..copies).for_each(|_| self.under_way.push(message));
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
            requests: (0..hosts).map(|_| Mutex::new(Wire { under_way: Vec::new() })).collect(),
            answers: (0..clients).map(|_| Mutex::new(Wire { under_way: Vec::new() })).collect(),
            calm: Mutex::new(false),
        }
    }

    /// From now on nothing is lost and all comes in turn.
    pub fn calm(&self) {
        *lock(&self.calm) = true;
    }

    pub fn request(&self, host: usize, request: Request) {
        let calm = *lock(&self.calm);
        lock(&self.requests[host]).send(request, calm);
    }

    pub fn take_request(&self, host: usize) -> Option<Request> {
        let calm = *lock(&self.calm);
        lock(&self.requests[host]).receive(calm)
    }

    /// What is under way to a host that is not there is lost.
    pub fn cut(&self, host: usize) {
        lock(&self.requests[host]).under_way.clear();
    }

    pub fn answer(&self, client: usize, answer: Answer) {
        let calm = *lock(&self.calm);
        lock(&self.answers[client]).send(answer, calm);
    }

    pub fn take_answer(&self, client: usize) -> Option<Answer> {
        let calm = *lock(&self.calm);
        lock(&self.answers[client]).receive(calm)
    }
}
