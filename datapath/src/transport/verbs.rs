//! Verbs: the NIC writes batches straight into the region.
//!
//! A verbs connection is a TCP connection with a queue pair beside it. The socket carries the opening frames, and what
//! ends a connection: errors with their text, and the peer's death, which it shows at once. The queue pair carries all
//! the rest. A publisher WRITEs batches back to back into landing windows that the broker leases to it, from the first on
//! ahead of need, each with immediate data that names the window; the broker answers with inline SENDs of frames. A
//! subscriber has deliveries WRITTEN into its ring and gives room back with WRITEs of no bytes. `docs/protocol.md` has
//! the details.

use super::tcp::TcpConnection;
use super::{Head, Isolation, Landing, Outbox, Outgoing, Placement, Received, TransportError};
use crate::cxl::{LINE_BYTES, Native, RegionOffset};
use crate::verbs::{
    Completion, CompletionQueue, Context, DOORBELL, LocalPort, MemoryRegion, MemoryWindow, Outcome, PeerAddress,
    ProtectionDomain, QueuePair, QueuePairOptions, RemoteRange, Request, Sending, SharedReceiveQueue, VerbsError, Work,
    WorkError, windows_are_enforced,
};
use crate::wire::{ErrorCode, FRAME_BYTES, Frame, Lease, VerbsAccept, VerbsConnect};
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

/// Immediate data of a publisher that has a batch and no window to put it in; or-ed with the number of the first window
/// that it has not given up.
pub const WANTS_LEASE: u32 = 1 << 31;
/// Windows that a publisher holds at a time: one to write into, and the next.
pub const LEASES: usize = 2;
/// Work requests that a connection may have under way.
pub const SEND_DEPTH: u64 = 128;
/// Work requests after which one asks for a completion.
pub const SIGNAL_EVERY: u64 = 16;
/// Completions that a connection can have outstanding: one for every [`SIGNAL_EVERY`] requests, and its deliveries.
const COMPLETIONS: u32 = 16;
/// Receives that the connections of one thread share. A peer that finds none tries again.
const RECEIVES: u32 = 1024;
/// Places of a thread's completion queue.
const QUEUE: u32 = 16 << 10;
/// Connections that a thread's completion queue has room for.
const CONNECTIONS: usize = ((QUEUE - RECEIVES) / COMPLETIONS) as usize;

/// A broker's RDMA device, with the region registered on it.
pub struct VerbsHost {
    context: Arc<Context>,
    port: LocalPort,
    domain: Arc<ProtectionDomain>,
    region: MemoryRegion,
    memory: Native,
    windows: bool,
    lease_bytes: u64,
}

impl VerbsHost {
    /// Registers the whole region on a device. Landing windows have at most `lease_bytes`.
    ///
    /// # Errors
    /// [`VerbsError`], which says what is missing.
    pub fn open(
        memory: &Native,
        (context, port): (Arc<Context>, LocalPort),
        isolation: Isolation,
        lease_bytes: u64,
    ) -> Result<Arc<Self>, VerbsError> {
        let domain = ProtectionDomain::new(&context).map_err(context.error("make a protection domain"))?;
        let whole = (memory, RegionOffset(0), crate::cxl::Fabric::bytes(memory));
        let region = MemoryRegion::for_windows(&domain, &whole).map_err(context.error("register the region"))?;
        let windows = match isolation {
            Isolation::Windows => true,
            Isolation::Registrations => false,
            Isolation::Auto => {
                windows_are_enforced(&context, &port).map_err(context.error("try the memory windows"))?
            }
        };
        Ok(Arc::new(Self { context, port, domain, region, memory: memory.clone(), windows, lease_bytes }))
    }

    /// The device's name.
    #[must_use]
    pub fn device(&self) -> &str {
        self.context.name()
    }

    /// As [`Context::take_event`].
    #[must_use]
    pub fn take_event(&self) -> Option<String> {
        self.context.take_event()
    }

