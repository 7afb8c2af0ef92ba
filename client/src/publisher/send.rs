//! The sending half of a publisher: gives batches to connections in turn and takes their acknowledgements.

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

/// Batches that wait in one connection before another is chosen.
const QUEUED_PER_LINK: usize = 2;
/// First and longest wait before a connection is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// What a publisher's session is, as the brokers know it.
pub(super) struct Session {
    /// Identity of its batches.
    pub(super) origin: BatchOrigin,
    /// Acknowledgement level.
    pub(super) ack_level: u8,
    /// Sequence on the wire = batch number + this (wrapping).
    pub(super) shift: u64,
    /// Batch numbers below this are committed by the broker's word.
    pub(super) committed: u64,
    /// Batches that may be in flight.
    pub(super) window: usize,
}

/// A connection that is to be made.
pub(super) struct DueConnection {
    /// Which.
    pub(super) index: usize,
    /// To whom.
    pub(super) broker: BrokerView,
    /// How long was waited for it.
    wait: Duration,
    attempt: u64,
}

/// Everything that moves a publisher's batches.
pub(super) struct SendState {
    pub(super) session: Session,
    pub(super) connections: Vec<BrokerConnection>,
    /// Connection that is asked first.
    next_connection: usize,
    pub(super) in_flight: InFlightBatches,
    pub(super) buffers: Buffers,
    checksum: bool,
    /// The session has ended: another epoch is to be opened.
    pub(super) reopen: bool,
    /// Why nothing can be published any more.
    pub(super) failed: Option<ClientError>,
    /// Why the last connection could not be made.
    pub(super) refused: Option<ClientError>,
    pub(super) stats: PublisherStats,
    pub(super) driven_at: Instant,
    /// When the brokers were last asked for.
    pub(super) refreshed_at: Instant,
    /// When a batch was last acknowledged, or the first of those in flight was sealed.
    progressed_at: Instant,
    /// Frames that came, while they are looked at.
    frames: Vec<Frame>,
}

impl SendState {
    /// Nothing published yet, to `brokers`, with at most `buffers` buffers.
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

    /// The opening frame of a connection that is made now.
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

    /// Takes the session's next epoch: every connection is made anew, and what is not committed is sent again.
    pub(super) fn resubmit(&mut self) {
        self.stats.sessions_reopened += 1;
        self.reopen = false;
        for connection in &mut self.connections {
            connection.drop_connection(Duration::ZERO);
        }
        // Each new connection begins with the acks of what is committed: only the rest is sent again.
        self.requeue(|_| true, self.session.committed);
    }

    /// The connections that are down and due; they count as being connected now.
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

    /// A connection was made, or could not be.
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

    /// Takes up brokers that came back elsewhere, and new ones up to `limit` in all (0: all).
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

    /// Queues again what was on connections for which `lost` holds, except batches below `committed`.
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

    /// Gives up connections with batches on them when nothing has been acknowledged for `silence`: a broker that is
    /// cut off keeps its connections open and says nothing. Other connections, and new ones, get the batches.
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

    /// Moves bytes and takes acknowledgements. True when anything moved.
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

    /// Takes what the broker says.
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

    /// A connection has ended.
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

    /// Hands what is queued to the connection.
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

    /// Sends what was written, and without acknowledgements takes a batch for done once its bytes are with the network.
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

    /// Takes acknowledged batches off the front and their buffers back.
    fn retire(&mut self) {
        let connections = &self.connections;
        let is_read = |number| connections.iter().any(|connection| connection.queue.contains(&number));
        while let Some(batch) = self.in_flight.retire(is_read) {
            self.stats.batches_acknowledged += 1;
            self.buffers.put(batch);
        }
    }

    /// True while there are connections, and more batches wait for them than keep them busy. Without one, the buffer is
    /// there to be filled until one is back.
    pub(super) fn is_ahead(&self) -> bool {
        self.in_flight.queued() >= BUFFERED_BATCHES && self.connections.iter().any(BrokerConnection::is_ready)
    }

    /// True while a connection has yet to take what was given to it.
    pub(super) fn wants_room(&self) -> bool {
        self.connections.iter().any(|connection| !connection.queue.is_empty())
    }

    /// Has connections show on their descriptors what comes from here on.
    pub(super) fn arm(&mut self) {
        for index in 0..self.connections.len() {
            if let Connection::Up { link, .. } = &mut self.connections[index].connection
                && link.arm().is_err()
            {
                self.drop_connection(index, RETRY.0);
            }
        }
    }

    /// What to wait for, and whether for room to write too.
    pub(super) fn descriptors(&self) -> Vec<(RawFd, bool)> {
        let up = self.connections.iter().filter_map(|connection| match &connection.connection {
            Connection::Up { link, .. } => Some(link.descriptors(!connection.queue.is_empty())),
            _ => None,
        });
        up.flatten().collect()
    }
}
