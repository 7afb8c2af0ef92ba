//! Responder: executes the peer's requests and answers them (IBTA 9.7.4, responder; 9.7.5.2, acknowledgements).

use crate::attributes::Attributes;
use crate::memory::{Access, Memory};
use crate::packet::{Aeth, LOW_24_BITS, Opcode, Packet, Part, Reth, Syndrome};
use crate::path::MAX_MESSAGE_BYTES;
use crate::psn::Psn;
use crate::work::{Completion, Failure, Receive};
use std::collections::VecDeque;

/// Message whose last packet is still to come.
#[derive(Debug)]
enum Current {
    /// A send: the receive, and the bytes of its buffer that are filled.
    Send { receive: Receive, filled: usize },
    /// A write: the memory that is still to be written, and the bytes of the whole message.
    Write { rest: Reth, bytes: u32 },
}

/// Read whose responses are still to be sent.
#[derive(Debug)]
struct Reading {
    remote: Reth,
    /// Bytes that were sent.
    done: u32,
    /// Number of the first packet of the response.
    first: Psn,
    /// Message count that the response carries.
    messages: u32,
}

/// Outcome of a request packet.
enum Outcome {
    /// The packet was executed. The last packet of a message may complete a receive.
    Done(Option<Completion>),
    /// The packet needs a receive, and none is posted.
    NotReady,
    /// The packet was refused, which ends the queue pair.
    Refused(Syndrome, Failure),
}

/// Answer to a malformed request.
const INVALID: Outcome = Outcome::Refused(Syndrome::InvalidRequest, Failure::InvalidRequest);
/// Answer to a request for memory to which the peer has no right.
const FORBIDDEN: Outcome = Outcome::Refused(Syndrome::RemoteAccessError, Failure::Access);

/// Most reads that wait for their responses. More are dropped, and the peer sends them again.
const MAX_READS: usize = 128;
/// Credit code of a responder that counts no credits (IBTA 9.7.7.2).
const UNCOUNTED: u8 = 31;

/// Receiving half of a queue pair.
#[derive(Debug)]
pub(super) struct Responder {
    /// Number of the next packet in sequence.
    expected: Psn,
    /// Messages completed, modulo 2^24 (IBTA 9.7.7, message sequence number).
    messages: u32,
    current: Option<Current>,
    receives: VecDeque<Receive>,
    reads: VecDeque<Reading>,
    /// True once the present gap was reported: one gap gets one NAK (IBTA 9.7.5.2.2).
    gap_told: bool,
    /// Answer to be sent. A newer one replaces it, because it also acknowledges everything before.
    answer: Option<(Psn, Syndrome)>,
    /// Payload of the response that is being sent.
    scratch: Vec<u8>,
}

