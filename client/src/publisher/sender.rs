//! Sending half of a publisher: its session, its connections, and its batches in flight.

use super::buffers::{Batch, Buffers};
use super::connection::{BrokerConnection, ConnectAttempt, RETRY_MAX, RETRY_MIN};
use super::in_flight::InFlightBatches;
use super::message::PublisherStats;
use super::session::Session;
use super::upkeep::Calls;
use crate::batching::BUFFERED_BATCHES;
use crate::environment::{Environment, PublisherEnd};
use crate::error::ClientError;
use crate::silence::{SILENCE_PART, Silence};
use crate::views::{BrokerView, TopicView};
use embarcadero_os::Clock;
use embarcadero_transport::{LinkError, PublisherLink};
use embarcadero_wire::{ErrorCode, Frame, OpenPublish};
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Sending half of a publisher. `drive.rs` has the part that moves bytes, and `upkeep.rs` the calls to the control plane.
pub(super) struct Sender<E: Environment> {
    pub(super) environment: Arc<E>,
    pub(super) topic: TopicView,
    pub(super) session: Session,
    pub(super) connections: Vec<BrokerConnection<E>>,
    /// Index of the connection that is offered the next batch.
    pub(super) next_connection: usize,
    pub(super) in_flight: InFlightBatches,
    pub(super) buffers: Buffers,
    checksum: bool,
    /// True once the session's epoch has ended: another is to be opened.
    pub(super) session_ended: bool,
    /// Time of the next attempt to reopen the session.
    reopen_at: Instant,
    /// Wait before that attempt.
    reopen_wait: Duration,
    /// Error that ended the publisher: nothing can be published any more.
    pub(super) fatal: Option<ClientError>,
    /// Last error of a connection, of an attempt to connect, or of reopening the session. Cleared once a broker takes
    /// batches again.
    pub(super) trouble: Option<ClientError>,
    pub(super) stats: PublisherStats,
    /// Time of the last [`Sender::drive`].
    pub(super) driven_at: Instant,
    /// Calls to the control plane that are under way.
    pub(super) calls: Calls,
    /// Time at which the list of brokers was last asked for.
    pub(super) refreshed_at: Instant,
    /// Silence of the brokers since the first batch in flight was given to a connection.
    pub(super) silence: Silence,
    /// Memory for received frames, kept between polls.
    pub(super) frames: Vec<Frame>,
}

impl<E: Environment> Sender<E> {
    /// Sender before the first message, with `brokers` to connect to.
    pub(super) fn new(environment: Arc<E>, topic: TopicView, session: Session, brokers: Vec<BrokerView>) -> Self {
        let now = environment.clock().instant();
        let config = environment.config();
        // More are never held at once.
        let buffers = config.buffer_bytes / config.batch_bytes().0;
        Self {
            topic,
            next_connection: session.origin.client_id.0 as usize,
            session,
            connections: brokers.into_iter().map(|broker| BrokerConnection::new(broker, now)).collect(),
            in_flight: InFlightBatches::new(buffers),
            buffers: Buffers::new(buffers, config.buffer_bytes),
            checksum: config.batch_checksum,
            session_ended: false,
            reopen_at: now,
            reopen_wait: Duration::ZERO,
            fatal: None,
            trouble: None,
            stats: PublisherStats::default(),
            driven_at: now,
            calls: Calls::default(),
            refreshed_at: now,
            silence: Silence::new(config.progress_timeout() / SILENCE_PART, now),
            frames: Vec::with_capacity(64),
            environment,
        }
    }

    /// Time now.
    #[inline]
    pub(super) fn now(&self) -> Instant {
        self.environment.clock().instant()
    }

    /// Opening frame of a connection that is made now.
    pub(super) fn opening(&self) -> OpenPublish {
        self.session.opening(self.in_flight.first())
    }

    /// Seals a batch and queues it.
    pub(super) fn push(&mut self, mut batch: Batch) {
        let sequence = self.session.sequence(self.in_flight.next_number());
        let header = batch.seal(&self.session.origin, sequence, self.checksum);
        self.in_flight.push(batch, header);
    }

    /// Begins the session's next epoch: drops every connection, and queues again the batches that are not committed.
    pub(super) fn resubmit(&mut self) {
        self.stats.sessions_reopened += 1;
        self.session_ended = false;
        self.reopen_wait = Duration::ZERO;
        self.trouble = None;
        let now = self.now();
        for connection in &mut self.connections {
            connection.drop_channel(Duration::ZERO, now);
        }
        // Each new connection begins with the acks of what is committed: only the rest is sent again.
        self.requeue(|_| true, self.session.committed);
    }

    /// Returns true when an attempt to reopen the session is due.
    pub(super) fn is_due_to_reopen(&self, now: Instant) -> bool {
        self.session_ended && self.fatal.is_none() && now >= self.reopen_at
    }

    /// Takes the error of an attempt to reopen the session. A permanent one ends the publisher. After any other, another
    /// attempt is due later: calls that wait for acknowledgements have time-outs of their own.
    pub(super) fn reopening_failed(&mut self, error: ClientError, now: Instant) {
        if error.is_permanent() {
            self.fatal = Some(error);
            return;
        }
        self.trouble = Some(error);
        self.reopen_wait = (self.reopen_wait * 2).clamp(RETRY_MIN, RETRY_MAX);
        self.reopen_at = now + self.reopen_wait;
    }

