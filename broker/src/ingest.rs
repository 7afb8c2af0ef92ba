//! Receive: a publisher's connection, from its opening frame to batches that lie complete in the Blog.

use crate::ack::AckQueue;
use crate::delegation::{Landed, Origin};
use crate::topics::{Topic, TopicTable};
use crossbeam_channel::Sender;
use embarcadero_datapath::cxl::headship::NoHead;
use embarcadero_datapath::cxl::layout::SESSION_WINDOW;
use embarcadero_datapath::cxl::session_table::{SessionState, read_progress, read_session};
use embarcadero_datapath::cxl::{LINE_BYTES, Native, RegionOffset};
use embarcadero_datapath::transport::{Landing, Placement, TransportError};
use embarcadero_datapath::wire::batch::{BodyError, check_body, check_lengths};
use embarcadero_datapath::wire::{BatchHeader, ErrorCode, FRAME_BYTES, OpenPublish, PublishReady};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most I/O workers of a broker.
pub const MAX_WORKERS: usize = 64;

/// Bounds on what publishers may do.
#[derive(Clone, Copy, Debug)]
pub struct IngestLimits {
    /// Largest batch, header and body, bytes.
    pub max_batch_bytes: u64,
    /// How long a publisher waits for memory before it gets an error.
    pub exhausted_wait: Duration,
    /// Check the body's checksum on arrival, not only at the subscriber.
    pub verify_body: bool,
}

/// A publisher's session on one connection.
pub struct PublisherSession {
    topic: Arc<Topic<Native>>,
    open: OpenPublish,
    /// What is to be acknowledged.
    pub acks: AckQueue,
    limits: IngestLimits,
    landed: Sender<Landed<Native>>,
    /// The reservation that a body is being received into.
    reserved: Option<RegionOffset>,
    /// Landing windows that its NIC may fill.
    windows: Vec<Window>,
    /// When a batch last came into one, or the connection was opened.
    active_at: Instant,
    progress: u64,
    waiting_since: Option<Instant>,
}

/// A reservation that several batches share.
struct Window {
    at: RegionOffset,
    bytes: u64,
    used: u64,
}

impl PublisherSession {
    /// Checks an opening frame against the topic and the session table.
    ///
    /// # Errors
    /// A refusal that says what is wrong.
    pub fn open(
        topics: &TopicTable<Native>,
        open: OpenPublish,
        limits: IngestLimits,
        landed: Sender<Landed<Native>>,
    ) -> Result<(Self, PublishReady), TransportError> {
        let refuse = |code, text: String| Err(TransportError::refused(code, text));
        let nobody = |error: NoHead| TransportError::refused(ErrorCode::Unavailable, error.to_string());
        let Some(topic) = topics.get(open.topic, open.topic_incarnation).map_err(nobody)? else {
            let text = format!("topic slot {} incarnation {} is not live", open.topic, open.topic_incarnation);
            return refuse(ErrorCode::UnknownTopic, text);
        };
        let region = topics.region();
        let standing = read_session(region, open.session_slot).map_err(nobody)?.filter(|session| {
            session.client_id == open.client_id
                && session.epoch == open.session_epoch
                && session.topic == open.topic
                && session.topic_incarnation == open.topic_incarnation
                && session.state == SessionState::Open
        });
        let Some(session) = standing else {
            let text = format!(
                "client {:#x} has no open session of epoch {} in slot {}",
                open.client_id, open.session_epoch, open.session_slot
            );
            return refuse(ErrorCode::UnknownSession, text);
        };
        if open.ack_level != u32::from(session.ack_level) {
            let text = format!("ack level is {}, the session was opened with {}", open.ack_level, session.ack_level);
            return refuse(ErrorCode::AckLevel, text);
        }
        let stream = topic.stream(topics.broker());
        let acks = AckQueue::new(open.session_slot, open.client_id, open.session_epoch, stream, open.ack_level);
        let global = topic.config.order.is_global();
        let ready = PublishReady {
            committed: if global { read_progress(region, open.session_slot).map_err(nobody)? } else { 0 },
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
            windows: Vec::new(),
            active_at: Instant::now(),
            progress: ready.committed,
            waiting_since: None,
        };
        Ok((session, ready))
    }

    /// The topic.
    pub fn topic(&self) -> &Arc<Topic<Native>> {
        &self.topic
    }

    /// True when the client wants acks.
    pub fn wants_acks(&self) -> bool {
        self.open.ack_level > 0
    }

    /// First sequence of which the client wants to hear.
    pub fn resume_from(&self) -> u64 {
        self.open.resume_from
    }

    /// A batch is complete: checks its body and hands it to the delegation. `in_memory` as [`Landed::in_memory`].
    ///
    /// # Errors
    /// The body does not fit its header; the batch is given up.
    pub fn complete(
        &mut self,
        memory: &Native,
        header: BatchHeader,
        at: RegionOffset,
        in_memory: bool,
        origin: Origin,
    ) -> Result<(), TransportError> {
        self.check(memory, &header, at)?;
        self.reserved = None;
        if self.wants_acks() {
            self.acks.expect(header.sequence);
        }
        let landed = Landed { topic: Arc::clone(&self.topic), header, at, in_memory, origin };
        self.landed.try_send(landed).map_err(|_| {
            self.topic.blog.settle(at);
            TransportError::refused(ErrorCode::Unavailable, "the broker is shutting down")
        })
    }

