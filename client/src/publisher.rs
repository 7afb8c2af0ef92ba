//! A publisher: fills batches, stripes them over brokers, and keeps each until it is acknowledged.
//!
//! Whoever calls drives: `publish`, `poll` and `flush` move bytes themselves, so an active application needs no
//! hand-over to another thread. The client's background thread steps in when the application does not call, and does
//! what blocks: connecting and opening sessions.

use crate::batching::{AHEAD, BatchSizer, Load, Sealed};
use crate::client::{Background, BrokerView, Inner, TopicView};
use crate::error::ClientError;
use crate::link::{Link, LinkEvent, refused};
use crate::verbs::heaviest_batch;
use embarcadero_control::v1 as proto;
use embarcadero_datapath::transport::tcp::wait_any;
use embarcadero_datapath::wire::batch::{BatchBuilder, BatchOrigin};
use embarcadero_datapath::wire::{BatchHeader, ErrorCode, Frame, OpenPublish, UNKNOWN_OFFSET};
use spin::mutex::SpinMutex;
use spin::relax::Yield;
use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Batches whose offsets stay known after they were acknowledged.
const REMEMBERED_BATCHES: usize = 4096;
/// Batches that wait in one connection before another is chosen.
const QUEUED_PER_LINK: usize = 2;
/// Messages after which `publish` goes on writing what a socket had no room for.
const DRIVE_EVERY: u32 = 128;
/// Part of the progress timeout after which a publisher tries other connections.
const SILENCE: u32 = 4;
/// Time after which the brokers are asked for anew.
const REFRESH: Duration = Duration::from_secs(1);
/// First and longest wait before a connection is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Names a published message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId {
    /// Number of its batch, counted by this publisher from 0.
    pub batch: u64,
    /// Place in the batch.
    pub index: u32,
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not acknowledged yet.
    Pending,
    /// Acknowledged, at this offset. `None` when it is known no more (ack level 0, or long ago).
    Acknowledged(Option<u64>),
}

/// Figures of a publisher.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PublisherStats {
    /// Batches acknowledged.
    pub batches_acknowledged: u64,
    /// Batches sent again, on another connection or under another epoch.
    pub batches_resubmitted: u64,
    /// Sessions opened after the first.
    pub sessions_reopened: u64,
    /// Connections lost.
    pub connections_lost: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Waits for a connection.
    Queued,
    /// On a connection, or on none but known to be committed: its ack will come.
    Sent(Option<usize>),
    /// Done.
    Acknowledged(u64),
}

struct InFlight {
    builder: BatchBuilder,
    header: BatchHeader,
    state: State,
}

enum Connection {
    Down {
        retry_at: Instant,
        wait: Duration,
    },
    /// Being connected by the background thread.
    Connecting,
    Up {
        link: Link,
        ready: bool,
    },
}

struct Slot {
    broker: BrokerView,
    connection: Connection,
    /// Batches to write, and how many bytes of the first are written.
    queue: VecDeque<u64>,
    written: usize,
    /// Without acknowledgements: batches that were written, and are read in place.
    reading: VecDeque<u64>,
    /// Changes with each connection, so that a late result is not taken for the present one's.
    attempt: u64,
}

struct Driver {
    origin: BatchOrigin,
    ack_level: u8,
    /// Sequence on the wire = batch number + this (wrapping).
    shift: u64,
    /// Batch numbers below this are committed by the broker's word.
    committed: u64,
    slots: Vec<Slot>,
    next_slot: usize,
    /// Number of the first batch in `in_flight`.
    first: u64,
    in_flight: VecDeque<InFlight>,
    /// Batches to hand to a connection, in order.
    queue: VecDeque<u64>,
    free: Vec<BatchBuilder>,
    /// Bytes of all buffers: the open one's, of those in flight, and of those that are free.
    held_bytes: usize,
    done: VecDeque<u64>,
    window: usize,
    checksum: bool,
    reopen: bool,
    failed: Option<ClientError>,
    /// Why the last connection could not be made.
    refused: Option<ClientError>,
    stats: PublisherStats,
    driven_at: Instant,
    /// When the brokers were last asked for.
    refreshed_at: Instant,
    /// When a batch was last acknowledged, or the first of those in flight was sealed.
    progressed_at: Instant,
}

struct Open {
    builder: Option<BatchBuilder>,
    /// Number of the batch being filled.
    batch: u64,
    /// The batch before it was full.
    streaming: bool,
    sealed_at: Instant,
    sizer: BatchSizer,
}