    /// As [`Context::is_present`].
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.context.is_present()
    }

    /// Largest message of its port, bytes.
    #[must_use]
    pub fn max_message_bytes(&self) -> u64 {
        self.port.max_message_bytes.into()
    }

    /// `memory windows` or `registrations`.
    #[must_use]
    pub fn isolation(&self) -> &'static str {
        if self.windows { "memory windows" } else { "registrations" }
    }

    fn open_window(&self, domain: &Arc<ProtectionDomain>, at: RegionOffset, bytes: u64) -> io::Result<Opening> {
        Ok(if self.windows {
            Opening::Window(MemoryWindow::new(&self.region, at.0, bytes)?)
        } else {
            Opening::Registration(MemoryRegion::writable(domain, &(&self.memory, at, bytes))?)
        })
    }
}

/// A polling thread's completion queue.
pub struct VerbsQueue {
    queue: CompletionQueue,
    receives: Arc<SharedReceiveQueue>,
    connections: Arc<()>,
}

impl VerbsQueue {
    /// A queue on the host's device.
    ///
    /// # Errors
    /// What the library reports.
    pub fn new(host: &VerbsHost) -> Result<Self, VerbsError> {
        let queue =
            CompletionQueue::new(&host.context, QUEUE).map_err(host.context.error("make a completion queue"))?;
        let receives =
            SharedReceiveQueue::new(&host.domain, RECEIVES).map_err(host.context.error("make a receive queue"))?;
        Ok(Self { queue, receives, connections: Arc::new(()) })
    }

    /// Takes completions and replaces the receives that they took. Returns how many there were.
    ///
    /// # Errors
    /// The device is gone.
    pub fn poll(&mut self, mut each: impl FnMut(Completion)) -> io::Result<usize> {
        let mut received = 0;
        let count = self.queue.poll(|completion| {
            // Requests of this side count from 1; shared receives have no number.
            received += usize::from(completion.id == 0);
            each(completion);
        })?;
        self.receives.post(received)?;
        Ok(count)
    }

    /// As [`CompletionQueue::arm`].
    ///
    /// # Errors
    /// As there.
    pub fn arm(&mut self) -> io::Result<()> {
        self.queue.arm()
    }

    /// As [`CompletionQueue::descriptor`].
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.queue.descriptor()
    }
}

/// What lets a peer write: dropping it ends that before it returns.
enum Opening {
    Window(MemoryWindow),
    Registration(MemoryRegion),
}

impl Opening {
    fn remote(&self) -> RemoteRange {
        match self {
            Self::Window(window) => window.remote(),
            Self::Registration(region) => region.remote(0, region.len() as u64),
        }
    }
}

/// Part of the Blog that a publisher may write.
struct Landed {
    number: u32,
    at: RegionOffset,
    bytes: u64,
    used: u64,
    opening: Opening,
    /// The publisher knows of it.
    told: bool,
}

/// A subscriber's ring, counted in lines.
struct Ring {
    to: RemoteRange,
    lines: u64,
    /// Lines ever written or skipped.
    head: u64,
    /// Lines that the subscriber gave back.
    released: u64,
}

impl Ring {
    /// Finds room for `bytes` in one piece; the line that it begins at.
    fn place(&mut self, bytes: u64) -> Option<u64> {
        let lines = bytes.div_ceil(LINE_BYTES);
        if lines > self.lines {
            return None;
        }
        let at = self.head % self.lines;
        let skipped = if at + lines > self.lines { self.lines - at } else { 0 };
        if self.head == self.released {
            // Empty: the rest up to the ring's end need not stay free.
            self.released += skipped;
        }
        if self.head + skipped + lines - self.released > self.lines {
            return None;
        }
        self.head += skipped + lines;
        Some((at + skipped) % self.lines)
    }

    /// The subscriber says up to where it has read, modulo 2^32.
    fn release(&mut self, lines: u32) -> bool {
        self.released += u64::from(lines.wrapping_sub(self.released as u32));
        self.released <= self.head
    }
}

