//! Requester: sends posted work, sends it again if need be, and completes it.
//!
//! Sources: IBTA 9.7.3, requester; 9.7.5.1 and 9.9.2, errors of the requester.

use crate::attributes::Attributes;
use crate::congestion::Congestion;
use crate::packet::{Aeth, Opcode, Packet, Part, Reth, Syndrome, rnr_nanos};
use crate::path::MAX_MESSAGE_BYTES;
use crate::psn::Psn;
use crate::round_trip::RoundTrip;
use crate::time::Nanos;
use crate::work::{Completion, Failure, Full, Operation, Work};
use std::collections::VecDeque;

/// Request that is not complete.
#[derive(Debug)]
struct Pending<B> {
    work: Work<B>,
    /// Number of its first packet.
    first: Psn,
    /// Number of packets, at least 1; for a read, those of the response.
    packets: u32,
    /// Bytes that a read has got so far.
    came: Vec<u8>,
}

impl<B> Pending<B> {
    fn is_read(&self) -> bool {
        matches!(self.work.operation, Operation::Read { .. })
    }

    /// Number after that of its last packet.
    fn end(&self) -> Psn {
        self.first.plus(self.packets)
    }
}

/// Most requests that wait or are under way.
const MAX_WORK: usize = 1024;
/// Most packets that wait or are under way: far below half of all packet numbers (IBTA 9.7.1).
const MAX_PACKETS: u32 = 1 << 22;
/// Retry count that stands for "without end" (IBTA 9.7.5.2.8, RNR retry count).
const FOR_EVER: u8 = 7;

/// Sending half of a queue pair.
#[derive(Debug)]
pub(super) struct Requester<B> {
    /// Requests that are not complete, in order.
    work: VecDeque<Pending<B>>,
    /// Number of the first packet that is not acknowledged.
    oldest: Psn,
    /// Number of the next packet to be sent.
    next: Psn,
    /// Number after that of the last packet posted.
    end: Psn,
    /// Number after that of the last packet that was ever sent.
    sent_end: Psn,
    congestion: Congestion,
    /// Time at which the oldest packet counts as lost; `None` while nothing is under way.
    lost_at: Option<Nanos>,
    round_trip: RoundTrip,
    /// Times that the oldest packet was sent again without an answer.
    retries: u8,
    /// Times that the oldest packet was answered with "receiver not ready".
    not_ready: u8,
    /// Time before which nothing is sent, as the peer asked.
    wait_until: Nanos,
}

impl<B: AsRef<[u8]>> Requester<B> {
    pub(crate) fn new(attributes: &Attributes) -> Self {
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

    /// Takes a request, or gives it back.
    pub(crate) fn post(&mut self, attributes: &Attributes, work: Work<B>) -> Result<(), Full<B>> {
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

    /// Takes away all requests, and returns their ids in order.
    pub(crate) fn take_work(&mut self) -> impl Iterator<Item = u64> + use<B> {
        std::mem::take(&mut self.work).into_iter().map(|pending| pending.work.id)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.work.is_empty()
    }

    pub(crate) fn congestion(&mut self) -> &mut Congestion {
        &mut self.congestion
    }

    /// Latest time at which [`Self::transmit`] is to be called again.
    pub(crate) fn wake_at(&self) -> Option<Nanos> {
        let window = self.congestion.window();
        let may_send = self.next != self.end && self.next.since(self.oldest).cast_unsigned() < window;
        let send_at = may_send.then(|| self.wait_until.max(self.congestion.next_at()));
        send_at.into_iter().chain(self.lost_at).min()
    }

    /// Returns to the oldest packet that is not acknowledged: it and all after it are sent again.
    fn go_back(&mut self) {
        self.next = self.oldest;
        self.lost_at = None;
        self.round_trip.sent_again();
    }

    /// Counts the oldest packet as lost if its time is up. A failure ends the queue pair.
    pub(crate) fn look_at_time(&mut self, attributes: &Attributes, now: Nanos) -> Result<(), Failure> {
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
    pub(crate) fn transmit(&mut self, attributes: &Attributes, now: Nanos, send: impl FnOnce(&Packet<'_>)) -> bool {
        let under_way = self.next.since(self.oldest).cast_unsigned();
        let wait = self.wait_until.max(self.congestion.next_at());
        if self.next == self.end || under_way >= self.congestion.window() || now < wait {
            return false;
        }
        let index = self.work.partition_point(|pending| pending.end().since(self.next) <= 0);
        let Some(pending) = self.work.get(index) else { return false };
        let (mtu, done) = (attributes.path_mtu.bytes(), self.next.since(pending.first).cast_unsigned());
        let payload = pending.work.payload.as_ref();
        let ends = done + 1 == pending.packets;
        let part = Part::of(done == 0, ends);
        let from = done as usize * mtu;
        let piece = &payload[from.min(payload.len())..(from + mtu).min(payload.len())];
        let (opcode, reth, immediate, taken) = match pending.work.operation {
            Operation::Send { immediate } => (Opcode::send(part, immediate.is_some()), None, immediate, 1),
            Operation::Write { address, rkey, immediate } => {
                let all = Reth { address, rkey, bytes: payload.len() as u32 };
                (Opcode::write(part, immediate.is_some()), Some(all), immediate, 1)
            }
            // A read of which a part has come asks for the rest (IBTA 9.7.5.1.1, retried reads).
            Operation::Read { address, rkey, bytes } => {
                let rest = Reth { address, rkey, bytes }.after(from as u32);
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

    /// Completes all work before `psn`, except reads whose responses are missing.
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

    /// Notes that packets before `psn` need not be sent again.
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
    pub(crate) fn answer(
        &mut self,
        attributes: &Attributes,
        psn: Psn,
        aeth: Aeth,
        now: Nanos,
        completed: &mut VecDeque<Completion>,
    ) -> Result<(), Failure> {
        // It answers a packet that is done, or one that was never sent: it is late, or forged.
        if psn.since(self.oldest) < 0 || psn.since(self.sent_end) >= 0 {
            return Ok(());
        }
        match aeth.syndrome {
            Syndrome::Ack(_) => self.done_before(attributes, psn.plus(1), now, completed),
            Syndrome::RnrNak(timer) => {
                self.done_before(attributes, psn, now, completed);
                if attributes.not_ready_retries != FOR_EVER {
                    if self.not_ready >= attributes.not_ready_retries {
                        return Err(Failure::RnrRetryExceeded);
                    }
                    self.not_ready += 1;
                }
                self.wait_until = now + rnr_nanos(timer);
                self.go_back();
            }
            Syndrome::PsnSequenceError => {
                self.done_before(attributes, psn, now, completed);
                self.congestion.lost();
                self.go_back();
            }
            Syndrome::InvalidRequest | Syndrome::RemoteAccessError | Syndrome::RemoteOperationalError => {
                self.done_before(attributes, psn, now, completed);
                return Err(match aeth.syndrome {
                    Syndrome::InvalidRequest => Failure::RemoteInvalidRequest,
                    Syndrome::RemoteAccessError => Failure::RemoteAccess,
                    _ => Failure::RemoteOperation,
                });
            }
        }
        Ok(())
    }

    /// Takes a response to a read. A failure ends the queue pair.
    pub(crate) fn response(
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
