//! Streams that a subscriber reads side by side.

use super::message::Start;
use super::stream::{Stream, check_identity};
use crate::call::Call;
use crate::environment::{Control, Environment, pick};
use crate::error::{ClientError, UnreadableBatch};
use crate::silence::{SILENCE_PART, Silence};
use crate::views::{BrokerView, ClusterView, TopicView};
use embarcadero_control::v1 as proto;
use embarcadero_os::{Clock, Now};
use embarcadero_transport::{Item, LinkError, SubscriberLink};
use embarcadero_wire::batch::BatchView;
use embarcadero_wire::{self as wire, BatchHeader, Deliver, ErrorCode, Frame, WireError};
use std::io;
use std::ops::{Index, Range};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Wait before a stream is connected again whose connection broke.
const RECONNECT: Duration = Duration::from_millis(10);
/// Wait before a stream is connected again whose last attempt failed.
const RETRY: Duration = Duration::from_millis(50);
/// Time after which the list of brokers is asked for again, where each broker has a stream of its own.
const REFRESH: Duration = Duration::from_secs(1);

/// Batch that came on a stream.
pub(super) struct Delivery {
    /// Index of the stream.
    pub(super) stream: usize,
    pub(super) deliver: Deliver,
    pub(super) header: BatchHeader,
    /// Range of the body in the connection's bytes.
    pub(super) body: Range<usize>,
}

/// Streams of a topic: the global one, or one per broker.
pub(super) struct Streams<E: Environment> {
    environment: Arc<E>,
    topic: TopicView,
    streams: Vec<Stream<E>>,
    /// Index of the stream to look at first.
    next: usize,
    /// Position that was asked for.
    start: Start,
    /// Time at which it was asked for, microseconds since 1970.
    asked_us: u64,
    /// Call for the list of brokers that is under way.
    asking: Option<Call<proto::MetadataResponse>>,
    /// Time at which the list of brokers was last asked for.
    refreshed_at: Instant,
    /// Last error of a connection or of an attempt to connect. Cleared once a broker answers.
    trouble: Option<ClientError>,
}

impl<E: Environment> Index<usize> for Streams<E> {
    type Output = Stream<E>;

    fn index(&self, index: usize) -> &Stream<E> {
        &self.streams[index]
    }
}

impl<E: Environment> Streams<E> {
    /// Streams of a topic at `brokers`, not connected yet.
    pub(super) fn new(
        environment: Arc<E>,
        topic: TopicView,
        mut brokers: Vec<BrokerView>,
        start: Start,
    ) -> Result<Self, ClientError> {
        if brokers.is_empty() {
            return Err(ClientError::unreachable("the cluster has no live broker"));
        }
        if topic.order.is_global() {
            // Spread subscribers over brokers.
            let chosen = brokers.swap_remove(pick(&*environment, brokers.len()));
            brokers = vec![chosen];
        }
        let Now { instant, wall_us: asked_us, .. } = environment.clock().now();
        let mut streams = Self {
            environment,
            topic,
            streams: Vec::new(),
            next: 0,
            start,
            asked_us,
            asking: None,
            refreshed_at: instant,
            trouble: None,
        };
        for broker in brokers {
            let id = streams.stream_of(&broker);
            streams.add(id, broker, start, instant);
        }
        Ok(streams)
    }

    /// Stream that a broker serves.
    fn stream_of(&self, broker: &BrokerView) -> wire::Stream {
        if self.topic.order.is_global() { wire::Stream::GLOBAL } else { wire::Stream::of(broker.id) }
    }

    fn add(&mut self, id: wire::Stream, broker: BrokerView, start: Start, now: Instant) {
        let limit = self.environment.config().progress_timeout() / SILENCE_PART;
        self.streams.push(Stream::new(id, broker, start, Silence::new(limit, now), now));
    }

    /// Time now.
    pub(super) fn now(&self) -> Instant {
        self.environment.clock().instant()
    }

    /// Topic of the streams.
    pub(super) fn topic(&self) -> &TopicView {
        &self.topic
    }

    /// Moves every stream to another position.
    pub(super) fn seek(&mut self, to: Start) {
        let now = self.environment.clock().now();
        (self.start, self.asked_us) = (to, now.wall_us);
        self.streams.iter_mut().for_each(|stream| stream.seek(to, now.instant));
    }

