//! Queue pairs of a NIC in software, and their shared receives.

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

/// Most bytes that a request carries in itself.
const INLINE_BYTES: usize = 64;
/// Most packets under way, as for Linux's soft-RoCE (rxe_param.h, RXE_MAX_UNACKED_PSNS).
const WINDOW: u32 = 128;
/// Shortest wait for an answer, nanoseconds: longer than most paths and polling threads take.
///
/// After [`RETRIES`] doublings a peer is given up, in about a second, or later if its answers took longer.
const TIMEOUT: Nanos = 4_000_000;
/// Id of the completion that reports the failure of a queue pair without work.
const OF_NO_REQUEST: u64 = u64::MAX;

/// Receives without buffers that queue pairs share.
pub struct Receives {
    /// Number of receives that are posted.
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

    /// Takes a receive; false if there is none.
    fn take(&self) -> bool {
        self.posted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |posted| posted.checked_sub(1)).is_ok()
    }
}

/// Payload of a request.
pub(super) enum Payload {
    /// Bytes that the request carries in itself, and their number.
    Inline([u8; INLINE_BYTES], usize),
    /// Bytes in registered memory.
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

/// State of a queue pair, which its port keeps.
pub(super) struct Side {
    number: u32,
    /// Number of its completion queue.
    pub queue: u32,
    pub domain: u32,
    /// Protocol engine; `None` before the queue pair is connected.
    engine: Option<roce::QueuePair<Payload>>,
    shared: Option<Arc<Receives>>,
    /// Posted receives in order: id, and buffer for a message of the peer.
    buffers: VecDeque<(u64, LocalBytes)>,
    /// Windows opened while a request was under way: the request's id, and their own. They complete after it.
    opened: VecDeque<(u64, u64)>,
    /// Id of the last request posted.
    posted: u64,
    /// Id of the last request done.
    done: u64,
    /// Whether a completion has reported the failure.
    told: bool,
    /// Whether the queue pair is in the port's list of those that have something to send.
    pub busy: bool,
}

impl Side {
    /// Makes a completion of this queue pair.
    fn completion(&self, id: u64, outcome: Outcome) -> Completion {
        Completion { queue_pair: self.number, id, outcome }
    }

    /// Makes the engine's receive for one of `buffers`.
    fn receive(id: u64, buffer: &LocalBytes) -> roce::Receive {
        roce::Receive { id, buffer: vec![0; buffer.len()] }
    }

    /// Takes a packet that came for this queue pair.
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

    /// Hands at most `most` packets to `send`, and returns their number.
    pub fn transmit(&mut self, now: Nanos, reach: &Reach<'_>, most: usize, send: impl FnMut(&Packet<'_>)) -> usize {
        self.engine.as_mut().map_or(0, |engine| engine.transmit(now, reach, most, send))
    }

    /// Time at which it has to send again, even if no packet comes.
    pub fn wake_at(&self) -> Option<Nanos> {
        self.engine.as_ref().and_then(roce::QueuePair::wake_at)
    }

    /// Adds the new completions to `completions`.
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

    /// Gives shared receives back.
    fn unused(&self, receives: usize) {
        if let Some(shared) = &self.shared {
            shared.posted.fetch_add(receives, Ordering::Relaxed);
        }
    }

    /// Posts a request; false if there is no room for it.
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

/// Whether a request of this opcode may need a receive.
fn takes_receive(opcode: Opcode) -> bool {
    opcode.has_immediate()
        || matches!(opcode, Opcode::SendFirst | Opcode::SendMiddle | Opcode::SendLast | Opcode::SendOnly)
}

/// Queue pair of a NIC in software. Types that know its state wrap it.
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
    /// `InvalidInput`: the peer's address is of another family, or its path MTU is below 256 bytes.
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

    /// Posts requests, sends what window and rate allow, and returns the number of requests taken.
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
