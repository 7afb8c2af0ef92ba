//! State of a publisher that the application's threads share with the client's background thread.

use super::send::{SendState, Session};
use super::{Batch, MessageId, Status};
use crate::background::Attended;
use crate::batching::{BatchSizer, BufferState, SealStats};
use crate::context::Context;
use crate::error::ClientError;
use crate::nic::loaded_batch_bytes;
use crate::views::TopicView;
use embarcadero_control::v1 as proto;
use embarcadero_transport::{Sockets, Transport};
use embarcadero_wire::batch::{BatchOrigin, largest_message};
use embarcadero_wire::{ClientId, Epoch, OutOfBounds, SessionSlot};
use spin::mutex::SpinMutex;
use spin::relax::Yield;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Number of messages after which `publish` retries the writes for which a socket had no room.
const DRIVE_EVERY: u32 = 128;
/// Divisor of the progress timeout: after that part of it without an acknowledgement, a broker counts as silent.
const SILENCE: u32 = 4;
/// Time after which the publisher asks for the list of brokers again.
const REFRESH: Duration = Duration::from_secs(1);
/// Time without a call of the application after which the background thread drives the publisher.
const IDLE: Duration = Duration::from_micros(500);

/// Open batch: the one that is being filled.
struct Open {
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
pub(super) enum SendTrigger {
    /// A message was added.
    Added,
    /// The application waits for the batch, or has not called for a while.
    Awaited,
    /// The next message does not fit.
    Full,
    /// The application flushes.
    Flushed,
}

/// Shared state of one publisher.
pub(super) struct PublisherCore {
    pub(super) context: Arc<Context>,
    topic: TopicView,
    /// Open batch under a lock that is taken once per message. A plain store releases the lock: an atomic read-modify-write
    /// would wait until the message's bytes have left the store buffer.
    open: SpinMutex<Open, Yield>,
    send: Mutex<SendState>,
    in_flight: AtomicUsize,
    /// True while [`crate::batching::BUFFERED_BATCHES`] batches or more wait for connections.
    pub(super) ahead: AtomicBool,
    /// Number below which all batches are acknowledged.
    pub(super) acknowledged: AtomicU64,
}

fn open_session(
    context: &Context,
    topic: &str,
    client_id: ClientId,
) -> Result<proto::OpenSessionResponse, ClientError> {
    let ack_level = context.config.ack_level.into();
    let request = proto::OpenSessionRequest { topic: topic.to_owned(), client_id: client_id.0, ack_level };
    context.control().leader(async |client| client.open_session(request.clone()).await)
}

fn origin(session: &proto::OpenSessionResponse, topic: &TopicView, client_id: ClientId) -> BatchOrigin {
    BatchOrigin {
        client_id,
        session_epoch: Epoch(session.epoch),
        session_slot: SessionSlot(session.slot),
        topic: topic.id,
        topic_incarnation: topic.incarnation,
    }
}

impl PublisherCore {
    /// Opens a session and connects to the topic's brokers.
    pub(super) fn open(context: Arc<Context>, topic: &str) -> Result<Arc<Self>, ClientError> {
        let client_id = ClientId(rand::random::<u64>().max(1));
        let session = open_session(&context, topic, client_id)?;
        let (topic, cluster) = context.topic(topic)?;
        let config = &context.config;
        let (least, most) = config.batch_bytes();
        if least as u64 > session.max_batch_bytes {
            let key = if config.batch_size.is_some() { "batch_size" } else { "batch_size_min" };
            let bound = format!("at most {}, the brokers' max_batch_bytes", session.max_batch_bytes);
            return Err(OutOfBounds::new(key, least, bound).into());
        }
        let most = most.min(session.max_batch_bytes as usize);
        let sizer = BatchSizer::between(least, most, config.buffer_bytes);
        let sizer = loaded_batch_bytes(config.transport).map_or(sizer, |bytes| sizer.with_loaded_max(bytes));
        let mut brokers = cluster.brokers;
        if config.max_brokers > 0 && config.max_brokers < brokers.len() {
            // Different clients start with different brokers.
            let start = client_id.0 as usize % brokers.len();
            brokers.rotate_left(start);
            brokers.truncate(config.max_brokers);
        }
        let now = Instant::now();
        let buffers = (config.buffer_bytes / least, config.buffer_bytes);
        let checksum = config.batch_checksum;
        let session = Session {
            origin: origin(&session, &topic, client_id),
            ack_level: config.ack_level,
            shift: session.next_sequence,
            committed: 0,
            window: session.window_batches as usize,
        };
        let core = Arc::new(Self {
            topic,
            open: SpinMutex::new(Open { batch: None, number: 0, streaming: false, sealed_at: now, sizer }),
            send: Mutex::new(SendState::new(session, brokers, buffers, checksum, now)),
            in_flight: AtomicUsize::new(0),
            ahead: AtomicBool::new(false),
            acknowledged: AtomicU64::new(0),
            context,
        });
        core.connect_due();
        core.require_connection()?;
        Ok(core)
    }

