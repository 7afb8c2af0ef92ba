//! One side of a reliable connection.

use crate::attributes::Attributes;
use crate::memory::Memory;
use crate::packet::{Ecn, Opcode, Packet};
use crate::psn::Psn;
use crate::requester::Requester;
use crate::responder::Responder;
use crate::time::Nanos;
use crate::work::{Completion, Failure, Full, Receive, Work};
use std::collections::VecDeque;

/// Shortest time between two congestion notifications, nanoseconds (DCQCN, section 3.2, notification point).
/// Annex A17.9.3 leaves it open.
const NOTIFICATION_EVERY: Nanos = 50_000;
/// Payload of a congestion notification (A17.9.3).
const RESERVED: [u8; 16] = [0; 16];

/// One side of a reliable connection that is ready to send. `B` holds payloads.
#[derive(Debug)]
pub struct QueuePair<B> {
    attributes: Attributes,
    requester: Requester<B>,
    responder: Responder,
    completions: VecDeque<Completion>,
    failure: Option<Failure>,
    /// True when a marked packet came that the peer was not told about.
    notify: bool,
    /// Time of the last congestion notification sent.
    notified_at: Option<Nanos>,
}

impl<B: AsRef<[u8]>> QueuePair<B> {
    /// Makes a queue pair that is ready to send and to receive.
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

    /// Attributes that the queue pair was made with.
    #[must_use]
    pub fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    /// Reason why the queue pair ended; `None` while it works.
    #[must_use]
    pub fn failure(&self) -> Option<Failure> {
        self.failure
    }

    /// Posts a request. After the end of the queue pair it completes as [`Completion::Flushed`].
    ///
    /// # Errors
    /// [`Full`], with the request.
    pub fn post(&mut self, work: Work<B>) -> Result<(), Full<B>> {
        if let Some(failure) = self.failure {
            self.completions.push_back(Completion::Flushed { id: work.id, failure });
            return Ok(());
        }
        self.requester.post(&self.attributes, work)
    }

    /// Posts a receive. After the end of the queue pair it comes back as [`Completion::Unused`].
    pub fn post_receive(&mut self, receive: Receive) {
        if self.failure.is_some() {
            self.completions.push_back(Completion::Unused { receive });
        } else {
            self.responder.post(receive);
        }
    }

    /// Returns true when a posted receive is unused.
    #[must_use]
    pub fn has_receive(&self) -> bool {
        self.responder.has_receive()
    }

    /// Takes the next completion.
    pub fn poll(&mut self) -> Option<Completion> {
        self.completions.pop_front()
    }

    /// Returns true when every posted request is done.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.requester.is_idle()
    }

    /// Time at which [`Self::transmit`] is to be called again if no packet comes before; `None` if there is no need.
    #[must_use]
    pub fn wake_at(&self) -> Option<Nanos> {
        self.failure.map_or_else(|| self.requester.wake_at(), |_| None)
    }

    /// Ends the queue pair once, and hands back all that was posted.
    fn fail(&mut self, failure: Failure) {
        if self.failure.is_none() {
            self.failure = Some(failure);
            self.completions.extend(self.requester.take_work().map(|id| Completion::Flushed { id, failure }));
            self.completions.extend(self.responder.take_receives().map(|receive| Completion::Unused { receive }));
        }
    }

    /// Takes a packet that came for this queue pair's number at time `now`.
    ///
    /// A packet that is not from the peer is dropped. Once the queue pair ended, all are.
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

    /// Hands at most `most` packets to `send`, and returns their number.
    ///
    /// Answers go first. Posted requests follow as far as window and rate allow.
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
        // A queue pair that ended still sends the answer that says so.
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