impl Responder {
    pub(crate) fn new(attributes: &Attributes) -> Self {
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

    pub(crate) fn post(&mut self, receive: Receive) {
        self.receives.push_back(receive);
    }

    pub(crate) fn has_receive(&self) -> bool {
        !self.receives.is_empty()
    }

    /// Takes away all unused receives. The receive of an incomplete message comes first.
    pub(crate) fn take_receives(&mut self) -> impl Iterator<Item = Receive> {
        let begun = match self.current.take() {
            Some(Current::Send { receive, .. }) => Some(receive),
            _ => None,
        };
        begun.into_iter().chain(std::mem::take(&mut self.receives))
    }

    /// Takes a request packet. A failure ends the queue pair.
    pub(crate) fn request(
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
                    self.answer = Some((self.expected, Syndrome::PsnSequenceError));
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
                    self.messages = (self.messages + u32::from(ends)) & LOW_24_BITS;
                    if packet.wants_ack {
                        self.answer = Some((packet.psn, Syndrome::Ack(UNCOUNTED)));
                    }
                }
                Ok(completion)
            }
            Outcome::NotReady => {
                self.answer = Some((self.expected, Syndrome::RnrNak(attributes.rnr_timer)));
                // Packets under way behind it come again; they are no gap to report.
                self.gap_told = true;
                Ok(None)
            }
            Outcome::Refused(syndrome, failure) => {
                self.answer = Some((self.expected, syndrome));
                Err(failure)
            }
        }
    }

    /// Takes a packet that came before. Sends and writes are acknowledged again, reads executed again
    /// (IBTA 9.7.4.3, duplicate requests).
    fn duplicate(&mut self, attributes: &Attributes, packet: &Packet<'_>, memory: &impl Memory) {
        let Some(remote) = packet.reth.filter(|_| packet.opcode == Opcode::ReadRequest) else {
            if self.answer.is_none() {
                self.answer = Some((self.expected.plus(u32::MAX), Syndrome::Ack(UNCOUNTED)));
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

    /// Executes a packet that is in sequence.
    fn execute(&mut self, attributes: &Attributes, packet: &Packet<'_>, memory: &mut impl Memory) -> Outcome {
        let opcode = packet.opcode;
        if !has_sound_length(attributes, packet) || opcode.begins() != self.current.is_none() {
            return INVALID;
        }
        if opcode == Opcode::ReadRequest {
            return self.read(attributes, packet, memory);
        }
        if opcode.begins()
            && let Err(outcome) = self.begin(attributes, packet, memory)
        {
            return outcome;
        }
        if let Err(outcome) = self.place(attributes, packet, memory) {
            return outcome;
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

    /// Begins the message whose first packet this is.
    fn begin(&mut self, attributes: &Attributes, packet: &Packet<'_>, memory: &mut impl Memory) -> Result<(), Outcome> {
        self.current = Some(match packet.reth {
            None => Current::Send { receive: self.receives.pop_front().ok_or(Outcome::NotReady)?, filled: 0 },
            Some(remote) if remote.bytes > MAX_MESSAGE_BYTES => return Err(INVALID),
            Some(remote) => {
                // The key to no bytes need not be valid (IBTA 9.7.4.1.4, zero-length requests).
                if remote.bytes > 0 && memory.check(attributes.number, remote, Access::Write).is_err() {
                    return Err(FORBIDDEN);
                }
                Current::Write { rest: remote, bytes: remote.bytes }
            }
        });
        Ok(())
    }

    /// Puts a packet's payload where the current message goes.
    fn place(&mut self, attributes: &Attributes, packet: &Packet<'_>, memory: &mut impl Memory) -> Result<(), Outcome> {
        let (opcode, payload) = (packet.opcode, packet.payload);
        match &mut self.current {
            Some(Current::Send { receive, filled }) if opcode.is_send() => {
                let room = receive.buffer.get_mut(*filled..*filled + payload.len()).ok_or(INVALID)?;
                room.copy_from_slice(payload);
                *filled += payload.len();
            }
            Some(Current::Write { rest, .. }) if !opcode.is_send() => {
                let (bytes, ends) = (payload.len() as u32, !opcode.is_followed());
                if bytes > rest.bytes || ends != (bytes == rest.bytes) {
                    return Err(INVALID);
                }
                if opcode.has_immediate() && self.receives.is_empty() {
                    if opcode.begins() {
                        self.current = None;
                    }
                    return Err(Outcome::NotReady);
                }
                if bytes > 0 && memory.write(attributes.number, rest.rkey, rest.address, payload).is_err() {
                    return Err(FORBIDDEN);
                }
                *rest = rest.after(bytes);
            }
            _ => return Err(INVALID),
        }
        Ok(())
    }

    /// Takes a request for a read.
    fn read(&mut self, attributes: &Attributes, packet: &Packet<'_>, memory: &impl Memory) -> Outcome {
        let Some(remote) = packet.reth.filter(|remote| remote.bytes <= MAX_MESSAGE_BYTES) else { return INVALID };
        if remote.bytes > 0 && memory.check(attributes.number, remote, Access::Read).is_err() {
            return FORBIDDEN;
        }
        if self.reads.len() >= MAX_READS {
            // As if it were lost.
            return Outcome::Done(None);
        }
        self.messages = (self.messages + 1) & LOW_24_BITS;
        self.expected = self.expected.plus(attributes.path_mtu.packets(remote.bytes));
        self.reads.push_back(Reading { remote, done: 0, first: packet.psn, messages: self.messages });
        Outcome::Done(None)
    }

    /// Hands the next packet to `send`; false if there is none. Responses to reads go first, so that answers keep their
    /// order.
    pub(crate) fn transmit(
        &mut self,
        attributes: &Attributes,
        memory: &impl Memory,
        send: impl FnOnce(&Packet<'_>),
    ) -> bool {
        if !self.reads.is_empty() {
            self.respond(attributes, memory, send);
            return true;
        }
        let Some((psn, syndrome)) = self.answer.take() else { return false };
        let aeth = Some(Aeth { syndrome, messages: self.messages });
        send(&Packet { aeth, ..attributes.packet(Opcode::Acknowledge, psn) });
        true
    }

    /// Hands the next response to the first read to `send`.
    fn respond(&mut self, attributes: &Attributes, memory: &impl Memory, send: impl FnOnce(&Packet<'_>)) {
        let Some(reading) = self.reads.front_mut() else { return };
        let rest = reading.remote.after(reading.done);
        let mtu = attributes.path_mtu.bytes() as u32;
        let piece = Reth { bytes: rest.bytes.min(mtu), ..rest };
        self.scratch.clear();
        if piece.bytes > 0 && memory.read(attributes.number, piece, &mut self.scratch).is_err() {
            // The right was taken away after the request came.
            self.reads.pop_front();
            self.answer = Some((self.expected, Syndrome::RemoteAccessError));
            return;
        }
        let ends = piece.bytes == rest.bytes;
        let opcode = Opcode::read_response(Part::of(reading.done == 0, ends));
        let psn = reading.first.plus(reading.done / mtu);
        let aeth = Aeth { syndrome: Syndrome::Ack(UNCOUNTED), messages: reading.messages };
        let aeth = opcode.has_aeth().then_some(aeth);
        send(&Packet { aeth, payload: &self.scratch, ..attributes.packet(opcode, psn) });
        reading.done += piece.bytes;
        if ends {
            self.reads.pop_front();
        }
    }
}

/// Returns true when a packet's payload is as long as its opcode allows (IBTA 9.7.4.1, length validation). A packet is
/// full unless it is the last of its message.
fn has_sound_length(attributes: &Attributes, packet: &Packet<'_>) -> bool {
    let (opcode, len, mtu) = (packet.opcode, packet.payload.len(), attributes.path_mtu.bytes());
    if opcode.is_followed() {
        return len == mtu;
    }
    let fits_opcode = if opcode == Opcode::ReadRequest { len == 0 } else { opcode.begins() || len > 0 };
    len <= mtu && fits_opcode
}