/// The queue pair of a connection, and what it is open to.
pub struct VerbsEnd {
    // Dropped in this order: nothing could be written any more, then nothing is. Soft-RoCE has an open window keep its
    // queue pair in use (`rxe_do_bind_mw` in drivers/infiniband/sw/rxe/rxe_mw.c), so that destroying that first waits
    // until the kernel gives up, close to a minute.
    leases: VecDeque<Landed>,
    pair: QueuePair<Sending>,
    /// Batches from elsewhere than the region, and the request that reads each.
    copies: VecDeque<(u64, MemoryRegion)>,
    ring: Option<Ring>,
    domain: Arc<ProtectionDomain>,
    host: Arc<VerbsHost>,
    lease_bytes: u64,
    next_lease: u32,
    wants_lease: bool,
    closed: bool,
    /// Immediate data and length of WRITEs that were not looked at.
    arrived: VecDeque<(u32, u32)>,
    /// Work requests posted, and those that are known to be done.
    posted: u64,
    done: u64,
    signaled: u64,
    /// For each thing at the front of the outbox that was posted: the request that ends it, 0 if it is not waited for.
    posted_outgoing: VecDeque<u64>,
    failure: Option<WorkError>,
    /// What goes over the socket.
    side: Outbox,
    _counted: Arc<()>,
}

impl VerbsEnd {
    /// Answers a peer that wants a queue pair. The answer leaves with the next [`VerbsEnd::send`].
    ///
    /// # Errors
    /// A refusal.
    pub fn connect(host: &Arc<VerbsHost>, queue: &VerbsQueue, request: &VerbsConnect) -> Result<Self, TransportError> {
        if Arc::strong_count(&queue.connections) > CONNECTIONS {
            return Err(TransportError::refused(ErrorCode::Unavailable, "the broker has no room for a queue pair"));
        }
        let ring = match (request.ring_bytes, request.batch_bytes) {
            (0, 1..) => None,
            (bytes, 0) if u64::from(bytes) >= 64 * LINE_BYTES => Some(Ring {
                to: RemoteRange { address: request.ring_address, key: request.ring_rkey },
                lines: u64::from(bytes) / LINE_BYTES,
                head: 0,
                released: 0,
            }),
            (ring, batch) => {
                let text = format!("a queue pair needs a ring of 4096 bytes or a batch size; got {ring} and {batch}");
                return Err(TransportError::refused(ErrorCode::BadFrame, text));
            }
        };
        let lease_bytes = host.lease_bytes.max(u64::from(request.batch_bytes).next_multiple_of(LINE_BYTES));
        let device = |error: io::Error| TransportError::refused(ErrorCode::Unavailable, error.to_string());
        // With registrations, a publisher's keys must be of no use to other queue pairs.
        let own = !host.windows && ring.is_none();
        let domain = if own { ProtectionDomain::new(&host.context).map_err(device)? } else { Arc::clone(&host.domain) };
        let options = QueuePairOptions {
            send_depth: SEND_DEPTH as u32,
            receive_depth: 0,
            inline_bytes: FRAME_BYTES as u32,
            shared: Some(&queue.receives),
        };
        let pair = QueuePair::new(&domain, &queue.queue, &host.port, &options).map_err(device)?;
        let pair = pair.receive_from(&peer(request)).and_then(QueuePair::send).map_err(device)?;
        let PeerAddress { gid, lid, queue_pair, first_psn, mtu } = pair.address();
        let accept = VerbsAccept { gid, queue_pair, first_psn, mtu, lid: lid.into(), ..VerbsAccept::blank() };
        let mut side = Outbox::default();
        side.push(Outgoing::frame(accept.encode()));
        Ok(Self {
            pair,
            copies: VecDeque::new(),
            leases: VecDeque::with_capacity(LEASES),
            ring,
            domain,
            host: Arc::clone(host),
            lease_bytes,
            next_lease: 0,
            wants_lease: false,
            closed: false,
            arrived: VecDeque::new(),
            posted: 0,
            done: 0,
            signaled: 0,
            posted_outgoing: VecDeque::new(),
            failure: None,
            side,
            _counted: Arc::clone(&queue.connections),
        })
    }

