//! Connections between clients and brokers: sockets, and queue pairs beside them in a rack with NICs.

use super::fate::{Clock, random};
use super::nic::{Granted, Nic, PairEnd, Port};
use embarcadero_cxl::RegionOffset;
use embarcadero_roce::psn::Psn;
use embarcadero_sim::{
    Power, Simulated, SimulatedConnection, SimulatedEndpoint, SimulatedPublisher, SimulatedSubscriber,
    SimulatedTransport,
};
use embarcadero_transport::{
    Connection, Endpoint, Landing, LinkError, LinkOptions, Outbox, Placement, PublisherLink, Received, SendBuffer,
    Slots, Transport, TransportError, Window, WindowPlacement,
};
use embarcadero_wire::batch::{ALIGN_BYTES, BatchBuilder};
use embarcadero_wire::{FRAME_BYTES, Frame, OpenPublish, RdmaAccept, RdmaConnect, Subscribe, WindowGrant};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a landing window, with room for some batches.
pub(crate) const WINDOW_BYTES: u64 = 2048;
/// Number of landing windows that a publisher has at a time.
const WINDOWS: usize = 2;

/// NIC that the connections of a host share.
pub(crate) type SharedNic = Arc<Mutex<Nic>>;

fn lock(nic: &SharedNic) -> MutexGuard<'_, Nic> {
    nic.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Address where the broker of a host listens.
pub(crate) fn address(host: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, host as u8], 1))
}

/// Network as one host or client sees it.
#[derive(Clone)]
pub(crate) struct RackTransport {
    pub(crate) sockets: SimulatedTransport<Simulated>,
    /// NIC of the client, and its clock.
    pub(crate) nic: Option<(SharedNic, Clock)>,
}

impl RackTransport {
    /// Returns the same network for a client that starts, whose power supply is `power`.
    pub(crate) fn of_client(&self, power: &Power, nic: Option<(SharedNic, Clock)>) -> Self {
        Self { sockets: self.sockets.of_host(power), nic }
    }
}

impl Transport for RackTransport {
    type Memory = Simulated;
    type Connection = RackConnection;
    type Endpoint = RackEndpoint;
    type Publisher = RackPublisher;
    type Subscriber = SimulatedSubscriber;

    fn publish(&self, broker: SocketAddr, options: &LinkOptions, open: &OpenPublish) -> io::Result<RackPublisher> {
        let Some((nic, clock)) = &self.nic else {
            return Ok(RackPublisher { link: self.sockets.publish(broker, options, open)?, queue: None });
        };
        let own = lock(nic).open();
        let mut gid = [0; 16];
        gid[15] = own.port.0 as u8;
        let request = RdmaConnect {
            gid,
            queue_pair: own.number,
            first_psn: own.psn.get(),
            batch_bytes: 256,
            ..RdmaConnect::blank()
        };
        let link = self.sockets.publish_after(broker, request.encode(), open)?;
        let queue = ClientQueue { nic: Arc::clone(nic), clock: *clock, own, windows: VecDeque::new() };
        Ok(RackPublisher { link, queue: Some(queue) })
    }

    fn subscribe(
        &self,
        broker: SocketAddr,
        options: &LinkOptions,
        request: &Subscribe,
    ) -> io::Result<SimulatedSubscriber> {
        self.sockets.subscribe(broker, options, request)
    }
}

/// Publisher's end of a connection.
pub(crate) struct RackPublisher {
    link: SimulatedPublisher,
    queue: Option<ClientQueue>,
}

/// Publisher's end of a queue pair.
struct ClientQueue {
    nic: SharedNic,
    clock: Clock,
    own: PairEnd,
    /// Landing windows that it may fill: their numbers, and what is left of them.
    windows: VecDeque<(u32, Granted)>,
}

impl ClientQueue {
    /// Takes a frame of the transport itself. Returns false for others.
    fn take(&mut self, frame: &Frame) -> bool {
        match frame {
            Frame::RdmaAccept(accept) => {
                let port = Port(accept.gid[15].into());
                let peer = PairEnd { port, number: accept.queue_pair, psn: Psn::new(accept.first_psn) };
                lock(&self.nic).join(self.own, peer);
            }
            Frame::WindowGrant(grant) => {
                let (at, bytes) = (RegionOffset(grant.address), grant.bytes.into());
                self.windows.push_back((grant.number, Granted { at, bytes, key: grant.rkey }));
            }
            _ => return false,
        }
        true
    }

