//! Sending half of a publisher: gives batches to connections in turn, and takes acknowledgements.

use super::buffers::Buffers;
use super::connection::{BrokerConnection, Connection};
use super::in_flight::{InFlightBatches, State};
use super::{Batch, PublisherStats};
use crate::batching::BUFFERED_BATCHES;
use crate::error::ClientError;
use crate::views::BrokerView;
use embarcadero_transport::{LinkError, PublisherChannel, PublisherLink};
use embarcadero_wire::batch::BatchOrigin;
use embarcadero_wire::{Ack, ErrorCode, Frame, OpenPublish, UNKNOWN_OFFSET};
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// Number of batches that wait in one connection before another is chosen.
const QUEUED_PER_LINK: usize = 2;
/// Shortest and longest wait before an attempt to connect is repeated.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Session of a publisher, as the brokers know it.
pub(super) struct Session {
    /// Header fields that all batches of the session share.
    pub(super) origin: BatchOrigin,
    /// Acknowledgement level.
    pub(super) ack_level: u8,
    /// Difference between sequences on the wire and batch numbers: sequence = number + shift, wrapping.
    pub(super) shift: u64,
    /// Batch number below which brokers have reported all batches as committed.
    pub(super) committed: u64,
    /// Number of batches that may be in flight.
    pub(super) window: usize,
}

/// Connection that is to be made.
pub(super) struct DueConnection {
    /// Index in [`SendState::connections`].
    pub(super) index: usize,
    /// Broker to connect to.
    pub(super) broker: BrokerView,
    /// Wait before this attempt.
    wait: Duration,
    attempt: u64,
}

/// State that moves a publisher's batches: the session, the connections, and the batches in flight.
pub(super) struct SendState {
    pub(super) session: Session,
    pub(super) connections: Vec<BrokerConnection>,
    /// Index of the connection that is offered the next batch.
    next_connection: usize,
    pub(super) in_flight: InFlightBatches,
    pub(super) buffers: Buffers,
    checksum: bool,
    /// True once the session's epoch has ended: another is to be opened.
    pub(super) reopen: bool,
    /// Error that ended the publisher: nothing can be published any more.
    pub(super) failed: Option<ClientError>,
    /// Error of the last attempt to connect that failed.
    pub(super) refused: Option<ClientError>,
    pub(super) stats: PublisherStats,
    /// Time of the last [`SendState::drive`].
    pub(super) driven_at: Instant,
    /// Time at which the list of brokers was last asked for.
    pub(super) refreshed_at: Instant,
    /// Time at which a batch was last acknowledged, or the first of those in flight was sealed.
    progressed_at: Instant,
    /// Memory for received frames, kept between polls.
    frames: Vec<Frame>,
}

impl SendState {
    /// State before the first message, with `brokers` to connect to. `buffers` are the number and the bytes of buffers.
    pub(super) fn new(
        session: Session,
        brokers: Vec<BrokerView>,
        buffers: (usize, usize),
        checksum: bool,
        now: Instant,
    ) -> Self {
        let (count, budget_bytes) = buffers;
        Self {
            next_connection: session.origin.client_id.0 as usize,
            session,
            connections: brokers.into_iter().map(|broker| BrokerConnection::new(broker, now)).collect(),
            in_flight: InFlightBatches::new(count),
            buffers: Buffers::new(count, budget_bytes),
            checksum,
            reopen: false,
            failed: None,
            refused: None,
            stats: PublisherStats::default(),
            driven_at: now,
            refreshed_at: now,
            progressed_at: now,
            frames: Vec::with_capacity(64),
        }
    }

    /// Opening frame of a connection that is made now.
    pub(super) fn opening(&self) -> OpenPublish {
        let Session { origin, ack_level, shift, .. } = &self.session;
        OpenPublish {
            client_id: origin.client_id,
            resume_from: self.in_flight.first().wrapping_add(*shift),
            session_epoch: origin.session_epoch,
            session_slot: origin.session_slot,
            topic: origin.topic,
            topic_incarnation: origin.topic_incarnation,
            ack_level: (*ack_level).into(),
            ..OpenPublish::blank()
        }
    }

    /// Seals a batch and queues it.
    pub(super) fn push(&mut self, mut batch: Batch) {
        if self.in_flight.is_empty() {
            self.progressed_at = Instant::now();
        }
        let sequence = self.in_flight.next_number().wrapping_add(self.session.shift);
        let header = batch.seal(&self.session.origin, sequence, self.checksum);
        self.in_flight.push(batch, header);
    }

    /// Begins the session's next epoch: drops every connection, and queues again the batches that are not committed.
    pub(super) fn resubmit(&mut self) {
        self.stats.sessions_reopened += 1;
        self.reopen = false;
        for connection in &mut self.connections {
            connection.drop_connection(Duration::ZERO);
        }
        // Each new connection begins with the acks of what is committed: only the rest is sent again.
        self.requeue(|_| true, self.session.committed);
    }

