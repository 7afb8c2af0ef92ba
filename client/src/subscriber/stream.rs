//! Stream of a topic, at the broker that serves it.

use super::Start;
use crate::context::Context;
use crate::views::{BrokerView, TopicView};
use embarcadero_transport::{Sockets, SubscriberChannel, Transport};
use embarcadero_wire::{self as wire, StartKind, Subscribe};
use std::io;
use std::time::{Duration, Instant};

/// Stream of a topic, connected or not.
pub(super) struct Stream {
    pub(super) id: wire::Stream,
    /// Broker that serves the stream.
    pub(super) broker: BrokerView,
    pub(super) link: Option<SubscriberChannel>,
    /// Offset that is due next; `None` until the broker has told where the stream starts.
    pub(super) due: Option<u64>,
    /// Position that was asked for.
    pub(super) from: Start,
    /// Time of the next attempt to connect.
    pub(super) retry_at: Instant,
    /// Number of connections made so far.
    pub(super) connections: u64,
}

impl Stream {
    /// Stream that is not connected yet; an attempt is due at once.
    pub(super) fn new(id: wire::Stream, broker: BrokerView, from: Start) -> Self {
        Self { id, broker, link: None, due: None, from, retry_at: Instant::now(), connections: 0 }
    }

    /// Connects, and asks for the stream from the due offset on.
    pub(super) fn connect(&mut self, context: &Context, topic: &TopicView) -> io::Result<()> {
        let options = context.link_options().map_err(io::Error::other)?;
        let (start_kind, start) = match (self.due, self.from) {
            (Some(offset), _) | (None, Start::Offset(offset)) => (StartKind::Offset, offset),
            (None, Start::Earliest) => (StartKind::Earliest, 0),
            (None, Start::Latest) => (StartKind::Latest, 0),
            (None, Start::Timestamp(time)) => (StartKind::Timestamp, time),
        };
        let request = Subscribe {
            start,
            start_kind: start_kind.code(),
            topic: topic.id,
            topic_incarnation: topic.incarnation,
            stream: self.id,
            ..Subscribe::blank()
        };
        self.link = Some(Sockets.subscribe(self.broker.data, &options, &request)?);
        self.connections += 1;
        Ok(())
    }

    /// Drops the connection. The next attempt is due after `wait`.
    pub(super) fn drop_connection(&mut self, wait: Duration) {
        self.link = None;
        self.retry_at = Instant::now() + wait;
    }
}