    fn require_connection(&self) -> Result<(), ClientError> {
        let send = self.send();
        if send.connections.iter().any(|connection| connection.is_up()) {
            return Ok(());
        }
        let why = send.refused.as_ref().map_or(String::new(), |error| format!(": {error}"));
        Err(ClientError::Unreachable(format!("no broker accepts data connections{why}")))
    }

    /// Locks the sending half.
    pub(super) fn send(&self) -> MutexGuard<'_, SendState> {
        self.send.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the session's next epoch, and queues again the batches that did not commit under the last.
    fn reopen(&self) {
        let client_id = self.send().session.origin.client_id;
        let session = open_session(&self.context, &self.topic.name, client_id);
        let mut send = self.send();
        let session = match session {
            Ok(session) => session,
            // The leader may be back later; only what can never work ends the publisher.
            Err(error @ ClientError::Control { .. }) => {
                send.failed = Some(error);
                return;
            }
            Err(_) => return,
        };
        let row_kept = SessionSlot(session.slot) == send.session.origin.session_slot;
        let global = self.topic.order.is_global();
        let first = send.in_flight.first();
        let known = &mut send.session;
        known.origin = origin(&session, &self.topic, client_id);
        if row_kept && global {
            known.committed = known.committed.max(session.next_sequence.wrapping_sub(known.shift));
        } else if global {
            known.shift = session.next_sequence.wrapping_sub(first);
        }
        send.resubmit();
    }

    /// Makes the connections that are due. Blocks for as long as connecting does.
    fn connect_due(&self) {
        let (due, opening) = {
            let mut send = self.send();
            (send.due_connections(Instant::now()), send.opening())
        };
        if due.is_empty() {
            return;
        }
        let options = self.context.link_options();
        let mut refresh = false;
        for connection in due {
            let link = match &options {
                Ok(options) => Sockets
                    .publish(connection.broker.data, options, &opening)
                    .map_err(ClientError::io("connect to a broker")),
                Err(error) => Err(error.clone()),
            };
            refresh |= link.is_err();
            self.send().connected(&connection, link);
        }
        if refresh {
            self.refresh_brokers();
        }
    }

    /// Asks for the list of brokers once it is old: brokers come and go while connections last.
    fn refresh_if_due(&self) {
        let due = |send: &SendState| send.failed.is_none() && send.refreshed_at.elapsed() > REFRESH;
        if due(&self.send()) {
            self.refresh_brokers();
        }
    }

    fn refresh_brokers(&self) {
        self.send().refreshed_at = Instant::now();
        let Ok(cluster) = self.context.cluster() else { return };
        self.send().update_brokers(cluster.brokers, self.context.config.max_brokers);
    }

    /// Seals the open batch if the trigger or the policy says so.
    pub(super) fn send_open(&self, trigger: SendTrigger) {
        let mut open = self.open.lock();
        self.seal(&mut open, trigger);
    }

