//! Queue pairs, and where they take receives from.

use super::super::memory::{LocalRange, Window as AnyWindow};
use super::super::queue_pair::{
    PeerAddress, QueuePairOptions, RETRIES, RNR_RETRIES, RNR_TIMER, Request, SharedReceiveQueue, Work,
};
use super::super::{Completion, DOORBELL, LocalPort, Outcome};
use super::memory::{Domain, LocalBytes, Reach};
use super::queue::PortHandle;
use embarcadero_roce as roce;
use embarcadero_roce::packet::{Opcode, Packet};
use embarcadero_roce::psn::Psn;
use embarcadero_roce::{Attributes, Nanos, Operation, PathMtu};
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that a request can carry in itself at most.
const INLINE_BYTES: usize = 64;
/// Packets under way at most, as Linux's soft-RoCE has it (rxe_param.h, RXE_MAX_UNACKED_PSNS).
const WINDOW: u32 = 128;
/// How long a packet may stay without an answer at least: longer than most paths and polling threads take. With [`RETRIES`],
/// a peer is given up after a second, or later if answers took longer.
const TIMEOUT: Nanos = 4_000_000;
/// Id of the completion that says of a queue pair without work that it failed.
const OF_NO_REQUEST: u64 = u64::MAX;

/// Receives without buffers that queue pairs share.
pub struct Receives {
    posted: AtomicUsize,
}

impl Receives {
    pub(in super::super) fn new(depth: u32) -> Self {
        Self { posted: AtomicUsize::new(depth as usize) }
    }

    #[allow(clippy::unnecessary_wraps, reason = "devices of the host may refuse")]
    pub(in super::super) fn post(&self, count: usize) -> io::Result<()> {
        self.posted.fetch_add(count, Ordering::Relaxed);
        Ok(())
    }

    fn take(&self) -> bool {
        self.posted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |posted| posted.checked_sub(1)).is_ok()
    }
}

/// What a request sends.
pub(super) enum Payload {
    /// It carries the bytes.
    Inline([u8; INLINE_BYTES], usize),
    /// They lie in registered memory.
    Registered(LocalBytes),
}

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Inline(bytes, len) => &bytes[..*len],
            Self::Registered(bytes) => bytes.as_ref(),
        }
    }
}

/// A queue pair as its port keeps it.
pub(super) struct Side {
    number: u32,
    /// The completion queue that it belongs to.
    pub queue: u32,
    pub domain: u32,
    engine: Option<roce::QueuePair<Payload>>,
    shared: Option<Arc<Receives>>,
    /// Where what the peer sends goes, in order.
    buffers: VecDeque<(u64, LocalBytes)>,
    /// Windows that were opened after a request, which is complete before they are: the request's id, their own.
    opened: VecDeque<(u64, u64)>,
    /// Ids of the last request posted, and of the last that is done.
    posted: u64,
    done: u64,
    /// It was said that it failed.
    told: bool,
    /// Whether the port has it among those that have something to send.
    pub busy: bool,
}

impl Side {
    fn completion(&self, id: u64, outcome: Outcome) -> Completion {
        Completion { queue_pair: self.number, id, outcome }
    }

    /// A receive for what one of `buffers` is for.
    fn receive(id: u64, buffer: &LocalBytes) -> roce::Receive {
        roce::Receive { id, buffer: vec![0; buffer.len()] }
    }

    /// Takes a packet.
    pub fn take(&mut self, packet: &Packet<'_>, now: Nanos, reach: &mut Reach<'_>) {
        let Some(engine) = &mut self.engine else { return };
        if let Some(shared) = &self.shared
            && takes_receive(packet.opcode)
            && !engine.has_receive()
            && shared.take()
        {
            engine.post_receive(roce::Receive { id: 0, buffer: Vec::new() });
        }
        reach.domain = self.domain;
        engine.receive(packet, now, reach);
    }

