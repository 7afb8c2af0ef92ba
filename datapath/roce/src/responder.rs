//! What the peer asks for is done here (IBTA 9.7.4, responder; 9.7.5.2, acknowledgements).

use super::MAX_MESSAGE_BYTES;
use super::packet::{Aeth, Opcode, Packet, Reth, Syndrome};
use super::psn::Psn;
use super::queue_pair::{Attributes, Completion, Failure};
use std::collections::VecDeque;

/// What a peer wants to do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Access {
    Read,
    Write,
}

/// No right to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no right to that memory")]
pub struct NoAccess;

/// Memory that peers reach with keys. Rights are looked at for every packet, so that they end when they are taken.
pub trait Memory {
    /// Whether that queue pair may do so with all of it.
    ///
    /// # Errors
    /// [`NoAccess`].
    fn check(&self, queue_pair: u32, remote: Reth, access: Access) -> Result<(), NoAccess>;

    /// Writes all of `bytes`, or nothing.
    ///
    /// # Errors
    /// [`NoAccess`].
    fn write(&mut self, queue_pair: u32, rkey: u32, address: u64, bytes: &[u8]) -> Result<(), NoAccess>;

    /// Appends `bytes` bytes to `into`.
    ///
    /// # Errors
    /// [`NoAccess`]; nothing is appended then.
    fn read(&self, queue_pair: u32, rkey: u32, address: u64, bytes: u32, into: &mut Vec<u8>) -> Result<(), NoAccess>;
}

/// A buffer for what the peer sends, or for the notice of one write with immediate data, which leaves it as it is.
#[derive(Debug, PartialEq, Eq)]
pub struct Receive {
    /// Comes back with the completion.
    pub id: u64,
    /// As many bytes as a message may have.
    pub buffer: Vec<u8>,
}

/// A message of which packets are still to come.
#[derive(Debug)]
enum Current {
    Send { receive: Receive, filled: usize },
    Write { rkey: u32, next: u64, left: u32, bytes: u32 },
}

/// Responses to a read that are still to be sent.
#[derive(Debug)]
struct Reading {
    remote: Reth,
    done: u32,
    first: Psn,
    messages: u32,
}

/// What a request came to.
enum Outcome {
    Done(Option<Completion>),
    NotReady,
    Refused(Syndrome, Failure),
}

/// Reads that wait for their responses at most; more are dropped, and asked for again.
const MAX_READS: usize = 128;
const MESSAGES_MASK: u32 = 0x00ff_ffff;
/// Credits that are not counted (IBTA 9.7.7.2).
const UNCOUNTED: u8 = 31;

#[derive(Debug)]
pub(super) struct Responder {
    expected: Psn,
    messages: u32,
    current: Option<Current>,
    receives: VecDeque<Receive>,
    reads: VecDeque<Reading>,
    /// Silence until the gap closes (IBTA 9.7.5.2.2, one NAK for a gap).
    gap_told: bool,
    /// The newest takes the place of those before it, which it says too.
    answer: Option<(Psn, Syndrome)>,
    /// The payload of a response.
    scratch: Vec<u8>,
}

impl Responder {
    pub fn new(attributes: &Attributes) -> Self {
        Self {
            expected: attributes.receive_psn,
            messages: 0,
            current: None,
            receives: VecDeque::new(),
            reads: VecDeque::new(),
            gap_told: false,
            answer: None,
            scratch: Vec::new(),
        }
    }

    pub fn post(&mut self, receive: Receive) {
        self.receives.push_back(receive);
    }

    pub fn has_receive(&self) -> bool {
        !self.receives.is_empty()
    }

    /// Receives that were not used, that of a message which did not become whole first.
    pub fn take_receives(&mut self) -> impl Iterator<Item = Receive> {
        let begun = match self.current.take() {
            Some(Current::Send { receive, .. }) => Some(receive),
            _ => None,
        };
        begun.into_iter().chain(std::mem::take(&mut self.receives))
    }

