//! What was posted is sent, again if need be, and completed (IBTA 9.7.3, requester; 9.7.5.1 and 9.9.2, its errors).

use super::congestion::Congestion;
use super::packet::{Aeth, Opcode, Packet, Reth, Syndrome, rnr_nanos};
use super::psn::Psn;
use super::queue_pair::{Attributes, Completion, Failure, Full};
use super::round_trip::RoundTrip;
use super::{MAX_MESSAGE_BYTES, Nanos};
use std::collections::VecDeque;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The payload goes to the next receive of the peer.
    Send {
        /// Given with it.
        immediate: Option<u32>,
    },
    /// The payload goes to memory of the peer.
    Write {
        /// Where.
        address: u64,
        /// The right to it.
        rkey: u32,
        /// The peer notices, if given, which takes a receive there.
        immediate: Option<u32>,
    },
    /// Memory of the peer comes here; there is no payload.
    Read {
        /// Where.
        address: u64,
        /// The right to it.
        rkey: u32,
        /// How much.
        bytes: u32,
    },
}

/// A request. Its payload is kept until it is acknowledged.
#[derive(Debug)]
pub struct Work<B> {
    /// Comes back with the completion.
    pub id: u64,
    /// What is to be done.
    pub operation: Operation,
    /// At most 2^31 bytes.
    pub payload: B,
}

#[derive(Debug)]
struct Pending<B> {
    work: Work<B>,
    first: Psn,
    packets: u32,
    /// Of a read, what came.
    came: Vec<u8>,
}

impl<B> Pending<B> {
    fn is_read(&self) -> bool {
        matches!(self.work.operation, Operation::Read { .. })
    }

    fn end(&self) -> Psn {
        self.first.plus(self.packets)
    }
}

/// Requests that wait or are under way at most.
const MAX_WORK: usize = 1024;
/// Packets of one request stay far below half of all numbers.
const MAX_PACKETS: u32 = 1 << 22;
/// How often attempts may be repeated without end (IBTA 9.7.5.2.8, RNR retry count).
const FOR_EVER: u8 = 7;

#[derive(Debug)]
pub(super) struct Requester<B> {
    work: VecDeque<Pending<B>>,
    /// The first packet that is not acknowledged, the next to be sent, and the one after the last posted.
    oldest: Psn,
    next: Psn,
    end: Psn,
    /// The one after the last that was ever sent.
    sent_end: Psn,
    congestion: Congestion,
    /// When the oldest packet is taken for lost; while nothing is under way, none.
    lost_at: Option<Nanos>,
    round_trip: RoundTrip,
    retries: u8,
    not_ready: u8,
    /// The receiver asked for time.
    wait_until: Nanos,
}

impl<B: AsRef<[u8]>> Requester<B> {
    pub fn new(attributes: &Attributes) -> Self {
        let first = attributes.send_psn;
        Self {
            work: VecDeque::new(),
            oldest: first,
            next: first,
            end: first,
            sent_end: first,
            congestion: Congestion::new(attributes.window, attributes.line_rate),
            lost_at: None,
            round_trip: RoundTrip::default(),
            retries: 0,
            not_ready: 0,
            wait_until: 0,
        }
    }

    pub fn post(&mut self, attributes: &Attributes, work: Work<B>) -> Result<(), Full<B>> {
        let bytes = match work.operation {
            Operation::Read { bytes, .. } => Some(bytes).filter(|_| work.payload.as_ref().is_empty()),
            _ => u32::try_from(work.payload.as_ref().len()).ok(),
        };
        let Some(bytes) = bytes.filter(|bytes| *bytes <= MAX_MESSAGE_BYTES) else { return Err(Full(work)) };
        let packets = attributes.path_mtu.packets(bytes);
        let posted = self.end.since(self.oldest).cast_unsigned();
        if self.work.len() >= MAX_WORK || posted.saturating_add(packets) > MAX_PACKETS {
            return Err(Full(work));
        }
        self.work.push_back(Pending { work, first: self.end, packets, came: Vec::new() });
        self.end = self.end.plus(packets);
        Ok(())
    }

    /// Everything that was posted, in order.
    pub fn take_work(&mut self) -> impl Iterator<Item = u64> + use<B> {
        std::mem::take(&mut self.work).into_iter().map(|pending| pending.work.id)
    }

    pub fn is_idle(&self) -> bool {
        self.work.is_empty()
    }

    pub fn congestion(&mut self) -> &mut Congestion {
        &mut self.congestion
    }