/// Why the open batch may go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// A message was added.
    Added,
    /// The application waits for it, or has been silent for a while.
    Awaited,
    /// The next message does not fit.
    Full,
    /// The application flushes.
    Flushed,
}

pub(crate) struct PublisherCore {
    inner: Arc<Inner>,
    topic: TopicView,
    /// Taken once a message. A lock that is let go by a plain store: an atomic read-modify-write would wait for the
    /// message's bytes to leave the store buffer.
    open: SpinMutex<Open, Yield>,
    driver: Mutex<Driver>,
    in_flight: AtomicUsize,
    /// [`AHEAD`] batches or more wait for connections.
    ahead: AtomicBool,
    /// Batches below this are acknowledged.
    acknowledged: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open_session(inner: &Inner, topic: &str, client_id: u64) -> Result<proto::OpenSessionResponse, ClientError> {
    let ack_level = inner.config.ack_level.into();
    let request = proto::OpenSessionRequest { topic: topic.to_owned(), client_id, ack_level };
    inner.control().head(async |client| client.open_session(request.clone()).await)
}

impl PublisherCore {
    pub(crate) fn open(inner: Arc<Inner>, topic: &str) -> Result<Arc<Self>, ClientError> {
        let client_id = rand::random::<u64>().max(1);
        let session = open_session(&inner, topic, client_id)?;
        let (topic, cluster) = inner.topic(topic)?;
        let config = &inner.config;
        let (least, most) = config.batch_bytes();
        if least as u64 > session.max_batch_bytes {
            let key = if config.batch_size.is_some() { "batch_size" } else { "batch_size_min" };
            let bound = format!("at most {}, the brokers' max_batch_bytes", session.max_batch_bytes);
            return Err(ClientError::Config { key, value: least.to_string(), bound });
        }
        let most = most.min(session.max_batch_bytes as usize);
        let sizer = BatchSizer::between(least, most, config.buffer_bytes);
        let sizer = heaviest_batch(config.transport).map_or(sizer, |bytes| sizer.capped(bytes));
        let buffers = config.buffer_bytes / least;
        let mut brokers = cluster.brokers;
        if config.max_brokers > 0 && config.max_brokers < brokers.len() {
            // Different clients start with different brokers.
            let start = client_id as usize % brokers.len();
            brokers.rotate_left(start);
            brokers.truncate(config.max_brokers);
        }
        let now = Instant::now();
        let slots = brokers.into_iter().map(|broker| Slot::new(broker, now)).collect();
        let driver = Driver {
            origin: origin(&session, &topic, client_id),
            ack_level: config.ack_level,
            shift: session.next_sequence,
            committed: 0,
            slots,
            next_slot: client_id as usize,
            first: 0,
            in_flight: VecDeque::with_capacity(buffers),
            queue: VecDeque::with_capacity(buffers),
            free: Vec::with_capacity(buffers),
            held_bytes: 0,
            done: VecDeque::with_capacity(REMEMBERED_BATCHES),
            window: session.window_batches as usize,
            checksum: config.batch_checksum,
            reopen: false,
            failed: None,
            refused: None,
            stats: PublisherStats::default(),
            driven_at: now,
            refreshed_at: now,
            progressed_at: now,
        };
        let core = Arc::new(Self {
            topic,
            open: SpinMutex::new(Open { builder: None, batch: 0, streaming: false, sealed_at: now, sizer }),
            driver: Mutex::new(driver),
            in_flight: AtomicUsize::new(0),
            ahead: AtomicBool::new(false),
            acknowledged: AtomicU64::new(0),
            inner,
        });
        core.connect_due();
        let driver = lock(&core.driver);
        if driver.slots.iter().all(|slot| !matches!(slot.connection, Connection::Up { .. })) {
            let why = driver.refused.as_ref().map_or(String::new(), |error| format!(": {error}"));
            return Err(ClientError::Unreachable(format!("no broker accepts data connections{why}")));
        }
        drop(driver);
        Ok(core)
    }

