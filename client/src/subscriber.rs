//! A subscriber: reads a topic's order, batches at a time, from any broker.

use crate::client::{BrokerView, Inner, TopicView};
use crate::error::ClientError;
use crate::link::{decode_refusal, refused};
use crate::verbs::{RingItem, RingPair};
use embarcadero_datapath::transport::tcp::{connect, wait_any};
use embarcadero_datapath::wire::batch::{BatchView, MAX_BATCH_BYTES, Messages};
use embarcadero_datapath::wire::{
    BatchHeader, Deliver, ErrorCode, ErrorFrame, FRAME_BYTES, Frame, Position, START_EARLIEST, START_LATEST,
    START_OFFSET, START_TIMESTAMP, Subscribe, WireError,
};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of the receive buffer at first; it grows to hold a batch.
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes that are read ahead of a frame.
const READ_AHEAD: usize = 64 << 10;

/// Where to start reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The first message that is kept.
    Earliest,
    /// The next message to come.
    Latest,
    /// This offset.
    Offset(u64),
    /// The first batch ordered at or after this time, microseconds since 1970.
    Timestamp(u64),
}

/// A message, in place.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// Its offset in the order of its stream.
    pub offset: u64,
    /// Broker whose stream it is in; `None` for the global order.
    pub stream: Option<u32>,
    /// Client that published it.
    pub client_id: u64,
    /// When its batch was ordered, microseconds since 1970.
    pub ordered_us: u64,
    /// Its bytes.
    pub payload: &'a [u8],
}

/// A batch, in place.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Offset of its first message (of the first one asked for, in the first batch).
    pub first_offset: u64,
    /// Broker whose stream it is in; `None` for the global order.
    pub stream: Option<u32>,
    /// Broker that received it.
    pub broker: u32,
    /// When it was ordered, microseconds since 1970.
    pub ordered_us: u64,
    /// Its header, as its publisher wrote it.
    pub header: BatchHeader,
    view: BatchView<'a>,
    skip: usize,
}

impl<'a> Batch<'a> {
    /// Its messages in order.
    pub fn messages(&self) -> impl Iterator<Item = Message<'a>> + use<'a> {
        let Self { first_offset, stream, ordered_us, header, .. } = *self;
        let payloads: Messages<'a> = self.view.messages();
        payloads.skip(self.skip).zip(first_offset..).map(move |(payload, offset)| Message {
            offset,
            stream,
            client_id: header.client_id,
            ordered_us,
            payload,
        })
    }

    /// How many messages [`Batch::messages`] yields.
    #[must_use]
    pub fn message_count(&self) -> usize {
        self.view.len() - self.skip
    }
}

/// What lies complete in a stream's buffer.
enum Item {
    Nothing,
    /// A batch: its frame and header, and where its body lies.
    Batch(Deliver, BatchHeader, std::ops::Range<usize>),
    /// Answer to a question for the stream's end.
    Reaches(u64),
}

struct Stream {
    /// `u32::MAX`: global.
    id: u32,
    broker: BrokerView,
    socket: Option<TcpStream>,
    /// Beside the socket, if deliveries arrive over verbs.
    ring: Option<Box<RingPair>>,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Offset that is due next; `None` until the broker said where the stream starts.
    due: Option<u64>,
    from: Start,
    retry_at: Instant,
    /// Connections made so far.
    connections: u64,
}

