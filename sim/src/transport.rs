//! A transport in memory. It carries whole frames and batches in order, a bounded number of them at a time.

use embarcadero_cxl::Fabric;
use embarcadero_transport::{
    Connection, Endpoint, Item, Landing, LinkError, LinkOptions, Outbox, Placement, PublisherLink, Received,
    SendBuffer, SubscriberLink, Transport, TransportError,
};
use embarcadero_wire::batch::BatchBuilder;
use embarcadero_wire::{BatchHeader, ErrorCode, ErrorFrame, FRAME_BYTES, Frame, OpenPublish, Subscribe, WireError};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Number of looks at a silent connection after which it counts as lost, as keep-alive has it.
const SILENT_LOOKS: u32 = 300;

/// Frame and the bytes that follow it: a batch's body, a delivered batch, or the text of an error.
struct Message {
    frame: [u8; FRAME_BYTES],
    rest: Vec<u8>,
}

/// Messages under way in one direction of a connection.
struct Pipe {
    under_way: VecDeque<Message>,
    /// Most messages that may be under way.
    room: usize,
    /// True once one of the ends is gone, or sends no more.
    closed: bool,
    /// Number of looks after which the end that is left finds the other one gone; `None` while both are there.
    silent_for: Option<u32>,
}

impl Pipe {
    /// Looks at a connection whose other end may be gone without a word.
    fn look(&mut self) {
        let Some(looks) = &mut self.silent_for else { return };
        *looks = looks.saturating_sub(1);
        if *looks == 0 {
            self.closed = true;
            self.under_way.clear();
        }
    }
}

type Shared = Arc<Mutex<Pipe>>;

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Faults of the network under a [`SimulatedTransport`].
pub trait Weather: Send + Sync {
    /// Returns true when what is under way to an end has not come yet, now that the end looks.
    fn delays(&self) -> bool;

    /// Returns true when a connection breaks, now that an end sends on it.
    fn breaks(&self) -> bool;
}

/// Network without faults.
struct Fair;

impl Weather for Fair {
    fn delays(&self) -> bool {
        false
    }

    fn breaks(&self) -> bool {
        false
    }
}

/// Power supply of a host. Once it has failed, connections of the host fall silent instead of closing.
#[derive(Clone, Debug, Default)]
pub struct Power(Arc<AtomicBool>);

