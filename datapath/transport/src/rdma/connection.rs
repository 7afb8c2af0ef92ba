//! Broker's end of a queue pair.

use super::arrivals::{Arrival, Arrivals};
use super::chain::SendQueue;
use super::device::{RdmaDevice, RdmaQueue};
use super::ring::{LEAST_BYTES, RingWriter};
use super::windows::LandingWindows;
use super::{SEND_DEPTH, WANTS_WINDOW, WINDOWS_PER_PUBLISHER, connecting_peer};
use crate::connection::{Connection, Landing, Placement, Received, TransportError};
use crate::outbox::{Outbox, Outgoing, Payload};
use crate::tcp::TcpConnection;
use embarcadero_cxl::{Native, RegionOffset};
use embarcadero_verbs::{
    Completion, MemoryRegion, Outcome, PeerAddress, ProtectionDomain, QueuePair, QueuePairOptions, RemoteRange,
    Sending, Work, WorkError,
};
use embarcadero_wire::{ErrorCode, FRAME_BYTES, RdmaAccept, RdmaConnect};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

/// Client at the other end of a queue pair, with the memory that its connection writes.
enum Peer {
    Publisher(LandingWindows),
    Subscriber(RingWriter),
}

/// Reason why a queue pair is of no use any more.
#[derive(Clone, Copy)]
enum Failure {
    /// The device reports an error.
    Work(WorkError),
    /// The peer does not speak the protocol.
    Refused(ErrorCode, &'static str),
}

/// Queue pair of a connection, with the landing windows or the ring that belong to it.
pub(crate) struct RdmaConnection {
    // The order of the drops matters: windows close before their queue pair is destroyed. In Soft-RoCE an open window
    // keeps its queue pair in use (`rxe_do_bind_mw` in drivers/infiniband/sw/rxe/rxe_mw.c). Destroying the queue pair
    // first would block until the kernel gives up, close to a minute.
    peer: Peer,
    pair: QueuePair<Sending>,
    /// Batches that do not lie in the region, each with the number of the request that reads it.
    copies: VecDeque<(u64, MemoryRegion)>,
    domain: Arc<ProtectionDomain>,
    device: Arc<RdmaDevice>,
    /// True once the peer may write no more.
    closed: bool,
    arrived: Arrivals,
    sends: SendQueue,
    /// Number of the last request of each posted entry at the front of the outbox; 0 for an entry that is inline.
    posted_outgoing: VecDeque<u64>,
    failure: Option<Failure>,
    /// Queue of what goes over the socket.
    side: Outbox,
    _counted: Arc<()>,
}

impl RdmaConnection {
    /// Sets up a queue pair for a peer that asks for one. The answer leaves with the next send.
    ///
    /// # Errors
    /// [`TransportError::Refused`] when the request is invalid, or the device has no room.
    pub(crate) fn accept(
        device: &Arc<RdmaDevice>,
        queue: &RdmaQueue,
        request: &RdmaConnect,
    ) -> Result<Self, TransportError> {
        if !queue.has_room() {
            return Err(TransportError::refused(ErrorCode::Unavailable, "the broker has no room for a queue pair"));
        }
        let ring = match (request.ring_bytes, request.batch_bytes) {
            (0, 1..) => None,
            (bytes, 0) if u64::from(bytes) >= LEAST_BYTES => {
                let to = RemoteRange { address: request.ring_address, key: request.ring_rkey };
                Some(RingWriter::new(to, bytes.into()))
            }
            (ring, batch) => {
                let text = format!(
                    "a queue pair needs a ring of at least {LEAST_BYTES} bytes or a batch size; got {ring} and {batch}"
                );
                return Err(TransportError::refused(ErrorCode::BadFrame, text));
            }
        };
        let share = device.bounds.share_of(request.batch_bytes.into());
        let failed = |error: io::Error| TransportError::refused(ErrorCode::Unavailable, error.to_string());
        // With registrations, a publisher's keys must be of no use to other queue pairs.
        let own = !device.windows && ring.is_none();
        let domain =
            if own { ProtectionDomain::new(&device.context).map_err(failed)? } else { Arc::clone(&device.domain) };
        let options = QueuePairOptions {
            send_depth: SEND_DEPTH as u32,
            receive_depth: 0,
            inline_bytes: FRAME_BYTES as u32,
            shared: Some(&queue.receives),
        };
        let pair = QueuePair::new(&domain, &queue.queue, &device.port, &options).map_err(failed)?;
        let Some(peer) = connecting_peer(request) else {
            return Err(TransportError::refused(ErrorCode::BadFrame, "a LID has at most 16 bits"));
        };
        let pair = pair.receive_from(&peer).and_then(QueuePair::send).map_err(failed)?;
        let PeerAddress { gid, lid, queue_pair, first_psn, mtu } = pair.address();
        let accept = RdmaAccept { gid, queue_pair, first_psn, mtu, lid: lid.into(), ..RdmaAccept::blank() };
        let mut side = Outbox::default();
        side.push(Outgoing::frame(accept.encode()));
        let peer = match ring {
            Some(ring) => Peer::Subscriber(ring),
            None => Peer::Publisher(LandingWindows::new(device, &domain, share)),
        };
        Ok(Self {
            peer,
            pair,
            copies: VecDeque::new(),
            domain,
            device: Arc::clone(device),
            closed: false,
            arrived: Arrivals::new(share.windows as u64 * share.window_bytes),
            sends: SendQueue::new(),
            posted_outgoing: VecDeque::new(),
            failure: None,
            side,
            _counted: Arc::clone(&queue.connections),
        })
    }

