//! Stream of a topic, at the broker that serves it.

use super::message::Start;
use super::streams::Delivery;
use crate::environment::{Environment, SubscriberEnd, subscribe};
use crate::error::{ClientError, UnreadableBatch};
use crate::silence::Silence;
use crate::views::{BrokerView, TopicView};
use embarcadero_transport::SubscriberLink;
use embarcadero_wire::{self as wire, BatchHeader, Deliver, Position, StartKind, Subscribe};
use std::time::{Duration, Instant};

/// Stream of a topic, connected or not.
pub(super) struct Stream<E: Environment> {
    pub(super) id: wire::Stream,
    /// Broker that serves the stream.
    pub(super) broker: BrokerView,
    /// True after the connection to it failed, until the brokers are known among which another is chosen.
    pub(super) wants_broker: bool,
    pub(super) channel: Option<SubscriberEnd<E>>,
    /// Offset that is due next; `None` until the broker has told where the stream starts.
    pub(super) due: Option<u64>,
    /// Position that was asked for.
    start: Start,
    /// Time of the next attempt to connect.
    retry_at: Instant,
    /// Number of questions for the end of the stream that were sent on this connection.
    asked: u64,
    /// Number of answers to them that have come. Answers come in the order of the questions.
    answered: u64,
    /// Number of the question whose answer is [`Stream::end`]; `None` until it is asked on this connection. The other
    /// questions only ask for a sign of life.
    end_asked: Option<u64>,
    /// Silence of the broker on this connection.
    silence: Silence,
    /// True when something has come since the last look in vain.
    has_news: bool,
    /// True when a sign of life was asked for since something came last.
    is_sounded: bool,
    /// Bytes that had come on this connection at the last look in vain.
    received_bytes: u64,
    /// First offset of a batch that was unreadable once. It is read again before it counts as damaged.
    pub(super) doubted: Option<u64>,
    /// Offset after the last message, as the broker has answered.
    pub(super) end: Option<u64>,
}

impl<E: Environment> Stream<E> {
    /// Stream that is not connected yet; an attempt is due at once. A connection is given up once its silence is too long.
    pub(super) fn new(id: wire::Stream, broker: BrokerView, start: Start, silence: Silence, now: Instant) -> Self {
        Self {
            id,
            broker,
            wants_broker: false,
            channel: None,
            due: None,
            start,
            retry_at: now,
            asked: 0,
            answered: 0,
            end_asked: None,
            silence,
            has_news: true,
            is_sounded: false,
            received_bytes: 0,
            doubted: None,
            end: None,
        }
    }

    /// Returns true when an attempt to connect is due.
    pub(super) fn is_due_to_connect(&self, now: Instant) -> bool {
        self.channel.is_none() && !self.wants_broker && self.retry_at <= now
    }

    /// Subscription that continues the stream: at the due offset, or at the position that was asked for.
    pub(super) fn request(&self, topic: &TopicView) -> Subscribe {
        let (start_kind, start) = match (self.due, self.start) {
            (Some(offset), _) | (None, Start::Offset(offset)) => (StartKind::Offset, offset),
            (None, Start::Earliest) => (StartKind::Earliest, 0),
            (None, Start::Latest) => (StartKind::Latest, 0),
            (None, Start::Timestamp(time)) => (StartKind::Timestamp, time),
        };
        Subscribe {
            start,
            start_kind: start_kind.code(),
            topic: topic.id,
            topic_incarnation: topic.incarnation,
            stream: self.id,
            ..Subscribe::blank()
        }
    }

    /// Connects and subscribes. Blocks for as long as connecting does.
    pub(super) fn connect(&mut self, environment: &E, topic: &TopicView) -> Result<(), ClientError> {
        self.channel = Some(subscribe(environment, self.broker.data, &self.request(topic))?);
        (self.asked, self.answered, self.end_asked) = (0, 0, None);
        (self.has_news, self.received_bytes) = (true, 0);
        Ok(())
    }

    /// Records that an item has come.
    pub(super) fn heard(&mut self) {
        self.has_news = true;
    }

