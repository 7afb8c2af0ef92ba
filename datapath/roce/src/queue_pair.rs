//! A reliable connection.

use super::packet::{Ecn, Opcode, Packet};
use super::psn::Psn;
use super::requester::{Requester, Work};
use super::responder::{Memory, Receive, Responder};
use super::{Nanos, PathMtu};
use std::collections::VecDeque;
use std::net::IpAddr;

/// What both sides agreed on, and how patient we are (IBTA 11.2.5.2, modify queue pair).
#[derive(Clone, Debug)]
pub struct Attributes {
    /// Our address.
    pub local: IpAddr,
    /// The peer's, of the same family. Packets from others are not for this queue pair.
    pub peer: IpAddr,
    /// Our number, 24 bits.
    pub number: u32,
    /// The peer's.
    pub peer_number: u32,
    /// UDP port that we send from.
    pub source_port: u16,
    /// Bytes of payload in a packet.
    pub path_mtu: PathMtu,
    /// Number of the first packet that we send.
    pub send_psn: Psn,
    /// Number of the first packet that the peer sends.
    pub receive_psn: Psn,
    /// How long a packet may stay without an answer at least; longer on a path that takes longer, and twice as long each time
    /// that it was sent again, to a second.
    pub timeout: Nanos,
    /// How often it is sent again then, before the queue pair fails.
    pub retries: u8,
    /// How often it is sent again when the peer has no receive; 7 is without end.
    pub not_ready_retries: u8,
    /// How long a peer is to wait for a receive of ours, encoded as [`super::packet::rnr_nanos`] says.
    pub rnr_timer: u8,
    /// Packets under way at most. (rxe has 128: rxe_param.h, RXE_MAX_UNACKED_PSNS.)
    pub window: u32,
    /// Bytes a second of the port, from which congestion notifications lower the rate.
    pub line_rate: f64,
}

impl Attributes {
    /// A packet to the peer, without extended headers and payload.
    pub(super) fn packet(&self, opcode: Opcode, psn: Psn) -> Packet<'static> {
        Packet {
            from: self.local,
            to: self.peer,
            source_port: self.source_port,
            ecn: Ecn::Capable0,
            opcode,
            solicited: false,
            wants_ack: false,
            queue_pair: self.peer_number,
            psn,
            reth: None,
            aeth: None,
            immediate: None,
            payload: &[],
        }
    }
}

/// Why a queue pair ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No answer, however often we sent.
    #[error("the peer does not answer")]
    NoAnswer,
    /// No receive there, however long we waited.
    #[error("the peer posts no receive")]
    NotReady,
    /// The peer takes our request for malformed.
    #[error("the peer refuses a request as invalid")]
    RemoteInvalidRequest,
    /// The peer gives no right to the memory.
    #[error("the peer gives no right to that memory")]
    RemoteAccess,
    /// The peer failed.
    #[error("the peer failed")]
    RemoteOperation,
    /// The peer answered a read with what was not asked for.
    #[error("the peer answers with what was not asked for")]
    BadResponse,
    /// The peer sent a malformed request, or more than a receive holds.
    #[error("the peer sends invalid requests")]
    InvalidRequest,
    /// The peer wanted memory to which it has no right.
    #[error("the peer wants memory to which it has no right")]
    Access,
    /// We closed it.
    #[error("it was closed")]
    Closed,
}

/// Something is done.
#[derive(Debug, PartialEq, Eq)]
pub enum Completion {
    /// A send or write reached the peer.
    Done {
        /// Of the work.
        id: u64,
    },
    /// A read is here.
    Read {
        /// Of the work.
        id: u64,
        /// What was read.
        bytes: Vec<u8>,
    },
    /// The peer sent something.
    Received {
        /// Its buffer is as long as the message.
        receive: Receive,
        /// What came with it.
        immediate: Option<u32>,
    },
    /// The peer wrote to memory and wants that noticed.
    Written {
        /// As it was posted.
        receive: Receive,
        /// What came with it.
        immediate: u32,
        /// How much was written.
        bytes: u32,
    },
    /// The queue pair ended before this work was done; the first of them is what failed, if ours did.
    Flushed {
        /// Of the work.
        id: u64,
        /// Why.
        failure: Failure,
    },
    /// The queue pair ended before this receive was used.
    Unused {
        /// As it was posted.
        receive: Receive,
    },
}

/// The work is not taken now: too much is, or its payload is longer than messages can be, or it is a read with a payload.
#[derive(Debug)]
pub struct Full<B>(pub Work<B>);

/// A marked packet is told at most so often (annex A17.9.3 leaves it open; DCQCN, section 3.2, notification point).
const NOTIFICATION_EVERY: Nanos = 50_000;
/// What a notification carries (A17.9.3).
const RESERVED: [u8; 16] = [0; 16];

/// One side of a reliable connection, from "ready to send" on. `B` holds payloads.
#[derive(Debug)]
pub struct QueuePair<B> {
    attributes: Attributes,
    requester: Requester<B>,
    responder: Responder,
    completions: VecDeque<Completion>,
    failure: Option<Failure>,
    notify: bool,
    notified_at: Option<Nanos>,
}