    /// Number of its queue pair, by which completions name it.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.pair.number()
    }

    /// As [`Context::writes_past_caches`].
    pub(super) fn writes_past_caches(&self) -> bool {
        self.host.context.writes_past_caches()
    }

    /// Takes a completion of its queue pair.
    pub fn completed(&mut self, completion: Completion) {
        match completion.outcome {
            Outcome::Sent => self.done = self.done.max(completion.id),
            Outcome::Written { bytes, immediate } => self.arrived.push_back((immediate, bytes)),
            // Nothing is posted that a SEND could go to.
            Outcome::Message { .. } => {}
            Outcome::Failed(error) => {
                self.failure.get_or_insert(error);
            }
        }
    }

    /// True when [`VerbsEnd::receive`] has something to do.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.arrived.is_empty() || self.failure.is_some() || self.is_due_a_lease()
    }

    /// True when [`VerbsEnd::send`] has something to do besides the outbox.
    #[must_use]
    pub fn has_to_send(&self) -> bool {
        !self.side.is_empty() || self.leases.iter().any(|lease| !lease.told)
    }

    /// True while bytes wait for the socket.
    #[must_use]
    pub fn waits_for_socket(&self) -> bool {
        !self.side.is_empty()
    }

    /// Closes all landing windows: when this returns, the device refuses every write of the peer.
    pub fn close_windows(&mut self) {
        self.leases.clear();
        self.closed = true;
    }

    /// Takes the next batch that arrived, if any.
    ///
    /// # Errors
    /// As [`super::Connection::receive`].
    pub fn receive(&mut self, memory: &Native, landing: &mut impl Landing) -> Result<Received, TransportError> {
        if let Some(error) = self.failure {
            return Err(io::Error::other(format!("queue pair {}: {error}", self.number())).into());
        }
        if self.closed {
            return Ok(Received::Nothing);
        }
        while let Some((immediate, bytes)) = self.arrived.front().copied() {
            if let Some(ring) = &mut self.ring {
                self.arrived.pop_front();
                if bytes != 0 || !ring.release(immediate) {
                    return Err(TransportError::refused(
                        ErrorCode::BadFrame,
                        "the ring has not that much to give back",
                    ));
                }
                continue;
            }
            if bytes == 0 && immediate & WANTS_LEASE != 0 {
                self.arrived.pop_front();
                self.wants_lease = true;
                let kept = immediate & !WANTS_LEASE;
                while self.leases.front().is_some_and(|lease| lease.told && lease.number < kept) {
                    self.close_first(landing);
                }
                continue;
            }
            match self.take_batch(memory, landing, immediate, bytes.into())? {
                Received::Nothing => {}
                received => return Ok(received),
            }
        }
        self.lease(landing)?;
        Ok(Received::Nothing)
    }

    /// A WRITE is complete: finds the batch, checks its header and has it admitted. `Nothing` when only a window closed.
    fn take_batch(
        &mut self,
        memory: &Native,
        landing: &mut impl Landing,
        number: u32,
        bytes: u64,
    ) -> Result<Received, TransportError> {
        let refuse = |text: String| Err(TransportError::refused(ErrorCode::BadBatch, text));
        let Some(lease) = self.leases.front_mut().filter(|lease| lease.told) else {
            return refuse(format!("a batch of {bytes} bytes came without a landing window"));
        };
        if lease.number != number {
            // The publisher has gone on to its next window.
            if self.leases.get(1).is_none_or(|lease| !lease.told || lease.number != number) {
                return refuse(format!("a batch names landing window {number}, which is not open"));
            }
            self.close_first(landing);
            return Ok(Received::Nothing);
        }
        if bytes < FRAME_BYTES as u64 || bytes > lease.bytes - lease.used {
            return refuse(format!("a batch of {bytes} bytes came; the window has {}", lease.bytes - lease.used));
        }
        let at = lease.at.add(lease.used);
        // Its own copy: the peer can still write the window.
        let header = memory.with_bytes(at, FRAME_BYTES as u64, |bytes| bytes.first_chunk().copied());
        let Frame::BatchHeader(header) = Frame::decode(&header.unwrap_or([0; FRAME_BYTES]))? else {
            return refuse("what was written is no batch".to_owned());
        };
        if u64::from(header.payload_bytes) > bytes || header.batch_bytes() != bytes {
            return refuse(format!("{bytes} bytes were written, the batch's header says {}", header.batch_bytes()));
        }
        match landing.admit(&header, at) {
            Placement::Wait => Ok(Received::Waiting),
            Placement::Refuse(error) => Err(error),
            Placement::At(at) => {
                lease.used = (lease.used + bytes).next_multiple_of(LINE_BYTES).min(lease.bytes);
                self.arrived.pop_front();
                Ok(Received::Batch(header, at))
            }
        }
    }

    /// The publisher is done with its first window.
    fn close_first(&mut self, landing: &mut impl Landing) {
        if let Some(Landed { at, opening, .. }) = self.leases.pop_front() {
            // Before the memory can be another's.
            drop(opening);
            landing.close(at);
        }
    }

    /// True when the publisher is to get a window: it asked for its first, or has used one up since.
    fn is_due_a_lease(&self) -> bool {
        let begun = self.wants_lease || self.next_lease > 0;
        self.ring.is_none() && begun && self.leases.len() < LEASES
    }

    /// Sees to it that the publisher has windows.
    fn lease(&mut self, landing: &mut impl Landing) -> Result<(), TransportError> {
        while self.is_due_a_lease() {
            let at = match landing.lease(self.lease_bytes, self.wants_lease && self.leases.is_empty()) {
                Placement::At(at) => at,
                Placement::Wait => return Ok(()),
                Placement::Refuse(error) => return Err(error),
            };
            self.wants_lease = false;
            let opening = self.host.open_window(&self.domain, at, self.lease_bytes)?;
            let number = self.next_lease;
            self.next_lease = (number + 1) & !WANTS_LEASE;
            self.leases.push_back(Landed { number, at, bytes: self.lease_bytes, used: 0, opening, told: false });
        }
        Ok(())
    }

    /// Posts what the device has room for. The socket's share goes to `socket`.
    ///
    /// # Errors
    /// As [`super::Connection::send`].
    pub fn send(
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
            moved += super::Connection::send(socket, memory, &mut self.side)?;
        }
        Ok(moved)
    }

    /// Posts one chain of requests; returns how many.
    fn post(&mut self, outbox: &mut Outbox) -> Result<u64, TransportError> {
        let room = ((SEND_DEPTH - (self.posted - self.done)) as usize).min(DOORBELL);
        let mut chain = Chain::new(self.posted, self.signaled);
        let mut frames = [[0u8; FRAME_BYTES]; LEASES];
        let mut told = 0;
        let untold = self.leases.iter().filter(|lease| !lease.told);
        for (lease, frame) in untold.zip(&mut frames) {
            if chain.count + 2 > room {
                break;
            }
            told += 1;
            let RemoteRange { address, key } = lease.opening.remote();
            let said = Lease { address, rkey: key, number: lease.number, bytes: lease.bytes as u32, ..Lease::blank() };
            *frame = said.encode();
            if let Opening::Window(window) = &lease.opening {
                chain.push(Work::Open(window), false);
            }
            chain.push(Work::Send(frame), false);
        }
        let before = self.posted_outgoing.len();
        for outgoing in outbox.queue.iter().skip(outbox.posted) {
            if outgoing.is_for_socket() || chain.count + 2 > room {
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
            if whole > ring.lines * LINE_BYTES {
                let text = format!("a batch of {bytes} bytes does not fit into the subscriber's ring");
                return Err(TransportError::refused(ErrorCode::BadBatch, text));
            }
            let Some(line) = ring.place(whole) else { break };
            let to = ring.to.offset(line * LINE_BYTES);
            chain.push(Work::WriteInline(frame, to, None), false);
            let from = match (&outgoing.head, outgoing.batch) {
                (Head::Copied(copied), _) => {
                    let copy = MemoryRegion::local(&self.domain, copied)?;
                    let from = copy.range(FRAME_BYTES as u64, bytes as u32);
                    self.copies.push_back((chain.next_id() + 1, copy));
                    from
                }
                (_, batch) => self.host.region.range(batch.map_or(0, |(at, _)| at.0), bytes as u32),
            };
            let id = chain.push(Work::Write(Some(from), to.offset(FRAME_BYTES as u64), Some(line as u32)), true);
            self.posted_outgoing.push_back(id);
        }
        let Chain { requests, count, signaled, .. } = chain;
        if count == 0 {
            return Ok(0);
        }
        if self.pair.post(&requests[..count])? < count {
            return Err(io::Error::other("the device took only part of a chain of requests").into());
        }
        self.leases.iter_mut().filter(|lease| !lease.told).take(told).for_each(|lease| lease.told = true);
        (self.posted, self.signaled) = (self.posted + count as u64, signaled);
        outbox.posted += self.posted_outgoing.len() - before;
        self.forget_done(outbox);
        Ok(count as u64)
    }

    /// Takes off the outbox what the device is done with.
    fn forget_done(&mut self, outbox: &mut Outbox) {
        while self.posted_outgoing.front().is_some_and(|id| *id <= self.done) {
            self.posted_outgoing.pop_front();
            outbox.pop_posted();
        }
        while self.copies.front().is_some_and(|(id, _)| *id <= self.done) {
            self.copies.pop_front();
        }
    }
}