fn again(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

impl Stream {
    fn connect(&mut self, inner: &Inner, topic: &TopicView) -> io::Result<()> {
        let options = inner.link_options().map_err(io::Error::other)?;
        let mut socket = connect(self.broker.data, options.timeout, options.sockets)?;
        {
            // The old ring goes before the new one comes.
            self.ring = None;
            if let Some(device) = &options.device {
                let ring = RingPair::open(device, &mut socket, options.timeout, inner.config.rdma.ring_bytes)?;
                self.ring = Some(Box::new(ring));
            }
        }
        let (start_kind, start) = match (self.due, self.from) {
            (Some(offset), _) | (None, Start::Offset(offset)) => (START_OFFSET, offset),
            (None, Start::Earliest) => (START_EARLIEST, 0),
            (None, Start::Latest) => (START_LATEST, 0),
            (None, Start::Timestamp(time)) => (START_TIMESTAMP, time),
        };
        let request = Subscribe {
            start,
            start_kind,
            topic: topic.id,
            topic_incarnation: topic.incarnation,
            stream: self.id,
            ..Subscribe::blank()
        };
        socket.write_all(&request.encode())?;
        socket.set_nonblocking(true)?;
        (self.start, self.end) = (0, 0);
        self.socket = Some(socket);
        self.connections += 1;
        Ok(())
    }

    /// Reads so that at least `bytes` are in the buffer, and up to `ahead` more. False when they have not come.
    fn fill(&mut self, bytes: usize, ahead: usize) -> io::Result<bool> {
        while self.end - self.start < bytes {
            if self.start + bytes + ahead > self.buffer.len() {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
                if bytes + ahead > self.buffer.len() {
                    self.buffer.resize(bytes + ahead, 0);
                }
            }
            let limit = self.start + bytes + ahead;
            let Some(socket) = &mut self.socket else { return Err(io::ErrorKind::NotConnected.into()) };
            match socket.read(&mut self.buffer[self.end..limit]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.end += read,
                Err(error) if again(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Takes the next item. An outer error is final, an inner one means that the connection is lost.
    fn take(&mut self) -> Result<io::Result<Item>, ClientError> {
        if self.ring.is_some() {
            match self.take_from_ring()? {
                Ok(Item::Nothing) => {}
                // The socket may know why.
                Err(error) => {
                    return Ok(match self.take_from_socket()? {
                        Ok(_) => Err(error),
                        lost => lost,
                    });
                }
                item => return Ok(item),
            }
        }
        self.take_from_socket()
    }

    fn take_from_ring(&mut self) -> Result<io::Result<Item>, ClientError> {
        while let Some(ring) = &mut self.ring {
            let range = match ring.take() {
                Ok(None) => break,
                Ok(Some(RingItem::Delivery(range))) => range,
                Ok(Some(RingItem::Frame(Frame::SubscribeReady(ready)))) => {
                    self.due = Some(self.due.unwrap_or(ready.start_offset));
                    continue;
                }
                Ok(Some(RingItem::Frame(Frame::Position(position)))) => {
                    return Ok(Ok(Item::Reaches(position.next_offset)));
                }
                Ok(Some(RingItem::Frame(other))) => return Err(WireError::Kind { found: other.kind() }.into()),
                Err(error) => return Ok(Err(error)),
            };
            let bytes = ring.bytes().get(range.clone()).unwrap_or(&[]);
            let (Some(frame), Some(header)) =
                (bytes.first_chunk(), bytes.get(FRAME_BYTES..).and_then(|batch| batch.first_chunk()))
            else {
                return Ok(Err(io::ErrorKind::InvalidData.into()));
            };
            let Frame::Deliver(deliver) = Frame::decode(frame)? else {
                return Err(WireError::Kind { found: frame[4] }.into());
            };
            let Frame::BatchHeader(header) = Frame::decode(header)? else {
                return Err(WireError::Kind { found: header[4] }.into());
            };
            return Ok(Ok(Item::Batch(deliver, header, range.start + 2 * FRAME_BYTES..range.end)));
        }
        Ok(Ok(Item::Nothing))
    }

    /// What the ranges of items are in.
    fn bytes(&self) -> &[u8] {
        if let Some(ring) = &self.ring {
            return ring.bytes();
        }
        &self.buffer
    }

    /// What to wait for. Look once more after this, and before waiting.
    fn descriptors(&mut self) -> io::Result<impl Iterator<Item = (RawFd, bool)> + use<>> {
        let socket = self.socket.as_ref().map(|socket| (socket.as_raw_fd(), false));
        let ring = match &mut self.ring {
            Some(ring) if socket.is_some() => {
                ring.arm()?;
                Some((ring.descriptor(), false))
            }
            _ => None,
        };
        Ok(socket.into_iter().chain(ring))
    }

    fn take_from_socket(&mut self) -> Result<io::Result<Item>, ClientError> {
        loop {
            match self.fill(FRAME_BYTES, READ_AHEAD) {
                Ok(true) => {}
                Ok(false) => return Ok(Ok(Item::Nothing)),
                Err(error) => return Ok(Err(error)),
            }
            let Some(frame) = self.buffer[self.start..self.end].first_chunk::<FRAME_BYTES>() else {
                return Ok(Ok(Item::Nothing));
            };
            match Frame::decode(frame)? {
                Frame::Deliver(deliver) => {
                    let bytes = deliver.batch_bytes as usize;
                    if bytes as u64 > MAX_BATCH_BYTES || bytes < FRAME_BYTES {
                        let (low, high) = (FRAME_BYTES as u64, MAX_BATCH_BYTES);
                        return Err(WireError::Field { field: "batch_bytes", value: bytes as u64, low, high }.into());
                    }
                    match self.fill(FRAME_BYTES + bytes, 0) {
                        Ok(true) => {}
                        Ok(false) => return Ok(Ok(Item::Nothing)),
                        Err(error) => return Ok(Err(error)),
                    }
                    let batch = self.start + FRAME_BYTES..self.start + FRAME_BYTES + bytes;
                    let Some(header) = self.buffer[batch.clone()].first_chunk::<FRAME_BYTES>() else {
                        return Ok(Ok(Item::Nothing));
                    };
                    let Frame::BatchHeader(header) = Frame::decode(header)? else {
                        return Err(WireError::Kind { found: header[4] }.into());
                    };
                    self.start = batch.end;
                    return Ok(Ok(Item::Batch(deliver, header, batch.start + FRAME_BYTES..batch.end)));
                }
                Frame::SubscribeReady(ready) => {
                    self.start += FRAME_BYTES;
                    self.due = Some(self.due.unwrap_or(ready.start_offset));
                }
                Frame::Position(position) => {
                    self.start += FRAME_BYTES;
                    return Ok(Ok(Item::Reaches(position.next_offset)));
                }
                Frame::ErrorFrame(error) => {
                    return match self.fill(FRAME_BYTES + error.text_bytes.min(1024) as usize, 0) {
                        Ok(true) => self.refusal(&error).map(Err),
                        Ok(false) => Ok(Ok(Item::Nothing)),
                        Err(lost) => Ok(Err(lost)),
                    };
                }
                other => return Err(WireError::Kind { found: other.kind() }.into()),
            }
        }
    }

    fn refusal(&self, error: &ErrorFrame) -> Result<io::Error, ClientError> {
        let rest = &self.buffer[self.start + FRAME_BYTES..self.end];
        match decode_refusal(error, rest) {
            // Slow once is not the end: the stream is read on from where it stopped.
            Some((Some(ErrorCode::Unavailable | ErrorCode::TooSlow) | None, text)) => Ok(io::Error::other(text)),
            Some((Some(code), text)) => Err(refused(code, text, error.detail)),
            None => Ok(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Reads a topic. With a global order there is one stream, and any broker serves it; with orders `broker` and `none`
/// each broker serves its own, and they are read side by side.
pub struct Subscriber {
    inner: Arc<Inner>,
    topic: TopicView,
    streams: Vec<Stream>,
    next_stream: usize,
    /// The batch that `next` is in: stream, frame, header, body, messages taken, bytes taken.
    current: Option<Current>,
}

struct Current {
    stream: usize,
    deliver: Deliver,
    header: BatchHeader,
    body: std::ops::Range<usize>,
    taken: usize,
    payload_at: usize,
}

impl Subscriber {
    pub(crate) fn open(inner: Arc<Inner>, topic: &str, from: Start) -> Result<Self, ClientError> {
        let (topic, cluster) = inner.topic(topic)?;
        let now = Instant::now();
        let stream = |id, broker: &BrokerView| Stream {
            id,
            broker: broker.clone(),
            socket: None,
            ring: None,
            buffer: vec![0; BUFFER_BYTES],
            start: 0,
            end: 0,
            due: None,
            from,
            retry_at: now,
            connections: 0,
        };
        let streams: Vec<Stream> = if topic.order.is_global() {
            // Spread subscribers over brokers.
            let pick = rand::random::<u32>() as usize % cluster.brokers.len().max(1);
            cluster.brokers.get(pick).map(|broker| stream(u32::MAX, broker)).into_iter().collect()
        } else {
            cluster.brokers.iter().map(|broker| stream(broker.id, broker)).collect()
        };
        if streams.is_empty() {
            return Err(ClientError::Unreachable("the cluster has no live broker".to_owned()));
        }
        Ok(Self { inner, topic, streams, next_stream: 0, current: None })
    }

    /// The topic.
    #[must_use]
    pub fn topic(&self) -> &TopicView {
        &self.topic
    }

    /// Connects streams that are down and due.
    fn reconnect(&mut self) {
        let now = Instant::now();
        for index in 0..self.streams.len() {
            let Some(stream) = self.streams.get_mut(index) else { return };
            if stream.socket.is_some() || stream.retry_at > now {
                continue;
            }
            if stream.connect(&self.inner, &self.topic).is_err() {
                stream.retry_at = now + Duration::from_millis(50);
                self.find_broker(index);
            }
        }
    }

    /// The stream's broker is gone: another one serves a global stream; a broker's own may come back elsewhere.
    fn find_broker(&mut self, index: usize) {
        let Ok(cluster) = self.inner.cluster() else { return };
        let Some(stream) = self.streams.get_mut(index) else { return };
        let others: Vec<_> = cluster
            .brokers
            .into_iter()
            .filter(
                |broker| if stream.id == u32::MAX { broker.data != stream.broker.data } else { broker.id == stream.id },
            )
            .collect();
        if !others.is_empty() {
            let pick = rand::random::<u32>() as usize % others.len();
            if let Some(broker) = others.into_iter().nth(pick) {
                stream.broker = broker;
            }
        }
    }

    /// Looks once at every stream.
    fn look(&mut self) -> Result<Option<(usize, Item)>, ClientError> {
        self.reconnect();
        let count = self.streams.len();
        for step in 0..count {
            let index = (self.next_stream + step) % count;
            let Some(stream) = self.streams.get_mut(index).filter(|stream| stream.socket.is_some()) else { continue };
            match stream.take()? {
                Ok(Item::Nothing) => {}
                Ok(item) => {
                    self.next_stream = index + 1;
                    return Ok(Some((index, item)));
                }
                Err(_) => {
                    stream.socket = None;
                    stream.retry_at = Instant::now() + Duration::from_millis(10);
                    self.find_broker(index);
                }
            }
        }
        Ok(None)
    }

    /// Looks, and waits for something to come if there is nothing.
    fn look_or_wait(&mut self, timeout: Duration) -> Result<Option<(usize, Item)>, ClientError> {
        if let found @ Some(_) = self.look()? {
            return Ok(found);
        }
        let mut watched = Vec::new();
        let mut missing = false;
        for stream in &mut self.streams {
            match stream.descriptors() {
                Ok(descriptors) => watched.extend(descriptors),
                Err(_) => stream.socket = None,
            }
            missing |= stream.socket.is_none();
        }
        if self.streams.iter().any(|stream| stream.ring.is_some()) {
            // What came before the rings were armed shows on no descriptor.
            if let found @ Some(_) = self.look()? {
                return Ok(found);
            }
        }
        if missing {
            std::thread::sleep(timeout.min(Duration::from_millis(5)));
        }
        if !watched.is_empty() {
            wait_any(&watched, timeout.min(Duration::from_millis(100))).map_err(ClientError::io("wait for brokers"))?;
        }
        Ok(None)
    }

    /// Checks that the batch is the one that is due; how many of its messages come before what was asked for.
    fn accept(&mut self, index: usize, deliver: &Deliver, header: &BatchHeader) -> Result<usize, ClientError> {
        let Some(stream) = self.streams.get_mut(index) else { return Ok(0) };
        let due = stream.due.unwrap_or(deliver.first_offset);
        let end = deliver.first_offset + u64::from(header.message_count);
        if deliver.first_offset > due || end <= due {
            return Err(ClientError::Gap { expected: due, found: deliver.first_offset });
        }
        stream.due = Some(end);
        Ok((due - deliver.first_offset) as usize)
    }

    fn receive(
        &mut self,
        timeout: Duration,
        mut reaches: impl FnMut(usize, u64),
    ) -> Result<Option<Current>, ClientError> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let found = if left.is_zero() { self.look()? } else { self.look_or_wait(left)? };
            match found {
                Some((stream, Item::Batch(deliver, header, body))) => {
                    let skip = self.accept(stream, &deliver, &header)?;
                    let mut current = Current { stream, deliver, header, body, taken: 0, payload_at: 0 };
                    let view = self.view(&current)?;
                    let skipped: usize = view.messages().take(skip).map(<[u8]>::len).sum();
                    (current.taken, current.payload_at) = (skip, skipped);
                    return Ok(Some(current));
                }
                Some((stream, Item::Reaches(offset))) => reaches(stream, offset),
                Some((_, Item::Nothing)) | None if left.is_zero() => return Ok(None),
                Some((_, Item::Nothing)) | None => {}
            }
        }
    }

    fn view(&self, current: &Current) -> Result<BatchView<'_>, ClientError> {
        let buffer = self.streams.get(current.stream).map_or(&[][..], Stream::bytes);
        let body = buffer.get(current.body.clone()).unwrap_or(&[]);
        BatchView::parse(&current.header, body)
            .map_err(|source| ClientError::Corrupt { offset: current.deliver.first_offset, source })
    }

    fn batch(&self, current: &Current) -> Result<Batch<'_>, ClientError> {
        let view = self.view(current)?;
        Ok(Batch {
            first_offset: current.deliver.first_offset + current.taken as u64,
            stream: (current.deliver.stream != u32::MAX).then_some(current.deliver.stream),
            broker: current.deliver.broker,
            ordered_us: current.deliver.ordered_us,
            header: current.header,
            view,
            skip: current.taken,
        })
    }

    /// The next batch, without copying; `None` when none came in time.
    ///
    /// # Errors
    /// The offset is not kept, order or bytes are damaged, or the topic is gone. A lost connection is not an error:
    /// reading goes on at another broker.
    pub fn next_batch(&mut self, timeout: Duration) -> Result<Option<Batch<'_>>, ClientError> {
        let current = match self.current.take() {
            Some(current) => current,
            None => match self.receive(timeout, |_, _| {})? {
                Some(current) => current,
                None => return Ok(None),
            },
        };
        self.batch(&current).map(Some)
    }

    /// The next message; `None` when none came in time.
    ///
    /// # Errors
    /// As [`Subscriber::next_batch`].
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Message<'_>>, ClientError> {
        if self.current.as_ref().is_none_or(|current| current.taken >= current.header.message_count as usize) {
            self.current = None;
            self.current = self.receive(timeout, |_, _| {})?;
        }
        let Some(current) = &mut self.current else { return Ok(None) };
        let Some(stream) = self.streams.get(current.stream) else { return Ok(None) };
        let body = stream.bytes().get(current.body.clone()).unwrap_or(&[]);
        let table_at = current.header.table_at() as usize + current.taken * 4;
        let length =
            body.get(table_at..).and_then(|table| table.first_chunk::<4>()).map_or(0, |l| u32::from_le_bytes(*l));
        let payload = body.get(current.payload_at..current.payload_at + length as usize).unwrap_or(&[]);
        let message = Message {
            offset: current.deliver.first_offset + current.taken as u64,
            stream: (current.deliver.stream != u32::MAX).then_some(current.deliver.stream),
            client_id: current.header.client_id,
            ordered_us: current.deliver.ordered_us,
            payload,
        };
        current.taken += 1;
        current.payload_at += length as usize;
        Ok(Some(message))
    }

    /// Reads all that is there now, and returns how many messages that was.
    ///
    /// # Errors
    /// As [`Subscriber::next_batch`], and [`ClientError::TimedOut`] when a stream's broker does not answer.
    pub fn drain(&mut self, mut each: impl FnMut(Message<'_>)) -> Result<u64, ClientError> {
        let mut count = 0;
        self.drain_batches(|batch| {
            for message in batch.messages() {
                count += 1;
                each(message);
            }
        })?;
        Ok(count)
    }

    /// As [`Subscriber::drain`], batches at a time.
    ///
    /// # Errors
    /// As [`Subscriber::drain`].
    pub fn drain_batches(&mut self, mut each: impl FnMut(Batch<'_>)) -> Result<(), ClientError> {
        let timeout = self.inner.config.progress_timeout();
        let mut reach: Vec<Option<u64>> = vec![None; self.streams.len()];
        // On which connection: the answer is lost with it.
        let mut asked = vec![0; self.streams.len()];
        let mut progress = Instant::now();
        loop {
            for (stream, asked) in self.streams.iter_mut().zip(&mut asked) {
                match &mut stream.socket {
                    // A question is 64 bytes on a socket that carries nothing else this way.
                    Some(socket) if *asked != stream.connections => {
                        if socket.write(&Position::blank().encode()).is_ok() {
                            *asked = stream.connections;
                        }
                    }
                    Some(_) | None => {}
                }
            }
            let reached = self.streams.iter().zip(&reach).all(|(stream, reach)| {
                reach.is_some_and(|reach| stream.due.is_some_and(|due| due >= reach) || reach == 0)
            });
            if reached && self.current.is_none() {
                return Ok(());
            }
            let current = match self.current.take() {
                Some(current) => Some(current),
                None => self.receive(Duration::from_millis(1), |stream, offset| reach[stream] = Some(offset))?,
            };
            match current {
                Some(current) => {
                    progress = Instant::now();
                    if current.taken < current.header.message_count as usize {
                        each(self.batch(&current)?);
                    }
                }
                None if progress.elapsed() > timeout => return Err(ClientError::TimedOut(timeout)),
                None => {}
            }
        }
    }

    /// Goes on reading elsewhere.
    pub fn seek(&mut self, to: Start) {
        self.current = None;
        for stream in &mut self.streams {
            stream.socket = None;
            stream.due = None;
            stream.from = to;
            stream.retry_at = Instant::now();
        }
    }
}
