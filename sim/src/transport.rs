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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
}

type Shared = Arc<Mutex<Pipe>>;

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One of the two ends of a connection.
struct End {
    incoming: Shared,
    outgoing: Shared,
}

impl End {
    fn pair(room: usize) -> [Self; 2] {
        let pipe = || Arc::new(Mutex::new(Pipe { under_way: VecDeque::new(), room, closed: false }));
        let (one, other) = (pipe(), pipe());
        [Self { incoming: Arc::clone(&one), outgoing: Arc::clone(&other) }, Self { incoming: other, outgoing: one }]
    }

    /// Sends a message. Returns false when there is no room for it now.
    fn send(&self, frame: [u8; FRAME_BYTES], rest: Vec<u8>) -> io::Result<bool> {
        let mut pipe = lock(&self.outgoing);
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
        let mut pipe = lock(&self.incoming);
        match pipe.under_way.pop_front() {
            None if pipe.closed => Err(io::ErrorKind::UnexpectedEof.into()),
            message => Ok(message),
        }
    }
}

impl End {
    /// Returns true when [`End::receive`] would return a message or an error.
    fn has_news(&self) -> bool {
        let pipe = lock(&self.incoming);
        pipe.closed || !pipe.under_way.is_empty()
    }

    /// Ends the outgoing direction. What is under way still arrives.
    fn finish(&self) {
        lock(&self.outgoing).closed = true;
    }
}

impl Drop for End {
    fn drop(&mut self) {
        lock(&self.incoming).closed = true;
        lock(&self.outgoing).closed = true;
    }
}

/// Connections that wait to be accepted, by the address where a broker listens.
type Listening = BTreeMap<SocketAddr, VecDeque<End>>;

/// Network that simulated clients and brokers share. Clones share it too.
pub struct SimulatedTransport<F> {
    listening: Arc<Mutex<Listening>>,
    room: usize,
    memory: PhantomData<fn() -> F>,
}

impl<F> Clone for SimulatedTransport<F> {
    fn clone(&self) -> Self {
        Self { listening: Arc::clone(&self.listening), room: self.room, memory: PhantomData }
    }
}

impl<F> SimulatedTransport<F> {
    /// Makes a network whose connections carry at most `room` messages at a time in each direction.
    #[must_use]
    pub fn new(room: usize) -> Self {
        Self { listening: Arc::default(), room, memory: PhantomData }
    }

    /// Begins to listen at an address.
    #[must_use]
    pub fn listen(&self, at: SocketAddr) -> SimulatedEndpoint<F> {
        lock(&self.listening).entry(at).or_default();
        SimulatedEndpoint { network: self.clone(), at }
    }

    fn connect(&self, to: SocketAddr, opening: [u8; FRAME_BYTES]) -> io::Result<End> {
        let [near, far] = End::pair(self.room);
        near.send(opening, Vec::new())?;
        lock(&self.listening).get_mut(&to).ok_or(io::ErrorKind::ConnectionRefused)?.push_back(far);
        Ok(near)
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

/// Address where a broker listens.
pub struct SimulatedEndpoint<F> {
    network: SimulatedTransport<F>,
    at: SocketAddr,
}

impl<F: Fabric> Endpoint<F> for SimulatedEndpoint<F> {
    type Connection = SimulatedConnection;

    fn accept(&mut self) -> Option<io::Result<SimulatedConnection>> {
        let end = lock(&self.network.listening).get_mut(&self.at)?.pop_front()?;
        Some(Ok(SimulatedConnection { end, waiting: None }))
    }
}

/// Broker's end of a connection.
pub struct SimulatedConnection {
    end: End,
    /// Batch that the landing has no room for.
    waiting: Option<Message>,
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
                let header = decode_header(&self.batch)?;
                Ok(Item::Batch(deliver, header, FRAME_BYTES..self.batch.len()))
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

fn decode_header(batch: &[u8]) -> Result<BatchHeader, LinkError> {
    let frame = batch.first_chunk().ok_or(LinkError::Lost(io::ErrorKind::InvalidData.into()))?;
    match Frame::decode(frame)? {
        Frame::BatchHeader(header) => Ok(header),
        other => Err(WireError::Kind { found: other.kind() }.into()),
    }
}
