//! Subscriber: reads the streams of a topic in order, one batch at a time.
//!
//! [`Subscriber`] only adds waiting to [`PolledSubscriber`], which has everything else and also runs in a simulator.

mod message;
mod polled;
mod stream;
mod streams;

pub use message::{Batch, Message, Start};
pub use polled::{Drain, Drained, PolledSubscriber};

use crate::context::Context;
use crate::environment::{Control, Environment};
use crate::error::ClientError;
use crate::views::TopicView;
use embarcadero_os::poller::wait_any;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest wait without a look at every stream.
const LOOK_PERIOD: Duration = Duration::from_millis(100);
/// Longest wait while a stream is not connected.
const MISSING_PERIOD: Duration = Duration::from_millis(5);
/// Longest wait of [`Subscriber::drain`] before it looks again.
const DRAIN_PERIOD: Duration = Duration::from_millis(1);

/// Subscriber to one topic.
///
/// A topic with a global order has one stream, which any broker serves. With orders `broker` and `none` each broker
/// serves a stream of its own, and the subscriber reads them side by side.
///
/// Streams of brokers that join later are added within seconds. With [`Start::Earliest`] and [`Start::Timestamp`] they start
/// where the others do. Otherwise they start with what was ordered since the subscription, by the client's clock.
pub struct Subscriber {
    polled: PolledSubscriber<Context>,
}

impl Subscriber {
    pub(crate) fn open(context: Arc<Context>, topic: &str, start: Start) -> Result<Self, ClientError> {
        let cluster = context.control().cluster().join()?;
        Ok(Self { polled: PolledSubscriber::new(context, topic, start, cluster)? })
    }

    /// Topic that is read.
    #[must_use]
    pub fn topic(&self) -> &TopicView {
        self.polled.topic()
    }

    /// Looks for a batch for at most `timeout`. Returns true once there is one.
    fn look_for(&mut self, timeout: Duration) -> Result<bool, ClientError> {
        if self.polled.look()? {
            return Ok(true);
        }
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.wait(left)?;
            if self.polled.look()? {
                return Ok(true);
            }
        }
    }

    /// Waits for something to come, for at most `timeout`.
    fn wait(&mut self, timeout: Duration) -> Result<(), ClientError> {
        self.polled.arm();
        // What came before the connections were armed shows on no descriptor.
        if self.polled.look()? {
            return Ok(());
        }
        let watched: Vec<_> = self.polled.descriptors().map(|descriptor| (descriptor, false)).collect();
        let limit = timeout.min(if self.polled.is_disconnected() { MISSING_PERIOD } else { LOOK_PERIOD });
        if watched.is_empty() {
            std::thread::sleep(limit);
        } else {
            wait_any(&watched, limit).map_err(ClientError::io("wait for brokers"))?;
        }
        Ok(())
    }

    /// Receives the next batch, without copying; `None` when none came within `timeout`.
    ///
    /// After [`Subscriber::next`] this is the rest of the batch of that message.
    ///
    /// # Errors
    /// The offset is not kept, order or bytes are damaged, or the topic is gone. A lost connection is not an error: the
    /// subscriber connects again. After [`ClientError::Corrupt`] the next call goes on behind what cannot be read.
    pub fn next_batch(&mut self, timeout: Duration) -> Result<Option<Batch<'_>>, ClientError> {
        Ok(if self.look_for(timeout)? { self.polled.take_batch() } else { None })
    }

    /// Receives the next message; `None` when none came within `timeout`.
    ///
    /// # Errors
    /// Those of [`Subscriber::next_batch`].
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Message<'_>>, ClientError> {
        Ok(if self.look_for(timeout)? { self.polled.take_message() } else { None })
    }

    /// Reads every message that the topic has now, hands each to `each`, and returns their number.
    ///
    /// # Errors
    /// Those of [`Subscriber::next_batch`], and [`ClientError::TimedOut`] when a stream's broker does not answer.
    pub fn drain(&mut self, mut each: impl FnMut(Message<'_>)) -> Result<u64, ClientError> {
        let mut count = 0;
        self.drain_batches(|batch| {
            for message in batch.messages() {
                count += 1;
                each(message);
            }
        })?;
        Ok(count)
    }

    /// Reads every batch that the topic has now, and hands each to `each`.
    ///
    /// # Errors
    /// Those of [`Subscriber::drain`].
    pub fn drain_batches(&mut self, mut each: impl FnMut(Batch<'_>)) -> Result<(), ClientError> {
        let mut drain = self.polled.begin_drain();
        loop {
            match self.polled.drain(&mut drain)? {
                Drained::Batch(batch) => each(batch),
                Drained::Nothing => self.wait(DRAIN_PERIOD)?,
                Drained::Everything => return Ok(()),
            }
        }
    }

    /// Moves every stream to another position. What was received and not read is dropped.
    pub fn seek(&mut self, to: Start) {
        self.polled.seek(to);
    }
}
