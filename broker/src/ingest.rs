//! Receive: a publisher's session, from its opening frame to batches that lie complete in the Blog.

use crate::ack::AckQueue;
use crate::delegation::{Landed, Origin};
use crate::session_board::SessionHold;
use crate::topics::{Topic, TopicTable};
use crossbeam_channel::Sender;
use embarcadero_cxl::layout::{SESSION_WINDOW, SessionState};
use embarcadero_cxl::leadership::NoLeader;
use embarcadero_cxl::segment::PoolError;
use embarcadero_cxl::session_table::read_session;
use embarcadero_cxl::{Fabric, RegionOffset, Row};
use embarcadero_transport::{Landing, Placement, TransportError, Window, WindowPlacement};
use embarcadero_wire::batch::{BodyError, check_body, check_lengths};
use embarcadero_wire::{BatchHeader, ErrorCode, FRAME_BYTES, OpenPublish, PublishReady};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Largest number of I/O workers of a broker.
pub(crate) const MAX_WORKERS: usize = 64;

/// Limits that the broker sets to publishers.
#[derive(Clone, Copy, Debug)]
pub struct IngestLimits {
    /// Largest batch, header and body, in bytes.
    pub max_batch_bytes: u64,
    /// Time for which a publisher waits for memory before it is refused.
    pub exhausted_wait: Duration,
    /// Time for which a body of which nothing comes may keep memory from being reused.
    pub receive_patience: Duration,
    /// True to check a body's checksum on arrival. Subscribers check it in any case.
    pub verify_body: bool,
}

/// Session of a publisher on one connection.
pub(crate) struct PublisherSession<F: Fabric> {
    topic: Arc<Topic<F>>,
    open: OpenPublish,
    /// Batches that are not acknowledged yet.
    pub(crate) acks: AckQueue,
    limits: IngestLimits,
    landed: Sender<Landed<F>>,
    /// Reservation that a body is being received into: its place and its length in bytes.
    reserved: Option<(RegionOffset, u64)>,
    /// Bytes of that body that had come when more last came, and the time at which that was seen.
    progress: Option<(u64, Instant)>,
    /// Time at which a batch last came through a landing window, or else the connection was opened.
    active_at: Instant,
    /// Time since which the publisher waits.
    waiting_since: Option<Instant>,
    /// True if what it waits for, or waited for last, is room: memory, or the Batchlog. False if it is its own window.
    waits_for_room: bool,
    /// Connection, as the leader sees it.
    hold: SessionHold,
}

impl<F: Fabric> PublisherSession<F> {
    /// Opens a session after a check of the opening frame against the topic and the session table. Returns it with the
    /// answer for the publisher.
    ///
    /// # Errors
    /// A refusal that says what is wrong.
    pub(crate) fn open(
        topics: &TopicTable<F>,
        open: OpenPublish,
        limits: IngestLimits,
        landed: Sender<Landed<F>>,
        now: Instant,
    ) -> Result<(Self, PublishReady), TransportError> {
        let refuse = |code, text: String| Err(TransportError::refused(code, text));
        let nobody = |error: NoLeader| TransportError::refused(ErrorCode::Unavailable, error.to_string());
        let Some(topic) = topics.get(open.topic, open.topic_incarnation)? else {
            let text = format!("topic slot {} incarnation {} is not live", open.topic, open.topic_incarnation);
            return refuse(ErrorCode::UnknownTopic, text);
        };
        let region = topics.region();
        let row = read_session(region, open.session_slot).map_err(nobody)?;
        if let Row::Damaged(damage) = row {
            return refuse(ErrorCode::Corrupt, damage.to_string());
        }
        let session = row.used().filter(|session| {
            session.client_id == open.client_id
                && session.epoch == open.session_epoch
                && session.topic == open.topic
                && session.topic_incarnation == open.topic_incarnation
                && session.state == SessionState::Open
                && session.is_held_by(open.token)
        });
        let Some(session) = session else {
            topics.check_live(&topic)?;
            let text = format!(
                "client {:#x} has no open session of epoch {} in slot {}, or its token is another",
                open.client_id.0, open.session_epoch, open.session_slot
            );
            return refuse(ErrorCode::UnknownSession, text);
        };
        if open.ack_level != u32::from(session.ack_level) {
            let text = format!("ack level is {}, the session was opened with {}", open.ack_level, session.ack_level);
            return refuse(ErrorCode::AckLevel, text);
        }
        let mut acks = AckQueue::new(session, topic.stream(topics.broker()));
        let ready = PublishReady {
            committed: acks.read_progress(region),
            max_batch_bytes: limits.max_batch_bytes.min(topic.blog.max_batch_bytes()),
            window_batches: SESSION_WINDOW as u32,
            broker: topics.broker(),
            ..PublishReady::blank()
        };
        let limits = IngestLimits { max_batch_bytes: ready.max_batch_bytes, ..limits };
        let session = Self {
            topic,
            open,
            acks,
            limits,
            landed,
            reserved: None,
            progress: None,
            active_at: now,
            waiting_since: None,
            waits_for_room: false,
            hold: topics.sessions().hold(open.session_slot),
        };
        Ok((session, ready))
    }

