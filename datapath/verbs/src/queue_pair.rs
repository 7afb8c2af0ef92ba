//! Reliable connected queue pairs (RC). Their states are types: a queue pair cannot send before it is connected.

use super::completion::{CompletionQueue, Queue};
use super::device::LocalPort;
use super::memory::{Domain, LocalRange, MemoryWindow, ProtectionDomain, RemoteRange};
use super::{either, softnic};
#[cfg(rdma)]
use super::{ibverbs, of_another_device};
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;

/// Most work requests that one call posts.
pub const DOORBELL: usize = 16;

/// Receives without buffers that queue pairs share. Each takes one WRITE_WITH_IMM, whose bytes lie where the peer wrote
/// them.
pub enum SharedReceiveQueue {
    /// Queue of a device of the host.
    #[cfg(rdma)]
    Hardware(Arc<ibverbs::SharedReceiveQueue>),
    /// Queue of a NIC in software.
    Software(Arc<softnic::Receives>),
}

impl SharedReceiveQueue {
    /// Makes a queue of `depth` receives, all of them posted.
    ///
    /// # Errors
    /// The error that the library reports.
    pub fn new(domain: &Arc<ProtectionDomain>, depth: u32) -> io::Result<Arc<Self>> {
        Ok(Arc::new(match &domain.kind {
            #[cfg(rdma)]
            Domain::Hardware(domain) => Self::Hardware(ibverbs::SharedReceiveQueue::new(domain, depth)?),
            Domain::Software(_) => Self::Software(Arc::new(softnic::Receives::new(depth))),
        }))
    }

    /// Posts `count` more receives, in place of those that were taken. Does not allocate.
    ///
    /// # Errors
    /// The error of `ibv_post_srq_recv`.
    pub fn post(&self, count: usize) -> io::Result<()> {
        either!(self, receives => receives.post(count))
    }
}

/// Options of a new queue pair.
pub struct QueuePairOptions<'a> {
    /// Most work requests under way.
    pub send_depth: u32,
    /// Most receives posted; without meaning if there is a shared queue.
    pub receive_depth: u32,
    /// Most bytes that a request carries in itself; a NIC in software carries 64.
    pub inline_bytes: u32,
    /// Queue that the receives come from; `None` if the queue pair has its own.
    pub shared: Option<&'a Arc<SharedReceiveQueue>>,
}

/// Address of a queue pair, which a peer needs to connect. It travels over the control channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    /// Global address of the port.
    pub gid: [u8; 16],
    /// LID of the port (InfiniBand); 0 on Ethernet.
    pub lid: u16,
    /// Number of the queue pair.
    pub queue_pair: u32,
    /// Sequence number of the first packet that it sends, 24 bits.
    pub first_psn: u32,
    /// Path MTU in force at the port, bytes.
    pub mtu: u32,
}

/// Times that an unanswered packet is sent again.
pub(super) const RETRIES: u8 = 7;
/// Times that a packet is sent again while the peer has no receive: 7 stands for "without end" (IBTA 1.4, 9.7.5.2.8).
pub(super) const RNR_RETRIES: u8 = 7;
/// Code of the time that the peer waits for a receive of this side: 12 stands for 0.64 ms (IBTA 1.4, 9.7.5.2.8).
pub(super) const RNR_TIMER: u8 = 12;
/// Low 24 bits, which packet sequence numbers and queue pairs have (IBTA 9.2).
pub(super) const LOW_24_BITS: u32 = 0x00ff_ffff;

/// State of a queue pair that is not connected. Receives can be posted.
pub struct Initial;
/// State of a queue pair that is ready to receive.
pub struct Receiving;
/// State of a queue pair that is ready to send and to receive.
pub struct Sending;

/// Queue pair.
pub struct QueuePair<State> {
    kind: Pair,
    state: PhantomData<State>,
}

enum Pair {
    #[cfg(rdma)]
    Hardware(ibverbs::QueuePair),
    Software(softnic::Pair),
}

impl Pair {
    fn receive_from(&mut self, peer: &PeerAddress) -> io::Result<()> {
        either!(self, pair => pair.receive_from(peer))
    }

    fn send(&mut self) -> io::Result<()> {
        either!(self, pair => pair.send())
    }

    fn address(&self) -> PeerAddress {
        either!(self, pair => pair.address())
    }

