//! The network between clients and brokers. Messages and packets are lost, repeated, and overtake each other. Packets are
//! damaged too.

use super::fate::{one_in, random};
use super::host::BATCH_BYTES;
use super::nic::{Port, Window};
use super::{CLIENTS, TOPIC};
use embarcadero_cxl::layout::SessionState;
use embarcadero_cxl::session_table::Session;
use embarcadero_roce::packet::SCRATCH_BYTES;
use embarcadero_roce::psn::Psn;
use embarcadero_wire::{Ack, ClientId, Epoch, SessionSlot};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Returns the id of a client that has lost `lost` sessions: after each it goes on as another.
pub(crate) fn id_of(client: usize, lost: u64) -> ClientId {
    ClientId(1 + client as u64 + lost * CLIENTS as u64)
}

/// Returns the client that has, or had, an id.
pub(crate) fn client_of(id: ClientId) -> usize {
    ((id.0 - 1) % CLIENTS as u64) as usize
}

/// Batch on its way to a broker.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    /// Session that it was sent in.
    pub session: Session,
    /// Sequence in its session.
    pub sequence: u64,
    /// Number among the batches of its client, from 0, which is what it holds.
    pub content: u64,
    /// First sequence for which the client waits for an acknowledgement.
    pub resume_from: u64,
}

impl Batch {
    /// Place of the second copy of the batch's client and number, in words of 8 bytes.
    const END: usize = (BATCH_BYTES as usize - 64) / 8;

    /// Returns the bytes that a NIC writes for it.
    pub fn encode(&self) -> Vec<u8> {
        let Self { session, sequence, content, resume_from } = self;
        let mut words = [0; BATCH_BYTES as usize / 8];
        let (client, epoch, slot) = (session.client_id.0, session.epoch.0.into(), session.slot.0.into());
        let header = [client, *content, epoch, slot, *sequence, *resume_from];
        words[..header.len()].copy_from_slice(&header);
        words[6] = session.ack_level.into();
        words[Self::END..Self::END + 2].copy_from_slice(&header[..2]);
        words.iter().flat_map(|word: &u64| word.to_le_bytes()).collect()
    }

    /// Reads a batch from the bytes that a NIC wrote.
    pub fn decode(bytes: &[u8; BATCH_BYTES as usize]) -> Self {
        let word = |index: usize| u64::from_le_bytes(bytes.as_chunks().0[index]);
        assert_eq!((word(0), word(1)), (word(Self::END), word(Self::END + 1)), "half of a batch is complete");
        let session = Session {
            slot: SessionSlot(word(3) as u32),
            client_id: ClientId(word(0)),
            epoch: Epoch(word(2) as u32),
            state: SessionState::Open,
            topic: TOPIC.0,
            topic_incarnation: TOPIC.1,
            committed: 0,
            ack_level: word(6) as u8,
            first_epoch: Epoch(0),
            first_sequence: 0,
        };
        Self { session, sequence: word(4), content: word(1), resume_from: word(5) }
    }
}

/// Message to a broker.
#[derive(Clone, Copy, Debug)]
pub enum Request {
    /// Orders a batch.
    Publish(Batch),
    /// Opens a window that a client may write to.
    Connect {
        /// Client that asks.
        client: usize,
        /// Number of the client's first packet.
        psn: Psn,
    },
    /// Opens the next epoch of a client's session, if the broker leads.
    OpenSession {
        /// Id of the client that asks.
        id: ClientId,
        /// True if it can only go on with the session that it had.
        resume: bool,
        /// Number that tells late answers from those that are waited for.
        attempt: u64,
    },
}

/// Message to a client.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// A batch of the client that had this id is committed, and as durable as it has to be.
    Ack(ClientId, Ack),
    /// The client's session of this epoch has ended.
    Fenced(ClientId, Epoch),
    /// A window was opened.
    Connected {
        /// Host that opened it.
        host: usize,
        /// Memory that the client may write.
        window: Window,
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
    calm: Mutex<bool>,
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
            calm: Mutex::new(false),
        }
    }

    /// Ends all faults: nothing is lost any more, and everything comes in turn.
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

    /// Drops everything that is under way to a host.
    pub fn cut(&self, host: usize) {
        lock(&self.requests[host]).under_way.clear();
        lock(&self.packets[Port::of_host(host).0]).under_way.clear();
    }

    pub fn packet(&self, to: Port, mut packet: Vec<u8>) {
        let calm = *lock(&self.calm);
        if !calm && one_in(64) {
            let at = random(SCRATCH_BYTES as u64..packet.len() as u64) as usize;
            packet[at] ^= 1 << random(0..8);
        }
        lock(&self.packets[to.0]).send(packet, calm);
    }

    pub fn take_packet(&self, at: Port) -> Option<Vec<u8>> {
        let calm = *lock(&self.calm);
        lock(&self.packets[at.0]).receive(calm)
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