    /// Begins the attempts to connect that are due.
    pub(super) fn begin_attempts(&mut self, now: Instant) -> Vec<ConnectAttempt> {
        if self.session_ended || self.fatal.is_some() {
            return Vec::new();
        }
        let connections = self.connections.iter_mut().enumerate();
        connections.filter_map(|(index, connection)| connection.begin_attempt(index, now)).collect()
    }

    /// Takes the result of an attempt to connect.
    pub(super) fn end_attempt(&mut self, attempt: &ConnectAttempt, result: Result<PublisherEnd<E>, ClientError>) {
        let now = self.now();
        if let Some(connection) = self.connections.get_mut(attempt.index)
            && let Some(error) = connection.end_attempt(attempt, result, now)
        {
            self.trouble = Some(error);
        }
    }

    /// Takes the current list of brokers: new addresses of known ones, and new brokers as far as the configuration allows.
    pub(super) fn update_brokers(&mut self, brokers: Vec<BrokerView>) {
        let (limit, now) = (self.environment.config().max_brokers, self.now());
        for broker in brokers {
            let room = limit == 0 || self.connections.len() < limit;
            match self.connections.iter_mut().find(|connection| connection.broker.id == broker.id) {
                Some(connection) => connection.broker = broker,
                None if room => self.connections.push(BrokerConnection::new(broker, now)),
                None => {}
            }
        }
    }

    /// Queues again the batches on connections for which `lost` holds, except those below `committed`.
    fn requeue(&mut self, lost: impl Fn(usize) -> bool, committed: u64) {
        if self.session.ack_level == 0 {
            self.in_flight.give_up(|_, connection| connection.is_some_and(&lost));
        }
        self.stats.batches_resubmitted += self.in_flight.requeue(lost, committed);
    }

    /// Drops a connection, and queues the batches on it again. The next attempt is due after `wait`.
    pub(super) fn drop_connection(&mut self, index: usize, wait: Duration) {
        self.stats.connections_lost += 1;
        let now = self.now();
        self.connections[index].drop_channel(wait, now);
        // Also what is committed: its ack was lost with the connection, and a duplicate is acknowledged again.
        self.requeue(|lost| lost == index, 0);
    }

    /// Decides, after a connection has ended, whether to reconnect, to reopen the session, or to end the publisher.
    pub(super) fn connection_ended(&mut self, index: usize, error: LinkError) {
        let code = match &error {
            LinkError::Refused { code, .. } => *code,
            LinkError::Lost(_) | LinkError::Wire(_) => None,
        };
        let is_fatal = match (&error, code) {
            // A broker that speaks another protocol will speak it on the next connection too.
            (LinkError::Wire(_), _) => true,
            (_, None | Some(ErrorCode::UnknownSession | ErrorCode::BadFrame | ErrorCode::Unavailable)) => false,
            (_, Some(_)) => true,
        };
        self.session_ended |= code == Some(ErrorCode::UnknownSession);
        let error = Some(ClientError::from(error));
        if is_fatal {
            self.fatal = error;
            self.drop_connection(index, RETRY_MAX);
        } else {
            self.trouble = error;
            self.drop_connection(index, RETRY_MIN);
        }
    }

    /// Drops a connection on which the system reported an error.
    pub(super) fn connection_failed(&mut self, index: usize, error: io::Error) {
        self.connection_ended(index, LinkError::Lost(error));
    }

    /// Drops the connections with batches on them when the brokers have been silent for too long. Other connections, and
    /// new ones, get the batches.
    ///
    /// A broker that is cut off keeps its connections open and says nothing.
    pub(super) fn drop_silent_connections(&mut self) {
        if !self.silence.is_too_long() {
            return;
        }
        self.silence.restart(self.now());
        for index in 0..self.connections.len() {
            if self.connections[index].is_ready() && self.in_flight.are_on(index) {
                self.drop_connection(index, RETRY_MIN);
            }
        }
    }

    /// Returns true while connections are ready and more batches wait for them than keep them busy. While none is ready,
    /// the whole buffer may be filled.
    pub(super) fn has_backlog(&self) -> bool {
        self.in_flight.queued() >= BUFFERED_BATCHES && self.connections.iter().any(BrokerConnection::is_ready)
    }

    /// Returns true while a connection has batches to write.
    pub(super) fn has_to_write(&self) -> bool {
        self.connections.iter().any(|connection| !connection.queue.is_empty())
    }

    /// Makes the descriptors of all connections ready when something comes from now on.
    pub(super) fn arm(&mut self) {
        for index in 0..self.connections.len() {
            let armed = self.connections[index].channel_mut().map_or(Ok(()), PublisherLink::arm);
            if let Err(error) = armed {
                self.connection_failed(index, error);
            }
        }
    }

    /// Descriptors to wait for, each with a flag that asks for room to write too.
    pub(super) fn descriptors(&mut self) -> Vec<(RawFd, bool)> {
        let mut descriptors = Vec::with_capacity(self.connections.len());
        for connection in &mut self.connections {
            let writable = !connection.queue.is_empty();
            if let Some(channel) = connection.channel_mut() {
                descriptors.extend(channel.descriptors(writable));
            }
        }
        descriptors
    }
}