    fn number(&self) -> u32 {
        either!(self, pair => pair.number())
    }

    fn number_packets_from(&mut self, psn: u32) {
        either!(self, pair => pair.number_packets_from(psn));
    }

    fn post_receive(&mut self, id: u64, into: LocalRange) -> io::Result<()> {
        either!(self, pair => pair.post_receive(id, into))
    }

    fn post(&mut self, requests: &[Request<'_>]) -> io::Result<usize> {
        either!(self, pair => pair.post(requests))
    }
}

impl QueuePair<Initial> {
    /// Makes a queue pair of a port, in the INIT state. Its peer may write where windows or registrations allow it.
    ///
    /// # Errors
    /// The error that the library reports.
    pub fn new(
        domain: &Arc<ProtectionDomain>,
        queue: &CompletionQueue,
        port: &LocalPort,
        options: &QueuePairOptions<'_>,
    ) -> io::Result<Self> {
        let kind = match (&domain.kind, &queue.kind) {
            #[cfg(rdma)]
            (Domain::Hardware(domain), Queue::Hardware(queue)) => {
                Pair::Hardware(ibverbs::QueuePair::new(domain, queue, port, options)?)
            }
            (Domain::Software(domain), Queue::Software(queue)) => Pair::Software(queue.pair(domain, port, options)?),
            #[cfg(rdma)]
            _ => return Err(of_another_device()),
        };
        Ok(Self { kind, state: PhantomData })
    }

    /// Numbers packets from the low 24 bits of `psn` on, instead of from a random number.
    ///
    /// It changes [`QueuePair::address`], which the peer must get afterwards.
    pub fn number_packets_from(&mut self, psn: u32) {
        self.kind.number_packets_from(psn & LOW_24_BITS);
    }

    /// Connects the receiving half: READY TO RECEIVE. The path MTU is the smaller one of both ends.
    ///
    /// # Errors
    /// The error that the library reports.
    pub fn receive_from(mut self, peer: &PeerAddress) -> io::Result<QueuePair<Receiving>> {
        self.kind.receive_from(peer)?;
        Ok(QueuePair { kind: self.kind, state: PhantomData })
    }
}

impl QueuePair<Receiving> {
    /// Connects the sending half: READY TO SEND.
    ///
    /// # Errors
    /// The error that the library reports.
    pub fn send(mut self) -> io::Result<QueuePair<Sending>> {
        self.kind.send()?;
        Ok(QueuePair { kind: self.kind, state: PhantomData })
    }
}

impl<State> QueuePair<State> {
    /// Number of the queue pair, 24 bits.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.kind.number()
    }

    /// Address that a peer needs to connect.
    #[must_use]
    pub fn address(&self) -> PeerAddress {
        self.kind.address()
    }

    /// Posts a receive into `into`. A device of the host does not allocate for it.
    ///
    /// # Errors
    /// The error of `ibv_post_recv`; `InvalidInput` if a NIC in software does not know the memory.
    pub fn post_receive(&mut self, id: u64, into: LocalRange) -> io::Result<()> {
        self.kind.post_receive(id, into)
    }
}

/// Operation of a work request.
#[derive(Clone, Copy)]
pub enum Work<'a> {
    /// Sends bytes that the request carries in itself.
    Send(&'a [u8]),
    /// Writes bytes that the request carries in itself to memory of the peer, with immediate data if there are any.
    WriteInline(&'a [u8], RemoteRange, Option<u32>),
    /// Writes registered bytes, or none, to memory of the peer, with immediate data if there are any.
    Write(Option<LocalRange>, RemoteRange, Option<u32>),
    /// Opens a memory window to the peer. It is open when a later request of this queue pair reaches the peer.
    Open(&'a MemoryWindow),
}

/// Work request.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Number of the caller's choice; the completion has it. Below 2^63.
    pub id: u64,
    /// Whether success has a completion. Failure always has.
    pub signaled: bool,
    /// Operation to carry out.
    pub work: Work<'a>,
}

impl QueuePair<Sending> {
    /// Posts the first requests, at most [`DOORBELL`], in order with one call. Returns the number taken. Does not allocate.
    ///
    /// # Errors
    /// The error of `ibv_post_send`, if no request was taken.
    pub fn post(&mut self, requests: &[Request<'_>]) -> io::Result<usize> {
        self.kind.post(requests)
    }
}