    /// One round by the background thread; true while batches are under way.
    pub(crate) fn attend(&self) -> bool {
        let (reopen, idle) = {
            let Ok(driver) = self.driver.try_lock() else { return true };
            (driver.reopen && driver.failed.is_none(), driver.driven_at.elapsed() > Duration::from_micros(500))
        };
        if reopen {
            self.reopen();
        }
        self.connect_due();
        self.refresh_if_due();
        if idle {
            self.send_open(Occasion::Awaited);
        }
        let mut driver = lock(&self.driver);
        driver.leave_silent_brokers(self.inner.config.progress_timeout() / SILENCE);
        if idle {
            self.drive(&mut driver);
        }
        drop(driver);
        self.in_flight.load(Ordering::Relaxed) > 0 || self.open.lock().builder.is_some()
    }

    /// Opens the next epoch and marks for resubmission what did not commit under the last.
    fn reopen(&self) {
        let client_id = lock(&self.driver).origin.client_id;
        let session = open_session(&self.inner, &self.topic.name, client_id);
        let mut driver = lock(&self.driver);
        let session = match session {
            Ok(session) => session,
            // The head may be back later; only what can never work ends the publisher.
            Err(error @ ClientError::Control { .. }) => {
                driver.failed = Some(error);
                return;
            }
            Err(_) => return,
        };
        let row_kept = session.slot == driver.origin.session_slot;
        let global = self.topic.order.is_global();
        driver.stats.sessions_reopened += 1;
        driver.reopen = false;
        driver.origin = origin(&session, &self.topic, client_id);
        if row_kept && global {
            driver.committed = driver.committed.max(session.next_sequence.wrapping_sub(driver.shift));
        } else if global {
            driver.shift = session.next_sequence.wrapping_sub(driver.first);
        }
        for slot in &mut driver.slots {
            slot.down(Duration::ZERO);
        }
        // Each new connection begins with the acks of what is committed: only the rest is sent again.
        let committed = driver.committed;
        driver.requeue(|_| true, committed);
    }

    /// Connects what is down and due. May block for as long as connecting does.
    fn connect_due(&self) {
        let now = Instant::now();
        let (due, open) = {
            let mut driver = lock(&self.driver);
            if driver.reopen || driver.failed.is_some() {
                return;
            }
            let mut due = Vec::new();
            for (index, slot) in driver.slots.iter_mut().enumerate() {
                if let Connection::Down { retry_at, wait } = slot.connection
                    && retry_at <= now
                {
                    slot.connection = Connection::Connecting;
                    slot.attempt += 1;
                    due.push((index, slot.broker.clone(), wait, slot.attempt));
                }
            }
            (due, driver.opening())
        };
        if due.is_empty() {
            return;
        }
        let options = self.inner.link_options();
        let mut refresh = false;
        for (index, broker, wait, attempt) in due {
            let link = match &options {
                Ok(options) => Link::open(broker.data, options, open).map_err(ClientError::io("connect to a broker")),
                Err(error) => Err(error.clone()),
            };
            let mut driver = lock(&self.driver);
            let Some(slot) = driver.slots.get_mut(index).filter(|slot| slot.attempt == attempt) else { continue };
            match link {
                Ok(link) => slot.connection = Connection::Up { link, ready: false },
                Err(error) => {
                    refresh = true;
                    driver.refused = Some(error);
                    let Some(slot) = driver.slots.get_mut(index) else { continue };
                    slot.down((wait * 2).clamp(RETRY.0, RETRY.1));
                }
            }
        }
        if refresh {
            self.refresh_brokers();
        }
    }

    /// Brokers come and go while connections last.
    fn refresh_if_due(&self) {
        let due = |driver: &Driver| driver.failed.is_none() && driver.refreshed_at.elapsed() > REFRESH;
        if due(&lock(&self.driver)) {
            self.refresh_brokers();
        }
    }

    /// Takes up brokers that came back elsewhere, and new ones.
    fn refresh_brokers(&self) {
        lock(&self.driver).refreshed_at = Instant::now();
        let Ok(cluster) = self.inner.cluster() else { return };
        let limit = self.inner.config.max_brokers;
        let mut driver = lock(&self.driver);
        for broker in cluster.brokers {
            let room = limit == 0 || driver.slots.len() < limit;
            match driver.slots.iter_mut().find(|slot| slot.broker.id == broker.id) {
                Some(slot) => slot.broker = broker,
                None if room => driver.slots.push(Slot::new(broker, Instant::now())),
                None => {}
            }
        }
    }

    fn send_open(&self, occasion: Occasion) {
        let mut open = self.open.lock();
        self.seal(&mut open, occasion);
    }