impl<B: AsRef<[u8]>> QueuePair<B> {
    /// A queue pair that is ready to send and to receive.
    #[must_use]
    pub fn new(attributes: Attributes) -> Self {
        Self {
            requester: Requester::new(&attributes),
            responder: Responder::new(&attributes),
            attributes,
            completions: VecDeque::new(),
            failure: None,
            notify: false,
            notified_at: None,
        }
    }

    /// What it was made of.
    #[must_use]
    pub fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    /// Why it ended, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<Failure> {
        self.failure
    }

    /// Posts a request; after the end of the queue pair it is completed as flushed.
    ///
    /// # Errors
    /// [`Full`] gives it back.
    pub fn post(&mut self, work: Work<B>) -> Result<(), Full<B>> {
        if let Some(failure) = self.failure {
            self.completions.push_back(Completion::Flushed { id: work.id, failure });
            return Ok(());
        }
        self.requester.post(&self.attributes, work)
    }

    /// Posts a receive; after the end of the queue pair it comes back unused.
    pub fn post_receive(&mut self, receive: Receive) {
        if self.failure.is_some() {
            self.completions.push_back(Completion::Unused { receive });
        } else {
            self.responder.post(receive);
        }
    }

    /// Whether a receive waits to be used.
    #[must_use]
    pub fn has_receive(&self) -> bool {
        self.responder.has_receive()
    }

    /// The next completion.
    pub fn poll(&mut self) -> Option<Completion> {
        self.completions.pop_front()
    }

    /// Whether everything that was posted is done.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.requester.is_idle()
    }

    /// When [`Self::transmit`] should be called again, if no packet comes before.
    #[must_use]
    pub fn wake_at(&self) -> Option<Nanos> {
        self.failure.map_or_else(|| self.requester.wake_at(), |_| None)
    }

    /// Ends it. The peer is not told, and finds out when it gets no answer, as with NICs.
    pub fn close(&mut self) {
        self.fail(Failure::Closed);
    }

    fn fail(&mut self, failure: Failure) {
        if self.failure.is_none() {
            self.failure = Some(failure);
            self.completions.extend(self.requester.take_work().map(|id| Completion::Flushed { id, failure }));
            self.completions.extend(self.responder.take_receives().map(|receive| Completion::Unused { receive }));
        }
    }

    /// Takes a packet for this queue pair's number. Packets from others than the peer are dropped, as all are once the queue
    /// pair ended.
    pub fn receive(&mut self, packet: &Packet<'_>, now: Nanos, memory: &mut impl Memory) {
        let ours = packet.from == self.attributes.peer
            && packet.to == self.attributes.local
            && packet.queue_pair == self.attributes.number;
        if !ours || self.failure.is_some() {
            return;
        }
        if packet.ecn == Ecn::Congested {
            self.notify = true;
        }
        let taken = match (packet.opcode, packet.aeth) {
            (Opcode::CongestionNotification, _) => {
                self.requester.congestion().notified(now);
                Ok(())
            }
            (Opcode::Acknowledge, Some(aeth)) => {
                self.requester.answer(&self.attributes, packet.psn, aeth, now, &mut self.completions)
            }
            (
                Opcode::ReadResponseFirst
                | Opcode::ReadResponseMiddle
                | Opcode::ReadResponseLast
                | Opcode::ReadResponseOnly,
                _,
            ) => self.requester.response(&self.attributes, packet, now, &mut self.completions),
            _ => self.responder.request(&self.attributes, packet, memory).map(|done| self.completions.extend(done)),
        };
        if let Err(failure) = taken {
            self.fail(failure);
        }
    }

    /// Hands packets to `send`, at most `most`, and says how many. What it answers goes first, then what was posted, as far as
    /// window and rate allow.
    pub fn transmit(
        &mut self,
        now: Nanos,
        memory: &impl Memory,
        most: usize,
        mut send: impl FnMut(&Packet<'_>),
    ) -> usize {
        let mut sent = 0;
        if self.notify && self.notified_at.is_none_or(|at| now >= at + NOTIFICATION_EVERY) && sent < most {
            (self.notify, self.notified_at) = (false, Some(now));
            let packet = self.attributes.packet(Opcode::CongestionNotification, Psn::new(0));
            send(&Packet { ecn: Ecn::NotCapable, payload: &RESERVED, ..packet });
            sent += 1;
        }
        // Of a queue pair that ended, the word that it did.
        while sent < most && self.responder.transmit(&self.attributes, memory, &mut send) {
            sent += 1;
        }
        if self.failure.is_none()
            && let Err(failure) = self.requester.look_at_time(&self.attributes, now)
        {
            self.fail(failure);
        }
        while self.failure.is_none() && sent < most && self.requester.transmit(&self.attributes, now, &mut send) {
            sent += 1;
        }
        sent
    }
}
