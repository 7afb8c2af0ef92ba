//! A client's end of a verbs connection: batches are written from their buffers into the broker's landing windows,
//! deliveries arrive in a ring. `datapath/src/transport/verbs.rs` is the other end.

use crate::config::ClientConfig;
use crate::error::ClientError;
use crate::link::LinkOptions;
use embarcadero_datapath::buffer::Buffer;
use embarcadero_datapath::cxl::LINE_BYTES;
use embarcadero_datapath::transport::Transport;
use embarcadero_datapath::transport::verbs::{LEASES, SEND_DEPTH, SIGNAL_EVERY, WANTS_LEASE, accepted};
use embarcadero_datapath::verbs::{
    CompletionQueue, Context, DOORBELL, LocalPort, LocalRange, MemoryRegion, Outcome, PeerAddress, ProtectionDomain,
    QueuePair, QueuePairOptions, RemoteRange, Request, Sending, Work, WorkError,
};
use embarcadero_datapath::wire::batch::BatchBuilder;
use embarcadero_datapath::wire::{ERROR_TEXT_BYTES, FRAME_BYTES, Frame, VerbsConnect};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

/// Frames that a broker may send before the first is looked at.
const FRAMES: usize = 512;

/// Bytes of a batch that is sent out of the core's own cache, where it was filled, while the next one is: larger ones spare a
/// NIC in software nothing, as it takes its time for each packet (docs/performance.md).
const CACHED_BATCH: usize = 128 << 10;

/// The most that load makes a batch, where the transport says so.
pub(crate) fn heaviest_batch(transport: Transport) -> Option<usize> {
    match transport {
        Transport::Roce | Transport::Dpdk => Some(CACHED_BATCH),
        Transport::Tcp | Transport::Verbs => None,
    }
}

/// A device, as all connections of a client use it.
pub(crate) struct VerbsDevice {
    port: LocalPort,
    domain: Arc<ProtectionDomain>,
}

impl VerbsDevice {
    /// Opens the first of the configured devices that can be used; with `roce` and `dpdk` this process is the device.
    pub(crate) fn open(config: &ClientConfig) -> Result<Arc<Self>, ClientError> {
        let transport = config.transport.name();
        let unusable =
            |error: &dyn std::fmt::Display| ClientError::Unreachable(format!("transport is {transport}, but {error}"));
        let found = match config.transport {
            Transport::Roce => Context::software(config.roce.address.or_else(|| address_towards(&config.bootstrap))),
            Transport::Dpdk => Context::dpdk(&config.dpdk),
            Transport::Tcp | Transport::Verbs => match &config.rdma.devices[..] {
                [] => Context::find(None),
                [first, others @ ..] => others
                    .iter()
                    .fold(Context::find(Some(first)), |found, other| found.or_else(|_| Context::find(Some(other)))),
            },
        };
        let (context, port) = found.map_err(|error| unusable(&error))?;
        let domain = ProtectionDomain::new(&context).map_err(|error| unusable(&error))?;
        Ok(Arc::new(Self { port, domain }))
    }

    /// True while its port is up.
    pub(crate) fn is_usable(&self) -> bool {
        self.domain.context().is_active(self.port.number)
    }
}

/// The address of this host from which it reaches one of the endpoints.
fn address_towards(endpoints: &[String]) -> Option<IpAddr> {
    let towards = |to: SocketAddr| {
        // Nothing is sent: connecting only chooses a route.
        let any = if to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect(to).ok()?;
        socket.local_addr().ok().map(|address| address.ip())
    };
    endpoints.iter().filter_map(|endpoint| endpoint.to_socket_addrs().ok()).flatten().find_map(towards)
}

/// A connected queue pair, and the frames that arrive on it.
struct Pair {
    pair: QueuePair<Sending>,
    queue: CompletionQueue,
    frames: Buffer,
    _frames_region: MemoryRegion,
    frame_ranges: Vec<LocalRange>,
    arrived: VecDeque<Arrival>,
    posted: u64,
    done: u64,
    signaled: u64,
    signal_every: u64,
    failure: Option<WorkError>,
}

enum Arrival {
    Frame(Frame),
    /// A delivery's line in the ring, and the bytes of its batch.
    Delivery(u32, u32),
}