    /// Hands the open batch over if the occasion or the policy says so.
    fn seal(&self, open: &mut Open, occasion: Occasion) {
        let Some(builder) = open.builder.as_ref().filter(|builder| !builder.is_empty()) else { return };
        let load = Load {
            in_flight: self.in_flight.load(Ordering::Relaxed),
            open_bytes: builder.batch_bytes(),
            open_messages: builder.message_count(),
            streaming: open.streaming,
            awaited: occasion == Occasion::Awaited,
        };
        if !(matches!(occasion, Occasion::Full | Occasion::Flushed) || open.sizer.goes(load)) {
            return;
        }
        let Some(mut builder) = open.builder.take() else { return };
        open.batch += 1;
        open.streaming = occasion == Occasion::Full;
        let mut driver = lock(&self.driver);
        let number = driver.first + driver.in_flight.len() as u64;
        let sequence = number.wrapping_add(driver.shift);
        let header = builder.seal(&driver.origin, sequence, driver.checksum);
        if driver.in_flight.is_empty() {
            driver.progressed_at = Instant::now();
        }
        driver.in_flight.push_back(InFlight { builder, header, state: State::Queued });
        driver.queue.push_back(number);
        self.in_flight.store(driver.in_flight.len(), Ordering::Relaxed);
        let offered_at = Instant::now();
        self.drive(&mut driver);
        open.sizer.sealed(Sealed {
            full: open.streaming,
            interval: driver.driven_at - open.sealed_at,
            sending: driver.driven_at - offered_at,
            waiting: driver.queue.len(),
        });
        open.sealed_at = driver.driven_at;
    }

    /// Moves bytes and takes acks.
    fn drive(&self, driver: &mut Driver) -> bool {
        let first = driver.first;
        let moved = driver.drive();
        driver.driven_at = Instant::now();
        if driver.first != first || driver.in_flight.is_empty() {
            driver.progressed_at = driver.driven_at;
        }
        self.in_flight.store(driver.in_flight.len(), Ordering::Relaxed);
        self.ahead.store(driver.is_ahead(), Ordering::Relaxed);
        self.acknowledged.store(driver.first, Ordering::Release);
        moved
    }
}

fn origin(session: &proto::OpenSessionResponse, topic: &TopicView, client_id: u64) -> BatchOrigin {
    BatchOrigin {
        client_id,
        session_epoch: session.epoch,
        session_slot: session.slot,
        topic: topic.id,
        topic_incarnation: topic.incarnation,
    }
}

impl Slot {
    fn new(broker: BrokerView, now: Instant) -> Self {
        let connection = Connection::Down { retry_at: now, wait: Duration::ZERO };
        Self { broker, connection, queue: VecDeque::new(), written: 0, reading: VecDeque::new(), attempt: 0 }
    }

    fn down(&mut self, wait: Duration) {
        self.connection = Connection::Down { retry_at: Instant::now() + wait, wait };
        self.attempt += 1;
        self.queue.clear();
        self.written = 0;
        self.reading.clear();
    }

    fn is_ready(&self) -> bool {
        matches!(self.connection, Connection::Up { ready: true, .. })
    }
}

impl Driver {
    fn opening(&self) -> OpenPublish {
        OpenPublish {
            client_id: self.origin.client_id,
            resume_from: self.first.wrapping_add(self.shift),
            session_epoch: self.origin.session_epoch,
            session_slot: self.origin.session_slot,
            topic: self.origin.topic,
            topic_incarnation: self.origin.topic_incarnation,
            ack_level: self.ack_level.into(),
            ..OpenPublish::blank()
        }
    }

    /// Queues again what was on connections for which `lost` holds, except batches below `committed`.
    fn requeue(&mut self, lost: impl Fn(usize) -> bool, committed: u64) {
        let first = self.first;
        let mut again = 0;
        for (number, batch) in (first..).zip(&mut self.in_flight) {
            match batch.state {
                State::Sent(Some(slot)) if lost(slot) && self.ack_level == 0 => {
                    batch.state = State::Acknowledged(UNKNOWN_OFFSET)
                }
                State::Sent(Some(slot)) if lost(slot) => {
                    batch.state = if number < committed { State::Sent(None) } else { State::Queued };
                    again += u64::from(number >= committed);
                }
                _ => {}
            }
        }
        self.stats.batches_resubmitted += again;
        self.queue.clear();
        self.queue.extend((first..).zip(&self.in_flight).filter(|(_, b)| b.state == State::Queued).map(|(n, _)| n));
    }