    /// Number of the queue pair, by which completions name it.
    #[must_use]
    pub(crate) fn number(&self) -> u32 {
        self.pair.number()
    }

    /// Takes a completion of the queue pair.
    pub(crate) fn completed(&mut self, completion: Completion) {
        match completion.outcome {
            Outcome::Sent => self.sends.completed(completion.id),
            Outcome::Written { bytes, immediate } => self.written(Arrival { immediate, bytes }),
            // Nothing is posted that a SEND could go to.
            Outcome::Message { .. } => {}
            Outcome::Failed(error) => {
                self.failure.get_or_insert(Failure::Work(error));
            }
        }
    }

    /// Takes note of an RDMA WRITE of the peer.
    fn written(&mut self, arrival: Arrival) {
        if self.closed {
            return;
        }
        let refused = match &mut self.peer {
            Peer::Publisher(_) => (!self.arrived.push(arrival))
                .then_some((ErrorCode::BadBatch, "more batches came than fit into the landing windows")),
            Peer::Subscriber(ring) => (arrival.bytes != 0 || !ring.release(arrival.immediate))
                .then_some((ErrorCode::BadFrame, "the ring has not that much to give back")),
        };
        if let Some((code, text)) = refused {
            self.failure.get_or_insert(Failure::Refused(code, text));
        }
    }

    /// Error of a queue pair that is of no use any more.
    fn check(&self) -> Result<(), TransportError> {
        match self.failure {
            None => Ok(()),
            Some(Failure::Work(error)) => {
                Err(io::Error::other(format!("queue pair {}: {error}", self.number())).into())
            }
            Some(Failure::Refused(code, text)) => Err(TransportError::refused(code, text)),
        }
    }

    /// Returns true when the device writes to the region's memory, past this host's caches.
    pub(crate) fn writes_past_caches(&self) -> bool {
        self.device.context.writes_past_caches()
    }

    /// Landing windows of a publisher; `None` for a subscriber.
    fn landing_windows(&self) -> Option<&LandingWindows> {
        match &self.peer {
            Peer::Publisher(windows) => Some(windows),
            Peer::Subscriber(_) => None,
        }
    }

    /// Returns true when [`RdmaConnection::receive`] has something to do.
    pub(crate) fn has_work(&self) -> bool {
        let is_due_a_window = self.landing_windows().is_some_and(LandingWindows::is_due);
        !self.arrived.is_empty() || self.failure.is_some() || is_due_a_window
    }

    /// Returns true when [`RdmaConnection::send`] has something to do besides the outbox.
    pub(crate) fn has_to_send(&self) -> bool {
        !self.side.is_empty() || self.landing_windows().is_some_and(LandingWindows::has_to_announce)
    }

    /// Returns true while bytes wait for the socket.
    pub(crate) fn waits_for_socket(&self) -> bool {
        !self.side.is_empty()
    }

    /// Offsets in the region of the open landing windows.
    pub(crate) fn windows(&self) -> impl Iterator<Item = RegionOffset> + '_ {
        self.landing_windows().into_iter().flat_map(LandingWindows::offsets)
    }

    /// Closes all landing windows. When this returns, the device refuses every write of the peer.
    pub(crate) fn close_windows(&mut self) {
        if let Peer::Publisher(windows) = &mut self.peer {
            windows.close();
        }
        self.arrived.clear();
        self.closed = true;
    }