fn protocol(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// Exchanges addresses over the socket, which may block for as long as its time-outs say.
fn handshake(socket: &mut TcpStream, request: &VerbsConnect, timeout: Duration) -> io::Result<PeerAddress> {
    socket.set_read_timeout(Some(timeout))?;
    socket.write_all(&request.encode())?;
    let mut frame = [0; FRAME_BYTES];
    socket.read_exact(&mut frame)?;
    match Frame::decode(&frame).map_err(io::Error::other)? {
        Frame::VerbsAccept(accept) => Ok(accepted(&accept)),
        Frame::ErrorFrame(error) => {
            let mut text = vec![0; (error.text_bytes as usize).min(ERROR_TEXT_BYTES)];
            socket.read_exact(&mut text)?;
            Err(io::Error::other(String::from_utf8_lossy(&text).into_owned()))
        }
        other => Err(protocol(format!("the broker answers a queue pair with a frame of kind {}", other.kind()))),
    }
}

impl Pair {
    fn open(
        device: &VerbsDevice,
        domain: &Arc<ProtectionDomain>,
        socket: &mut TcpStream,
        timeout: Duration,
        request: VerbsConnect,
    ) -> io::Result<Self> {
        let frames = Buffer::zeroed(FRAMES * FRAME_BYTES)?;
        let region = MemoryRegion::local(domain, &frames)?;
        let frame_ranges: Vec<_> =
            (0..FRAMES).map(|index| region.range((index * FRAME_BYTES) as u64, FRAME_BYTES as u32)).collect();
        let queue = CompletionQueue::new(domain.context(), (FRAMES + SEND_DEPTH as usize) as u32)?;
        let options = QueuePairOptions {
            send_depth: SEND_DEPTH as u32,
            receive_depth: FRAMES as u32,
            inline_bytes: FRAME_BYTES as u32,
            shared: None,
        };
        let mut pair = QueuePair::new(domain, &queue, &device.port, &options)?;
        for (index, range) in frame_ranges.iter().enumerate() {
            pair.post_receive(index as u64, *range)?;
        }
        let PeerAddress { gid, lid, queue_pair, first_psn, mtu } = pair.address();
        let request = VerbsConnect { gid, lid: lid.into(), queue_pair, first_psn, mtu, ..request };
        let peer = handshake(socket, &request, timeout)?;
        let pair = pair.receive_from(&peer)?.send()?;
        Ok(Self {
            pair,
            queue,
            frames,
            _frames_region: region,
            frame_ranges,
            arrived: VecDeque::with_capacity(FRAMES),
            posted: 0,
            done: 0,
            signaled: 0,
            signal_every: SIGNAL_EVERY,
            failure: None,
        })
    }

    /// Takes completions.
    fn poll(&mut self) -> io::Result<()> {
        let Self { queue, pair, frames, frame_ranges, arrived, done, failure, .. } = self;
        let mut trouble = Ok(());
        loop {
            let count = queue.poll(|completion| match completion.outcome {
                Outcome::Sent => *done = (*done).max(completion.id),
                Outcome::Failed(error) => {
                    failure.get_or_insert(error);
                }
                Outcome::Message { .. } | Outcome::Written { .. } => {
                    let index = completion.id as usize;
                    let frame = frames.get(index * FRAME_BYTES..).and_then(|frames| frames.first_chunk());
                    match (completion.outcome, frame.map(Frame::decode)) {
                        (Outcome::Written { bytes, immediate }, _) => {
                            arrived.push_back(Arrival::Delivery(immediate, bytes));
                        }
                        (_, Some(Ok(frame))) => arrived.push_back(Arrival::Frame(frame)),
                        (_, Some(Err(error))) => trouble = Err(io::Error::other(error)),
                        (_, None) => {}
                    }
                    if let Some(range) = frame_ranges.get(index)
                        && let Err(error) = pair.post_receive(completion.id, *range)
                    {
                        trouble = Err(error);
                    }
                }
            })?;
            if count == 0 {
                break;
            }
        }
        trouble?;
        match self.failure {
            Some(error) => Err(io::Error::other(error)),
            None => Ok(()),
        }
    }

    /// Makes the queue's descriptor readable when something comes; fails if nothing can.
    fn arm(&mut self) -> io::Result<()> {
        if !self.queue.context().is_present() {
            return Err(io::Error::other("the RDMA device was removed, or broke down"));
        }
        self.queue.arm()
    }

    fn room(&self) -> usize {
        (SEND_DEPTH - (self.posted - self.done)) as usize
    }

    fn post(&mut self, works: &[Work<'_>]) -> io::Result<()> {
        let mut chain = [Request { id: 0, signaled: false, work: Work::Send(&[]) }; DOORBELL];
        let count = works.len().min(DOORBELL);
        for (request, work) in chain.iter_mut().zip(works) {
            self.posted += 1;
            let signaled = self.posted - self.signaled >= self.signal_every;
            if signaled {
                self.signaled = self.posted;
            }
            *request = Request { id: self.posted, signaled, work: *work };
        }
        if self.pair.post(&chain[..count])? < works.len() {
            return Err(io::Error::other("the device took only part of a chain of requests"));
        }
        Ok(())
    }
}

/// A landing window.
struct Window {
    number: u32,
    to: RemoteRange,
    bytes: u64,
    used: u64,
}

/// Where a publisher writes.
pub(crate) struct PublishPair {
    pair: Pair,
    device: Arc<VerbsDevice>,
    windows: VecDeque<Window>,
    /// Number of the window that comes next.
    next_window: u32,
    /// The broker knows that there is no window.
    wanted: bool,
    /// Batches to post with the next call to the device.
    staged: Vec<(LocalRange, RemoteRange, u32)>,
    /// Without acknowledgements: requests that read batches.
    reading: Option<VecDeque<u64>>,
}

impl PublishPair {
    /// Connects a queue pair beside `socket`.
    pub(crate) fn open(device: &Arc<VerbsDevice>, socket: &mut TcpStream, options: &LinkOptions) -> io::Result<Self> {
        let request = VerbsConnect { batch_bytes: options.batch_bytes as u32, ..VerbsConnect::blank() };
        let mut pair = Pair::open(device, &device.domain, socket, options.timeout, request)?;
        if !options.acknowledged {
            pair.signal_every = 1;
        }
        Ok(Self {
            pair,
            device: Arc::clone(device),
            windows: VecDeque::with_capacity(LEASES),
            next_window: 0,
            wanted: false,
            staged: Vec::with_capacity(DOORBELL),
            reading: (!options.acknowledged).then(VecDeque::new),
        })
    }

    /// The next frame for the publisher.
    pub(crate) fn poll(&mut self) -> io::Result<Option<Frame>> {
        self.pair.poll()?;
        while let Some(arrival) = self.pair.arrived.pop_front() {
            match arrival {
                Arrival::Frame(Frame::Lease(lease)) => {
                    self.wanted = false;
                    self.next_window = lease.number + 1;
                    let to = RemoteRange { address: lease.address, key: lease.rkey };
                    self.windows.push_back(Window { number: lease.number, to, bytes: lease.bytes.into(), used: 0 });
                }
                Arrival::Frame(frame) => return Ok(Some(frame)),
                Arrival::Delivery(..) => return Err(protocol("the broker writes to a publisher")),
            }
        }
        Ok(None)
    }

    /// Stages a sealed batch, which is read in place until it is acknowledged. False when it has to wait.
    pub(crate) fn stage(&mut self, batch: &mut BatchBuilder) -> io::Result<bool> {
        let bytes = batch.bytes().len() as u64;
        if self.staged.len() == DOORBELL {
            self.flush()?;
        }
        // One request stays free to ask for a window with.
        if self.pair.room() < self.staged.len() + 2 {
            return Ok(false);
        }
        while self.windows.front().is_some_and(|window| window.bytes - window.used < bytes) {
            self.windows.pop_front();
        }
        let Some(window) = self.windows.front_mut() else {
            if !std::mem::replace(&mut self.wanted, true) {
                self.flush()?;
                self.pair.post(&[Work::Write(
                    None,
                    RemoteRange { address: 0, key: 0 },
                    Some(WANTS_LEASE | self.next_window),
                )])?;
            }
            return Ok(false);
        };
        let from = batch.local(&self.device.domain)?;
        self.staged.push((from, window.to.offset(window.used), window.number));
        window.used = (window.used + bytes).next_multiple_of(LINE_BYTES).min(window.bytes);
        Ok(true)
    }

    /// Rings the doorbell for what is staged.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if self.staged.is_empty() {
            return Ok(());
        }
        let mut works = [Work::Send(&[]); DOORBELL];
        for (work, (from, to, number)) in works.iter_mut().zip(&self.staged) {
            *work = Work::Write(Some(*from), *to, Some(*number));
        }
        let count = self.staged.len();
        self.staged.clear();
        if let Some(reading) = &mut self.reading {
            reading.extend(self.pair.posted + 1..=self.pair.posted + count as u64);
        }
        self.pair.post(&works[..count])
    }

    /// Batches that the device may still read.
    pub(crate) fn in_use(&mut self) -> usize {
        let Some(reading) = &mut self.reading else { return 0 };
        while reading.front().is_some_and(|id| *id <= self.pair.done) {
            reading.pop_front();
        }
        reading.len() + self.staged.len()
    }

    /// Makes [`PublishPair::descriptor`] readable when something comes.
    pub(crate) fn arm(&mut self) -> io::Result<()> {
        self.pair.arm()
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.pair.queue.descriptor()
    }
}

