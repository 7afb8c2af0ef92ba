//! Publisher that is polled: no call blocks, and nothing happens between calls.
//!
//! Its state is under locks, so that an application's threads can share it with the client's background thread.

use super::buffers::Batch;
use super::message::{MessageId, PublisherStats, Status};
use super::sender::Sender;
use super::session::Session;
use crate::background::BackgroundTask;
use crate::batching::{BatchSizer, BufferState, SealStats};
use crate::call::Call;
use crate::context::Context;
use crate::environment::{Control, Environment, publish};
use crate::error::ClientError;
use crate::nic::loaded_batch_bytes;
use crate::views::ClusterView;
use embarcadero_control::v1 as proto;
use embarcadero_wire::batch::largest_message;
use embarcadero_wire::{ClientId, OutOfBounds};
use spin::mutex::SpinMutex;
use spin::relax::Yield;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Number of messages after which `publish` retries the writes for which a socket had no room.
const DRIVE_EVERY: u32 = 128;
/// Time without a call of the application after which a turn drives the publisher.
const IDLE: Duration = Duration::from_micros(500);

/// Open batch: the one that is being filled.
struct OpenBatch {
    batch: Option<Batch>,
    /// Number of the open batch.
    number: u64,
    /// True when the batch before the open one was full.
    streaming: bool,
    sealed_at: Instant,
    sizer: BatchSizer,
}

/// Reason for which the open batch may be sealed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum SealTrigger {
    /// A message was added.
    Added,
    /// The application waits for the batch, or has not called for a while.
    Awaited,
    /// The next message does not fit.
    Full,
    /// The application flushes.
    Flushed,
}

/// Publisher that is polled. [`PolledPublisher::turn`] does what no call of the application does.
pub struct PolledPublisher<E: Environment> {
    pub(super) environment: Arc<E>,
    /// Open batch under a lock that is taken once per message. A plain store releases the lock: an atomic read-modify-write
    /// would wait until the message's bytes have left the store buffer.
    open: SpinMutex<OpenBatch, Yield>,
    sender: Mutex<Sender<E>>,
    in_flight: AtomicUsize,
    /// True while [`crate::batching::BUFFERED_BATCHES`] batches or more wait for connections.
    pub(super) has_backlog: AtomicBool,
    /// Number below which all batches are acknowledged.
    pub(super) acknowledged: AtomicU64,
}

impl<E: Environment> PolledPublisher<E> {
    /// Publisher of a session that is open, not connected yet.
    pub(super) fn new(
        environment: Arc<E>,
        topic: &str,
        client_id: ClientId,
        opened: &proto::OpenSessionResponse,
        cluster: ClusterView,
    ) -> Result<Self, ClientError> {
        let topic = cluster.topic(topic)?;
        let config = environment.config();
        let (least, most) = config.batch_bytes();
        if least as u64 > opened.max_batch_bytes {
            let key = if config.batch_size.is_some() { "batch_size" } else { "batch_size_min" };
            let bound = format!("at most {}, the brokers' max_batch_bytes", opened.max_batch_bytes);
            return Err(OutOfBounds::new(key, least, bound).into());
        }
        let most = most.min(opened.max_batch_bytes as usize);
        let sizer = BatchSizer::between(least, most, config.buffer_bytes);
        let sizer = loaded_batch_bytes(config.transport).map_or(sizer, |bytes| sizer.with_loaded_max(bytes));
        let mut brokers = cluster.brokers;
        if config.max_brokers > 0 && config.max_brokers < brokers.len() {
            // Different clients start with different brokers.
            let start = client_id.0 as usize % brokers.len();
            brokers.rotate_left(start);
            brokers.truncate(config.max_brokers);
        }
        let session = Session::new(opened, &topic, client_id, config.ack_level);
        let sender = Sender::new(Arc::clone(&environment), topic, session, brokers);
        let sealed_at = sender.driven_at;
        Ok(Self {
            open: SpinMutex::new(OpenBatch { batch: None, number: 0, streaming: false, sealed_at, sizer }),
            sender: Mutex::new(sender),
            in_flight: AtomicUsize::new(0),
            has_backlog: AtomicBool::new(false),
            acknowledged: AtomicU64::new(0),
            environment,
        })
    }