    fn check(&self, memory: &Native, header: &BatchHeader, at: RegionOffset) -> Result<(), BodyError> {
        let table_at = at.add(FRAME_BYTES as u64 + header.table_at());
        let table_bytes = u64::from(header.message_count) * 4;
        if self.limits.verify_body {
            memory.with_bytes(at.add(FRAME_BYTES as u64), header.body_bytes(), |body| {
                check_lengths(header, body)?;
                check_body(header, body)
            })
        } else {
            memory.with_bytes(table_at, table_bytes, |table| header.check_table(table))
        }
    }

    /// The publisher waits, and after a while it is told why.
    fn wait_for_room(&mut self, reason: &str) -> Placement {
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        if since.elapsed() < self.limits.exhausted_wait {
            return Placement::Wait;
        }
        let text = format!("{reason} (waited {} ms)", self.limits.exhausted_wait.as_millis());
        Placement::Refuse(TransportError::refused(ErrorCode::PoolExhausted, text))
    }

    /// True when its landing windows keep segments that nothing else is received into from being reclaimed, and it has
    /// sent nothing for `idle`.
    pub fn hoards(&self, idle: Duration) -> bool {
        self.active_at.elapsed() > idle && self.windows.iter().any(|window| !self.topic.blog.is_current(window.at))
    }

    /// Gives back what a closed window does not hold batches in.
    fn give_back(&self, window: &Window) {
        self.topic.blog.give_back(window.at, window.bytes, window.used);
        self.topic.blog.settle(window.at);
    }

    /// Checks a batch's header against the session; what to answer if it is not to be taken now.
    fn stops(&mut self, topics: &TopicTable<Native>, header: &BatchHeader) -> Option<Placement> {
        let refuse = |code, text: String| Some(Placement::Refuse(TransportError::refused(code, text)));
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
        if self.topic.is_deleted() {
            return refuse(ErrorCode::TopicDeleted, format!("topic {} is deleted", self.topic.config.name));
        }
        if self.topic.config.order.is_global() && header.sequence >= self.progress + SESSION_WINDOW {
            self.progress = read_progress(topics.region(), self.open.session_slot).unwrap_or(self.progress);
            if header.sequence >= self.progress + SESSION_WINDOW {
                return Some(Placement::Wait);
            }
        }
        if self.acks.is_full() {
            return Some(Placement::Wait);
        }
        if !self.can_hand_over() {
            let reason = "batches that are here cannot be ordered: the Batchlog or the order index has no room";
            return Some(self.wait_for_room(reason));
        }
        None
    }

    /// Room for one more batch between here and the delegation.
    pub fn can_hand_over(&self) -> bool {
        // Other workers hand over too; each has at most one batch between this check and its hand-over.
        self.landed.capacity().is_none_or(|capacity| self.landed.len() + MAX_WORKERS < capacity)
    }
}

impl Drop for PublisherSession {
    fn drop(&mut self) {
        if let Some(at) = self.reserved.take() {
            self.topic.blog.settle(at);
        }
        // The connection is gone or has closed them.
        for window in &self.windows {
            self.give_back(window);
        }
    }
}

/// Where a publisher's next batch goes.
pub struct Place<'a> {
    /// All topics.
    pub topics: &'a TopicTable<Native>,
    /// The publisher; `None` before its opening frame.
    pub session: Option<&'a mut PublisherSession>,
}

fn not_opened() -> Placement {
    let text = "a batch came on a connection that was not opened for publishing";
    Placement::Refuse(TransportError::refused(ErrorCode::UnknownSession, text))
}

impl Landing for Place<'_> {
    fn place(&mut self, header: &BatchHeader) -> Placement {
        let Some(session) = &mut self.session else { return not_opened() };
        if let Some(answer) = session.stops(self.topics, header) {
            return answer;
        }
        match session.topic.blog.reserve(header.batch_bytes()) {
            Ok(at) => {
                session.reserved = Some(at);
                session.waiting_since = None;
                Placement::At(at)
            }
            Err(error) => session.wait_for_room(&error.to_string()),
        }
    }

    fn lease(&mut self, bytes: u64, starved: bool) -> Placement {
        let Some(session) = &mut self.session else { return Placement::Wait };
        let segment = session.topic.blog.max_batch_bytes();
        if bytes > segment {
            let text = format!("a landing window of {bytes} bytes does not fit into a segment of {segment}");
            return Placement::Refuse(TransportError::refused(ErrorCode::BadBatch, text));
        }
        match session.topic.blog.reserve(bytes) {
            Ok(at) => {
                session.windows.push(Window { at, bytes, used: 0 });
                session.waiting_since = None;
                Placement::At(at)
            }
            Err(error) if starved => session.wait_for_room(&error.to_string()),
            Err(_) => Placement::Wait,
        }
    }

    fn admit(&mut self, header: &BatchHeader, at: RegionOffset) -> Placement {
        let Some(session) = &mut self.session else { return not_opened() };
        if let Some(answer) = session.stops(self.topics, header) {
            return answer;
        }
        let inside = |window: &&mut Window| (window.at.0..window.at.0 + window.bytes).contains(&at.0);
        let Some(window) = session.windows.iter_mut().find(inside) else { return not_opened() };
        window.used = (at.0 + header.batch_bytes() - window.at.0).next_multiple_of(LINE_BYTES).min(window.bytes);
        session.topic.blog.share(at);
        session.active_at = Instant::now();
        session.reserved = Some(at);
        session.waiting_since = None;
        Placement::At(at)
    }

    fn close(&mut self, at: RegionOffset) {
        let Some(session) = &mut self.session else { return };
        if let Some(index) = session.windows.iter().position(|window| window.at == at) {
            let window = session.windows.swap_remove(index);
            session.give_back(&window);
        }
    }
}