impl Power {
    /// Fails. Drop what the host has of the transport next.
    pub fn fail(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn has_failed(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// One of the two ends of a connection.
struct End {
    incoming: Shared,
    outgoing: Shared,
    weather: Arc<dyn Weather>,
    /// Power of the end's host.
    power: Power,
}

impl End {
    /// Sends a message. Returns false when there is no room for it now.
    fn send(&self, frame: [u8; FRAME_BYTES], rest: Vec<u8>) -> io::Result<bool> {
        if self.weather.breaks() {
            lock(&self.incoming).closed = true;
            lock(&self.outgoing).closed = true;
        }
        let mut pipe = lock(&self.outgoing);
        pipe.look();
        if pipe.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let has_room = pipe.under_way.len() < pipe.room;
        if has_room {
            pipe.under_way.push_back(Message { frame, rest });
        }
        Ok(has_room)
    }

    /// Takes a message, if there is one. Fails once the other end is gone and nothing is left.
    fn receive(&self) -> io::Result<Option<Message>> {
        if self.weather.delays() {
            return Ok(None);
        }
        let mut pipe = lock(&self.incoming);
        pipe.look();
        match pipe.under_way.pop_front() {
            None if pipe.closed => Err(io::ErrorKind::UnexpectedEof.into()),
            message => Ok(message),
        }
    }

    /// Returns true when [`End::receive`] would return a message or an error.
    fn has_news(&self) -> bool {
        let mut pipe = lock(&self.incoming);
        pipe.look();
        pipe.closed || !pipe.under_way.is_empty()
    }

    /// Returns true once the other end is gone, or sends no more.
    fn has_hung_up(&self) -> bool {
        lock(&self.incoming).closed
    }

    /// Ends the outgoing direction. What is under way still arrives.
    fn finish(&self) {
        lock(&self.outgoing).closed = true;
    }
}

impl Drop for End {
    fn drop(&mut self) {
        for pipe in [&self.incoming, &self.outgoing] {
            let mut pipe = lock(pipe);
            if self.power.has_failed() {
                pipe.silent_for.get_or_insert(SILENT_LOOKS);
            } else {
                pipe.closed = true;
            }
        }
    }
}

/// Address that a broker listens at: the connections that wait to be accepted there, and the power of the host.
struct Listener {
    waiting: VecDeque<End>,
    power: Power,
}

type Listening = BTreeMap<SocketAddr, Listener>;

/// Network that simulated clients and brokers share, as one host sees it. Clones share it too.
pub struct SimulatedTransport<F> {
    listening: Arc<Mutex<Listening>>,
    room: usize,
    weather: Arc<dyn Weather>,
    power: Power,
    memory: PhantomData<fn() -> F>,
}

impl<F> Clone for SimulatedTransport<F> {
    fn clone(&self) -> Self {
        self.of_host(&self.power)
    }
}

impl<F> SimulatedTransport<F> {
    /// Makes a network whose connections carry at most `room` messages at a time in each direction, and never fail.
    #[must_use]
    pub fn new(room: usize) -> Self {
        Self::in_weather(room, Arc::new(Fair))
    }

    /// Makes a network whose connections carry at most `room` messages at a time in each direction, with faults.
    #[must_use]
    pub fn in_weather(room: usize, weather: Arc<dyn Weather>) -> Self {
        Self { listening: Arc::default(), room, weather, power: Power::default(), memory: PhantomData }
    }

    /// Returns the same network for a host with a power supply of its own.
    #[must_use]
    pub fn of_host(&self, power: &Power) -> Self {
        let (listening, weather) = (Arc::clone(&self.listening), Arc::clone(&self.weather));
        Self { listening, room: self.room, weather, power: power.clone(), memory: PhantomData }
    }

    /// Begins to listen at an address.
    #[must_use]
    pub fn listen(&self, at: SocketAddr) -> SimulatedEndpoint<F> {
        let listener = Listener { waiting: VecDeque::new(), power: self.power.clone() };
        lock(&self.listening).insert(at, listener);
        SimulatedEndpoint { network: self.clone(), at }
    }

    /// Ends listening at an address. Who connects to it from now on is refused, and who was not accepted yet finds the
    /// connection closed.
    pub fn close(&self, at: SocketAddr) {
        lock(&self.listening).remove(&at);
    }

    fn connect(&self, to: SocketAddr, opening: [u8; FRAME_BYTES]) -> io::Result<End> {
        let pipe = || Pipe { under_way: VecDeque::new(), room: self.room, closed: false, silent_for: None };
        let [one, other] = [pipe(), pipe()].map(|pipe| Arc::new(Mutex::new(pipe)));
        let mut listening = lock(&self.listening);
        let listener = listening.get_mut(&to).ok_or(io::ErrorKind::ConnectionRefused)?;
        let end = |incoming: &Shared, outgoing: &Shared, power: &Power| End {
            incoming: Arc::clone(incoming),
            outgoing: Arc::clone(outgoing),
            weather: Arc::clone(&self.weather),
            power: power.clone(),
        };
        let near = end(&one, &other, &self.power);
        listener.waiting.push_back(end(&other, &one, &listener.power));
        drop(listening);
        near.send(opening, Vec::new())?;
        Ok(near)
    }

    /// Connects a publisher, which sends two frames to open the connection. The answers come through
    /// [`PublisherLink::poll`].
    ///
    /// # Errors
    /// Nobody listens at the address.
    pub fn publish_after(
        &self,
        broker: SocketAddr,
        before: [u8; FRAME_BYTES],
        open: &OpenPublish,
    ) -> io::Result<SimulatedPublisher> {
        let end = self.connect(broker, before)?;
        end.send(open.encode(), Vec::new())?;
        Ok(SimulatedPublisher { end })
    }
}

impl<F: Fabric> Transport for SimulatedTransport<F> {
    type Memory = F;
    type Connection = SimulatedConnection;
    type Endpoint = SimulatedEndpoint<F>;
    type Publisher = SimulatedPublisher;
    type Subscriber = SimulatedSubscriber;

    fn publish(&self, broker: SocketAddr, _: &LinkOptions, open: &OpenPublish) -> io::Result<SimulatedPublisher> {
        Ok(SimulatedPublisher { end: self.connect(broker, open.encode())? })
    }

    fn subscribe(&self, broker: SocketAddr, _: &LinkOptions, request: &Subscribe) -> io::Result<SimulatedSubscriber> {
        Ok(SimulatedSubscriber { end: self.connect(broker, request.encode())?, batch: Vec::new() })
    }
}

/// Address where a broker listens, until this is dropped.
pub struct SimulatedEndpoint<F> {
    network: SimulatedTransport<F>,
    at: SocketAddr,
}

impl<F> Drop for SimulatedEndpoint<F> {
    fn drop(&mut self) {
        lock(&self.network.listening).remove(&self.at);
    }
}

impl<F: Fabric> Endpoint<F> for SimulatedEndpoint<F> {
    type Connection = SimulatedConnection;

    fn accept(&mut self) -> Option<io::Result<SimulatedConnection>> {
        let end = lock(&self.network.listening).get_mut(&self.at)?.waiting.pop_front()?;
        Some(Ok(SimulatedConnection { end, waiting: None }))
    }
}

/// Broker's end of a connection.
pub struct SimulatedConnection {
    end: End,
    /// Batch that the landing has no room for.
    waiting: Option<Message>,
}

impl SimulatedConnection {
    /// Sends a frame of the transport itself. Returns false when there is no room for it now.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn send_frame(&self, frame: [u8; FRAME_BYTES]) -> io::Result<bool> {
        self.end.send(frame, Vec::new())
    }
}

impl<F: Fabric> Connection<F> for SimulatedConnection {
    fn receive<L: Landing>(&mut self, memory: &F, landing: &mut L, budget: usize) -> Result<Received, TransportError> {
        for _ in 0..budget {
            let message = match self.waiting.take() {
                Some(message) => message,
                None => match self.end.receive() {
                    Ok(Some(message)) => message,
                    Ok(None) => return Ok(Received::Nothing),
                    Err(_) => return Err(TransportError::Closed),
                },
            };
            let header = match Frame::decode(&message.frame)? {
                Frame::BatchHeader(header) => header,
                frame => return Ok(Received::Frame(frame)),
            };
            match landing.place(&header) {
                Placement::At(at) => {
                    memory.write_bytes(at, &message.frame);
                    memory.write_bytes(at.add(FRAME_BYTES as u64), &message.rest);
                    landing.complete(header, at, false)?;
                }
                // What nobody has taken goes with the connection.
                Placement::Wait if self.end.has_hung_up() => return Err(TransportError::Closed),
                Placement::Wait => {
                    self.waiting = Some(message);
                    return Ok(Received::Waiting);
                }
                Placement::Refuse(error) => return Err(error),
            }
        }
        Ok(Received::More)
    }

    fn send(&mut self, memory: &F, outbox: &mut Outbox) -> Result<u64, TransportError> {
        let mut sent = 0;
        while let Some((frame, rest)) = outbox.front(memory) {
            if !self.end.send(frame, rest)? {
                break;
            }
            outbox.pop_front();
            sent += 1;
        }
        Ok(sent)
    }

    fn has_work(&self) -> bool {
        self.waiting.is_some() || self.end.has_news()
    }

    fn has_to_send(&self) -> bool {
        false
    }

    fn waits_for_socket(&self, _: &Outbox) -> bool {
        false
    }

    fn finish(&mut self) {
        self.end.finish();
    }

    fn discard(&mut self) -> bool {
        self.waiting = None;
        loop {
            match self.end.receive() {
                Ok(Some(_)) => {}
                Ok(None) => return false,
                Err(_) => return true,
            }
        }
    }
}

fn refusal(error: &ErrorFrame, text: &[u8]) -> LinkError {
    let text = String::from_utf8_lossy(text).into_owned();
    LinkError::Refused { code: ErrorCode::from_code(error.code), text, detail: error.detail }
}

/// Publisher's end of a connection.
pub struct SimulatedPublisher {
    end: End,
}

impl PublisherLink for SimulatedPublisher {
    fn write(&mut self, batch: &mut BatchBuilder<SendBuffer>, written: usize) -> io::Result<usize> {
        assert!(written == 0, "batches go whole");
        let Some((frame, body)) = batch.bytes().split_first_chunk() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        Ok(if self.end.send(*frame, body.to_vec())? { batch.bytes().len() } else { 0 })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn poll(&mut self, frames: &mut Vec<Frame>) -> Result<(), LinkError> {
        while let Some(message) = self.end.receive()? {
            match Frame::decode(&message.frame)? {
                Frame::ErrorFrame(error) => return Err(refusal(&error, &message.rest)),
                frame => frames.push(frame),
            }
        }
        Ok(())
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

/// Subscriber's end of a connection.
pub struct SimulatedSubscriber {
    end: End,
    /// Batch that was taken last.
    batch: Vec<u8>,
}

impl SubscriberLink for SimulatedSubscriber {
    fn take(&mut self) -> Result<Item, LinkError> {
        let Some(Message { frame, rest }) = self.end.receive()? else { return Ok(Item::Nothing) };
        match Frame::decode(&frame)? {
            Frame::ErrorFrame(error) => Err(refusal(&error, &rest)),
            Frame::Deliver(deliver) => {
                self.batch = rest;
                let header = self.batch.first_chunk().ok_or(LinkError::Lost(io::ErrorKind::InvalidData.into()))?;
                Ok(Item::Batch(deliver, decode_header(header), FRAME_BYTES..self.batch.len()))
            }
            frame => Ok(Item::Frame(frame)),
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.batch
    }

    fn send(&mut self, frame: &[u8; FRAME_BYTES]) -> io::Result<bool> {
        self.end.send(*frame, Vec::new())
    }

    fn arm(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn descriptors(&self) -> impl Iterator<Item = RawFd> + use<> {
        std::iter::empty()
    }
}

fn decode_header(frame: &[u8; FRAME_BYTES]) -> Result<BatchHeader, WireError> {
    match Frame::decode(frame)? {
        Frame::BatchHeader(header) => Ok(header),
        other => Err(WireError::Kind { found: other.kind() }),
    }
}