    /// Connections that are down and due. They count as connecting from now on.
    pub(super) fn due_connections(&mut self, now: Instant) -> Vec<DueConnection> {
        let mut due = Vec::new();
        if self.reopen || self.failed.is_some() {
            return due;
        }
        for (index, connection) in self.connections.iter_mut().enumerate() {
            if let Connection::Down { retry_at, wait } = connection.connection
                && retry_at <= now
            {
                connection.connection = Connection::Connecting;
                connection.attempt += 1;
                let (broker, attempt) = (connection.broker.clone(), connection.attempt);
                due.push(DueConnection { index, broker, wait, attempt });
            }
        }
        due
    }

    /// Takes the result of an attempt to connect.
    pub(super) fn connected(&mut self, due: &DueConnection, link: Result<PublisherChannel, ClientError>) {
        let Some(connection) = self.connections.get_mut(due.index).filter(|found| found.attempt == due.attempt) else {
            return;
        };
        match link {
            Ok(link) => connection.connection = Connection::Up { link, ready: false },
            Err(error) => {
                self.refused = Some(error);
                connection.drop_connection((due.wait * 2).clamp(RETRY.0, RETRY.1));
            }
        }
    }

    /// Takes the current list of brokers: new addresses of known ones, and new brokers up to `limit` in all (0: no limit).
    pub(super) fn update_brokers(&mut self, brokers: Vec<BrokerView>, limit: usize) {
        for broker in brokers {
            let room = limit == 0 || self.connections.len() < limit;
            match self.connections.iter_mut().find(|connection| connection.broker.id == broker.id) {
                Some(connection) => connection.broker = broker,
                None if room => self.connections.push(BrokerConnection::new(broker, Instant::now())),
                None => {}
            }
        }
    }

    /// Queues again the batches on connections for which `lost` holds, except those below `committed`.
    fn requeue(&mut self, lost: impl Fn(usize) -> bool, committed: u64) {
        if self.session.ack_level == 0 {
            self.in_flight.give_up(&lost);
        }
        self.stats.batches_resubmitted += self.in_flight.requeue(lost, committed);
    }

    fn drop_connection(&mut self, index: usize, wait: Duration) {
        self.stats.connections_lost += 1;
        self.connections[index].drop_connection(wait);
        // Also what is committed: its ack was lost with the connection, and a duplicate is acknowledged again.
        self.requeue(|lost| lost == index, 0);
    }

    /// Drops the connections with batches on them when nothing has been acknowledged for `silence`. Other connections, and
    /// new ones, get the batches.
    ///
    /// A broker that is cut off keeps its connections open and says nothing.
    pub(super) fn leave_silent_brokers(&mut self, silence: Duration) {
        if self.in_flight.is_empty() || self.progressed_at.elapsed() < silence {
            return;
        }
        self.progressed_at = Instant::now();
        for index in 0..self.connections.len() {
            if self.connections[index].is_ready() && self.in_flight.are_on(index) {
                self.drop_connection(index, RETRY.0);
            }
        }
    }

    /// Moves bytes and takes acknowledgements. Returns true when anything moved.
    pub(super) fn drive(&mut self) -> bool {
        let first = self.in_flight.first();
        let mut moved = false;
        for index in 0..self.connections.len() {
            moved |= self.poll_frames(index);
        }
        self.assign();
        for index in 0..self.connections.len() {
            moved |= self.write(index);
        }
        self.retire();
        self.driven_at = Instant::now();
        if self.in_flight.first() != first || self.in_flight.is_empty() {
            self.progressed_at = self.driven_at;
        }
        moved
    }

    /// Takes the frames that a broker has sent.
    fn poll_frames(&mut self, index: usize) -> bool {
        let Connection::Up { link, .. } = &mut self.connections[index].connection else { return false };
        let mut frames = std::mem::take(&mut self.frames);
        let polled = link.poll(&mut frames);
        let moved = !frames.is_empty() || polled.is_err();
        for frame in frames.drain(..) {
            self.take_frame(index, &frame);
        }
        self.frames = frames;
        if let Err(error) = polled {
            self.lose(index, error);
        }
        moved
    }

    fn take_frame(&mut self, index: usize, frame: &Frame) {
        match frame {
            Frame::PublishReady(_) => {
                if let Connection::Up { ready, .. } = &mut self.connections[index].connection {
                    *ready = true;
                }
            }
            Frame::Ack(ack) => self.acknowledge(ack),
            Frame::Fenced(fenced) if fenced.session_epoch == self.session.origin.session_epoch => self.reopen = true,
            _ => {}
        }
    }

    /// Decides, after a connection has ended, whether to reconnect, to reopen the session, or to end the publisher.
    fn lose(&mut self, index: usize, error: LinkError) {
        let (code, text) = match error {
            LinkError::Refused { code: Some(code), text, .. } => (code, text),
            LinkError::Refused { code: None, .. } | LinkError::Lost(_) | LinkError::Wire(_) => {
                return self.drop_connection(index, RETRY.0);
            }
        };
        match code {
            ErrorCode::UnknownSession => {
                self.reopen = true;
                self.drop_connection(index, RETRY.0);
            }
            ErrorCode::BadFrame | ErrorCode::Unavailable => self.drop_connection(index, RETRY.0),
            _ => {
                self.failed = Some(ClientError::refused(code, text, 0));
                self.drop_connection(index, RETRY.1);
            }
        }
    }

