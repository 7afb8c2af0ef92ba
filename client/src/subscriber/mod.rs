//! Subscriber: reads the streams of a topic in order, one batch at a time.

mod stream;

use crate::context::Context;
use crate::error::ClientError;
use crate::views::TopicView;
use embarcadero_os::poller::wait_any;
use embarcadero_transport::{Item, LinkError, SubscriberLink};
use embarcadero_wire::batch::{BODY_CHECKSUM, BatchView, Messages};
use embarcadero_wire::{self as wire, BatchHeader, BrokerId, ClientId, Deliver, ErrorCode, Frame, Position, WireError};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stream::Stream;

/// Wait before a stream is connected again whose connection broke.
const RECONNECT: Duration = Duration::from_millis(10);
/// Wait before a stream is connected again whose last attempt failed.
const RETRY: Duration = Duration::from_millis(50);
/// Longest wait without a look at every stream.
const LOOK_PERIOD: Duration = Duration::from_millis(100);
/// Longest wait while a stream is not connected.
const MISSING_PERIOD: Duration = Duration::from_millis(5);

/// Position at which a subscriber starts to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// First message that is kept.
    Earliest,
    /// Next message to come.
    Latest,
    /// Message at this offset.
    Offset(u64),
    /// First batch that was ordered at or after this time, microseconds since 1970.
    Timestamp(u64),
}

/// Received message, in place.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// Offset of the message in its stream.
    pub offset: u64,
    /// Broker whose stream the message is in; `None` for the global order.
    pub stream: Option<BrokerId>,
    /// Client that published the message.
    pub client_id: ClientId,
    /// Time at which the batch was ordered, microseconds since 1970.
    pub ordered_us: u64,
    /// Bytes of the message.
    pub payload: &'a [u8],
}

/// Received batch, in place.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Offset of the first message of [`Batch::messages`].
    pub first_offset: u64,
    /// Broker whose stream the batch is in; `None` for the global order.
    pub stream: Option<BrokerId>,
    /// Broker that received the batch from its publisher.
    pub broker: BrokerId,
    /// Time at which the batch was ordered, microseconds since 1970.
    pub ordered_us: u64,
    /// Client that published the batch.
    pub client_id: ClientId,
    /// Sequence of the batch in the client's session.
    pub sequence: u64,
    /// Bytes of all messages of the batch, those before `first_offset` included.
    pub payload_bytes: u32,
    /// True when the publisher gave the batch a checksum, which was checked.
    pub has_checksum: bool,
    view: BatchView<'a>,
    skip: usize,
}

impl<'a> Batch<'a> {
    /// Iterates over the messages in order, from `first_offset` on.
    pub fn messages(&self) -> impl Iterator<Item = Message<'a>> + use<'a> {
        let Self { first_offset, stream, ordered_us, client_id, .. } = *self;
        let payloads: Messages<'a> = self.view.messages();
        let message = move |(payload, offset)| Message { offset, stream, client_id, ordered_us, payload };
        payloads.skip(self.skip).zip(first_offset..).map(message)
    }

    /// Number of messages that [`Batch::messages`] yields.
    #[must_use]
    pub fn message_count(&self) -> usize {
        self.view.len() - self.skip
    }
}

/// Item that came on a stream.
enum StreamEvent {
    /// Delivery frame, header, and range of the body in the connection's bytes.
    Batch(Deliver, BatchHeader, Range<usize>),
    /// Offset after the last message of the stream, as its broker reports it.
    Reaches(u64),
}

/// Subscriber to one topic.
///
/// A topic with a global order has one stream, which any broker serves. With orders `broker` and `none` each broker
/// serves a stream of its own, and the subscriber reads them side by side.
pub struct Subscriber {
    context: Arc<Context>,
    topic: TopicView,
    streams: Vec<Stream>,
    next_stream: usize,
    /// Batch that was received last, while messages of it are left. It lies in its stream's connection, which is not
    /// touched meanwhile.
    current: Option<Current>,
}