    /// Takes a request. Ends the queue pair with a failure.
    pub fn request(
        &mut self,
        attributes: &Attributes,
        packet: &Packet<'_>,
        memory: &mut impl Memory,
    ) -> Result<Option<Completion>, Failure> {
        match packet.psn.since(self.expected) {
            0 => {}
            1.. => {
                if !self.gap_told {
                    self.gap_told = true;
                    self.answer = Some((self.expected, Syndrome::Sequence));
                }
                return Ok(None);
            }
            _ => {
                self.duplicate(attributes, packet, memory);
                return Ok(None);
            }
        }
        self.gap_told = false;
        match self.execute(attributes, packet, memory) {
            Outcome::Done(completion) => {
                let ends = !packet.opcode.is_followed();
                if packet.opcode != Opcode::ReadRequest {
                    self.expected = self.expected.plus(1);
                    self.messages = (self.messages + u32::from(ends)) & MESSAGES_MASK;
                    if packet.wants_ack {
                        self.answer = Some((packet.psn, Syndrome::Done(UNCOUNTED)));
                    }
                }
                Ok(completion)
            }
            Outcome::NotReady => {
                self.answer = Some((self.expected, Syndrome::NotReady(attributes.rnr_timer)));
                // What is under way comes again, and is not a gap.
                self.gap_told = true;
                Ok(None)
            }
            Outcome::Refused(syndrome, failure) => {
                self.answer = Some((self.expected, syndrome));
                Err(failure)
            }
        }
    }

    /// Sends and writes were done: that is said again. Reads are done again (IBTA 9.7.4.3, duplicate requests).
    fn duplicate(&mut self, attributes: &Attributes, packet: &Packet<'_>, memory: &impl Memory) {
        let Some(remote) = packet.reth.filter(|_| packet.opcode == Opcode::ReadRequest) else {
            if self.answer.is_none() {
                self.answer = Some((self.expected.plus(u32::MAX), Syndrome::Done(UNCOUNTED)));
            }
            return;
        };
        // Not beyond what was asked for before; without rights no word: the peer must not learn more than it did.
        let end = packet.psn.plus(attributes.path_mtu.packets(remote.bytes));
        if end.since(self.expected) <= 0
            && self.reads.len() < MAX_READS
            && remote.bytes <= MAX_MESSAGE_BYTES
            && memory.check(attributes.number, remote, Access::Read).is_ok()
        {
            self.reads.push_back(Reading { remote, done: 0, first: packet.psn, messages: self.messages });
        }
    }

    fn execute(&mut self, attributes: &Attributes, packet: &Packet<'_>, memory: &mut impl Memory) -> Outcome {
        const WRONG: Outcome = Outcome::Refused(Syndrome::InvalidRequest, Failure::InvalidRequest);
        let opcode = packet.opcode;
        let length_is_sound = if opcode.is_followed() {
            packet.payload.len() == attributes.path_mtu.bytes()
        } else {
            packet.payload.len() <= attributes.path_mtu.bytes()
                && (opcode.begins() || !packet.payload.is_empty())
                && (opcode != Opcode::ReadRequest || packet.payload.is_empty())
        };
        if !length_is_sound || opcode.begins() != self.current.is_none() {
            return WRONG;
        }
        if opcode == Opcode::ReadRequest {
            return self.read(attributes, packet, memory);
        }
        if opcode.begins() {
            self.current = match packet.reth {
                None => match self.receives.pop_front() {
                    Some(receive) => Some(Current::Send { receive, filled: 0 }),
                    None => return Outcome::NotReady,
                },
                Some(remote) if remote.bytes > MAX_MESSAGE_BYTES => return WRONG,
                Some(remote) => {
                    // A key of nothing need not be valid (IBTA 9.7.4.1.4, zero-length requests).
                    if remote.bytes > 0 && memory.check(attributes.number, remote, Access::Write).is_err() {
                        return Outcome::Refused(Syndrome::Access, Failure::Access);
                    }
                    let Reth { address, rkey, bytes } = remote;
                    Some(Current::Write { rkey, next: address, left: bytes, bytes })
                }
            };
        }
        let is_send = matches!(
            opcode,
            Opcode::SendFirst
                | Opcode::SendMiddle
                | Opcode::SendLast
                | Opcode::SendLastImmediate
                | Opcode::SendOnly
                | Opcode::SendOnlyImmediate
        );
        match &mut self.current {
            Some(Current::Send { receive, filled }) if is_send => {
                let Some(room) = receive.buffer.get_mut(*filled..*filled + packet.payload.len()) else { return WRONG };
                room.copy_from_slice(packet.payload);
                *filled += packet.payload.len();
            }
            Some(Current::Write { rkey, next, left, .. }) if !is_send => {
                let (bytes, ends) = (packet.payload.len() as u32, !opcode.is_followed());
                if bytes > *left || ends != (bytes == *left) {
                    return WRONG;
                }
                if opcode.has_immediate() && self.receives.is_empty() {
                    if opcode.begins() {
                        self.current = None;
                    }
                    return Outcome::NotReady;
                }
                if bytes > 0 && memory.write(attributes.number, *rkey, *next, packet.payload).is_err() {
                    return Outcome::Refused(Syndrome::Access, Failure::Access);
                }
                (*next, *left) = (next.wrapping_add(bytes.into()), *left - bytes);
            }
            _ => return WRONG,
        }
        if opcode.is_followed() {
            return Outcome::Done(None);
        }
        Outcome::Done(match (self.current.take(), packet.immediate) {
            (Some(Current::Send { mut receive, filled }), immediate) => {
                receive.buffer.truncate(filled);
                Some(Completion::Received { receive, immediate })
            }
            (Some(Current::Write { bytes, .. }), Some(immediate)) => {
                self.receives.pop_front().map(|receive| Completion::Written { receive, immediate, bytes })
            }
            _ => None,
        })
    }