    fn lose(&mut self, index: usize, wait: Duration) {
        self.stats.connections_lost += 1;
        if let Some(slot) = self.slots.get_mut(index) {
            slot.down(wait);
        }
        // Also what is committed: its ack was lost with the connection, and a duplicate is acknowledged again.
        self.requeue(|slot| slot == index, 0);
    }

    /// Gives up connections with batches on them when nothing has been acknowledged for `silence`: a broker that is
    /// cut off keeps its connections open and says nothing. Other connections, and new ones, get the batches.
    fn leave_silent_brokers(&mut self, silence: Duration) {
        if self.in_flight.is_empty() || self.progressed_at.elapsed() < silence {
            return;
        }
        self.progressed_at = Instant::now();
        for index in 0..self.slots.len() {
            if self.slots[index].is_ready()
                && self.in_flight.iter().any(|batch| batch.state == State::Sent(Some(index)))
            {
                self.lose(index, RETRY.0);
            }
        }
    }

    fn drive(&mut self) -> bool {
        let mut moved = false;
        for index in 0..self.slots.len() {
            moved |= self.hear(index);
        }
        self.assign();
        for index in 0..self.slots.len() {
            moved |= self.write(index);
        }
        self.retire();
        moved
    }

    /// Takes what the broker says.
    fn hear(&mut self, index: usize) -> bool {
        let mut moved = false;
        loop {
            let Some(Slot { connection: Connection::Up { link, ready }, .. }) = self.slots.get_mut(index) else {
                return moved;
            };
            match link.poll() {
                LinkEvent::Nothing => return moved,
                LinkEvent::Frame(Frame::PublishReady(_)) => *ready = true,
                LinkEvent::Frame(Frame::Ack(ack)) => self.acknowledge(ack.sequence, ack.first_offset, ack.committed),
                LinkEvent::Frame(Frame::Fenced(fenced)) if fenced.session_epoch == self.origin.session_epoch => {
                    self.reopen = true;
                }
                LinkEvent::Frame(_) => {}
                LinkEvent::Refused(ErrorCode::UnknownSession, _) => {
                    self.reopen = true;
                    self.lose(index, RETRY.0);
                }
                LinkEvent::Refused(ErrorCode::BadFrame | ErrorCode::Unavailable, _) | LinkEvent::Lost => {
                    self.lose(index, RETRY.0);
                }
                LinkEvent::Refused(code, text) => {
                    self.failed = Some(refused(code, text, 0));
                    self.lose(index, RETRY.1);
                }
            }
            moved = true;
        }
    }

    fn acknowledge(&mut self, sequence: u64, first_offset: u64, committed: u64) {
        let number = sequence.wrapping_sub(self.shift);
        let committed = committed.wrapping_sub(self.shift);
        if committed <= self.first + self.in_flight.len() as u64 {
            self.committed = self.committed.max(committed);
        }
        let Some(index) = number.checked_sub(self.first) else { return };
        if let Some(batch) = self.in_flight.get_mut(index as usize)
            && !matches!(batch.state, State::Acknowledged(_))
        {
            if batch.state == State::Queued {
                self.queue.retain(|queued| *queued != number);
            }
            batch.state = State::Acknowledged(first_offset);
        }
    }

    /// Gives queued batches to connections in turn.
    fn assign(&mut self) {
        while let Some(number) = self.queue.front().copied() {
            if self.slots.is_empty() || (number - self.first) as usize >= self.window {
                return;
            }
            let count = self.slots.len();
            let chosen = (0..count)
                .map(|step| (self.next_slot + step) % count)
                .find(|index| self.slots[*index].is_ready() && self.slots[*index].queue.len() < QUEUED_PER_LINK);
            let Some(chosen) = chosen else { return };
            self.next_slot = chosen + 1;
            self.queue.pop_front();
            let sequence = number.wrapping_add(self.shift);
            let origin = self.origin;
            let Some(batch) = self.in_flight.get_mut((number - self.first) as usize) else { continue };
            if batch.header.session_epoch != origin.session_epoch || batch.header.sequence != sequence {
                batch.header.sequence = sequence;
                batch.header = batch.builder.readdress(&batch.header, &origin);
            }
            batch.state = State::Sent(Some(chosen));
            self.slots[chosen].queue.push_back(number);
        }
    }