    /// Sends at most `most` packets; returns how many.
    pub fn transmit(&mut self, now: Nanos, reach: &Reach<'_>, most: usize, send: impl FnMut(&Packet<'_>)) -> usize {
        self.engine.as_mut().map_or(0, |engine| engine.transmit(now, reach, most, send))
    }

    /// When it has to send again, whatever comes.
    pub fn wake_at(&self) -> Option<Nanos> {
        self.engine.as_ref().and_then(roce::QueuePair::wake_at)
    }

    /// Hands on what is complete.
    pub fn collect(&mut self, completions: &mut Vec<Completion>) {
        let Some(mut engine) = self.engine.take() else { return };
        while let Some(completion) = engine.poll() {
            match completion {
                roce::Completion::Done { id } => {
                    let (id, signaled) = (id >> 1, id & 1 != 0);
                    self.done = id;
                    if signaled {
                        completions.push(self.completion(id, Outcome::Sent));
                    }
                    while let Some((_, opened)) = self.opened.front().copied().filter(|(after, _)| *after <= id) {
                        self.opened.pop_front();
                        completions.push(self.completion(opened, Outcome::Sent));
                    }
                }
                // No reads are posted.
                roce::Completion::Read { .. } => {}
                roce::Completion::Received { receive, .. } => {
                    if let Some((id, buffer)) = self.buffers.pop_front() {
                        buffer.fill(&receive.buffer);
                        let bytes = receive.buffer.len() as u32;
                        completions.push(self.completion(id, Outcome::Message { bytes }));
                    }
                }
                roce::Completion::Written { receive, immediate, bytes } => {
                    let id = self.buffers.pop_front().map_or(receive.id, |(id, _)| id);
                    completions.push(self.completion(id, Outcome::Written { bytes, immediate }));
                }
                roce::Completion::Flushed { id, failure } => {
                    self.told = true;
                    completions.push(self.completion(id >> 1, Outcome::Failed(failure.into())));
                }
                roce::Completion::Unused { .. } => self.unused(1),
            }
        }
        if let Some(failure) = engine.failure()
            && !std::mem::replace(&mut self.told, true)
        {
            completions.push(self.completion(OF_NO_REQUEST, Outcome::Failed(failure.into())));
        }
        self.engine = Some(engine);
    }

    fn unused(&self, receives: usize) {
        if let Some(shared) = &self.shared {
            shared.posted.fetch_add(receives, Ordering::Relaxed);
        }
    }

    /// Takes a request. False when it has no room.
    fn post(&mut self, request: &Request<'_>, domain: &Domain, completions: &mut Vec<Completion>) -> io::Result<bool> {
        let Some(engine) = &mut self.engine else { return Err(io::ErrorKind::NotConnected.into()) };
        let inline = |bytes: &[u8]| {
            let mut copy = [0; INLINE_BYTES];
            let room = copy.get_mut(..bytes.len()).ok_or(io::ErrorKind::InvalidInput)?;
            room.copy_from_slice(bytes);
            Ok::<_, io::Error>(Payload::Inline(copy, bytes.len()))
        };
        let (operation, payload) = match request.work {
            Work::Send(bytes) => (Operation::Send { immediate: None }, inline(bytes)?),
            Work::WriteInline(bytes, to, immediate) => {
                (Operation::Write { address: to.address, rkey: to.key, immediate }, inline(bytes)?)
            }
            Work::Write(from, to, immediate) => {
                let payload = match from {
                    Some(range) => Payload::Registered(domain.keys.local(domain.number, range)?),
                    None => inline(&[])?,
                };
                (Operation::Write { address: to.address, rkey: to.key, immediate }, payload)
            }
            Work::Open(window) => {
                match &window.kind {
                    AnyWindow::Software(window) => window.open(self.number),
                    #[cfg(rdma)]
                    AnyWindow::Hardware(_) => return Err(super::super::of_another_device()),
                }
                if request.signaled && self.done < self.posted {
                    self.opened.push_back((self.posted, request.id));
                } else if request.signaled {
                    completions.push(self.completion(request.id, Outcome::Sent));
                }
                return Ok(true);
            }
        };
        let work = roce::Work { id: request.id << 1 | u64::from(request.signaled), operation, payload };
        let taken = engine.post(work).is_ok();
        if taken {
            self.posted = request.id;
        }
        Ok(taken)
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        if self.engine.as_ref().is_some_and(roce::QueuePair::has_receive) {
            self.unused(1);
        }
    }
}

/// Whether a request may need a receive.
fn takes_receive(opcode: Opcode) -> bool {
    opcode.has_immediate()
        || matches!(opcode, Opcode::SendFirst | Opcode::SendMiddle | Opcode::SendLast | Opcode::SendOnly)
}

/// A queue pair. It is wrapped in types that know its state.
pub struct Pair {
    port: PortHandle,
    domain: Domain,
    address: PeerAddress,
}