    /// Topic that the session publishes to.
    pub(crate) fn topic(&self) -> &Arc<Topic<F>> {
        &self.topic
    }

    /// Returns true when the client wants acks.
    pub(crate) fn wants_acks(&self) -> bool {
        self.open.ack_level > 0
    }

    /// First sequence whose ack the client may have missed on an earlier connection.
    pub(crate) fn resume_from(&self) -> u64 {
        self.open.resume_from
    }

    /// Checks the body of a complete batch and hands the batch to the delegation.
    ///
    /// # Errors
    /// A refusal when the body is wrong or the broker is shutting down. The batch is then given up.
    fn complete(&mut self, batch: Landed<F>, memory: &F) -> Result<(), TransportError> {
        self.check(memory, &batch.header, batch.at)?;
        self.reserved = None;
        if self.wants_acks() {
            self.acks.expect(batch.header.sequence);
        }
        let (at, bytes) = (batch.at, batch.header.batch_bytes());
        self.landed.try_send(batch).map_err(|_| {
            self.topic.blog.give_up(at, bytes);
            TransportError::refused(ErrorCode::Unavailable, "the broker is shutting down")
        })
    }

    /// Checks a body's padding and length table, and with `verify_body` its checksum, too.
    fn check(&self, memory: &F, header: &BatchHeader, at: RegionOffset) -> Result<(), BodyError> {
        if self.limits.verify_body {
            memory.with_bytes(at.add(FRAME_BYTES as u64), header.body_bytes(), |body| {
                check_lengths(header, body)?;
                check_body(header, body)
            })
        } else {
            let payload_bytes = u64::from(header.payload_bytes);
            let tail_at = at.add(FRAME_BYTES as u64 + payload_bytes);
            memory.with_bytes(tail_at, header.body_bytes() - payload_bytes, |tail| header.check_tail(tail))
        }
    }

    /// Shows whether the publisher waits for room that others may give: memory, or the Batchlog. It does not while it is
    /// not `listened` to.
    pub(crate) fn show_wait(&mut self, listened: bool) {
        self.hold.set_waiting(listened && self.waits_for_room);
    }

    /// Notes that the publisher waits no more.
    fn go_on(&mut self) {
        (self.waiting_since, self.waits_for_room) = (None, false);
    }

    /// Lets the publisher wait for room, and refuses it once it has waited for `exhausted_wait`.
    fn wait_for_room(
        &mut self,
        code: ErrorCode,
        reason: &dyn fmt::Display,
        now: Instant,
    ) -> Result<(), TransportError> {
        self.waits_for_room = true;
        self.wait(code, reason, now)
    }

    /// Lets the publisher wait, and refuses it once it has waited for `exhausted_wait`.
    fn wait(&mut self, code: ErrorCode, reason: &dyn fmt::Display, now: Instant) -> Result<(), TransportError> {
        let since = *self.waiting_since.get_or_insert(now);
        if now.saturating_duration_since(since) < self.limits.exhausted_wait {
            return Ok(());
        }
        let text = format!("{reason} (waited {} ms)", self.limits.exhausted_wait.as_millis());
        Err(TransportError::refused(code, text))
    }

    /// Lets the publisher wait until the pool gives a segment.
    fn wait_for_segment(&mut self, error: &PoolError, now: Instant) -> Result<(), TransportError> {
        let code = match error {
            PoolError::Exhausted { .. } => ErrorCode::PoolExhausted,
            PoolError::NoLeader(_) | PoolError::UnknownLeader | PoolError::Unreachable(_) | PoolError::Refused(_) => {
                ErrorCode::Unavailable
            }
            PoolError::Damaged(_) | PoolError::NoSuchSegment { .. } | PoolError::NotAllocated { .. } => {
                ErrorCode::Corrupt
            }
        };
        self.wait_for_room(code, error, now)
    }

    /// Returns true when the publisher was silent for `idle` and one of its landing `windows` keeps a full segment from
    /// being reclaimed.
    pub(crate) fn is_idle_holding(
        &self,
        mut windows: impl Iterator<Item = RegionOffset>,
        idle: Duration,
        now: Instant,
    ) -> bool {
        now.saturating_duration_since(self.active_at) > idle && windows.any(|at| !self.topic.blog.is_current(at))
    }