/// What came for a subscriber.
pub(crate) enum RingItem {
    /// A frame.
    Frame(Frame),
    /// A delivery: where its frame and its batch lie in the ring.
    Delivery(std::ops::Range<usize>),
}

/// Where a subscriber's deliveries arrive.
pub(crate) struct RingPair {
    pair: Pair,
    ring: Buffer,
    _ring_region: MemoryRegion,
    lines: u64,
    /// Lines ever taken or skipped.
    taken: u64,
    /// The same, as the broker was told.
    released: u64,
    _device: Arc<VerbsDevice>,
}

impl RingPair {
    /// Connects a queue pair beside `socket`, with a ring of `bytes`.
    pub(crate) fn open(
        device: &Arc<VerbsDevice>,
        socket: &mut TcpStream,
        timeout: Duration,
        bytes: usize,
    ) -> io::Result<Self> {
        // Its own domain: the key to the ring is of no use to other brokers.
        let domain = ProtectionDomain::new(device.domain.context())?;
        let ring = Buffer::zeroed(bytes)?;
        let region = MemoryRegion::writable(&domain, &ring)?;
        let to = region.remote(0, bytes as u64);
        let request = VerbsConnect {
            ring_address: to.address,
            ring_rkey: to.key,
            ring_bytes: bytes as u32,
            ..VerbsConnect::blank()
        };
        let pair = Pair::open(device, &domain, socket, timeout, request)?;
        let lines = bytes as u64 / LINE_BYTES;
        Ok(Self { pair, ring, _ring_region: region, lines, taken: 0, released: 0, _device: Arc::clone(device) })
    }