impl Pair {
    pub(super) fn new(
        port: &PortHandle,
        queue: u32,
        domain: &Domain,
        local: &LocalPort,
        options: &QueuePairOptions<'_>,
    ) -> io::Result<Self> {
        let shared = match options.shared.map(|shared| &**shared) {
            None => None,
            Some(SharedReceiveQueue::Software(shared)) => Some(Arc::clone(shared)),
            #[cfg(rdma)]
            Some(SharedReceiveQueue::Hardware(_)) => return Err(super::super::of_another_device()),
        };
        let number = port.add(|number| Side {
            number,
            queue,
            domain: domain.number,
            engine: None,
            shared,
            buffers: VecDeque::new(),
            opened: VecDeque::new(),
            posted: 0,
            done: 0,
            told: false,
            busy: false,
        })?;
        let first_psn = rand::random::<u32>() & 0xff_ffff;
        let address = PeerAddress { gid: local.gid, lid: 0, queue_pair: number, first_psn, mtu: local.mtu };
        Ok(Self { port: port.clone(), domain: domain.clone(), address })
    }

    /// Connects both halves.
    ///
    /// # Errors
    /// The peer's address is of another family.
    pub(in super::super) fn receive_from(&self, peer: &PeerAddress) -> io::Result<()> {
        let nic = self.port.nic();
        let to = Ipv6Addr::from(peer.gid);
        let to = to.to_ipv4_mapped().map_or(IpAddr::V6(to), IpAddr::V4);
        let path_mtu = PathMtu::of_payload(self.address.mtu.min(peer.mtu) as usize);
        let (true, Some(path_mtu)) = (to.is_ipv4() == nic.address.is_ipv4(), path_mtu) else {
            let text = format!("{} cannot reach {to} with packets of {} bytes", nic.name(), peer.mtu);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        let number = self.number();
        let engine = roce::QueuePair::new(Attributes {
            local: nic.address,
            peer: to,
            number,
            peer_number: peer.queue_pair & 0xff_ffff,
            // The flow, as switches see it (IBTA annex A17.9.3); the upper ports are nobody's.
            source_port: 0xc000 | (number ^ number >> 10) as u16 & 0x3fff,
            path_mtu,
            send_psn: Psn::new(self.address.first_psn),
            receive_psn: Psn::new(peer.first_psn & 0xff_ffff),
            timeout: TIMEOUT,
            retries: RETRIES,
            not_ready_retries: RNR_RETRIES,
            rnr_timer: RNR_TIMER,
            window: WINDOW,
            line_rate: nic.line_rate,
        });
        self.port.with(number, |side, _| {
            let engine = side.engine.insert(engine);
            side.buffers.iter().for_each(|(id, buffer)| engine.post_receive(Side::receive(*id, buffer)));
            Ok(())
        })?;
        self.port.seek(to);
        Ok(())
    }

    #[allow(clippy::unnecessary_wraps, clippy::unused_self, reason = "devices of the host have to be told")]
    pub(in super::super) fn send(&self) -> io::Result<()> {
        Ok(())
    }

    pub(in super::super) fn address(&self) -> PeerAddress {
        self.address
    }

    pub(in super::super) fn number(&self) -> u32 {
        self.address.queue_pair
    }

    pub(in super::super) fn number_packets_from(&mut self, psn: u32) {
        self.address.first_psn = psn;
    }

    pub(in super::super) fn post_receive(&self, id: u64, into: LocalRange) -> io::Result<()> {
        let buffer = self.domain.keys.local(self.domain.number, into)?;
        self.port.with(self.number(), |side, _| {
            if let Some(engine) = &mut side.engine {
                engine.post_receive(Side::receive(id, &buffer));
            }
            side.buffers.push_back((id, buffer));
            Ok(())
        })
    }

    /// Posts requests and sends what may go.
    pub(in super::super) fn post(&self, requests: &[Request<'_>]) -> io::Result<usize> {
        let taken = self.port.with(self.number(), |side, completions| {
            for (index, request) in requests.iter().take(DOORBELL).enumerate() {
                match side.post(request, &self.domain, completions) {
                    Ok(true) => {}
                    Err(error) if index == 0 => return Err(error),
                    _ => return Ok(index),
                }
            }
            Ok(requests.len().min(DOORBELL))
        })?;
        self.port.send();
        Ok(taken)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // Once it is gone, no packet finds it.
        self.port.remove(self.number());
    }
}