    /// Checks that there is a connection.
    ///
    /// # Errors
    /// None of them is up. The cause is that of the last attempt.
    pub(super) fn require_connection(&self) -> Result<(), ClientError> {
        let sender = self.sender();
        if sender.connections.iter().any(|connection| connection.is_up()) {
            return Ok(());
        }
        match sender.trouble.clone() {
            // This host's fault, not the brokers'.
            Some(error @ ClientError::Device { .. }) => Err(error),
            Some(error) => Err(ClientError::Unreachable {
                reason: format!("no broker accepts data connections: {error}"),
                source: Some(Arc::new(error)),
            }),
            None => Err(ClientError::unreachable("the topic has no live broker")),
        }
    }

    /// Locks the sending half.
    pub(super) fn sender(&self) -> MutexGuard<'_, Sender<E>> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the connections that are due. Blocks for as long as connecting does, and holds no lock meanwhile.
    pub(super) fn connect_due(&self) {
        let (attempts, opening) = {
            let mut sender = self.sender();
            let now = sender.now();
            (sender.begin_attempts(now), sender.opening())
        };
        if attempts.is_empty() {
            return;
        }
        let mut failed = false;
        for attempt in attempts {
            let result = publish(&*self.environment, attempt.broker.data, &opening);
            failed |= result.is_err();
            self.sender().end_attempt(&attempt, result);
        }
        if failed {
            let mut sender = self.sender();
            let now = sender.now();
            sender.ask_for_brokers(now);
        }
    }

    /// Seals the open batch if the trigger or the policy says so.
    pub(super) fn seal_open(&self, trigger: SealTrigger) {
        let mut open = self.open.lock();
        self.seal(&mut open, trigger);
    }

    // What is done once per batch stays out of the code that publishes a message.
    #[inline(never)]
    fn seal(&self, open: &mut OpenBatch, trigger: SealTrigger) {
        let Some(batch) = open.batch.as_ref().filter(|batch| !batch.is_empty()) else { return };
        let state = BufferState {
            in_flight: self.in_flight.load(Ordering::Relaxed),
            open_bytes: batch.batch_bytes(),
            open_messages: batch.message_count(),
            streaming: open.streaming,
            awaited: trigger == SealTrigger::Awaited,
        };
        if !(matches!(trigger, SealTrigger::Full | SealTrigger::Flushed) || open.sizer.should_seal(state)) {
            return;
        }
        let Some(batch) = open.batch.take() else { return };
        open.number += 1;
        open.streaming = trigger == SealTrigger::Full;
        let mut sender = self.sender();
        sender.push(batch);
        self.in_flight.store(sender.in_flight.len(), Ordering::Relaxed);
        let offered_at = sender.now();
        self.drive(&mut sender);
        open.sizer.record_seal(SealStats {
            full: open.streaming,
            interval: sender.driven_at - open.sealed_at,
            sending: sender.driven_at - offered_at,
            waiting: sender.in_flight.queued(),
        });
        open.sealed_at = sender.driven_at;
    }

    /// Moves bytes and takes acknowledgements. Returns true when anything moved.
    #[inline(never)]
    pub(super) fn drive(&self, sender: &mut Sender<E>) -> bool {
        let moved = sender.drive();
        self.in_flight.store(sender.in_flight.len(), Ordering::Relaxed);
        self.has_backlog.store(sender.has_backlog(), Ordering::Relaxed);
        self.acknowledged.store(sender.in_flight.first(), Ordering::Release);
        moved
    }

    /// Copies a message into the open batch.
    ///
    /// # Errors
    /// Those of [`crate::Publisher::publish`].
    #[inline]
    pub fn publish(&self, message: &[u8]) -> Result<MessageId, ClientError> {
        self.add(message.len(), |batch| batch.push(message))
    }

