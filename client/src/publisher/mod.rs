//! Publisher: fills batches, stripes them over brokers, and keeps each until it is acknowledged.
//!
//! `publish`, `poll` and `flush` move bytes themselves, so an active application needs no hand-over to another thread.
//! The client's background thread gives the publisher a turn when the application does not call. It also does what blocks:
//! connecting.
//!
//! [`Publisher`] only adds waiting to [`PolledPublisher`], which has everything else and also runs in a simulator.

mod buffers;
mod connection;
mod drive;
mod in_flight;
mod message;
mod opening;
mod polled;
mod progress;
mod sender;
mod session;
mod upkeep;

pub use message::{MessageId, PublisherStats, Status};
pub use opening::PublisherOpening;
pub use polled::PolledPublisher;
pub use progress::{Flush, Progress};

use crate::background::Background;
use crate::context::Context;
use crate::error::ClientError;
use embarcadero_os::poller::wait_any;
use embarcadero_wire::ClientId;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Longest wait of a call that waits for acknowledgements, before it looks again.
const LOOK_PERIOD: Duration = Duration::from_millis(1);

/// Publisher to one topic, under one session. Threads may share it; the messages of each thread keep their order.
pub struct Publisher {
    polled: Arc<PolledPublisher<Context>>,
    _background: Arc<Background>,
}

impl Publisher {
    pub(crate) fn open(context: Arc<Context>, topic: &str, background: Arc<Background>) -> Result<Self, ClientError> {
        let mut opening = PublisherOpening::begin(context, topic);
        let polled = loop {
            match opening.turn() {
                Some(opened) => break Arc::new(opened?),
                None => opening.wait(),
            }
        };
        let task: Weak<PolledPublisher<Context>> = Arc::downgrade(&polled);
        background.add(task);
        Ok(Self { polled, _background: background })
    }

    /// Copies a message into the open batch. Never blocks on the network.
    ///
    /// # Errors
    /// - [`ClientError::BufferFull`] when every buffer holds messages that are not acknowledged. Call
    ///   [`Publisher::wait`] and try again, or use [`Publisher::publish_wait`].
    /// - [`ClientError::MessageTooLarge`].
    /// - The error that ended the publisher.
    #[inline]
    pub fn publish(&self, message: &[u8]) -> Result<MessageId, ClientError> {
        self.polled.publish(message)
    }

    /// Publishes a message of `bytes` bytes that `fill` writes in place, without a copy. Never blocks on the network.
    ///
    /// # Errors
    /// Those of [`Publisher::publish`].
    #[inline]
    pub fn publish_with(&self, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<MessageId, ClientError> {
        self.polled.add(bytes, |batch| batch.push_with(bytes, fill))
    }

    /// Publishes like [`Publisher::publish`], but blocks while the buffer is full, or while 16 batches wait for the
    /// connections that are up. A longer queue would only make messages older and push their batches out of the cache.
    ///
    /// # Errors
    /// Those of [`Publisher::publish`] except [`ClientError::BufferFull`], and [`ClientError::TimedOut`] when
    /// acknowledgements stop coming.
    pub fn publish_wait(&self, message: &[u8]) -> Result<MessageId, ClientError> {
        // The clock is read only once there is something to wait for.
        let mut progress = None;
        loop {
            if !self.polled.has_backlog.load(Ordering::Relaxed) {
                match self.publish(message) {
                    Err(ClientError::BufferFull { .. }) => {}
                    result => return result,
                }
            }
            let progress = progress.get_or_insert_with(|| Progress::new(&self.polled));
            self.wait(LOOK_PERIOD)?;
            progress.look(&self.polled)?;
        }
    }

    /// Moves bytes, and waits until brokers answer or can take more, for at most `timeout`.
    ///
    /// # Errors
    /// The error that ended the publisher.
    pub fn wait(&self, timeout: Duration) -> Result<(), ClientError> {
        let sockets = {
            let mut sender = self.polled.sender();
            // Connections are told to show what comes once nothing has come.
            if self.polled.drive(&mut sender) {
                return Ok(());
            }
            sender.arm();
            if self.polled.drive(&mut sender) {
                return Ok(());
            }
            if let Some(error) = &sender.fatal {
                return Err(error.clone());
            }
            sender.descriptors()
        };
        if sockets.is_empty() {
            std::thread::sleep(timeout.min(LOOK_PERIOD));
            return Ok(());
        }
        wait_any(&sockets, timeout).map_err(ClientError::io("wait for brokers"))
    }

    /// Returns the status of a message. Moves bytes, so that calling it in a loop is enough.
    ///
    /// # Errors
    /// [`ClientError::UnknownId`], or the error that ended the publisher.
    pub fn poll(&self, id: MessageId) -> Result<Status, ClientError> {
        self.polled.status(id)
    }

    /// Polls several messages. Returns `Ok(())` when all are acknowledged, and otherwise the first that is not.
    ///
    /// # Errors
    /// Those of [`Publisher::poll`].
    pub fn poll_range(&self, ids: impl IntoIterator<Item = MessageId>) -> Result<Result<(), MessageId>, ClientError> {
        for id in ids {
            if self.poll(id)? == Status::Pending {
                return Ok(Err(id));
            }
        }
        Ok(Ok(()))
    }

    /// Sends all messages and waits until they are acknowledged; at acknowledgement level 0, until they are handed to the
    /// network.
    ///
    /// # Errors
    /// The error that ended the publisher, or [`ClientError::TimedOut`] when acknowledgements stop coming.
    pub fn flush(&self) -> Result<(), ClientError> {
        let mut flush = Flush::begin(&self.polled);
        while !flush.turn(&self.polled)? {
            self.wait(LOOK_PERIOD)?;
        }
        Ok(())
    }

    /// Flushes, and closes the session.
    ///
    /// # Errors
    /// Those of [`Publisher::flush`], or the leader does not answer.
    pub fn close(self) -> Result<(), ClientError> {
        self.flush()?;
        self.polled.close().join().map(drop)
    }

    /// Id of this publisher, which batches and deliveries carry. It changes if the brokers forget an idle session.
    #[must_use]
    pub fn client_id(&self) -> ClientId {
        self.polled.client_id()
    }

    /// Counters since the publisher was opened.
    #[must_use]
    pub fn stats(&self) -> PublisherStats {
        self.polled.stats()
    }
}
