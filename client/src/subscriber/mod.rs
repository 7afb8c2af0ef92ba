//! Subscriber: reads the streams of a topic in order, one batch at a time.

mod brokers;
mod message;
mod stream;
mod streams;

pub use message::{Batch, Message, Start};

use crate::background::Background;
use crate::context::Context;
use crate::error::ClientError;
use crate::silence::Silence;
use crate::views::TopicView;
use brokers::BrokerWatch;
use embarcadero_wire::batch::{BODY_CHECKSUM, BatchView};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use streams::{Delivery, Streams};

/// Subscriber to one topic.
///
/// A topic with a global order has one stream, which any broker serves. With orders `broker` and `none` each broker
/// serves a stream of its own, and the subscriber reads them side by side.
///
/// Streams of brokers that join later are added within seconds. With [`Start::Earliest`] and [`Start::Timestamp`] they start
/// where the others do. Otherwise they start with what was ordered since the subscription, by the client's clock.
pub struct Subscriber {
    streams: Streams,
    /// Longest wait for an answer of brokers in [`Subscriber::drain`].
    progress_timeout: Duration,
    /// Batch that was received last, while messages of it are left. It lies in its stream's connection, which is not
    /// touched meanwhile.
    current: Option<Current>,
    _background: Arc<Background>,
}

/// Received and checked batch.
struct Current {
    delivery: Delivery,
    /// Number of messages taken.
    taken: usize,
    /// Offset of the next message in the body, bytes.
    payload_at: usize,
}

impl Current {
    fn is_used_up(&self) -> bool {
        self.taken >= self.delivery.header.message_count as usize
    }
}

impl Subscriber {
    pub(crate) fn open(
        context: Arc<Context>,
        topic: &str,
        start: Start,
        background: Arc<Background>,
    ) -> Result<Self, ClientError> {
        let (topic, cluster) = context.topic(topic)?;
        let watch = (!topic.order.is_global()).then(|| {
            let watch = Arc::new(BrokerWatch::new(Arc::clone(&context), cluster.brokers.clone()));
            let task: Weak<BrokerWatch> = Arc::downgrade(&watch);
            background.add(task);
            watch
        });
        let progress_timeout = context.config.progress_timeout();
        let streams = Streams::new(context, topic, cluster.brokers, start, watch)?;
        Ok(Self { streams, progress_timeout, current: None, _background: background })
    }

    /// Topic that is read.
    #[must_use]
    pub fn topic(&self) -> &TopicView {
        self.streams.topic()
    }

    /// Receives a batch within `timeout`, and checks it.
    fn receive(&mut self, timeout: Duration) -> Result<Option<Current>, ClientError> {
        assert!(self.current.is_none(), "a batch that is read may lie in a connection that is looked at");
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let found = if left.is_zero() { self.streams.look()? } else { self.streams.look_or_wait(left)? };
            match found {
                Some(delivery) => {
                    let Some(taken) = self.streams.accept(&delivery)? else { continue };
                    let payload_at = self.view(&delivery).messages().take(taken).map(<[u8]>::len).sum();
                    return Ok(Some(Current { delivery, taken, payload_at }));
                }
                None if left.is_zero() => return Ok(None),
                None => {}
            }
        }
    }

    /// Bytes of a batch that was accepted.
    fn view(&self, delivery: &Delivery) -> BatchView<'_> {
        BatchView::of_checked(&delivery.header, self.streams[delivery.stream].body(delivery))
    }

    fn batch(&self, current: &Current) -> Batch<'_> {
        let view = self.view(&current.delivery);
        let Delivery { deliver, header, .. } = &current.delivery;
        Batch {
            first_offset: deliver.first_offset + current.taken as u64,
            stream: deliver.stream.broker(),
            broker: deliver.broker,
            ordered_us: deliver.ordered_us,
            client_id: header.client_id,
            sequence: header.sequence,
            payload_bytes: header.payload_bytes,
            has_checksum: header.flags & BODY_CHECKSUM != 0,
            view,
            skip: current.taken,
        }
    }

    /// Takes the batch that was received last, if messages of it are left.
    fn take_current(&mut self) -> Option<Current> {
        self.current.take().filter(|current| !current.is_used_up())
    }

    /// Takes the batch that was received last, if messages of it are left, or receives another within `timeout`.
    fn take_or_receive(&mut self, timeout: Duration) -> Result<Option<Current>, ClientError> {
        match self.take_current() {
            Some(current) => Ok(Some(current)),
            None => self.receive(timeout),
        }
    }

    /// Receives the next batch, without copying; `None` when none came within `timeout`.
    ///
    /// After [`Subscriber::next`] this is the rest of the batch of that message.
    ///
    /// # Errors
    /// The offset is not kept, order or bytes are damaged, or the topic is gone. A lost connection is not an error: the
    /// subscriber connects again. After [`ClientError::Corrupt`] the next call goes on behind what cannot be read.
    pub fn next_batch(&mut self, timeout: Duration) -> Result<Option<Batch<'_>>, ClientError> {
        Ok(self.take_or_receive(timeout)?.map(|current| self.batch(&current)))
    }

    /// Receives the next message; `None` when none came within `timeout`.
    ///
    /// # Errors
    /// Those of [`Subscriber::next_batch`].
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Message<'_>>, ClientError> {
        let Some(mut current) = self.take_or_receive(timeout)? else { return Ok(None) };
        let (index, start) = (current.taken, current.payload_at);
        // The lengths were checked against the payload when the batch came.
        let Delivery { header, stream, .. } = &current.delivery;
        let length = header.message_bytes(self.streams[*stream].body(&current.delivery), index);
        current.taken += 1;
        current.payload_at += length;
        let Delivery { deliver, header, .. } = &current.delivery;
        let (offset, stream) = (deliver.first_offset + index as u64, deliver.stream.broker());
        let (client_id, ordered_us) = (header.client_id, deliver.ordered_us);
        self.current = Some(current);
        let Some(current) = &self.current else { return Ok(None) };
        let payload = &self.streams[current.delivery.stream].body(&current.delivery)[start..start + length];
        Ok(Some(Message { offset, stream, client_id, ordered_us, payload }))
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
        self.streams.forget_ends();
        let mut silence = Silence::new(self.progress_timeout, Instant::now());
        loop {
            self.streams.ask_ends();
            let left = self.take_current();
            if left.is_none() && self.streams.are_read_to_end() {
                return Ok(());
            }
            let current = match left {
                Some(current) => Some(current),
                None => self.receive(Duration::from_millis(1))?,
            };
            match current {
                Some(current) => {
                    each(self.batch(&current));
                    silence.restart(Instant::now());
                }
                None => {
                    silence.look(Instant::now());
                    if silence.is_too_long() {
                        return Err(ClientError::timed_out(self.progress_timeout, self.streams.trouble().cloned()));
                    }
                }
            }
        }
    }

    /// Moves every stream to another position. What was received and not read is dropped.
    pub fn seek(&mut self, to: Start) {
        self.current = None;
        self.streams.seek(to);
    }
}