/// Received and checked batch.
struct Current {
    /// Index of the stream.
    stream: usize,
    deliver: Deliver,
    header: BatchHeader,
    /// Range of the body in the connection's bytes.
    body: Range<usize>,
    /// Number of messages taken.
    taken: usize,
    /// Offset of the next message in the body, bytes.
    payload_at: usize,
}

impl Current {
    fn is_used_up(&self) -> bool {
        self.taken >= self.header.message_count as usize
    }
}

impl Subscriber {
    pub(crate) fn open(context: Arc<Context>, topic: &str, from: Start) -> Result<Self, ClientError> {
        let (topic, cluster) = context.topic(topic)?;
        let streams: Vec<Stream> = if topic.order.is_global() {
            // Spread subscribers over brokers.
            let pick = rand::random::<u32>() as usize % cluster.brokers.len().max(1);
            let broker = cluster.brokers.into_iter().nth(pick);
            broker.map(|broker| Stream::new(wire::Stream::GLOBAL, broker, from)).into_iter().collect()
        } else {
            cluster.brokers.into_iter().map(|broker| Stream::new(wire::Stream::of(broker.id), broker, from)).collect()
        };
        if streams.is_empty() {
            return Err(ClientError::Unreachable("the cluster has no live broker".to_owned()));
        }
        Ok(Self { context, topic, streams, next_stream: 0, current: None })
    }

    /// Topic that is read.
    #[must_use]
    pub fn topic(&self) -> &TopicView {
        &self.topic
    }

    /// Connects the streams that are down and due.
    fn reconnect(&mut self) {
        let now = Instant::now();
        for index in 0..self.streams.len() {
            let stream = &mut self.streams[index];
            if stream.link.is_some() || stream.retry_at > now {
                continue;
            }
            if stream.connect(&self.context, &self.topic).is_err() {
                stream.drop_connection(RETRY);
                self.find_broker(index);
            }
        }
    }

    /// Chooses the broker to connect to after a stream's connection failed. Any other broker serves the global stream; a
    /// broker's own stream is served by that broker alone, maybe at a new address.
    fn find_broker(&mut self, index: usize) {
        let Ok(cluster) = self.context.cluster() else { return };
        let stream = &mut self.streams[index];
        let mut others = cluster.brokers;
        others.retain(|broker| match stream.id.broker() {
            None => broker.data != stream.broker.data,
            Some(own) => broker.id == own,
        });
        if !others.is_empty() {
            let pick = rand::random::<u32>() as usize % others.len();
            stream.broker = others.swap_remove(pick);
        }
    }

    /// Looks once at every stream. Returns the first item that came, with the index of its stream.
    fn look(&mut self) -> Result<Option<(usize, StreamEvent)>, ClientError> {
        assert!(self.current.is_none(), "a batch that is read may lie in a connection that is looked at");
        self.reconnect();
        let count = self.streams.len();
        for step in 0..count {
            let index = (self.next_stream + step) % count;
            if let Some(event) = self.poll_stream(index)? {
                self.next_stream = index + 1;
                return Ok(Some((index, event)));
            }
        }
        Ok(None)
    }

    /// Takes the next item of a stream. A lost connection is not an error.
    fn poll_stream(&mut self, index: usize) -> Result<Option<StreamEvent>, ClientError> {
        let stream = &mut self.streams[index];
        let Some(link) = &mut stream.link else { return Ok(None) };
        loop {
            match link.take() {
                Ok(Item::Nothing) => return Ok(None),
                Ok(Item::Batch(deliver, header, body)) => return Ok(Some(StreamEvent::Batch(deliver, header, body))),
                Ok(Item::Frame(Frame::SubscribeReady(ready))) => {
                    stream.due.get_or_insert(ready.start_offset);
                }
                Ok(Item::Frame(Frame::Position(position))) => {
                    return Ok(Some(StreamEvent::Reaches(position.next_offset)));
                }
                Ok(Item::Frame(other)) => return Err(WireError::Kind { found: other.kind() }.into()),
                Err(LinkError::Wire(error)) => return Err(error.into()),
                Err(LinkError::Refused { code: Some(code), text, detail })
                    // Slow once is not the end: the stream is read on from where it stopped.
                    if !matches!(code, ErrorCode::Unavailable | ErrorCode::TooSlow) =>
                {
                    return Err(ClientError::refused(code, text, detail));
                }
                Err(LinkError::Refused { .. } | LinkError::Lost(_)) => {
                    stream.drop_connection(RECONNECT);
                    self.find_broker(index);
                    return Ok(None);
                }
            }
        }
    }