/// Requests that are posted together.
struct Chain<'a> {
    requests: [Request<'a>; DOORBELL],
    count: usize,
    /// Requests posted before.
    posted: u64,
    /// The last that asked for a completion.
    signaled: u64,
}

impl<'a> Chain<'a> {
    fn new(posted: u64, signaled: u64) -> Self {
        let blank = Request { id: 0, signaled: false, work: Work::Send(&[]) };
        Self { requests: [blank; DOORBELL], count: 0, posted, signaled }
    }

    /// The id that the next request gets.
    fn next_id(&self) -> u64 {
        self.posted + self.count as u64 + 1
    }

    /// Adds a request, which asks for a completion if `signal`, or if none before it has for long. Returns its id.
    fn push(&mut self, work: Work<'a>, signal: bool) -> u64 {
        let id = self.next_id();
        let signaled = signal || id - self.signaled >= SIGNAL_EVERY;
        if signaled {
            self.signaled = id;
        }
        self.requests[self.count] = Request { id, signaled, work };
        self.count += 1;
        id
    }
}

/// The other end, as a connecting peer tells it.
fn peer(request: &VerbsConnect) -> PeerAddress {
    PeerAddress {
        gid: request.gid,
        lid: request.lid as u16,
        queue_pair: request.queue_pair,
        first_psn: request.first_psn,
        mtu: request.mtu,
    }
}