    fn write(&mut self, index: usize) -> bool {
        let mut moved = false;
        loop {
            let Some(slot) = self.slots.get_mut(index) else { return moved };
            let Connection::Up { link, .. } = &mut slot.connection else { return moved };
            let Some(number) = slot.queue.front().copied() else { break };
            // Acknowledged by another way while it waited: what is half written must still be completed.
            let Some(batch) = number.checked_sub(self.first).and_then(|at| self.in_flight.get_mut(at as usize)) else {
                slot.queue.pop_front();
                continue;
            };
            match link.write(&mut batch.builder, slot.written) {
                Ok(0) => break,
                Ok(written) => {
                    moved = true;
                    slot.written += written;
                    if slot.written == batch.builder.bytes().len() {
                        slot.written = 0;
                        slot.queue.pop_front();
                        if self.ack_level == 0 {
                            slot.reading.push_back(number);
                        }
                        self.assign();
                    }
                }
                Err(_) => {
                    self.lose(index, RETRY.0);
                    return true;
                }
            }
        }
        let Some(Slot { connection: Connection::Up { link, .. }, reading, .. }) = self.slots.get_mut(index) else {
            return moved;
        };
        if link.flush().is_err() {
            self.lose(index, RETRY.0);
            return true;
        }
        // Without acknowledgements, a batch is done once its bytes are with the network.
        let in_use = link.in_use();
        while reading.len() > in_use {
            moved = true;
            let done = reading.pop_front().and_then(|number| number.checked_sub(self.first));
            if let Some(batch) = done.and_then(|at| self.in_flight.get_mut(at as usize)) {
                batch.state = State::Acknowledged(UNKNOWN_OFFSET);
            }
        }
        moved
    }

    /// Takes acknowledged batches off the front and their buffers back.
    fn retire(&mut self) {
        while let Some(InFlight { state: State::Acknowledged(offset), .. }) = self.in_flight.front() {
            let (offset, number) = (*offset, self.first);
            if self.slots.iter().any(|slot| slot.queue.contains(&number)) {
                return; // its bytes are still being written
            }
            let Some(mut batch) = self.in_flight.pop_front() else { return };
            self.first += 1;
            self.stats.batches_acknowledged += 1;
            if self.done.len() == REMEMBERED_BATCHES {
                self.done.pop_front();
            }
            self.done.push_back(offset);
            batch.builder.clear();
            self.free.push(batch.builder);
        }
    }

    fn status(&self, id: MessageId) -> Option<Status> {
        let known = |offset: u64| (offset != UNKNOWN_OFFSET).then(|| offset + u64::from(id.index));
        if let Some(index) = id.batch.checked_sub(self.first) {
            return self.in_flight.get(index as usize).map(|batch| match batch.state {
                State::Acknowledged(offset) => Status::Acknowledged(known(offset)),
                _ => Status::Pending,
            });
        }
        let back = (self.first - id.batch) as usize;
        let offset = self.done.len().checked_sub(back).and_then(|at| self.done.get(at)).copied();
        Some(Status::Acknowledged(offset.and_then(known)))
    }

    /// A buffer for a batch of `size` bytes while all of them have `budget` bytes; `None` when too much is in flight.
    fn buffer_of(&mut self, size: usize, budget: usize) -> Result<Option<BatchBuilder>, ClientError> {
        if let Some(index) = self.free.iter().rposition(|builder| builder.capacity() == size) {
            return Ok(Some(self.free.swap_remove(index)));
        }
        // Those that are free have a size of before.
        while self.held_bytes + size > budget {
            let Some(other) = self.free.pop() else { return Ok(None) };
            self.held_bytes -= other.capacity();
        }
        let builder = BatchBuilder::new(size).map_err(ClientError::io("get memory for a batch"))?;
        self.held_bytes += size;
        Ok(Some(builder))
    }

    /// True while there are connections, and more batches wait for them than keep them busy. Without one, the buffer is
    /// there to be filled until one is back.
    fn is_ahead(&self) -> bool {
        self.queue.len() >= AHEAD && self.slots.iter().any(Slot::is_ready)
    }

    /// True while a connection has yet to take what was given to it.
    fn wants_room(&self) -> bool {
        self.slots.iter().any(|slot| !slot.queue.is_empty())
    }

    /// Has connections show on their descriptors what comes from here on.
    fn arm(&mut self) {
        for index in 0..self.slots.len() {
            if let Connection::Up { link, .. } = &mut self.slots[index].connection
                && link.arm().is_err()
            {
                self.lose(index, RETRY.0);
            }
        }
    }