    /// The ring's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.ring
    }

    /// Takes what came next, and gives back the room of what was taken before.
    pub(crate) fn take(&mut self) -> io::Result<Option<RingItem>> {
        self.pair.poll()?;
        if self.taken != self.released && self.pair.room() > 0 {
            let nowhere = RemoteRange { address: 0, key: 0 };
            self.pair.post(&[Work::Write(None, nowhere, Some(self.taken as u32))])?;
            self.released = self.taken;
        }
        Ok(match self.pair.arrived.pop_front() {
            None => None,
            Some(Arrival::Frame(frame)) => Some(RingItem::Frame(frame)),
            Some(Arrival::Delivery(line, bytes)) => {
                let whole = FRAME_BYTES as u64 + u64::from(bytes);
                let lines = whole.div_ceil(LINE_BYTES);
                let at = self.taken % self.lines;
                let skipped = if at + lines > self.lines { self.lines - at } else { 0 };
                let start = (at + skipped) % self.lines;
                if start != u64::from(line) || lines > self.lines {
                    return Err(protocol(format!("a delivery is at line {line} of the ring, it belongs to {start}")));
                }
                self.taken += skipped + lines;
                let start = (start * LINE_BYTES) as usize;
                Some(RingItem::Delivery(start..start + whole as usize))
            }
        })
    }

    /// Makes [`RingPair::descriptor`] readable when something comes.
    pub(crate) fn arm(&mut self) -> io::Result<()> {
        self.pair.arm()
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.pair.queue.descriptor()
    }
}