/// A connected peer's answer.
#[must_use]
pub fn accepted(accept: &VerbsAccept) -> PeerAddress {
    PeerAddress {
        gid: accept.gid,
        lid: accept.lid as u16,
        queue_pair: accept.queue_pair,
        first_psn: accept.first_psn,
        mtu: accept.mtu,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_ring_never_hands_out_what_is_still_read(
            lines in 64u64..256,
            start in 0u64..1 << 33,
            steps in proptest::collection::vec((1u64..80, 0usize..4), 1..200),
        ) {
            let to = RemoteRange { address: 0, key: 0 };
            let mut ring = Ring { to, lines, head: start, released: start };
            let mut held: VecDeque<(u64, u64, u64)> = VecDeque::new();
            for (size, give_back) in steps {
                if let Some(at) = ring.place(size * LINE_BYTES) {
                    prop_assert!(at + size <= lines);
                    for (begin, end, _) in &held {
                        prop_assert!(at + size <= *begin || at >= *end);
                    }
                    held.push_back((at, at + size, ring.head));
                } else {
                    prop_assert!(size > lines || !held.is_empty());
                }
                for _ in 0..give_back {
                    if let Some((_, _, head)) = held.pop_front() {
                        prop_assert!(ring.release(head as u32));
                    }
                }
            }
            prop_assert!(!ring.release((ring.head + 1) as u32));
        }
    }
}