    fn descriptors(&self) -> Vec<(RawFd, bool)> {
        let up = self.slots.iter().filter_map(|slot| match &slot.connection {
            Connection::Up { link, .. } => Some(link.descriptors(!slot.queue.is_empty())),
            _ => None,
        });
        up.flatten().collect()
    }
}

/// Publishes to one topic under one session. Threads may share it; each keeps its own order.
pub struct Publisher {
    core: Arc<PublisherCore>,
    _background: Arc<Background>,
}

impl Publisher {
    pub(crate) fn new(core: Arc<PublisherCore>, background: Arc<Background>) -> Self {
        Self { core, _background: background }
    }

    /// Copies a message into the open batch. Never blocks on the network.
    ///
    /// # Errors
    /// [`ClientError::BufferFull`] when every buffer holds messages that are not acknowledged (call
    /// [`Publisher::wait`], or use [`Publisher::publish_wait`]); [`ClientError::MessageTooLarge`]; or why the
    /// publisher failed for good.
    #[inline]
    pub fn publish(&self, message: &[u8]) -> Result<MessageId, ClientError> {
        self.publish_as(message.len(), |builder| builder.push(message))
    }

    /// Lets `fill` write a message of `bytes` in place: no copy.
    ///
    /// # Errors
    /// As [`Publisher::publish`].
    #[inline]
    pub fn publish_with(&self, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<MessageId, ClientError> {
        self.publish_as(bytes, |builder| builder.push_with(bytes, fill))
    }

    #[inline]
    fn publish_as(&self, bytes: usize, push: impl FnOnce(&mut BatchBuilder)) -> Result<MessageId, ClientError> {
        let core = &*self.core;
        let mut open = core.open.lock();
        if open.builder.as_ref().is_none_or(|builder| !builder.fits(bytes)) {
            self.next_builder(&mut open, bytes)?;
        }
        let id = MessageId { batch: open.batch, index: open.builder.as_ref().map_or(0, BatchBuilder::message_count) };
        if let Some(builder) = &mut open.builder {
            push(builder);
        }
        if core.in_flight.load(Ordering::Relaxed) == 0 {
            core.seal(&mut open, Occasion::Added);
        } else if (id.index + 1).is_multiple_of(DRIVE_EVERY)
            && let Ok(mut driver) = core.driver.try_lock()
            && driver.wants_room()
        {
            core.drive(&mut driver);
        }
        Ok(id)
    }

    #[cold]
    fn next_builder(&self, open: &mut Open, bytes: usize) -> Result<(), ClientError> {
        let core = &*self.core;
        let budget = core.inner.config.buffer_bytes;
        let max = BatchBuilder::largest_message(open.sizer.largest());
        if bytes > max {
            return Err(ClientError::MessageTooLarge { bytes, max });
        }
        core.seal(open, Occasion::Full);
        let mut driver = lock(&core.driver);
        if let Some(error) = &driver.failed {
            return Err(error.clone());
        }
        let mut size = open.sizer.size();
        while bytes > BatchBuilder::largest_message(size) {
            size = (size * 2).min(open.sizer.largest());
        }
        let builder = match driver.buffer_of(size, budget)? {
            Some(builder) => builder,
            None => {
                core.drive(&mut driver);
                driver.buffer_of(size, budget)?.ok_or(ClientError::BufferFull { bytes: budget })?
            }
        };
        open.builder = Some(builder);
        Ok(())
    }

    /// As [`Publisher::publish`], waiting while the buffer is full, or 16 batches wait for the connections that there are:
    /// with more, a message would only be older when it is sent, and its batch no longer in the cache.
    ///
    /// # Errors
    /// As [`Publisher::publish`], and [`ClientError::TimedOut`] when acknowledgements stop coming.
    pub fn publish_wait(&self, message: &[u8]) -> Result<MessageId, ClientError> {
        // The clock is read only once there is something to wait for.
        let mut progress = None;
        loop {
            if !self.core.ahead.load(Ordering::Relaxed) {
                match self.publish(message) {
                    Err(ClientError::BufferFull { .. }) => {}
                    result => return result,
                }
            }
            progress.get_or_insert_with(|| Progress::new(self)).wait(self)?;
        }
    }

    /// Moves bytes and waits until there is news, at most `timeout`.
    ///
    /// # Errors
    /// Why the publisher failed for good.
    pub fn wait(&self, timeout: Duration) -> Result<(), ClientError> {
        let sockets = {
            let mut driver = lock(&self.core.driver);
            // Connections are told to show what comes once nothing has come.
            if self.core.drive(&mut driver) {
                return Ok(());
            }
            driver.arm();
            if self.core.drive(&mut driver) {
                return Ok(());
            }
            if let Some(error) = &driver.failed {
                return Err(error.clone());
            }
            driver.descriptors()
        };
        if sockets.is_empty() {
            std::thread::sleep(timeout.min(Duration::from_millis(1)));
            return Ok(());
        }
        wait_any(&sockets, timeout).map_err(ClientError::io("wait for brokers"))
    }

    /// What became of a message. Moves bytes, so that calling it in a loop is enough.
    ///
    /// # Errors
    /// [`ClientError::UnknownId`], or why the publisher failed for good.
    pub fn poll(&self, id: MessageId) -> Result<Status, ClientError> {
        let core = &*self.core;
        let mut driver = lock(&core.driver);
        core.drive(&mut driver);
        match driver.status(id) {
            Some(Status::Pending) if driver.failed.is_some() => {
                Err(driver.failed.clone().unwrap_or(ClientError::UnknownId { batch: id.batch }))
            }
            Some(status) => Ok(status),
            None => {
                drop(driver);
                let mut open = core.open.lock();
                if id.batch < open.batch {
                    // Another thread sealed it since we looked.
                    Ok(Status::Pending)
                } else if id.batch == open.batch && open.builder.as_ref().is_some_and(|b| id.index < b.message_count())
                {
                    core.seal(&mut open, Occasion::Awaited);
                    Ok(Status::Pending)
                } else {
                    Err(ClientError::UnknownId { batch: id.batch })
                }
            }
        }
    }

    /// What became of several messages: all acknowledged, or the first that is not.
    ///
    /// # Errors
    /// As [`Publisher::poll`].
    pub fn poll_range(&self, ids: impl IntoIterator<Item = MessageId>) -> Result<Result<(), MessageId>, ClientError> {
        for id in ids {
            if self.poll(id)? == Status::Pending {
                return Ok(Err(id));
            }
        }
        Ok(Ok(()))
    }

    /// Sends what is open and waits until everything is acknowledged (ack level 0: handed to the network).
    ///
    /// # Errors
    /// Why the publisher failed, or [`ClientError::TimedOut`] when acknowledgements stop coming.
    pub fn flush(&self) -> Result<(), ClientError> {
        let mut progress = Progress::new(self);
        self.core.send_open(Occasion::Flushed);
        loop {
            {
                let mut driver = lock(&self.core.driver);
                self.core.drive(&mut driver);
                if driver.in_flight.is_empty() {
                    return Ok(());
                }
            }
            progress.wait(self)?;
        }
    }

    /// Flushes and ends the session in order.
    ///
    /// # Errors
    /// As [`Publisher::flush`], or the head does not answer.
    pub fn close(self) -> Result<(), ClientError> {
        self.flush()?;
        let origin = lock(&self.core.driver).origin;
        let request = proto::CloseSessionRequest {
            slot: origin.session_slot,
            client_id: origin.client_id,
            epoch: origin.session_epoch,
        };
        self.core.inner.control().head(async |client| client.close_session(request).await).map(drop)
    }

    /// This publisher's id, as batches and index entries show it.
    #[must_use]
    pub fn client_id(&self) -> u64 {
        lock(&self.core.driver).origin.client_id
    }

    /// Figures so far.
    #[must_use]
    pub fn stats(&self) -> PublisherStats {
        lock(&self.core.driver).stats
    }
}

/// Notices when acknowledgements stop coming.
struct Progress {
    acknowledged: u64,
    since: Instant,
}

impl Progress {
    fn new(publisher: &Publisher) -> Self {
        Self { acknowledged: publisher.core.acknowledged.load(Ordering::Acquire), since: Instant::now() }
    }

    fn wait(&mut self, publisher: &Publisher) -> Result<(), ClientError> {
        publisher.wait(Duration::from_millis(1))?;
        let acknowledged = publisher.core.acknowledged.load(Ordering::Acquire);
        let timeout = publisher.core.inner.config.progress_timeout();
        if acknowledged != self.acknowledged {
            *self = Self { acknowledged, since: Instant::now() };
        } else if self.since.elapsed() > timeout {
            return Err(ClientError::TimedOut(timeout));
        }
        Ok(())
    }
}