    /// Takes the place at which a batch is received.
    fn reserve(&mut self, at: RegionOffset, header: &BatchHeader) {
        self.reserved = Some((at, header.batch_bytes()));
        self.progress = None;
        self.go_on();
    }

    /// Returns true when nothing has come for `receive_patience` of the body that is being received, and the body keeps a
    /// full segment from being reclaimed. `arriving` is the number of its bytes that have come. Call it every few
    /// milliseconds.
    pub(crate) fn is_late(&mut self, arriving: Option<u64>, now: Instant) -> bool {
        let (Some((at, _)), Some(bytes)) = (self.reserved, arriving) else { return false };
        let since = match self.progress {
            Some((before, since)) if before == bytes => since,
            _ => {
                self.progress = Some((bytes, now));
                now
            }
        };
        now.saturating_duration_since(since) > self.limits.receive_patience && !self.topic.blog.gives_room_at(at)
    }

    /// Checks a batch's header against the session, and that there is room for the batch. Returns the answer to the
    /// publisher when the batch cannot be taken now, else `None`.
    fn reject_or_wait(&mut self, topics: &TopicTable<F>, header: &BatchHeader, now: Instant) -> Option<Placement> {
        let refuse = |code, text: String| Some(Placement::Refuse(TransportError::refused(code, text)));
        self.waits_for_room = false;
        if let Err(error) = header.check(self.limits.max_batch_bytes) {
            return refuse(ErrorCode::BadBatch, error.to_string());
        }
        let open = &self.open;
        if header.client_id != open.client_id
            || header.session_epoch != open.session_epoch
            || header.session_slot != open.session_slot
            || header.topic != open.topic
            || header.topic_incarnation != open.topic_incarnation
        {
            let text = "the batch names another session or topic than the connection was opened for";
            return refuse(ErrorCode::BadBatch, text.to_owned());
        }
        if let Err(error) = self.topic.check() {
            return Some(Placement::Refuse(error));
        }
        if self.topic.config.order.is_global() {
            let first = self.acks.session().first_sequence;
            if header.sequence < first {
                let text = format!("batch {} is before the client's first, {first}", header.sequence);
                return refuse(ErrorCode::BadBatch, text);
            }
            // Progress may lag behind the acks of other brokers, above all between two leaders.
            if !self.acks.is_in_window(topics.region(), header.sequence) {
                let reason = format!("batch {} is beyond the window of the session", header.sequence);
                return Some(waiting(self.wait(ErrorCode::Unavailable, &reason, now)));
            }
        }
        if self.acks.is_full() {
            return Some(Placement::Wait);
        }
        if !self.can_hand_over() {
            let reason = "batches that are here cannot be ordered: the Batchlog or the order index has no room";
            return Some(waiting(self.wait_for_room(ErrorCode::PoolExhausted, &reason, now)));
        }
        None
    }

    /// Returns true when the channel to the delegation has room for one more batch of each worker.
    pub(crate) fn can_hand_over(&self) -> bool {
        // Other workers hand over too; each has at most one batch between this check and its hand-over.
        self.landed.capacity().is_none_or(|capacity| self.landed.len() + MAX_WORKERS < capacity)
    }
}

impl<F: Fabric> Drop for PublisherSession<F> {
    fn drop(&mut self) {
        if let Some((at, bytes)) = self.reserved.take() {
            self.topic.blog.give_up(at, bytes);
        }
    }
}

fn waiting(waits: Result<(), TransportError>) -> Placement {
    match waits {
        Ok(()) => Placement::Wait,
        Err(error) => Placement::Refuse(error),
    }
}

/// Places and takes the batches of one connection, for one call of the transport.
pub(crate) struct PublisherLanding<'a, F: Fabric> {
    /// Topics of the broker.
    pub(crate) topics: &'a TopicTable<F>,
    /// Session of the publisher; `None` before its opening frame.
    pub(crate) session: Option<&'a mut PublisherSession<F>>,
    /// Connection that the batches come on.
    pub(crate) origin: Origin,
    /// Present time.
    pub(crate) now: Instant,
    /// Number of batches that were taken, counted up.
    pub(crate) taken: usize,
}

fn not_opened() -> TransportError {
    let text = "a batch came on a connection that was not opened for publishing";
    TransportError::refused(ErrorCode::UnknownSession, text)
}