    fn acknowledge(&mut self, ack: &Ack) {
        let number = ack.sequence.wrapping_sub(self.session.shift);
        let committed = ack.committed.wrapping_sub(self.session.shift);
        if committed <= self.in_flight.next_number() {
            self.session.committed = self.session.committed.max(committed);
        }
        self.in_flight.acknowledge(number, ack.first_offset);
    }

    /// Gives queued batches to connections in turn.
    fn assign(&mut self) {
        while let Some(number) = self.in_flight.next_queued() {
            if (number - self.in_flight.first()) as usize >= self.session.window {
                return;
            }
            let count = self.connections.len();
            let has_room = |index: &usize| {
                let connection = &self.connections[*index];
                connection.is_ready() && connection.queue.len() < QUEUED_PER_LINK
            };
            let turns = (0..count).map(|step| (self.next_connection + step) % count);
            let Some(chosen) = turns.into_iter().find(has_room) else { return };
            self.next_connection = chosen + 1;
            self.in_flight.pop_queued();
            let sequence = number.wrapping_add(self.session.shift);
            let origin = self.session.origin;
            let Some(sent) = self.in_flight.get_mut(number) else { continue };
            if sent.header.session_epoch != origin.session_epoch || sent.header.sequence != sequence {
                sent.header.sequence = sequence;
                sent.header = sent.batch.readdress(&sent.header, &origin);
            }
            sent.state = State::Sent(Some(chosen));
            self.connections[chosen].queue.push_back(number);
        }
    }

    fn write(&mut self, index: usize) -> bool {
        let written = self.write_queue(index).and_then(|moved| Ok(moved | self.flush(index)?));
        written.unwrap_or_else(|_| {
            self.drop_connection(index, RETRY.0);
            true
        })
    }

    /// Writes the queued batches of a connection, as far as it has room.
    fn write_queue(&mut self, index: usize) -> std::io::Result<bool> {
        let mut moved = false;
        loop {
            let connection = &mut self.connections[index];
            let Connection::Up { link, .. } = &mut connection.connection else { return Ok(moved) };
            let Some(number) = connection.queue.front().copied() else { return Ok(moved) };
            // Acknowledged by another way while it waited: what is half written must still be completed.
            let Some(sent) = self.in_flight.get_mut(number) else {
                connection.queue.pop_front();
                continue;
            };
            let taken = link.write(&mut sent.batch, connection.written)?;
            if taken == 0 {
                return Ok(moved);
            }
            moved = true;
            connection.written += taken;
            if connection.written == sent.batch.bytes().len() {
                connection.written = 0;
                connection.queue.pop_front();
                if self.session.ack_level == 0 {
                    connection.reading.push_back(number);
                }
                self.assign();
            }
        }
    }

    /// Sends what was written. Without acknowledgements, batches are done once the network has their bytes.
    fn flush(&mut self, index: usize) -> std::io::Result<bool> {
        let BrokerConnection { connection: Connection::Up { link, .. }, reading, .. } = &mut self.connections[index]
        else {
            return Ok(false);
        };
        link.flush()?;
        let mut moved = false;
        let in_use = link.batches_in_use();
        while reading.len() > in_use
            && let Some(number) = reading.pop_front()
        {
            moved = true;
            self.in_flight.acknowledge(number, UNKNOWN_OFFSET);
        }
        Ok(moved)
    }

    /// Removes acknowledged batches from the front, and takes their buffers back.
    fn retire(&mut self) {
        let connections = &self.connections;
        let is_read = |number| connections.iter().any(|connection| connection.queue.contains(&number));
        while let Some(batch) = self.in_flight.retire(is_read) {
            self.stats.batches_acknowledged += 1;
            self.buffers.put(batch);
        }
    }

    /// Returns true while connections are up and more batches wait for them than keep them busy. While none is up, the
    /// whole buffer may be filled.
    pub(super) fn is_ahead(&self) -> bool {
        self.in_flight.queued() >= BUFFERED_BATCHES && self.connections.iter().any(BrokerConnection::is_ready)
    }

    /// Returns true while a connection has batches to write.
    pub(super) fn wants_room(&self) -> bool {
        self.connections.iter().any(|connection| !connection.queue.is_empty())
    }

    /// Makes the descriptors of all connections ready when something comes from now on.
    pub(super) fn arm(&mut self) {
        for index in 0..self.connections.len() {
            if let Connection::Up { link, .. } = &mut self.connections[index].connection
                && link.arm().is_err()
            {
                self.drop_connection(index, RETRY.0);
            }
        }
    }

    /// Descriptors to wait for, each with a flag that asks for room to write too.
    pub(super) fn descriptors(&self) -> Vec<(RawFd, bool)> {
        let up = self.connections.iter().filter_map(|connection| match &connection.connection {
            Connection::Up { link, .. } => Some(link.descriptors(!connection.queue.is_empty())),
            _ => None,
        });
        up.flatten().collect()
    }
}
