//! State of queue pairs, which their port keeps.

use super::memory::{Domain, LocalBytes, Reach, Window};
use super::receives::Receives;
use crate::outcome::{Completion, Outcome};
use crate::work::{Request, Work};
use embarcadero_roce as roce;
use embarcadero_roce::packet::{Opcode, Packet};
use embarcadero_roce::{Attributes, Nanos, Operation};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

/// Most bytes that a request carries in itself.
const INLINE_BYTES: usize = 64;
/// Id of the completion that reports the failure of a queue pair without work.
const OF_NO_REQUEST: u64 = u64::MAX;

/// Payload of a request.
pub(super) enum Payload {
    /// Bytes that the request carries in itself, and their number.
    Inline([u8; INLINE_BYTES], usize),
    /// Bytes in registered memory.
    Registered(LocalBytes),
}

impl Payload {
    /// Copies bytes into a request.
    fn inline(bytes: &[u8]) -> io::Result<Self> {
        let mut copy = [0; INLINE_BYTES];
        let room = copy.get_mut(..bytes.len()).ok_or_else(|| {
            let text = format!("a request carries at most {INLINE_BYTES} bytes in itself, not {}", bytes.len());
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })?;
        room.copy_from_slice(bytes);
        Ok(Self::Inline(copy, bytes.len()))
    }
}

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Inline(bytes, len) => &bytes[..*len],
            Self::Registered(bytes) => bytes.as_ref(),
        }
    }
}

/// State of a queue pair, which its port keeps.
pub(super) struct Side {
    number: u32,
    /// Number of its completion queue.
    pub queue: u32,
    pub domain: u32,
    /// Protocol engine; `None` before the queue pair is connected.
    engine: Option<roce::QueuePair<Payload>>,
    shared: Option<Arc<Receives>>,
    /// Posted receives in order: id, and buffer for a message of the peer.
    buffers: VecDeque<(u64, LocalBytes)>,
    /// Windows opened while a request was under way: the request's id, and their own. They complete after it.
    opened: VecDeque<(u64, u64)>,
    /// Id of the last request posted.
    posted: u64,
    /// Id of the last request done.
    done: u64,
    /// True once a completion has reported the failure.
    told: bool,
    /// True while the queue pair is in the port's list of those that have something to send.
    pub busy: bool,
}

impl Side {
    /// Makes a queue pair that is not connected.
    pub(super) fn new(number: u32, queue: u32, domain: u32, shared: Option<Arc<Receives>>) -> Self {
        Self {
            number,
            queue,
            domain,
            engine: None,
            shared,
            buffers: VecDeque::new(),
            opened: VecDeque::new(),
            posted: 0,
            done: 0,
            told: false,
            busy: false,
        }
    }

    /// Connects the queue pair.
    pub(super) fn connect(&mut self, attributes: Attributes) {
        let engine = self.engine.insert(roce::QueuePair::new(attributes));
        self.buffers.iter().for_each(|(id, buffer)| engine.post_receive(Self::receive(*id, buffer)));
    }

    /// Posts a receive into `buffer`.
    pub(super) fn post_receive(&mut self, id: u64, buffer: LocalBytes) {
        if let Some(engine) = &mut self.engine {
            engine.post_receive(Self::receive(id, &buffer));
        }
        self.buffers.push_back((id, buffer));
    }

    /// Makes a completion of this queue pair.
    fn completion(&self, id: u64, outcome: Outcome) -> Completion {
        Completion { queue_pair: self.number, id, outcome }
    }

    /// Makes the engine's receive for one of `buffers`.
    fn receive(id: u64, buffer: &LocalBytes) -> roce::Receive {
        roce::Receive { id, buffer: vec![0; buffer.len()] }
    }

    /// Takes a packet that came for this queue pair.
    pub(super) fn take(&mut self, packet: &Packet<'_>, now: Nanos, reach: &mut Reach<'_>) {
        let Some(engine) = &mut self.engine else { return };
        if let Some(shared) = &self.shared
            && takes_receive(packet.opcode)
            && !engine.has_receive()
            && shared.take()
        {
            engine.post_receive(roce::Receive { id: 0, buffer: Vec::new() });
        }
        reach.domain = self.domain;
        engine.receive(packet, now, reach);
    }