    fn seal(&self, open: &mut Open, trigger: SendTrigger) {
        let Some(batch) = open.batch.as_ref().filter(|batch| !batch.is_empty()) else { return };
        let state = BufferState {
            in_flight: self.in_flight.load(Ordering::Relaxed),
            open_bytes: batch.batch_bytes(),
            open_messages: batch.message_count(),
            streaming: open.streaming,
            awaited: trigger == SendTrigger::Awaited,
        };
        if !(matches!(trigger, SendTrigger::Full | SendTrigger::Flushed) || open.sizer.should_seal(state)) {
            return;
        }
        let Some(batch) = open.batch.take() else { return };
        open.number += 1;
        open.streaming = trigger == SendTrigger::Full;
        let mut send = self.send();
        send.push(batch);
        self.in_flight.store(send.in_flight.len(), Ordering::Relaxed);
        let offered_at = Instant::now();
        self.drive(&mut send);
        open.sizer.record_seal(SealStats {
            full: open.streaming,
            interval: send.driven_at - open.sealed_at,
            sending: send.driven_at - offered_at,
            waiting: send.in_flight.queued(),
        });
        open.sealed_at = send.driven_at;
    }

    /// Moves bytes and takes acknowledgements. Returns true when anything moved.
    pub(super) fn drive(&self, send: &mut SendState) -> bool {
        let moved = send.drive();
        self.in_flight.store(send.in_flight.len(), Ordering::Relaxed);
        self.ahead.store(send.is_ahead(), Ordering::Relaxed);
        self.acknowledged.store(send.in_flight.first(), Ordering::Release);
        moved
    }

    /// Adds a message of `bytes` that `push` writes into the open batch.
    #[inline]
    pub(super) fn publish(&self, bytes: usize, push: impl FnOnce(&mut Batch)) -> Result<MessageId, ClientError> {
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
            self.seal(&mut open, SendTrigger::Added);
        } else if (id.index + 1).is_multiple_of(DRIVE_EVERY)
            && let Ok(mut send) = self.send.try_lock()
            && send.wants_room()
        {
            self.drive(&mut send);
        }
        Ok(id)
    }

    /// Seals the open batch and gets a buffer for the next, which begins with a message of `bytes`.
    #[cold]
    fn next_batch(&self, open: &mut Open, bytes: usize) -> Result<Batch, ClientError> {
        let max = largest_message(open.sizer.largest());
        if bytes > max {
            return Err(ClientError::MessageTooLarge { bytes, max });
        }
        self.seal(open, SendTrigger::Full);
        let mut send = self.send();
        if let Some(error) = &send.failed {
            return Err(error.clone());
        }
        let mut size = open.sizer.size();
        while bytes > largest_message(size) {
            size = (size * 2).min(open.sizer.largest());
        }
        if let Some(batch) = send.buffers.get(size)? {
            return Ok(batch);
        }
        self.drive(&mut send);
        send.buffers.get(size)?.ok_or(ClientError::BufferFull { bytes: self.context.config.buffer_bytes })
    }

    /// Status of a message. Moves bytes.
    pub(super) fn status(&self, id: MessageId) -> Result<Status, ClientError> {
        let mut send = self.send();
        self.drive(&mut send);
        match (send.in_flight.status(id), &send.failed) {
            (Some(Status::Pending), Some(error)) => return Err(error.clone()),
            (Some(status), _) => return Ok(status),
            (None, _) => {}
        }
        drop(send);
        let mut open = self.open.lock();
        let is_open = |open: &Open| open.batch.as_ref().is_some_and(|batch| id.index < batch.message_count());
        if id.batch == open.number && is_open(&open) {
            self.seal(&mut open, SendTrigger::Awaited);
            return Ok(Status::Pending);
        }
        // Another thread may have sealed it since we looked.
        if id.batch < open.number { Ok(Status::Pending) } else { Err(ClientError::UnknownId { batch: id.batch }) }
    }
}

impl Attended for PublisherCore {
    fn attend(&self) -> bool {
        let (reopen, idle) = {
            let Ok(send) = self.send.try_lock() else { return true };
            (send.reopen && send.failed.is_none(), send.driven_at.elapsed() > IDLE)
        };
        if reopen {
            self.reopen();
        }
        self.connect_due();
        self.refresh_if_due();
        if idle {
            self.send_open(SendTrigger::Awaited);
        }
        let mut send = self.send();
        send.leave_silent_brokers(self.context.config.progress_timeout() / SILENCE);
        if idle {
            self.drive(&mut send);
        }
        drop(send);
        self.in_flight.load(Ordering::Relaxed) > 0 || self.open.lock().batch.is_some()
    }
}