    /// Forgets the ends of all streams, so that [`Streams::ask_ends`] asks for them again.
    pub(super) fn forget_ends(&mut self) {
        self.streams.iter_mut().for_each(Stream::forget_end);
    }

    /// Asks for the ends of all streams that are connected.
    pub(super) fn ask_ends(&mut self) {
        self.streams.iter_mut().for_each(Stream::ask_end);
    }

    /// Returns true once every stream was read up to the end that its broker has answered.
    pub(super) fn are_read_to_end(&self) -> bool {
        self.streams.iter().all(Stream::is_read_to_end)
    }

    /// Adds the streams of brokers that have appeared since.
    ///
    /// An offset that was asked for may lie beyond the end of such a stream. Its latest message may be newer than the
    /// subscription. In both cases it starts with what was ordered since the subscription.
    fn add_streams(&mut self, brokers: Vec<BrokerView>, now: Instant) {
        let start = match self.start {
            Start::Earliest | Start::Timestamp(_) => self.start,
            Start::Latest | Start::Offset(_) => Start::Timestamp(self.asked_us),
        };
        for broker in brokers {
            let id = wire::Stream::of(broker.id);
            if !self.streams.iter().any(|stream| stream.id == id) {
                self.add(id, broker, start, now);
            }
        }
    }

    /// Connects the streams that are down and due.
    fn connect_due(&mut self) {
        let now = self.now();
        self.keep_brokers(now);
        for index in 0..self.streams.len() {
            let stream = &mut self.streams[index];
            if stream.is_due_to_connect(now)
                && let Err(error) = stream.connect(&self.environment, &self.topic)
            {
                self.lose(index, error, RETRY);
            }
        }
    }

    /// Asks for the list of brokers, unless it is being asked for.
    fn ask_for_brokers(&mut self, now: Instant) {
        self.refreshed_at = now;
        let environment = &self.environment;
        self.asking.get_or_insert_with(|| environment.control().cluster());
    }

    /// Takes the list of brokers, if it has come: for streams that want another broker, and for streams of brokers that
    /// have appeared since. Asks for it again once it is old.
    fn keep_brokers(&mut self, now: Instant) {
        let each_has_its_own = !self.topic.order.is_global();
        if let Some(answer) = self.asking.as_mut().and_then(Call::look) {
            self.asking = None;
            // While no broker answers, those that are known have to do.
            let cluster = answer.and_then(ClusterView::from_proto);
            let brokers = cluster.map_or(Vec::new(), |cluster| cluster.brokers);
            (0..self.streams.len()).for_each(|index| self.choose_broker(index, &brokers));
            if each_has_its_own {
                self.add_streams(brokers, now);
            }
        }
        if each_has_its_own && now.saturating_duration_since(self.refreshed_at) >= REFRESH {
            self.ask_for_brokers(now);
        }
    }

    /// Chooses the broker to connect to for a stream that wants another. Any other broker serves the global stream; a
    /// broker's own stream is served by that broker alone, maybe at a new address.
    fn choose_broker(&mut self, index: usize, brokers: &[BrokerView]) {
        let stream = &mut self.streams[index];
        if !std::mem::take(&mut stream.wants_broker) {
            return;
        }
        let is_fit = |broker: &&BrokerView| match stream.id.broker() {
            None => broker.data != stream.broker.data,
            Some(own) => broker.id == own,
        };
        let fit: Vec<_> = brokers.iter().filter(is_fit).collect();
        if !fit.is_empty() {
            stream.broker = fit[pick(&*self.environment, fit.len())].clone();
        }
    }

    /// Looks once at every stream. Returns the first batch that came. What the last batch lay in is given back.
    pub(super) fn look(&mut self) -> Result<Option<Delivery>, ClientError> {
        self.connect_due();
        let count = self.streams.len();
        for step in 0..count {
            let index = (self.next + step) % count;
            if let Some(delivery) = self.poll_stream(index)? {
                self.next = index + 1;
                return Ok(Some(delivery));
            }
        }
        Ok(None)
    }