    fn read(&mut self, attributes: &Attributes, packet: &Packet<'_>, memory: &impl Memory) -> Outcome {
        let Some(remote) = packet.reth.filter(|remote| remote.bytes <= MAX_MESSAGE_BYTES) else {
            return Outcome::Refused(Syndrome::InvalidRequest, Failure::InvalidRequest);
        };
        if remote.bytes > 0 && memory.check(attributes.number, remote, Access::Read).is_err() {
            return Outcome::Refused(Syndrome::Access, Failure::Access);
        }
        if self.reads.len() >= MAX_READS {
            // As if it were lost.
            return Outcome::Done(None);
        }
        self.messages = (self.messages + 1) & MESSAGES_MASK;
        self.expected = self.expected.plus(attributes.path_mtu.packets(remote.bytes));
        self.reads.push_back(Reading { remote, done: 0, first: packet.psn, messages: self.messages });
        Outcome::Done(None)
    }

    /// Hands the next packet to `send`, if there is one: responses to reads first, as answers come in order.
    pub fn transmit(&mut self, attributes: &Attributes, memory: &impl Memory, send: impl FnOnce(&Packet<'_>)) -> bool {
        if let Some(reading) = self.reads.front_mut() {
            let Reth { address, rkey, bytes } = reading.remote;
            let mtu = attributes.path_mtu.bytes() as u32;
            let piece = (bytes - reading.done).min(mtu);
            self.scratch.clear();
            let at = address.wrapping_add(reading.done.into());
            if piece > 0 && memory.read(attributes.number, rkey, at, piece, &mut self.scratch).is_err() {
                // The right went while it was used.
                self.reads.pop_front();
                self.answer = Some((self.expected, Syndrome::Access));
                return true;
            }
            let (starts, ends) = (reading.done == 0, reading.done + piece == bytes);
            let opcode = match (starts, ends) {
                (true, true) => Opcode::ReadResponseOnly,
                (true, false) => Opcode::ReadResponseFirst,
                (false, false) => Opcode::ReadResponseMiddle,
                (false, true) => Opcode::ReadResponseLast,
            };
            let psn = reading.first.plus(reading.done / mtu);
            let aeth = Aeth { syndrome: Syndrome::Done(UNCOUNTED), messages: reading.messages };
            let aeth = opcode.has_aeth().then_some(aeth);
            send(&Packet { aeth, payload: &self.scratch, ..attributes.packet(opcode, psn) });
            reading.done += piece;
            if ends {
                self.reads.pop_front();
            }
            return true;
        }
        let Some((psn, syndrome)) = self.answer.take() else { return false };
        let aeth = Some(Aeth { syndrome, messages: self.messages });
        send(&Packet { aeth, ..attributes.packet(Opcode::Acknowledge, psn) });
        true
    }
}
