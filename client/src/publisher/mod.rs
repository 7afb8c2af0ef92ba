//! A publisher: fills batches, stripes them over brokers, and keeps each until it is acknowledged.
//!
//! Whoever calls drives: `publish`, `poll` and `flush` move bytes themselves, so an active application needs no
//! hand-over to another thread. The client's background thread steps in when the application does not call, and does
//! what blocks: connecting and opening sessions.

mod buffers;
mod connection;
mod core;
mod in_flight;
mod send;

use crate::background::Background;
use crate::context::Context;
use crate::error::ClientError;
use crate::publisher::core::{PublisherCore, SendTrigger};
use embarcadero_control::v1 as proto;
use embarcadero_os::poller::wait_any;
use embarcadero_transport::SendBuffer;
use embarcadero_wire::ClientId;
use embarcadero_wire::batch::BatchBuilder;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// A batch being filled, in memory that NICs can send from.
type Batch = BatchBuilder<SendBuffer>;

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

/// Publishes to one topic under one session. Threads may share it; each keeps its own order.
pub struct Publisher {
    core: Arc<PublisherCore>,
    _background: Arc<Background>,
}

impl Publisher {
    pub(crate) fn open(context: Arc<Context>, topic: &str, background: Arc<Background>) -> Result<Self, ClientError> {
        let core = PublisherCore::open(context, topic)?;
        let attended: Weak<PublisherCore> = Arc::downgrade(&core);
        background.attend(attended);
        Ok(Self { core, _background: background })
    }

    /// Copies a message into the open batch. Never blocks on the network.
    ///
    /// # Errors
    /// [`ClientError::BufferFull`] when every buffer holds messages that are not acknowledged (call
    /// [`Publisher::wait`], or use [`Publisher::publish_wait`]); [`ClientError::MessageTooLarge`]; or why the
    /// publisher failed for good.
    #[inline]
    pub fn publish(&self, message: &[u8]) -> Result<MessageId, ClientError> {
        self.core.publish(message.len(), |batch| batch.push(message))
    }

    /// Lets `fill` write a message of `bytes` in place: no copy.
    ///
    /// # Errors
    /// As [`Publisher::publish`].
    #[inline]
    pub fn publish_with(&self, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<MessageId, ClientError> {
        self.core.publish(bytes, |batch| batch.push_with(bytes, fill))
    }

    /// Publishes like [`Publisher::publish`], but blocks while the buffer is full or 16 batches wait for the connections
    /// that are up. A longer queue would only make messages older and push their batches out of the cache.
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
            let mut send = self.core.send();
            // Connections are told to show what comes once nothing has come.
            if self.core.drive(&mut send) {
                return Ok(());
            }
            send.arm();
            if self.core.drive(&mut send) {
                return Ok(());
            }
            if let Some(error) = &send.failed {
                return Err(error.clone());
            }
            send.descriptors()
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
        self.core.status(id)
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
        self.core.send_open(SendTrigger::Flushed);
        loop {
            {
                let mut send = self.core.send();
                self.core.drive(&mut send);
                if send.in_flight.is_empty() {
                    return Ok(());
                }
            }
            progress.wait(self)?;
        }
    }

    /// Flushes and ends the session in order.
    ///
    /// # Errors
    /// As [`Publisher::flush`], or the leader does not answer.
    pub fn close(self) -> Result<(), ClientError> {
        self.flush()?;
        let origin = self.core.send().session.origin;
        let request = proto::CloseSessionRequest {
            slot: origin.session_slot.0,
            client_id: origin.client_id.0,
            epoch: origin.session_epoch.0,
        };
        self.core.context.control().leader(async |client| client.close_session(request).await).map(drop)
    }

    /// This publisher's id, as batches and index entries show it.
    #[must_use]
    pub fn client_id(&self) -> ClientId {
        self.core.send().session.origin.client_id
    }

    /// Figures so far.
    #[must_use]
    pub fn stats(&self) -> PublisherStats {
        self.core.send().stats
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
        let timeout = publisher.core.context.config.progress_timeout();
        if acknowledged != self.acknowledged {
            *self = Self { acknowledged, since: Instant::now() };
        } else if self.since.elapsed() > timeout {
            return Err(ClientError::TimedOut(timeout));
        }
        Ok(())
    }
}