    /// Takes the next batch of a stream. A lost connection is not an error.
    fn poll_stream(&mut self, index: usize) -> Result<Option<Delivery>, ClientError> {
        loop {
            let stream = &mut self.streams[index];
            let Some(channel) = &mut stream.channel else { return Ok(None) };
            match channel.take() {
                Ok(Item::Nothing) => {
                    if stream.is_silent(self.environment.clock().instant()) {
                        self.lose(index, LinkError::Lost(io::ErrorKind::TimedOut.into()).into(), RECONNECT);
                    }
                    return Ok(None);
                }
                Ok(Item::Batch(deliver, Ok(header), body)) => {
                    stream.heard();
                    return Ok(Some(Delivery { stream: index, deliver, header, body }));
                }
                Ok(Item::Batch(deliver, Err(error), _)) => {
                    stream.heard();
                    stream.accept(&deliver)?;
                    self.doubt(index, &deliver, error.into())?;
                    return Ok(None);
                }
                Ok(Item::Frame(Frame::SubscribeReady(ready))) => {
                    stream.due.get_or_insert(ready.start_offset);
                    stream.heard();
                    self.trouble = None;
                }
                Ok(Item::Frame(Frame::Position(position))) => {
                    stream.answer(&position);
                    stream.heard();
                }
                Ok(Item::Frame(other)) => return Err(WireError::Kind { found: other.kind() }.into()),
                Err(error) => {
                    // Slow once is not the end: the stream is read on from where it stopped.
                    let is_passing = matches!(
                        error,
                        LinkError::Lost(_)
                            | LinkError::Refused { code: None | Some(ErrorCode::Unavailable | ErrorCode::TooSlow), .. }
                    );
                    let error = ClientError::from(error);
                    if !is_passing {
                        return Err(error);
                    }
                    self.lose(index, error, RECONNECT);
                    return Ok(None);
                }
            }
        }
    }

    /// Drops the connection of a stream after an error, and goes on at another broker where there is one.
    fn lose(&mut self, index: usize, error: ClientError, wait: Duration) {
        self.trouble = Some(error);
        self.leave(index, wait);
    }

    /// Drops the connection of a stream, and goes on at another broker where there is one. The next attempt is due after
    /// `wait`.
    fn leave(&mut self, index: usize, wait: Duration) {
        let now = self.now();
        let stream = &mut self.streams[index];
        stream.drop_connection(wait, now);
        stream.wants_broker = true;
        self.ask_for_brokers(now);
    }

    /// Makes the descriptors of all connections readable when something comes from now on. What came before is found by
    /// one more look.
    pub(super) fn arm(&mut self) {
        let now = self.now();
        for stream in &mut self.streams {
            if let Err(error) = stream.channel.as_mut().map_or(Ok(()), SubscriberLink::arm) {
                self.trouble = Some(LinkError::Lost(error).into());
                stream.drop_connection(RECONNECT, now);
            }
        }
    }