    /// Records a look that found no item. Asks for a sign of life once the broker has been silent for half as long as it
    /// may be. Returns true once it has been silent for too long.
    ///
    /// A host that is cut off keeps its connections open, and a stream without batches is as quiet.
    pub(super) fn is_silent(&mut self, now: Instant) -> bool {
        let Some(channel) = &self.channel else { return false };
        let received = channel.received_bytes();
        if std::mem::take(&mut self.has_news) || received != self.received_bytes {
            self.received_bytes = received;
            self.is_sounded = false;
            self.silence.restart(now);
            return false;
        }
        self.silence.look(now);
        if !self.is_sounded && self.silence.is_half_over() {
            self.is_sounded = self.ask();
        }
        self.silence.is_too_long()
    }

    /// Asks for the end of the stream. Returns true if the question was sent.
    fn ask(&mut self) -> bool {
        let Some(channel) = &mut self.channel else { return false };
        let sent = matches!(channel.send(&Position::blank().encode()), Ok(true));
        self.asked += u64::from(sent);
        sent
    }

    /// Takes the broker's answer to the oldest question that has none.
    pub(super) fn answer(&mut self, position: &Position) {
        self.answered += 1;
        if self.end_asked == Some(self.answered) {
            self.end = Some(position.next_offset);
        }
    }

    /// Drops the connection. The next attempt is due after `wait`.
    pub(super) fn drop_connection(&mut self, wait: Duration, now: Instant) {
        self.channel = None;
        self.retry_at = now + wait;
    }

    /// Moves the stream to another position.
    pub(super) fn seek(&mut self, to: Start, now: Instant) {
        self.drop_connection(Duration::ZERO, now);
        (self.due, self.start) = (None, to);
    }

    /// Body of a batch, in place.
    ///
    /// # Panics
    /// If the connection is gone in which the batch lies.
    pub(super) fn body(&self, delivery: &Delivery) -> &[u8] {
        let channel = self.channel.as_ref();
        assert!(channel.is_some(), "the batch at offset {} lies in no connection", delivery.deliver.first_offset);
        channel.map_or(&[], |channel| &channel.bytes()[delivery.body.clone()])
    }

    /// Checks that the offsets of a batch are due. Returns the number of messages in it that come before the due offset.
    pub(super) fn accept(&mut self, deliver: &Deliver) -> Result<usize, ClientError> {
        let due = self.due.unwrap_or(deliver.first_offset);
        if deliver.first_offset > due || end_of(deliver) <= due {
            return Err(ClientError::Gap { expected: due, found: deliver.first_offset });
        }
        Ok((due - deliver.first_offset) as usize)
    }

    /// Goes on behind a batch.
    pub(super) fn skip(&mut self, deliver: &Deliver) {
        self.due = Some(end_of(deliver));
    }

    /// Handles a batch that cannot be read. Its memory may have changed while a broker that stood still was about to
    /// send it, so it is read once more, on another connection. After that the stream goes on behind it, and it is an
    /// error.
    pub(super) fn doubt(&mut self, deliver: &Deliver, source: UnreadableBatch) -> Result<(), ClientError> {
        let first = deliver.first_offset;
        if self.doubted == Some(first) {
            self.skip(deliver);
            return Err(ClientError::Corrupt { offset: first, end: end_of(deliver), source });
        }
        self.doubted = Some(first);
        Ok(())
    }

    /// Forgets the end of the stream, so that it is asked for again.
    pub(super) fn forget_end(&mut self) {
        (self.end, self.end_asked) = (None, None);
    }

    /// Asks for the end of the stream, once on each connection: the answer is lost with the connection.
    pub(super) fn ask_end(&mut self) {
        if self.end_asked.is_none() && self.ask() {
            self.end_asked = Some(self.asked);
        }
    }

    /// Returns true once the stream was read up to the end that its broker has answered.
    pub(super) fn is_read_to_end(&self) -> bool {
        self.end.is_some_and(|end| end == 0 || self.due.is_some_and(|due| due >= end))
    }
}

/// Offset after the last message of a batch.
fn end_of(deliver: &Deliver) -> u64 {
    deliver.first_offset.saturating_add(deliver.message_count.into())
}

/// Checks that a batch is the one that was ordered.
pub(super) fn check_identity(
    deliver: &Deliver,
    header: &BatchHeader,
    topic: &TopicView,
) -> Result<(), UnreadableBatch> {
    let ordered = (deliver.client_id, deliver.sequence, deliver.message_count, topic.id, topic.incarnation);
    let found = (header.client_id, header.sequence, header.message_count, header.topic, header.topic_incarnation);
    if ordered == found {
        return Ok(());
    }
    Err(UnreadableBatch::Foreign { client_id: header.client_id, sequence: header.sequence, topic: header.topic })
}
