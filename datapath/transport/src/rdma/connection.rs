//! Broker's end of a queue pair.

use super::chain::{Chain, SendQueue};
use super::device::{CONNECTIONS, RdmaDevice, RdmaQueue, RemoteAccess};
use super::ring::{LEAST_BYTES, RingWriter};
use super::{SEND_DEPTH, WANTS_WINDOW, WINDOWS_PER_PUBLISHER, connecting_peer};
use crate::connection::{Connection, Landing, Placement, Received, TransportError, WindowPlacement};
use crate::outbox::{Head, Outbox, Outgoing};
use crate::tcp::TcpConnection;
use crate::window::Window;
use embarcadero_cxl::{Native, RegionOffset};
use embarcadero_verbs::{
    Completion, MemoryRegion, Outcome, PeerAddress, ProtectionDomain, QueuePair, QueuePairOptions, RemoteRange,
    Sending, Work, WorkError,
};
use embarcadero_wire::batch::ALIGN_BYTES;
use embarcadero_wire::{BatchHeader, ErrorCode, FRAME_BYTES, Frame, RdmaAccept, RdmaConnect, WindowGrant};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

/// Landing window that is open to the publisher.
struct OpenWindow {
    // First, so that it is dropped first: nothing can be written any more once the window is given back.
    access: RemoteAccess,
    window: Window,
    number: u32,
    /// True once its window grant was sent.
    announced: bool,
}

/// Queue pair of a connection, with the landing windows or the ring that belong to it.
pub struct RdmaConnection {
    // The order of the drops matters: windows close before their queue pair is destroyed. In Soft-RoCE an open window
    // keeps its queue pair in use (`rxe_do_bind_mw` in drivers/infiniband/sw/rxe/rxe_mw.c). Destroying the queue pair
    // first would block until the kernel gives up, close to a minute.
    windows: VecDeque<OpenWindow>,
    pair: QueuePair<Sending>,
    /// Batches that do not lie in the region, each with the number of the request that reads it.
    copies: VecDeque<(u64, MemoryRegion)>,
    /// Ring of a subscriber; `None` for a publisher.
    ring: Option<RingWriter>,
    domain: Arc<ProtectionDomain>,
    device: Arc<RdmaDevice>,
    window_bytes: u64,
    next_window: u32,
    wants_window: bool,
    closed: bool,
    /// Immediate data and length of each RDMA WRITE that was not looked at yet.
    arrived: VecDeque<(u32, u32)>,
    sends: SendQueue,
    /// Number of the last request of each posted entry at the front of the outbox; 0 for an entry that is inline.
    posted_outgoing: VecDeque<u64>,
    failure: Option<WorkError>,
    /// Queue of what goes over the socket.
    side: Outbox,
    _counted: Arc<()>,
}

impl RdmaConnection {
    /// Sets up a queue pair for a peer that asks for one. The answer leaves with the next send.
    ///
    /// # Errors
    /// [`TransportError::Refused`] when the request is invalid, or the device has no room.
    pub fn accept(device: &Arc<RdmaDevice>, queue: &RdmaQueue, request: &RdmaConnect) -> Result<Self, TransportError> {
        if Arc::strong_count(&queue.connections) > CONNECTIONS {
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
        let window_bytes = device.window_bytes.max(u64::from(request.batch_bytes).next_multiple_of(ALIGN_BYTES));
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
        let pair = pair.receive_from(&connecting_peer(request)).and_then(QueuePair::send).map_err(failed)?;
        let PeerAddress { gid, lid, queue_pair, first_psn, mtu } = pair.address();
        let accept = RdmaAccept { gid, queue_pair, first_psn, mtu, lid: lid.into(), ..RdmaAccept::blank() };
        let mut side = Outbox::default();
        side.push(Outgoing::frame(accept.encode()));
        Ok(Self {
            pair,
            copies: VecDeque::new(),
            windows: VecDeque::with_capacity(WINDOWS_PER_PUBLISHER),
            ring,
            domain,
            device: Arc::clone(device),
            window_bytes,
            next_window: 0,
            wants_window: false,
            closed: false,
            arrived: VecDeque::new(),
            sends: SendQueue::new(),
            posted_outgoing: VecDeque::new(),
            failure: None,
            side,
            _counted: Arc::clone(&queue.connections),
        })
    }

    /// Number of the queue pair, by which completions name it.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.pair.number()
    }