    /// Hands at most `most` packets to `send`, and returns their number.
    pub(super) fn transmit(
        &mut self,
        now: Nanos,
        reach: &Reach<'_>,
        most: usize,
        send: impl FnMut(&Packet<'_>),
    ) -> usize {
        self.engine.as_mut().map_or(0, |engine| engine.transmit(now, reach, most, send))
    }

    /// Time at which it has to send again, even if no packet comes.
    pub(super) fn wake_at(&self) -> Option<Nanos> {
        self.engine.as_ref().and_then(roce::QueuePair::wake_at)
    }

    /// Adds the new completions to `completions`.
    pub(super) fn collect(&mut self, completions: &mut Vec<Completion>) {
        let Some(mut engine) = self.engine.take() else { return };
        while let Some(completion) = engine.poll() {
            match completion {
                roce::Completion::Done { id } => {
                    let (id, signaled) = (id >> 1, id & 1 != 0);
                    self.done = id;
                    if signaled {
                        completions.push(self.completion(id, Outcome::Sent));
                    }
                    while let Some((_, opened)) = self.opened.front().copied().filter(|(after, _)| *after <= id) {
                        self.opened.pop_front();
                        completions.push(self.completion(opened, Outcome::Sent));
                    }
                }
                // No reads are posted.
                roce::Completion::Read { .. } => {}
                roce::Completion::Received { receive, .. } => {
                    if let Some((id, buffer)) = self.buffers.pop_front() {
                        buffer.fill(&receive.buffer);
                        let bytes = receive.buffer.len() as u32;
                        completions.push(self.completion(id, Outcome::Message { bytes }));
                    }
                }
                roce::Completion::Written { receive, immediate, bytes } => {
                    let id = self.buffers.pop_front().map_or(receive.id, |(id, _)| id);
                    completions.push(self.completion(id, Outcome::Written { bytes, immediate }));
                }
                roce::Completion::Flushed { id, failure } => {
                    self.told = true;
                    completions.push(self.completion(id >> 1, Outcome::Failed(failure.into())));
                }
                roce::Completion::Unused { .. } => self.unused(1),
            }
        }
        if let Some(failure) = engine.failure()
            && !std::mem::replace(&mut self.told, true)
        {
            completions.push(self.completion(OF_NO_REQUEST, Outcome::Failed(failure.into())));
        }
        self.engine = Some(engine);
    }

    /// Gives shared receives back.
    fn unused(&self, receives: usize) {
        if let Some(shared) = &self.shared {
            shared.give_back(receives);
        }
    }

    /// Posts a request; false if there is no room for it.
    pub(super) fn post(
        &mut self,
        request: &Request<'_, Window>,
        domain: &Domain,
        completions: &mut Vec<Completion>,
    ) -> io::Result<bool> {
        let Some(engine) = &mut self.engine else { return Err(not_connected()) };
        let (operation, payload) = match request.work {
            Work::Send(bytes) => (Operation::Send { immediate: None }, Payload::inline(bytes)?),
            Work::WriteInline(bytes, to, immediate) => {
                (Operation::Write { address: to.address, rkey: to.key, immediate }, Payload::inline(bytes)?)
            }
            Work::Write(from, to, immediate) => {
                let payload = match from {
                    Some(range) => Payload::Registered(domain.keys.local(domain.number, range)?),
                    None => Payload::inline(&[])?,
                };
                (Operation::Write { address: to.address, rkey: to.key, immediate }, payload)
            }
            Work::Open(window) => {
                window.open(self.number);
                if request.signaled && self.done < self.posted {
                    self.opened.push_back((self.posted, request.id));
                } else if request.signaled {
                    completions.push(self.completion(request.id, Outcome::Sent));
                }
                return Ok(true);
            }
        };
        assert!(request.id >> 63 == 0, "ids of requests are below 2^63, not {}", request.id);
        let work = roce::Work { id: request.id << 1 | u64::from(request.signaled), operation, payload };
        let taken = engine.post(work).is_ok();
        if taken {
            self.posted = request.id;
        }
        Ok(taken)
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        if self.engine.as_ref().is_some_and(roce::QueuePair::has_receive) {
            self.unused(1);
        }
    }
}

/// Error of a request that is posted before the queue pair is connected.
fn not_connected() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the queue pair is not connected: receive_from comes first")
}

/// Returns true when a request of this opcode may need a receive.
fn takes_receive(opcode: Opcode) -> bool {
    opcode.has_immediate()
        || matches!(opcode, Opcode::SendFirst | Opcode::SendMiddle | Opcode::SendLast | Opcode::SendOnly)
}