    /// When [`Self::transmit`] should be called again at the latest.
    pub fn wake_at(&self) -> Option<Nanos> {
        let window = self.congestion.window();
        let may_send = self.next != self.end && self.next.since(self.oldest).cast_unsigned() < window;
        let send_at = may_send.then(|| self.wait_until.max(self.congestion.next_at()));
        send_at.into_iter().chain(self.lost_at).min()
    }

    /// Sends everything from the oldest packet that is not acknowledged again.
    fn go_back(&mut self) {
        self.next = self.oldest;
        self.lost_at = None;
        self.round_trip.sent_again();
    }

    /// Takes a packet for lost if it is time. A failure ends the queue pair.
    pub fn look_at_time(&mut self, attributes: &Attributes, now: Nanos) -> Result<(), Failure> {
        if self.lost_at.is_none_or(|at| now < at) {
            return Ok(());
        }
        if self.retries >= attributes.retries {
            return Err(Failure::NoAnswer);
        }
        self.retries += 1;
        self.round_trip.missed();
        self.congestion.lost();
        self.go_back();
        Ok(())
    }

    /// Hands the next packet to `send`, if one may go.
    pub fn transmit(&mut self, attributes: &Attributes, now: Nanos, send: impl FnOnce(&Packet<'_>)) -> bool {
        let under_way = self.next.since(self.oldest).cast_unsigned();
        let wait = self.wait_until.max(self.congestion.next_at());
        if self.next == self.end || under_way >= self.congestion.window() || now < wait {
            return false;
        }
        let index = self.work.partition_point(|pending| pending.end().since(self.next) <= 0);
        let Some(pending) = self.work.get(index) else { return false };
        let (mtu, done) = (attributes.path_mtu.bytes(), self.next.since(pending.first).cast_unsigned());
        let payload = pending.work.payload.as_ref();
        let (starts, ends) = (done == 0, done + 1 == pending.packets);
        let from = done as usize * mtu;
        let piece = &payload[from.min(payload.len())..(from + mtu).min(payload.len())];
        let (opcode, reth, immediate, taken) = match pending.work.operation {
            Operation::Send { immediate } => {
                let opcode = match (starts, ends, immediate) {
                    (true, true, None) => Opcode::SendOnly,
                    (true, true, Some(_)) => Opcode::SendOnlyImmediate,
                    (true, false, _) => Opcode::SendFirst,
                    (false, false, _) => Opcode::SendMiddle,
                    (false, true, None) => Opcode::SendLast,
                    (false, true, Some(_)) => Opcode::SendLastImmediate,
                };
                (opcode, None, immediate, 1)
            }
            Operation::Write { address, rkey, immediate } => {
                let opcode = match (starts, ends, immediate) {
                    (true, true, None) => Opcode::WriteOnly,
                    (true, true, Some(_)) => Opcode::WriteOnlyImmediate,
                    (true, false, _) => Opcode::WriteFirst,
                    (false, false, _) => Opcode::WriteMiddle,
                    (false, true, None) => Opcode::WriteLast,
                    (false, true, Some(_)) => Opcode::WriteLastImmediate,
                };
                (opcode, Some(Reth { address, rkey, bytes: payload.len() as u32 }), immediate, 1)
            }
            // The rest of it, where a part has come (IBTA 9.7.5.1.1, retried reads).
            Operation::Read { address, rkey, bytes } => {
                let at = from as u32;
                let rest = Reth { address: address.wrapping_add(at.into()), rkey, bytes: bytes - at };
                (Opcode::ReadRequest, Some(rest), None, pending.packets - done)
            }
        };
        let every = (self.congestion.window() / 2).max(1);
        let packet = Packet {
            wants_ack: opcode != Opcode::ReadRequest && (ends || self.next.get().is_multiple_of(every)),
            reth: reth.filter(|_| opcode.has_reth()),
            immediate: immediate.filter(|_| opcode.has_immediate()),
            payload: piece,
            ..attributes.packet(opcode, self.next)
        };
        send(&packet);
        self.congestion.sent(piece.len(), now);
        if packet.wants_ack && self.next.since(self.sent_end) >= 0 {
            self.round_trip.sent(self.next, now);
        }
        self.next = self.next.plus(taken);
        if self.next.since(self.sent_end) > 0 {
            self.sent_end = self.next;
        }
        self.lost_at = self.lost_at.or(Some(now + self.round_trip.patience(attributes.timeout)));
        true
    }

    /// Everything before `psn` was done. Reads of which something is missing were not.
    fn done_before(&mut self, attributes: &Attributes, psn: Psn, now: Nanos, completed: &mut VecDeque<Completion>) {
        while let Some(pending) = self.work.front() {
            if pending.is_read() || pending.end().since(psn) > 0 {
                break;
            }
            self.advance(attributes, pending.end(), now);
            if let Some(pending) = self.work.pop_front() {
                completed.push_back(Completion::Done { id: pending.work.id });
            }
        }
        let Some(pending) = self.work.front().filter(|_| psn.since(self.oldest) > 0) else { return };
        if !pending.is_read() {
            self.advance(attributes, psn, now);
        } else if self.next.since(self.oldest) > 0 {
            // Its responses would have come first: they were lost.
            self.go_back();
        }
    }

    /// Packets before `psn` need not be sent again.
    fn advance(&mut self, attributes: &Attributes, psn: Psn, now: Nanos) {
        let packets = psn.since(self.oldest);
        if packets <= 0 {
            return;
        }
        self.congestion.acknowledged(packets.cast_unsigned());
        self.round_trip.answered(psn, now);
        self.oldest = psn;
        if self.next.since(psn) < 0 {
            // It was sent before we went back.
            self.next = psn;
        }
        (self.retries, self.not_ready) = (0, 0);
        self.lost_at = (self.next != self.oldest).then_some(now + self.round_trip.patience(attributes.timeout));
    }

    /// Takes an acknowledgement. A failure ends the queue pair.
    pub fn answer(
        &mut self,
        attributes: &Attributes,
        psn: Psn,
        aeth: Aeth,
        now: Nanos,
        completed: &mut VecDeque<Completion>,
    ) -> Result<(), Failure> {
        // Of a packet that is done, or was never sent: late, or forged.
        if psn.since(self.oldest) < 0 || psn.since(self.sent_end) >= 0 {
            return Ok(());
        }
        match aeth.syndrome {
            Syndrome::Done(_) => self.done_before(attributes, psn.plus(1), now, completed),
            Syndrome::NotReady(timer) => {
                self.done_before(attributes, psn, now, completed);
                if attributes.not_ready_retries != FOR_EVER {
                    if self.not_ready >= attributes.not_ready_retries {
                        return Err(Failure::NotReady);
                    }
                    self.not_ready += 1;
                }
                self.wait_until = now + rnr_nanos(timer);
                self.go_back();
            }
            Syndrome::Sequence => {
                self.done_before(attributes, psn, now, completed);
                self.congestion.lost();
                self.go_back();
            }
            Syndrome::InvalidRequest | Syndrome::Access | Syndrome::Operation => {
                self.done_before(attributes, psn, now, completed);
                return Err(match aeth.syndrome {
                    Syndrome::InvalidRequest => Failure::RemoteInvalidRequest,
                    Syndrome::Access => Failure::RemoteAccess,
                    _ => Failure::RemoteOperation,
                });
            }
        }
        Ok(())
    }

    /// Takes a response to a read. A failure ends the queue pair.
    pub fn response(
        &mut self,
        attributes: &Attributes,
        packet: &Packet<'_>,
        now: Nanos,
        completed: &mut VecDeque<Completion>,
    ) -> Result<(), Failure> {
        if packet.psn.since(self.oldest) < 0 || packet.psn.since(self.sent_end) >= 0 {
            return Ok(());
        }
        // It answers everything before it.
        let index = self.work.partition_point(|pending| pending.end().since(packet.psn) <= 0);
        let Some(first) = self.work.get(index).filter(|pending| pending.is_read()).map(|pending| pending.first) else {
            return Err(Failure::BadResponse);
        };
        self.done_before(attributes, first, now, completed);
        if packet.psn != self.oldest {
            // A response before it was lost. (A read before it may be what is not done.)
            if self.next.since(self.oldest) > 0 {
                self.go_back();
            }
            return Ok(());
        }
        let Some(pending) = self.work.front_mut() else { return Err(Failure::BadResponse) };
        let Operation::Read { bytes, .. } = pending.work.operation else { return Err(Failure::BadResponse) };
        let want = (bytes as usize - pending.came.len()).min(attributes.path_mtu.bytes());
        if packet.payload.len() != want {
            return Err(Failure::BadResponse);
        }
        pending.came.extend_from_slice(packet.payload);
        let whole = pending.came.len() == bytes as usize;
        self.advance(attributes, packet.psn.plus(1), now);
        if whole && let Some(pending) = self.work.pop_front() {
            completed.push_back(Completion::Read { id: pending.work.id, bytes: pending.came });
        }
        Ok(())
    }
}