    /// Adds a message of `bytes` that `push` writes into the open batch.
    #[inline]
    pub(super) fn add(&self, bytes: usize, push: impl FnOnce(&mut Batch)) -> Result<MessageId, ClientError> {
        let mut open = self.open.lock();
        let number = open.number;
        let id = match &mut open.batch {
            Some(batch) if batch.fits(bytes) => {
                let id = MessageId { batch: number, index: batch.message_count() };
                push(batch);
                id
            }
            _ => {
                let mut batch = self.next_batch(&mut open, bytes)?;
                push(&mut batch);
                open.batch = Some(batch);
                MessageId { batch: open.number, index: 0 }
            }
        };
        if self.in_flight.load(Ordering::Relaxed) == 0 {
            self.seal(&mut open, SealTrigger::Added);
        } else if (id.index + 1).is_multiple_of(DRIVE_EVERY)
            && let Ok(mut sender) = self.sender.try_lock()
            && sender.has_to_write()
        {
            self.drive(&mut sender);
        }
        Ok(id)
    }

    /// Seals the open batch and gets a buffer for the next, which begins with a message of `bytes`.
    #[cold]
    fn next_batch(&self, open: &mut OpenBatch, bytes: usize) -> Result<Batch, ClientError> {
        let max = largest_message(open.sizer.largest());
        if bytes > max {
            return Err(ClientError::MessageTooLarge { bytes, max });
        }
        self.seal(open, SealTrigger::Full);
        let mut sender = self.sender();
        if let Some(error) = &sender.fatal {
            return Err(error.clone());
        }
        let mut size = open.sizer.size();
        while bytes > largest_message(size) {
            size = (size * 2).min(open.sizer.largest());
        }
        if let Some(batch) = sender.buffers.get(size)? {
            return Ok(batch);
        }
        self.drive(&mut sender);
        sender.buffers.get(size)?.ok_or(ClientError::BufferFull { bytes: self.environment.config().buffer_bytes })
    }

    /// Status of a message. Moves bytes.
    ///
    /// # Errors
    /// Those of [`crate::Publisher::poll`].
    pub fn status(&self, id: MessageId) -> Result<Status, ClientError> {
        let mut sender = self.sender();
        self.drive(&mut sender);
        match (sender.in_flight.status(id), &sender.fatal) {
            (Some(Status::Pending), Some(error)) => return Err(error.clone()),
            (Some(status), _) => return Ok(status),
            (None, _) => {}
        }
        drop(sender);
        let mut open = self.open.lock();
        let is_open = |open: &OpenBatch| open.batch.as_ref().is_some_and(|batch| id.index < batch.message_count());
        if id.batch == open.number && is_open(&open) {
            self.seal(&mut open, SealTrigger::Awaited);
            return Ok(Status::Pending);
        }
        // Another thread may have sealed it since we looked.
        if id.batch < open.number { Ok(Status::Pending) } else { Err(ClientError::UnknownId { batch: id.batch }) }
    }

    /// Does what is due and no call of the application does. Opens the session's next epoch, connects, asks for brokers,
    /// and leaves those that are silent. Moves bytes too, once the application has not called for a while.
    ///
    /// Returns true while something is under way, so that the next turn is due soon. Blocks only while the transport
    /// connects.
    pub fn turn(&self) -> bool {
        let idle = {
            let Ok(mut sender) = self.sender.try_lock() else { return true };
            let now = sender.now();
            sender.keep_up(now);
            now.saturating_duration_since(sender.driven_at) > IDLE
        };
        self.connect_due();
        if idle {
            self.seal_open(SealTrigger::Awaited);
        }
        let mut sender = self.sender();
        if idle {
            self.drive(&mut sender);
        }
        sender.drop_silent_connections();
        let calls = sender.calls.are_under_way();
        drop(sender);
        calls || self.in_flight.load(Ordering::Relaxed) > 0 || self.open.lock().batch.is_some()
    }

    /// Begins to close the session.
    pub fn close(&self) -> Call<proto::CloseSessionResponse> {
        let request = self.sender().session.closing();
        self.environment.control().close_session(request)
    }

    /// Id of the client that it publishes as now.
    pub fn client_id(&self) -> ClientId {
        self.sender().session.origin.client_id
    }

    /// Counters since it was opened.
    pub fn stats(&self) -> PublisherStats {
        self.sender().stats
    }
}

impl BackgroundTask for PolledPublisher<Context> {
    fn run_once(&self) -> bool {
        self.turn()
    }
}