    /// Takes a completion of the queue pair.
    pub fn completed(&mut self, completion: Completion) {
        match completion.outcome {
            Outcome::Sent => self.sends.completed(completion.id),
            Outcome::Written { bytes, immediate } => self.arrived.push_back((immediate, bytes)),
            // Nothing is posted that a SEND could go to.
            Outcome::Message { .. } => {}
            Outcome::Failed(error) => {
                self.failure.get_or_insert(error);
            }
        }
    }

    /// Returns true when the device writes to the region's memory, past this host's caches.
    pub(crate) fn writes_past_caches(&self) -> bool {
        self.device.context.writes_past_caches()
    }

    /// Returns true when [`RdmaConnection::receive`] has something to do.
    pub(crate) fn has_work(&self) -> bool {
        !self.arrived.is_empty() || self.failure.is_some() || self.is_due_a_window()
    }

    /// Returns true when [`RdmaConnection::send`] has something to do besides the outbox.
    pub(crate) fn has_to_send(&self) -> bool {
        !self.side.is_empty() || self.windows.iter().any(|open| !open.announced)
    }

    /// Returns true while bytes wait for the socket.
    pub(crate) fn waits_for_socket(&self) -> bool {
        !self.side.is_empty()
    }

    /// Offsets in the region of the open landing windows.
    pub(crate) fn windows(&self) -> impl Iterator<Item = RegionOffset> + '_ {
        self.windows.iter().map(|open| open.window.at())
    }

    /// Closes all landing windows. When this returns, the device refuses every write of the peer.
    pub(crate) fn close_windows(&mut self) {
        self.windows.clear();
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
        if let Some(error) = self.failure {
            return Err(io::Error::other(format!("queue pair {}: {error}", self.number())).into());
        }
        if self.closed {
            return Ok(Received::Nothing);
        }
        let mut taken = 0;
        while let Some((immediate, bytes)) = self.arrived.front().copied() {
            if let Some(ring) = &mut self.ring {
                self.arrived.pop_front();
                if bytes != 0 || !ring.release(immediate) {
                    let text = "the ring has not that much to give back";
                    return Err(TransportError::refused(ErrorCode::BadFrame, text));
                }
                continue;
            }
            if bytes == 0 && immediate & WANTS_WINDOW != 0 {
                self.arrived.pop_front();
                self.wants_window = true;
                let kept = immediate & !WANTS_WINDOW;
                while self.windows.front().is_some_and(|open| open.announced && open.number < kept) {
                    self.windows.pop_front();
                }
                continue;
            }
            let Some((header, at)) = self.next_batch(memory, immediate, bytes.into())? else { continue };
            match landing.admit(&header, at) {
                Placement::Wait => return Ok(Received::Waiting),
                Placement::Refuse(error) => return Err(error),
                Placement::At(at) => {
                    if let Some(open) = self.windows.front_mut() {
                        open.window.take(bytes.into());
                    }
                    self.arrived.pop_front();
                    landing.complete(header, at, self.writes_past_caches())?;
                }
            }
            taken += 1;
            if taken == budget {
                return Ok(Received::More);
            }
        }
        self.open_windows(landing)?;
        Ok(Received::Nothing)
    }

    /// Header and place of the batch that a WRITE of `bytes` put into window `number`. `None` when the publisher has left
    /// a window, which this closes: call again.
    fn next_batch(
        &mut self,
        memory: &Native,
        number: u32,
        bytes: u64,
    ) -> Result<Option<(BatchHeader, RegionOffset)>, TransportError> {
        let refuse = |text: String| Err(TransportError::refused(ErrorCode::BadBatch, text));
        let Some(open) = self.windows.front().filter(|open| open.announced) else {
            return refuse(format!("a batch of {bytes} bytes came without a landing window"));
        };
        if open.number != number {
            // The publisher has gone on to its next window.
            if self.windows.get(1).is_none_or(|next| !next.announced || next.number != number) {
                return refuse(format!("a batch names landing window {number}, which is not open"));
            }
            self.windows.pop_front();
            return Ok(None);
        }
        let room = open.window.room();
        if bytes < FRAME_BYTES as u64 || bytes > room {
            return refuse(format!("a batch of {bytes} bytes came; the window has {room}"));
        }
        let at = open.window.next();
        // Its own copy: the peer can still write the window.
        let mut header = [0; FRAME_BYTES];
        memory.with_bytes(at, FRAME_BYTES as u64, |bytes| header.copy_from_slice(bytes));
        let Frame::BatchHeader(header) = Frame::decode(&header)? else {
            return refuse("what was written is no batch".to_owned());
        };
        if u64::from(header.payload_bytes) > bytes || header.batch_bytes() != bytes {
            return refuse(format!("{bytes} bytes were written, the batch's header says {}", header.batch_bytes()));
        }
        Ok(Some((header, at)))
    }

    /// Returns true when the publisher is to get a window: it asked for its first, or has used one up since.
    fn is_due_a_window(&self) -> bool {
        let begun = self.wants_window || self.next_window > 0;
        self.ring.is_none() && begun && self.windows.len() < WINDOWS_PER_PUBLISHER
    }

    /// Opens the landing windows that the publisher is due, as far as the landing has room.
    fn open_windows(&mut self, landing: &mut impl Landing) -> Result<(), TransportError> {
        while self.is_due_a_window() {
            let starved = self.wants_window && self.windows.is_empty();
            let window = match landing.grant_window(self.window_bytes, starved) {
                WindowPlacement::Granted(window) => window,
                WindowPlacement::Wait => return Ok(()),
                WindowPlacement::Refuse(error) => return Err(error),
            };
            self.wants_window = false;
            let access = self.device.grant_access(&self.domain, window.at(), window.bytes())?;
            let number = self.next_window;
            self.next_window = (number + 1) & !WANTS_WINDOW;
            self.windows.push_back(OpenWindow { access, window, number, announced: false });
        }
        Ok(())
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
        let announced = announce(&mut chain, &self.windows, &mut frames);
        let before = self.posted_outgoing.len();
        for outgoing in outbox.queue.iter().skip(outbox.posted) {
            if outgoing.is_for_socket() || chain.room() < 2 {
                break;
            }
            let frame = &outgoing.head()[..FRAME_BYTES];
            let bytes = match (&outgoing.head, outgoing.batch) {
                (Head::Copied(copied), _) => (copied.len() - FRAME_BYTES) as u64,
                (_, Some((_, bytes))) => bytes,
                (_, None) => {
                    chain.push(Work::Send(frame), false);
                    self.posted_outgoing.push_back(0);
                    continue;
                }
            };
            let Some(ring) = &mut self.ring else {
                return Err(TransportError::refused(ErrorCode::BadFrame, "a publisher is sent no batches"));
            };
            let whole = FRAME_BYTES as u64 + bytes;
            if !ring.can_hold(whole) {
                let text = format!("a batch of {bytes} bytes does not fit into the subscriber's ring");
                return Err(TransportError::refused(ErrorCode::BadBatch, text));
            }
            let Some((line, to)) = ring.place(whole) else { break };
            chain.push(Work::WriteInline(frame, to, None), false);
            let from = match (&outgoing.head, outgoing.batch) {
                (Head::Copied(copied), _) => {
                    let copy = MemoryRegion::local(&self.domain, copied)?;
                    let from = copy.range(FRAME_BYTES as u64, bytes as u32);
                    self.copies.push_back((chain.next_number(), copy));
                    from
                }
                (_, batch) => self.device.region.range(batch.map_or(0, |(at, _)| at.0), bytes as u32),
            };
            let number = chain.push(Work::Write(Some(from), to.offset(FRAME_BYTES as u64), Some(line)), true);
            self.posted_outgoing.push_back(number);
        }
        let posted = self.sends.post(&mut self.pair, &chain)?;
        if posted == 0 {
            return Ok(0);
        }
        self.windows.iter_mut().filter(|open| !open.announced).take(announced).for_each(|open| open.announced = true);
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

/// Adds to `chain` the window grants that the publisher was not sent, each behind the request that opens its window.
/// Returns their number.
fn announce<'a>(
    chain: &mut Chain<'a>,
    windows: &'a VecDeque<OpenWindow>,
    frames: &'a mut [[u8; FRAME_BYTES]; WINDOWS_PER_PUBLISHER],
) -> usize {
    let mut announced = 0;
    for (open, frame) in windows.iter().filter(|open| !open.announced).zip(frames) {
        if chain.room() < 2 {
            break;
        }
        announced += 1;
        let RemoteRange { address, key } = open.access.remote();
        let bytes = open.window.bytes() as u32;
        let grant = WindowGrant { address, rkey: key, number: open.number, bytes, ..WindowGrant::blank() };
        *frame = grant.encode();
        if let RemoteAccess::Window(window) = &open.access {
            chain.push(Work::Open(window), false);
        }
        chain.push(Work::Send(frame), false);
    }
    announced
}