    /// Writes a batch to a window. Returns false when no window has room.
    fn write(&mut self, batch: &[u8]) -> bool {
        let bytes = batch.len() as u64;
        while self.windows.front().is_some_and(|(_, left)| left.bytes < bytes) {
            self.windows.pop_front();
        }
        let Some((number, left)) = self.windows.front_mut() else { return false };
        lock(&self.nic).write(self.own.number, *left, batch, *number);
        let used = bytes.next_multiple_of(ALIGN_BYTES).min(left.bytes);
        (left.at, left.bytes) = (left.at.add(used), left.bytes - used);
        true
    }
}

impl Drop for ClientQueue {
    fn drop(&mut self) {
        lock(&self.nic).close(self.own.number);
    }
}

impl PublisherLink for RackPublisher {
    fn write(&mut self, batch: &mut BatchBuilder<SendBuffer>, written: usize) -> io::Result<usize> {
        let Some(queue) = &mut self.queue else { return self.link.write(batch, written) };
        Ok(if queue.write(batch.bytes()) { batch.bytes().len() } else { 0 })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn poll(&mut self, frames: &mut Vec<Frame>) -> Result<(), LinkError> {
        let before = frames.len();
        let polled = self.link.poll(frames);
        let Some(queue) = &mut self.queue else { return polled };
        for frame in frames.split_off(before) {
            if !queue.take(&frame) {
                frames.push(frame);
            }
        }
        let mut nic = lock(&queue.nic);
        nic.drive(queue.clock.now_us());
        if nic.failure(queue.own.number).is_some() {
            return Err(LinkError::Lost(io::ErrorKind::ConnectionReset.into()));
        }
        polled
    }

    fn batches_in_use(&mut self) -> usize {
        0
    }

    fn arm(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn descriptors(&self, _: bool) -> impl Iterator<Item = (RawFd, bool)> + use<> {
        std::iter::empty()
    }
}

/// Half of the network that a broker's worker has.
pub(crate) struct RackEndpoint {
    pub(crate) sockets: SimulatedEndpoint<Simulated>,
    /// NIC of the process, and its clock.
    pub(crate) nic: Option<(SharedNic, Clock)>,
}

impl Endpoint<Simulated> for RackEndpoint {
    type Connection = RackConnection;

    fn accept(&mut self) -> Option<io::Result<RackConnection>> {
        Some(self.sockets.accept()?.map(|link| RackConnection { queue: None, link }))
    }

    fn upgrade(
        &mut self,
        _: usize,
        connection: &mut RackConnection,
        request: &RdmaConnect,
    ) -> Result<(), TransportError> {
        let (nic, _) = self.nic.as_ref().expect("only clients of a rack with NICs ask for it");
        let mut device = lock(nic);
        let own = device.open();
        let peer = PairEnd {
            port: Port(request.gid[15].into()),
            number: request.queue_pair,
            psn: Psn::new(request.first_psn),
        };
        device.join(own, peer);
        let mut gid = [0; 16];
        gid[15] = own.port.0 as u8;
        let accept = RdmaAccept { gid, queue_pair: own.number, first_psn: own.psn.get(), ..RdmaAccept::blank() };
        connection.queue = Some(BrokerQueue {
            nic: Arc::clone(nic),
            number: own.number,
            unsent: VecDeque::from([accept.encode()]),
            windows: VecDeque::new(),
            granted: 0,
            arrived: None,
        });
        Ok(())
    }

    fn complete(&mut self, _: &mut impl Slots<RackConnection>) -> io::Result<usize> {
        Ok(self.nic.as_ref().map_or(0, |(nic, clock)| lock(nic).drive(clock.now_us())))
    }
}

/// Broker's end of a connection.
pub(crate) struct RackConnection {
    // The first field is dropped first. Nothing is written to the windows after that.
    queue: Option<BrokerQueue>,
    link: SimulatedConnection,
}

/// Broker's end of a queue pair.
struct BrokerQueue {
    nic: SharedNic,
    number: u32,
    /// Frames for the publisher that its socket has no room for yet.
    unsent: VecDeque<[u8; FRAME_BYTES]>,
    /// Landing windows and their numbers.
    windows: VecDeque<(u32, Window)>,
    /// Number of windows that were ever granted.
    granted: u32,
    /// Number of the window of a batch that has come and was not taken.
    arrived: Option<u32>,
}

impl BrokerQueue {
    /// Grants windows, as far as there is memory. Returns false when the publisher has none.
    fn grant<L: Landing>(&mut self, landing: &mut L) -> Result<bool, TransportError> {
        while self.windows.len() < WINDOWS {
            let window = match landing.grant_window(WINDOW_BYTES, self.windows.is_empty()) {
                WindowPlacement::Granted(window) => window,
                WindowPlacement::Wait => break,
                WindowPlacement::Refuse(error) => return Err(error),
            };
            let (number, key) = (self.granted, random(0..1 << 32) as u32);
            self.granted += 1;
            lock(&self.nic).grant(self.number, Granted { at: window.at(), bytes: window.bytes(), key });
            let (address, bytes) = (window.at().0, window.bytes() as u32);
            let grant = WindowGrant { address, number, rkey: key, bytes, ..WindowGrant::blank() };
            self.unsent.push_back(grant.encode());
            self.windows.push_back((number, window));
        }
        Ok(!self.windows.is_empty())
    }

    /// Takes up to `budget` batches that were written to windows.
    fn receive<L: Landing>(
        &mut self,
        memory: &Simulated,
        landing: &mut L,
        budget: usize,
    ) -> Result<Received, TransportError> {
        use embarcadero_cxl::Fabric;
        for _ in 0..budget {
            let next = self.arrived.take().or_else(|| lock(&self.nic).take_written(self.number));
            let Some(number) = next else {
                return Ok(if self.grant(landing)? { Received::Nothing } else { Received::Waiting });
            };
            // The publisher has gone on to this window.
            while self.windows.front().is_some_and(|(of, _)| *of != number) {
                if let Some((_, old)) = self.windows.pop_front() {
                    lock(&self.nic).revoke(self.number, old.at());
                }
            }
            let Some((_, window)) = self.windows.front_mut() else { panic!("window {number} was not granted") };
            let at = window.next();
            let mut bytes = [0; FRAME_BYTES];
            memory.read_bytes(at, &mut bytes);
            let Frame::BatchHeader(header) = Frame::decode(&bytes)? else { panic!("{at:?} has no batch") };
            match landing.admit(&header, at) {
                Placement::At(at) => {
                    landing.complete(header, at, true)?;
                    window.take(header.batch_bytes());
                }
                Placement::Wait => {
                    self.arrived = Some(number);
                    return Ok(Received::Waiting);
                }
                Placement::Refuse(error) => return Err(error),
            }
        }
        Ok(Received::More)
    }
}

impl Drop for BrokerQueue {
    fn drop(&mut self) {
        lock(&self.nic).close(self.number);
    }
}

impl Connection<Simulated> for RackConnection {
    fn receive<L: Landing>(
        &mut self,
        memory: &Simulated,
        landing: &mut L,
        budget: usize,
    ) -> Result<Received, TransportError> {
        let from_windows = self.queue.as_mut().map(|queue| queue.receive(memory, landing, budget)).transpose()?;
        match from_windows {
            Some(Received::More) => Ok(Received::More),
            waits => match (self.link.receive(memory, landing, budget)?, waits) {
                (Received::Nothing, Some(waits)) => Ok(waits),
                (received, _) => Ok(received),
            },
        }
    }

    fn send(&mut self, memory: &Simulated, outbox: &mut Outbox) -> Result<u64, TransportError> {
        let mut sent = 0;
        if let Some(BrokerQueue { unsent, .. }) = &mut self.queue {
            while let Some(frame) = unsent.front() {
                if !self.link.send_frame(*frame)? {
                    return Ok(sent);
                }
                unsent.pop_front();
                sent += 1;
            }
        }
        Ok(sent + self.link.send(memory, outbox)?)
    }

    fn has_work(&self) -> bool {
        let in_windows = |queue: &BrokerQueue| {
            queue.arrived.is_some() || queue.windows.len() < WINDOWS || lock(&queue.nic).has_written(queue.number)
        };
        Connection::<Simulated>::has_work(&self.link) || self.queue.as_ref().is_some_and(in_windows)
    }

    fn has_to_send(&self) -> bool {
        self.queue.as_ref().is_some_and(|queue| !queue.unsent.is_empty())
    }

    fn waits_for_socket(&self, outbox: &Outbox) -> bool {
        Connection::<Simulated>::waits_for_socket(&self.link, outbox)
    }

    fn finish(&mut self) {
        Connection::<Simulated>::finish(&mut self.link);
    }

    fn discard(&mut self) -> bool {
        Connection::<Simulated>::discard(&mut self.link)
    }

    fn windows(&self) -> impl Iterator<Item = RegionOffset> {
        self.queue.iter().flat_map(|queue| queue.windows.iter().map(|(_, window)| window.at()))
    }

    fn close_windows(&mut self) {
        self.queue = None;
    }
}