    /// Looks at every stream, and waits for an item if none has come.
    fn look_or_wait(&mut self, timeout: Duration) -> Result<Option<(usize, StreamEvent)>, ClientError> {
        if let found @ Some(_) = self.look()? {
            return Ok(found);
        }
        for stream in &mut self.streams {
            if stream.link.as_mut().is_some_and(|link| link.arm().is_err()) {
                stream.drop_connection(RECONNECT);
            }
        }
        // What came before the connections were armed shows on no descriptor.
        if let found @ Some(_) = self.look()? {
            return Ok(found);
        }
        let links = self.streams.iter().filter_map(|stream| stream.link.as_ref());
        let watched: Vec<_> =
            links.flat_map(SubscriberLink::descriptors).map(|descriptor| (descriptor, false)).collect();
        if self.streams.iter().any(|stream| stream.link.is_none()) {
            std::thread::sleep(timeout.min(MISSING_PERIOD));
        }
        if !watched.is_empty() {
            wait_any(&watched, timeout.min(LOOK_PERIOD)).map_err(ClientError::io("wait for brokers"))?;
        }
        Ok(None)
    }

    /// Checks that a batch is the one that is due. Returns the number of messages in it that come before the offset that
    /// was asked for.
    fn accept(&mut self, index: usize, deliver: &Deliver, header: &BatchHeader) -> Result<usize, ClientError> {
        let stream = &mut self.streams[index];
        let due = stream.due.unwrap_or(deliver.first_offset);
        let end = deliver.first_offset.saturating_add(header.message_count.into());
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
                Some((stream, StreamEvent::Batch(deliver, header, body))) => {
                    let skip = self.accept(stream, &deliver, &header)?;
                    let mut current = Current { stream, deliver, header, body, taken: 0, payload_at: 0 };
                    let view = self.view(&current)?;
                    let skipped: usize = view.messages().take(skip).map(<[u8]>::len).sum();
                    (current.taken, current.payload_at) = (skip, skipped);
                    return Ok(Some(current));
                }
                Some((stream, StreamEvent::Reaches(offset))) => reaches(stream, offset),
                None if left.is_zero() => return Ok(None),
                None => {}
            }
        }
    }

    /// Body of a batch, in place.
    fn body(&self, current: &Current) -> &[u8] {
        let link = self.streams[current.stream].link.as_ref();
        assert!(link.is_some(), "the batch at offset {} lies in no connection", current.deliver.first_offset);
        link.map_or(&[], |link| &link.bytes()[current.body.clone()])
    }

    /// Checks a batch, its checksum included.
    fn view(&self, current: &Current) -> Result<BatchView<'_>, ClientError> {
        BatchView::parse(&current.header, self.body(current))
            .map_err(|source| ClientError::Corrupt { offset: current.deliver.first_offset, source })
    }

    fn batch(&self, current: &Current) -> Result<Batch<'_>, ClientError> {
        let view = self.view(current)?;
        let Current { deliver, header, taken, .. } = current;
        Ok(Batch {
            first_offset: deliver.first_offset + *taken as u64,
            stream: current.deliver.stream.broker(),
            broker: deliver.broker,
            ordered_us: deliver.ordered_us,
            client_id: header.client_id,
            sequence: header.sequence,
            payload_bytes: header.payload_bytes,
            has_checksum: header.flags & BODY_CHECKSUM != 0,
            view,
            skip: *taken,
        })
    }

    /// Takes the batch that was received last, if messages of it are left.
    fn take_current(&mut self) -> Option<Current> {
        self.current.take().filter(|current| !current.is_used_up())
    }

    /// Receives the next batch, without copying; `None` when none came within `timeout`.
    ///
    /// After [`Subscriber::next`] this is the rest of the batch of that message.
    ///
    /// # Errors
    /// The offset is not kept, order or bytes are damaged, or the topic is gone. A lost connection is not an error: the
    /// subscriber connects again.
    pub fn next_batch(&mut self, timeout: Duration) -> Result<Option<Batch<'_>>, ClientError> {
        let current = match self.take_current() {
            Some(current) => current,
            None => match self.receive(timeout, |_, _| {})? {
                Some(current) => current,
                None => return Ok(None),
            },
        };
        self.batch(&current).map(Some)
    }

    /// Receives the next message; `None` when none came within `timeout`.
    ///
    /// # Errors
    /// Those of [`Subscriber::next_batch`].
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Message<'_>>, ClientError> {
        let mut current = match self.take_current() {
            Some(current) => current,
            None => match self.receive(timeout, |_, _| {})? {
                Some(current) => current,
                None => return Ok(None),
            },
        };
        let (index, start) = (current.taken, current.payload_at);
        // The lengths were checked against the payload when the batch came.
        let length = current.header.message_bytes(self.body(&current), index);
        current.taken += 1;
        current.payload_at += length;
        let current = self.current.insert(current);
        let (offset, stream) = (current.deliver.first_offset + index as u64, current.deliver.stream.broker());
        let (client_id, ordered_us) = (current.header.client_id, current.deliver.ordered_us);
        let Some(current) = &self.current else { return Ok(None) };
        let payload = &self.body(current)[start..start + length];
        Ok(Some(Message { offset, stream, client_id, ordered_us, payload }))
    }

    /// Reads every message that the topic has now, hands each to `each`, and returns their number.
    ///
    /// # Errors
    /// Those of [`Subscriber::next_batch`], and [`ClientError::TimedOut`] when a stream's broker does not answer.
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

    /// Reads every batch that the topic has now, and hands each to `each`.
    ///
    /// # Errors
    /// Those of [`Subscriber::drain`].
    pub fn drain_batches(&mut self, mut each: impl FnMut(Batch<'_>)) -> Result<(), ClientError> {
        let timeout = self.context.config.progress_timeout();
        let mut reach: Vec<Option<u64>> = vec![None; self.streams.len()];
        // On which connection: the answer is lost with it.
        let mut asked = vec![0; self.streams.len()];
        let mut progress = Instant::now();
        loop {
            self.ask_positions(&mut asked);
            let reached = self.streams.iter().zip(&reach).all(|(stream, reach)| {
                reach.is_some_and(|reach| stream.due.is_some_and(|due| due >= reach) || reach == 0)
            });
            let left = self.take_current();
            if reached && left.is_none() {
                return Ok(());
            }
            let current = match left {
                Some(current) => Some(current),
                None => self.receive(Duration::from_millis(1), |stream, offset| reach[stream] = Some(offset))?,
            };
            match current {
                Some(current) => {
                    progress = Instant::now();
                    each(self.batch(&current)?);
                }
                None if progress.elapsed() > timeout => return Err(ClientError::TimedOut(timeout)),
                None => {}
            }
        }
    }

    /// Asks on each new connection for the end of its stream. `asked` has the connection that was asked last per stream.
    fn ask_positions(&mut self, asked: &mut [u64]) {
        for (stream, asked) in self.streams.iter_mut().zip(asked) {
            if let Some(link) = &mut stream.link
                && *asked != stream.connections
                && matches!(link.send(&Position::blank().encode()), Ok(true))
            {
                *asked = stream.connections;
            }
        }
    }

    /// Moves every stream to another position. What was received and not read is dropped.
    pub fn seek(&mut self, to: Start) {
        self.current = None;
        for stream in &mut self.streams {
            stream.drop_connection(Duration::ZERO);
            (stream.due, stream.from) = (None, to);
        }
    }
}