    /// Takes up to `budget` batches that arrived, and opens the windows that the publisher is due.
    ///
    /// # Errors
    /// [`TransportError`]. The connection can then only send the frame of the error.
    pub(crate) fn receive(
        &mut self,
        memory: &Native,
        landing: &mut impl Landing,
        budget: usize,
    ) -> Result<Received, TransportError> {
        self.check()?;
        if self.closed {
            return Ok(Received::Nothing);
        }
        let in_memory = self.writes_past_caches();
        // What a subscriber gives back is taken as it comes.
        let Peer::Publisher(windows) = &mut self.peer else { return Ok(Received::Nothing) };
        let mut taken = 0;
        while let Some(arrival @ Arrival { immediate, bytes }) = self.arrived.front() {
            if arrival.wants_window() {
                self.arrived.pop_front();
                windows.want(immediate & !WANTS_WINDOW);
                continue;
            }
            let Some((header, at)) = windows.next_batch(memory, immediate, bytes.into())? else { continue };
            match landing.admit(&header, at) {
                Placement::Wait => return Ok(Received::Waiting),
                Placement::Refuse(error) => return Err(error),
                Placement::At(at) => {
                    windows.take(bytes.into());
                    self.arrived.pop_front();
                    landing.complete(header, at, in_memory)?;
                }
            }
            taken += 1;
            if taken == budget {
                return Ok(Received::More);
            }
        }
        windows.grant_due(landing)?;
        Ok(Received::Nothing)
    }

    /// Posts as much of the outbox as the device has room for. Errors go to `socket`.
    ///
    /// # Errors
    /// [`TransportError`], as for [`Connection::send`].
    pub(crate) fn send(
        &mut self,
        socket: &mut TcpConnection,
        memory: &Native,
        outbox: &mut Outbox,
    ) -> Result<u64, TransportError> {
        if !self.closed
            && let Some(Failure::Work(_)) = self.failure
        {
            // The peer may have so much to read that nobody receives from it.
            self.check()?;
        }
        self.forget_done(outbox);
        let mut moved = 0;
        if self.failure.is_none() {
            while let more @ 1.. = self.post(outbox)? {
                moved += more;
            }
        }
        while let Some(bytes) = outbox.take_bytes() {
            self.side.push(bytes);
        }
        if !self.side.is_empty() {
            moved += socket.send(memory, &mut self.side)?;
        }
        Ok(moved)
    }

    /// Posts one chain of requests. Returns their number.
    fn post(&mut self, outbox: &mut Outbox) -> Result<u64, TransportError> {
        let mut chain = self.sends.chain();
        let mut frames = [[0u8; FRAME_BYTES]; WINDOWS_PER_PUBLISHER];
        let (mut ring, announced) = match &mut self.peer {
            Peer::Publisher(windows) => (None, windows.announce(&mut chain, &mut frames)),
            Peer::Subscriber(ring) => (Some(ring), 0),
        };
        let before = self.posted_outgoing.len();
        for outgoing in outbox.queue.iter().skip(outbox.posted) {
            if outgoing.is_for_socket() || chain.room() < 2 {
                break;
            }
            let frame = &outgoing.head()[..FRAME_BYTES];
            let payload = outgoing.payload();
            let bytes = match payload {
                Payload::Copied(copied) => (copied.len() - FRAME_BYTES) as u64,
                Payload::InRegion(_, bytes) => bytes,
                Payload::None => {
                    chain.push(Work::Send(frame), false);
                    self.posted_outgoing.push_back(0);
                    continue;
                }
            };
            let Some(ring) = &mut ring else {
                return Err(TransportError::refused(ErrorCode::BadFrame, "a publisher is sent no batches"));
            };
            let whole = FRAME_BYTES as u64 + bytes;
            if !ring.can_hold(whole) {
                let text = format!("a batch of {bytes} bytes does not fit into the subscriber's ring");
                return Err(TransportError::refused(ErrorCode::BadBatch, text));
            }
            let Some((line, to)) = ring.place(whole) else { break };
            chain.push(Work::WriteInline(frame, to, None), false);
            let from = match payload {
                Payload::Copied(copied) => {
                    let copy = MemoryRegion::local(&self.domain, copied)?;
                    let from = copy.range(FRAME_BYTES as u64, bytes as u32);
                    self.copies.push_back((chain.next_number(), copy));
                    Some(from)
                }
                Payload::InRegion(at, bytes) => Some(self.device.region.range(at.0, bytes as u32)),
                Payload::None => None,
            };
            let number = chain.push(Work::Write(from, to.offset(FRAME_BYTES as u64), Some(line)), true);
            self.posted_outgoing.push_back(number);
        }
        let posted = self.sends.post(&mut self.pair, &chain)?;
        if posted == 0 {
            return Ok(0);
        }
        if let Peer::Publisher(windows) = &mut self.peer {
            windows.announced(announced);
        }
        outbox.posted += self.posted_outgoing.len() - before;
        self.forget_done(outbox);
        Ok(posted as u64)
    }

    /// Removes from the outbox the entries that the device has sent.
    fn forget_done(&mut self, outbox: &mut Outbox) {
        while self.posted_outgoing.front().is_some_and(|number| self.sends.is_done(*number)) {
            self.posted_outgoing.pop_front();
            outbox.pop_posted();
        }
        while self.copies.front().is_some_and(|(number, _)| self.sends.is_done(*number)) {
            self.copies.pop_front();
        }
    }
}
