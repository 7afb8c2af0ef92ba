//! Reliable connected queue pairs (RC). Their states are types: a queue pair cannot send before it is connected.

use crate::completion::{CompletionQueue, Queue};
use crate::either::either;
#[cfg(rdma)]
use crate::either::of_another_device;
#[cfg(rdma)]
use crate::ibverbs;
use crate::memory::{Domain, MemoryWindow, ProtectionDomain, Window};
use crate::peer::PeerAddress;
use crate::port::LocalPort;
use crate::range::LocalRange;
use crate::{softnic, work};
use embarcadero_roce::packet::LOW_24_BITS;
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;

/// Receives without buffers that queue pairs share. Each takes one WRITE_WITH_IMM, whose bytes lie where the peer wrote
/// them.
pub struct SharedReceiveQueue {
    kind: Receives,
}

/// Shared receives of either kind of device.
enum Receives {
    #[cfg(rdma)]
    Hardware(Arc<ibverbs::SharedReceiveQueue>),
    Software(Arc<softnic::Receives>),
}

impl SharedReceiveQueue {
    /// Makes a queue of `depth` receives, all of them posted.
    ///
    /// # Errors
    /// The error that the library reports.
    pub fn new(domain: &Arc<ProtectionDomain>, depth: u32) -> io::Result<Arc<Self>> {
        let kind = match &domain.kind {
            #[cfg(rdma)]
            Domain::Hardware(domain) => Receives::Hardware(ibverbs::SharedReceiveQueue::new(domain, depth)?),
            Domain::Software(_) => Receives::Software(Arc::new(softnic::Receives::new(depth))),
        };
        Ok(Arc::new(Self { kind }))
    }

    /// Posts `count` more receives, in place of those that were taken. Does not allocate.
    ///
    /// # Errors
    /// The error of `ibv_post_srq_recv`.
    pub fn post(&self, count: usize) -> io::Result<()> {
        either!(&self.kind, Receives, receives => receives.post(count))
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

/// Operation of a work request.
pub type Work<'a> = work::Work<'a, MemoryWindow>;
/// Work request.
pub type Request<'a> = work::Request<'a, MemoryWindow>;

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

/// Queue pair of either kind of device.
enum Pair {
    #[cfg(rdma)]
    Hardware(ibverbs::QueuePair),
    Software(softnic::Pair),
}

impl QueuePair<Initial> {
    /// Makes a queue pair of a port, in the INIT state. Its peer may write where windows or registrations allow it.
    ///
    /// # Errors
    /// The error that the library reports; `InvalidInput` if domain, queues and port are not of one device.
    pub fn new(
        domain: &Arc<ProtectionDomain>,
        queue: &CompletionQueue,
        port: &LocalPort,
        options: &QueuePairOptions<'_>,
    ) -> io::Result<Self> {
        let shared = options.shared.map(|shared| &shared.kind);
        let kind = match (&domain.kind, &queue.kind) {
            #[cfg(rdma)]
            (Domain::Hardware(domain), Queue::Hardware(queue)) => {
                let shared = match shared {
                    None => None,
                    Some(Receives::Hardware(shared)) => Some(shared),
                    Some(Receives::Software(_)) => return Err(of_another_device()),
                };
                let QueuePairOptions { send_depth, receive_depth, inline_bytes, .. } = *options;
                let depths = ibverbs::Depths { send: send_depth, receive: receive_depth, inline_bytes };
                Pair::Hardware(ibverbs::QueuePair::new(domain, queue, port, depths, shared)?)
            }
            (Domain::Software(domain), Queue::Software(queue)) => {
                let shared = match shared {
                    None => None,
                    Some(Receives::Software(shared)) => Some(shared),
                    #[cfg(rdma)]
                    Some(Receives::Hardware(_)) => return Err(of_another_device()),
                };
                Pair::Software(queue.pair(domain, port, shared)?)
            }
            #[cfg(rdma)]
            _ => return Err(of_another_device()),
        };
        Ok(Self { kind, state: PhantomData })
    }

    /// Numbers packets from the low 24 bits of `psn` on, instead of from a random number.
    ///
    /// [`QueuePair::address`] changes with it: the peer must get the address afterwards.
    pub fn number_packets_from(&mut self, psn: u32) {
        either!(&mut self.kind, Pair, pair => pair.number_packets_from(psn & LOW_24_BITS));
    }

    /// Sends an unanswered packet again `times` times before the queue pair fails, instead of
    /// [`LocalPort::retries`] times.
    ///
    /// Devices of the host take at most 7.
    pub fn send_again(&mut self, times: u8) {
        either!(&mut self.kind, Pair, pair => pair.send_again(times));
    }

    /// Connects the receiving half: READY TO RECEIVE. The path MTU is the smaller one of both ends.
    ///
    /// # Errors
    /// The error that the library reports.
    pub fn receive_from(mut self, peer: &PeerAddress) -> io::Result<QueuePair<Receiving>> {
        either!(&mut self.kind, Pair, pair => pair.receive_from(peer))?;
        Ok(QueuePair { kind: self.kind, state: PhantomData })
    }
}

impl QueuePair<Receiving> {
    /// Connects the sending half: READY TO SEND.
    ///
    /// # Errors
    /// The error that the library reports.
    pub fn send(mut self) -> io::Result<QueuePair<Sending>> {
        either!(&mut self.kind, Pair, pair => pair.send())?;
        Ok(QueuePair { kind: self.kind, state: PhantomData })
    }
}

impl<State> QueuePair<State> {
    /// Number of the queue pair, 24 bits.
    #[must_use]
    pub fn number(&self) -> u32 {
        either!(&self.kind, Pair, pair => pair.number())
    }

    /// Address that a peer needs to connect.
    #[must_use]
    pub fn address(&self) -> PeerAddress {
        either!(&self.kind, Pair, pair => pair.address())
    }

    /// Posts a receive into `into`. A device of the host does not allocate for it.
    ///
    /// # Errors
    /// The error of `ibv_post_recv`; `InvalidInput` if a NIC in software does not know the memory.
    pub fn post_receive(&mut self, id: u64, into: LocalRange) -> io::Result<()> {
        either!(&mut self.kind, Pair, pair => pair.post_receive(id, into))
    }
}

impl QueuePair<Sending> {
    /// Posts the first requests, at most [`DOORBELL`](crate::DOORBELL), in order with one call.
    ///
    /// Returns the number of requests taken. Does not allocate.
    ///
    /// # Errors
    /// The error of `ibv_post_send`, if no request was taken.
    pub fn post(&mut self, requests: &[Request<'_>]) -> io::Result<usize> {
        match &mut self.kind {
            #[cfg(rdma)]
            Pair::Hardware(pair) => pair.post(requests.iter().map(|request| {
                request.with_window(|window| match &window.kind {
                    Window::Hardware(window) => Ok(window),
                    Window::Software(_) => Err(of_another_device()),
                })
            })),
            Pair::Software(pair) => pair.post(requests.iter().map(|request| {
                request.with_window(|window| match &window.kind {
                    Window::Software(window) => Ok(window),
                    #[cfg(rdma)]
                    Window::Hardware(_) => Err(of_another_device()),
                })
            })),
        }
    }
}
