//! Reliable connected queue pairs (RC), whose states are types: a pair cannot send before it is connected.

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

/// Receives without buffers, shared by queue pairs: each takes one WRITE_WITH_IMM, whose bytes lie where they were
/// written.
pub enum SharedReceiveQueue {
    /// Of a device of the host.
    #[cfg(rdma)]
    Hardware(Arc<ibverbs::SharedReceiveQueue>),
    /// Of a NIC in software.
    Software(Arc<softnic::Receives>),
}

impl SharedReceiveQueue {
    /// A queue of `depth` receives, all posted.
    ///
    /// # Errors
    /// What the library reports.
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
    /// What `ibv_post_srq_recv` reports.
    pub fn post(&self, count: usize) -> io::Result<()> {
        either!(self, receives => receives.post(count))
    }
}

/// What a queue pair is made with.
pub struct QueuePairOptions<'a> {
    /// Work requests that may be under way.
    pub send_depth: u32,
    /// Receives that may be posted; of no meaning with a shared queue.
    pub receive_depth: u32,
    /// Bytes that a request may carry itself.
    pub inline_bytes: u32,
    /// Where it takes its receives from.
    pub shared: Option<&'a Arc<SharedReceiveQueue>>,
}

/// All that a peer needs to know to connect: it travels over the control channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    /// Global address of the port.
    pub gid: [u8; 16],
    /// LID of the port (InfiniBand); 0 on Ethernet.
    pub lid: u16,
    /// Number of the queue pair.
    pub queue_pair: u32,
    /// First packet sequence number that it sends, 24 bits.
    pub first_psn: u32,
    /// Path MTU that its port has in force, bytes.
    pub mtu: u32,
}

/// How often a packet that is not answered is sent again.
pub(super) const RETRIES: u8 = 7;
/// Receiver not ready: tried for ever (7, IBTA 1.4, 9.7.5.2.8), after 0.64 ms (12).
pub(super) const RNR_RETRIES: u8 = 7;
pub(super) const RNR_TIMER: u8 = 12;

/// Made, not connected; receives can be posted.
pub struct Initial;
/// Ready to receive.
pub struct Receiving;
/// Ready to send and to receive.
pub struct Sending;

/// A queue pair.
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
    /// A queue pair of a port, in the INIT state, whose peer may write where windows or registrations let it.
    ///
    /// # Errors
    /// What the library reports.
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

    /// Numbers its packets from `psn` on, of which 24 bits count; otherwise from a random number on. The peer is to be given the
    /// address as it is afterwards.
    pub fn number_packets_from(&mut self, psn: u32) {
        self.kind.number_packets_from(psn & 0xff_ffff);
    }

    /// Connects the receiving half: READY TO RECEIVE. The path MTU is the smaller of both ends'.
    ///
    /// # Errors
    /// What the library reports.
    pub fn receive_from(mut self, peer: &PeerAddress) -> io::Result<QueuePair<Receiving>> {
        self.kind.receive_from(peer)?;
        Ok(QueuePair { kind: self.kind, state: PhantomData })
    }
}

impl QueuePair<Receiving> {
    /// Connects the sending half: READY TO SEND.
    ///
    /// # Errors
    /// What the library reports.
    pub fn send(mut self) -> io::Result<QueuePair<Sending>> {
        self.kind.send()?;
        Ok(QueuePair { kind: self.kind, state: PhantomData })
    }
}

impl<State> QueuePair<State> {
    /// Its number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.kind.number()
    }

    /// What a peer needs to connect.
    #[must_use]
    pub fn address(&self) -> PeerAddress {
        self.kind.address()
    }

    /// Posts a receive into `into`. Does not allocate.
    ///
    /// # Errors
    /// What `ibv_post_recv` reports.
    pub fn post_receive(&mut self, id: u64, into: LocalRange) -> io::Result<()> {
        self.kind.post_receive(id, into)
    }
}

/// What the NIC is to do.
#[derive(Clone, Copy)]
pub enum Work<'a> {
    /// SEND these bytes, carried by the request itself.
    Send(&'a [u8]),
    /// WRITE these bytes, carried by the request itself.
    WriteInline(&'a [u8], RemoteRange, Option<u32>),
    /// WRITE registered bytes, or none.
    Write(Option<LocalRange>, RemoteRange, Option<u32>),
    /// Open a memory window to the peer; what follows finds it open.
    Open(&'a MemoryWindow),
}

/// A work request.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Comes back with its completion.
    pub id: u64,
    /// Whether it has a completion when it succeeds.
    pub signaled: bool,
    /// What to do.
    pub work: Work<'a>,
}

impl QueuePair<Sending> {
    /// Posts up to [`DOORBELL`] requests with one call, in order. Returns how many it took. Does not allocate.
    ///
    /// # Errors
    /// What `ibv_post_send` reports when it took none.
    pub fn post(&mut self, requests: &[Request<'_>]) -> io::Result<usize> {
        self.kind.post(requests)
    }
}