impl<F: Fabric> Landing for PublisherLanding<'_, F> {
    fn place(&mut self, header: &BatchHeader) -> Placement {
        let Some(session) = &mut self.session else { return Placement::Refuse(not_opened()) };
        if let Some(answer) = session.reject_or_wait(self.topics, header, self.now) {
            return answer;
        }
        match session.topic.blog.reserve(header.batch_bytes()) {
            Ok(at) => {
                session.reserve(at, header);
                Placement::At(at)
            }
            Err(error) => waiting(session.wait_for_segment(&error, self.now)),
        }
    }

    fn grant_window(&mut self, bytes: u64, starved: bool) -> WindowPlacement {
        let Some(session) = &mut self.session else { return WindowPlacement::Wait };
        let segment = session.topic.blog.max_batch_bytes();
        if bytes > segment {
            let text = format!("a landing window of {bytes} bytes does not fit into a segment of {segment}");
            return WindowPlacement::Refuse(TransportError::refused(ErrorCode::BadBatch, text));
        }
        match session.topic.blog.reserve(bytes) {
            Ok(at) => {
                session.go_on();
                let topic = Arc::clone(&session.topic);
                WindowPlacement::Granted(Window::new(at, bytes, move |used| {
                    // Batches that were taken are written back when they are published, or given up.
                    topic.blog.write_back(at.add(used), bytes - used);
                    topic.blog.give_back(at, bytes, used);
                    topic.blog.settle(at);
                }))
            }
            Err(error) if starved => match session.wait_for_segment(&error, self.now) {
                Ok(()) => WindowPlacement::Wait,
                Err(refused) => WindowPlacement::Refuse(refused),
            },
            Err(_) => WindowPlacement::Wait,
        }
    }

    fn admit(&mut self, header: &BatchHeader, at: RegionOffset) -> Placement {
        let Some(session) = &mut self.session else { return Placement::Refuse(not_opened()) };
        if let Some(answer) = session.reject_or_wait(self.topics, header, self.now) {
            return answer;
        }
        session.topic.blog.share(at);
        session.active_at = self.now;
        session.reserve(at, header);
        Placement::At(at)
    }

    fn complete(&mut self, header: BatchHeader, at: RegionOffset, in_memory: bool) -> Result<(), TransportError> {
        let Some(session) = &mut self.session else { return Err(not_opened()) };
        self.taken += 1;
        let topic = Arc::clone(&session.topic);
        let batch = Landed { topic, header, at, in_memory, origin: self.origin };
        session.complete(batch, self.topics.region().fabric())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topics::tests::{region, topic};
    use crossbeam_channel::unbounded;
    use embarcadero_cxl::layout::LeaderArea;
    use embarcadero_cxl::leadership::{activate_term, claim_term};
    use embarcadero_cxl::segment::PartitionAllocator;
    use embarcadero_cxl::session_table::{Session, publish_session};
    use embarcadero_cxl::topic_table::publish_topic;
    use embarcadero_wire::{BrokerId, ClientId, Epoch, Incarnation, SessionSlot, SessionToken, Term, TopicId};

    const LEADER: LeaderArea = LeaderArea(BrokerId(0));
    const LIMITS: IngestLimits = IngestLimits {
        max_batch_bytes: 4096,
        exhausted_wait: Duration::ZERO,
        receive_patience: Duration::ZERO,
        verify_body: false,
    };

    #[test]
    fn only_the_token_of_an_open_session_opens_it() {
        let region = region();
        claim_term(&region, LEADER, Term(1));
        publish_topic(&region, LEADER, &topic(0));
        let session = Session {
            slot: SessionSlot(0),
            client_id: ClientId(7),
            epoch: Epoch(1),
            state: SessionState::Open,
            topic: TopicId(0),
            topic_incarnation: Incarnation(1),
            committed: 0,
            ack_level: 1,
            first_epoch: Epoch(1),
            first_sequence: 0,
            token: SessionToken(77),
        };
        publish_session(&region, LEADER, &session);
        activate_term(&region, LEADER, Term(1));
        let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BrokerId(0)));
        let topics = TopicTable::new(region.clone(), BrokerId(0), pool);
        let refusal = |token| {
            let open = OpenPublish {
                client_id: session.client_id,
                session_epoch: session.epoch,
                session_slot: session.slot,
                topic: session.topic,
                topic_incarnation: session.topic_incarnation,
                ack_level: 1,
                token,
                ..OpenPublish::blank()
            };
            match PublisherSession::open(&topics, open, LIMITS, unbounded().0, Instant::now()) {
                Ok(_) => None,
                Err(TransportError::Refused { code, .. }) => Some(code),
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!(refusal(SessionToken(77)), None);
        for token in [SessionToken::NONE, SessionToken(76)] {
            assert_eq!(refusal(token), Some(ErrorCode::UnknownSession));
        }
        // Nobody holds a session without a token.
        publish_session(&region, LEADER, &Session { token: SessionToken::NONE, ..session });
        assert_eq!(refusal(SessionToken::NONE), Some(ErrorCode::UnknownSession));
    }
}