    /// Descriptors of all connections.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.streams.iter().filter_map(|stream| stream.channel.as_ref()).flat_map(SubscriberLink::descriptors)
    }

    /// Returns true while a stream is not connected.
    pub(super) fn are_missing(&self) -> bool {
        self.streams.iter().any(|stream| stream.channel.is_none())
    }

    /// Last error of a connection or of an attempt to connect. Cleared once a broker answers.
    pub(super) fn trouble(&self) -> Option<&ClientError> {
        self.trouble.as_ref()
    }

    /// Checks that a batch is the one that is due on its stream, and goes on behind it. Returns the number of messages in
    /// it that come before the due offset; `None` when it cannot be read, and is asked for again.
    ///
    /// # Errors
    /// [`ClientError::Gap`]; [`ClientError::Corrupt`] for a batch that cannot be read the second time.
    pub(super) fn accept(&mut self, delivery: &Delivery) -> Result<Option<usize>, ClientError> {
        let Delivery { deliver, header, .. } = delivery;
        let stream = &mut self.streams[delivery.stream];
        let taken = stream.accept(deliver)?;
        let readable = check_identity(deliver, header, &self.topic)
            .and_then(|()| BatchView::parse(header, stream.body(delivery)).map(drop).map_err(UnreadableBatch::from));
        match readable {
            Ok(()) => {
                stream.skip(deliver);
                Ok(Some(taken))
            }
            Err(reason) => self.doubt(delivery.stream, deliver, reason).map(|()| None),
        }
    }

    /// Handles a batch that is due and cannot be read: its stream is connected again.
    ///
    /// # Errors
    /// [`ClientError::Corrupt`] when it cannot be read the second time.
    fn doubt(&mut self, index: usize, deliver: &Deliver, reason: UnreadableBatch) -> Result<(), ClientError> {
        let stream = &mut self.streams[index];
        stream.doubt(deliver, reason)?;
        self.leave(index, RECONNECT);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ClientConfig;
    use crate::context::Context;
    use embarcadero_wire::batch::{BatchBuilder, BatchOrigin};
    use embarcadero_wire::{
        BrokerId, ClientId, Epoch, FRAME_BYTES, Incarnation, Order, Position, SessionSlot, StartKind, Subscribe,
    };
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

    fn broker(id: u32) -> BrokerView {
        let data = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        BrokerView { id: BrokerId(id), incarnation: Incarnation(1), data, control: String::new(), leader: id == 0 }
    }

    fn streams(order: Order, start: Start) -> Streams<Context> {
        let context = Arc::new(Context::new(ClientConfig::default()).unwrap());
        Streams::new(context, TopicView::of_order(order), vec![broker(0), broker(1)], start).unwrap()
    }

    /// Listener, and a broker whose data address it is.
    fn listener() -> (TcpListener, BrokerView) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let data = listener.local_addr().unwrap();
        (listener, BrokerView { data, ..broker(0) })
    }

    /// Client of brokers whose control plane nobody serves.
    fn context(progress_timeout_ms: u64) -> Arc<Context> {
        let config = ClientConfig { progress_timeout_ms, ..ClientConfig::at("127.0.0.1:1") };
        Arc::new(Context::new(config).unwrap())
    }

    /// Reads a frame that the client sent.
    fn frame(stream: &mut TcpStream) -> Frame {
        let mut bytes = [0; FRAME_BYTES];
        stream.read_exact(&mut bytes).unwrap();
        Frame::decode(&bytes).unwrap()
    }

    /// Broker, start kind and start of each stream.
    fn requests(streams: &Streams<Context>) -> Vec<(Option<u32>, u32, u64)> {
        let request = |stream: &Stream<Context>| {
            let request = stream.request(&streams.topic);
            (stream.id.broker().map(|broker| broker.0), request.start_kind, request.start)
        };
        streams.streams.iter().map(request).collect()
    }

    #[test]
    fn a_broker_that_appears_later_has_a_stream() {
        let earliest = StartKind::Earliest.code();
        let mut streams = streams(Order::Broker, Start::Earliest);
        let now = streams.now();
        streams.add_streams(vec![broker(1), broker(2)], now);
        streams.add_streams(vec![broker(2), broker(0)], now);
        let expected = [0, 1, 2].map(|id| (Some(id), earliest, 0));
        assert_eq!(requests(&streams), expected);
    }

    #[test]
    fn a_stream_that_appears_later_begins_at_the_subscription() {
        let timestamp = StartKind::Timestamp.code();
        for start in [Start::Latest, Start::Offset(7)] {
            let mut streams = streams(Order::None, start);
            let now = streams.now();
            streams.add_streams(vec![broker(2)], now);
            assert_eq!(requests(&streams)[2], (Some(2), timestamp, streams.asked_us), "{start:?}");
        }
        let mut streams = streams(Order::None, Start::Latest);
        streams.seek(Start::Timestamp(7));
        let now = streams.now();
        streams.add_streams(vec![broker(2)], now);
        assert_eq!(requests(&streams), [0, 1, 2].map(|id| (Some(id), timestamp, 7)));
    }

    #[test]
    fn a_silent_broker_is_asked_for_a_sign_of_life_and_then_given_up() {
        const STEP: Duration = Duration::from_millis(100);
        let (listener, broker) = listener();
        let mut now = Instant::now();
        let mut stream = Stream::new(wire::Stream::GLOBAL, broker, Start::Earliest, Silence::new(8 * STEP, now), now);
        stream.connect(&*context(30_000), &TopicView::of_order(Order::Strong)).unwrap();
        let (mut end, _) = listener.accept().unwrap();
        let mut looks = |stream: &mut Stream<Context>, count| {
            (0..count)
                .filter(|_| {
                    now += STEP;
                    stream.is_silent(now)
                })
                .count()
        };
        // The first look finds that the connection is new.
        assert_eq!(looks(&mut stream, 1 + 4), 0);
        assert!(matches!(frame(&mut end), Frame::Subscribe(_)));
        assert!(matches!(frame(&mut end), Frame::Position(_)), "half of the silence is over");
        stream.answer(&Position::blank());
        stream.heard();
        assert_eq!(looks(&mut stream, 1 + 7), 0);
        assert_eq!(looks(&mut stream, 1), 1);
        assert!(matches!(frame(&mut end), Frame::Position(_)), "asked again after it had answered");
        end.set_nonblocking(true).unwrap();
        assert_eq!(end.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock, "asked once per silence");
    }

    #[test]
    fn a_sign_of_life_is_not_the_end_that_was_asked_for() {
        let (_listener, broker) = listener();
        let mut now = Instant::now();
        let silence = Silence::new(Duration::from_secs(8), now);
        let mut stream = Stream::new(wire::Stream::GLOBAL, broker, Start::Earliest, silence, now);
        stream.connect(&*context(30_000), &TopicView::of_order(Order::Strong)).unwrap();
        (0..5).for_each(|_| {
            now += Duration::from_secs(1);
            stream.is_silent(now);
        });
        stream.ask_end();
        stream.answer(&Position { next_offset: 5, ..Position::blank() });
        assert_eq!(stream.end, None, "that was the answer to the sign of life");
        stream.answer(&Position { next_offset: 9, ..Position::blank() });
        assert_eq!(stream.end, Some(9));
    }

    /// Sends what a broker does whose memory is damaged: the Deliver frame is that of the order, the rest is `batch`.
    fn send(end: &mut TcpStream, first_offset: u64, batch: &[u8]) {
        let (batch_bytes, message_count) = (batch.len() as u32, 1);
        let (client_id, sequence, stream) = (ClientId(7), first_offset, wire::Stream::GLOBAL);
        let deliver =
            Deliver { first_offset, batch_bytes, message_count, client_id, sequence, stream, ..Deliver::blank() };
        end.write_all(&deliver.encode()).unwrap();
        end.write_all(batch).unwrap();
    }

    #[test]
    fn a_batch_without_a_header_is_read_again_and_then_left_out() {
        let topic = TopicView::of_order(Order::Strong);
        let (listener, broker) = listener();
        let mut streams = Streams::new(context(600_000), topic.clone(), vec![broker], Start::Earliest).unwrap();
        let origin = BatchOrigin {
            client_id: ClientId(7),
            session_epoch: Epoch(1),
            session_slot: SessionSlot(0),
            topic: topic.id,
            topic_incarnation: topic.incarnation,
        };
        let mut batch = BatchBuilder::new(4096);
        batch.push(b"message");
        batch.seal(&origin, 1, true);
        let look = |streams: &mut Streams<Context>| loop {
            match streams.look() {
                Ok(None) if streams.streams[0].channel.is_some() => {}
                other => return other.map(|found| found.map(|delivery| delivery.deliver.first_offset)),
            }
        };
        // Another frame, and no frame at all.
        for damaged in [Position::blank().encode(), [0x5a; FRAME_BYTES]] {
            streams.streams[0].due = Some(0);
            let now = streams.now();
            streams.streams[0].drop_connection(Duration::ZERO, now);
            for attempt in 0..2 {
                // Nobody tells of other brokers.
                streams.streams[0].wants_broker = false;
                streams.connect_due();
                let (mut end, _) = listener.accept().unwrap();
                assert!(matches!(frame(&mut end), Frame::Subscribe(Subscribe { start: 0, .. })));
                send(&mut end, 0, &[damaged, [0; FRAME_BYTES]].concat());
                send(&mut end, 1, batch.bytes());
                let found = look(&mut streams);
                if attempt == 0 {
                    assert!(matches!(found, Ok(None)), "{found:?}");
                    streams.streams[0].drop_connection(Duration::ZERO, now);
                    continue;
                }
                let Err(ClientError::Corrupt { offset, end: behind, source }) = found else { panic!("{found:?}") };
                assert!(matches!(source, UnreadableBatch::Header(_)), "{source:?}");
                assert_eq!((offset, behind), (0, 1));
                // The stream of frames goes on behind it.
                assert_eq!(look(&mut streams).unwrap(), Some(1));
            }
            streams.streams[0].doubted = None;
        }
    }

    #[test]
    fn a_connection_on_which_nothing_comes_is_made_anew() {
        let (listener, broker) = listener();
        let mut streams =
            Streams::new(context(400), TopicView::of_order(Order::Strong), vec![broker], Start::Earliest).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut ends = Vec::new();
        let begun = Instant::now();
        while ends.len() < 2 {
            assert!(begun.elapsed() < Duration::from_secs(60), "the subscriber still waits on its first connection");
            assert!(streams.look().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(10));
            ends.extend(listener.accept().ok());
        }
        assert!(streams.trouble().is_some());
    }
}
