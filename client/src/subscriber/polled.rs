//! Subscriber that is polled: no call waits, and nothing happens between calls.

use super::message::{Batch, Message, Start};
use super::streams::{Delivery, Streams};
use crate::environment::Environment;
use crate::error::ClientError;
use crate::silence::Silence;
use crate::views::{ClusterView, TopicView};
use embarcadero_control::v1 as proto;
use embarcadero_wire::batch::{BODY_CHECKSUM, BatchView};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

/// Subscriber that is polled.
pub struct PolledSubscriber<E: Environment> {
    streams: Streams<E>,
    /// Longest wait for an answer of brokers in [`PolledSubscriber::drain`].
    progress_timeout: Duration,
    /// Batch that was received last, while messages of it are left. It lies in its stream's connection, which is not
    /// touched meanwhile.
    current: Option<Current>,
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

/// Reading of everything that a topic has, under way.
pub struct Drain {
    silence: Silence,
    /// True when a batch has come since the last look in vain.
    has_news: bool,
}

/// Outcome of a look in a [`Drain`].
pub enum Drained<'a> {
    /// The next batch.
    Batch(Batch<'a>),
    /// Nothing has come: look again later.
    Nothing,
    /// Everything was read that the topic has.
    Everything,
}

impl<E: Environment> PolledSubscriber<E> {
    /// Subscribes to a topic of a cluster, from `start` on. `cluster` is the answer of the control plane.
    ///
    /// # Errors
    /// The topic does not exist, or there is no broker.
    pub fn new(
        environment: Arc<E>,
        topic: &str,
        start: Start,
        cluster: proto::MetadataResponse,
    ) -> Result<Self, ClientError> {
        let cluster = ClusterView::from_proto(cluster)?;
        let topic = cluster.topic(topic)?;
        let progress_timeout = environment.config().progress_timeout();
        let streams = Streams::new(environment, topic, cluster.brokers, start)?;
        Ok(Self { streams, progress_timeout, current: None })
    }

    /// Topic that is read.
    pub fn topic(&self) -> &TopicView {
        self.streams.topic()
    }

    /// Looks for a batch, unless messages of the last are left. Returns true when there is one to take. Blocks only while
    /// the transport connects.
    ///
    /// # Errors
    /// Those of [`crate::Subscriber::next_batch`].
    #[inline]
    pub fn look(&mut self) -> Result<bool, ClientError> {
        if !self.has_messages() {
            self.receive()?;
        }
        Ok(self.current.is_some())
    }

    /// Returns true while messages are left of the batch that was received last.
    fn has_messages(&self) -> bool {
        self.current.as_ref().is_some_and(|current| !current.is_used_up())
    }

    /// Receives a batch, if one has come, and checks it.
    fn receive(&mut self) -> Result<(), ClientError> {
        self.current = None;
        while let Some(delivery) = self.streams.look()? {
            if let Some(taken) = self.streams.accept(&delivery)? {
                let payload_at = self.view(&delivery).messages().take(taken).map(<[u8]>::len).sum();
                self.current = Some(Current { delivery, taken, payload_at });
                break;
            }
        }
        Ok(())
    }

    /// Bytes of a batch that was accepted.
    fn view(&self, delivery: &Delivery) -> BatchView<'_> {
        BatchView::of_checked(&delivery.header, self.streams[delivery.stream].body(delivery))
    }

    /// Takes the batch that was found, or the rest of it, without copying.
    pub fn take_batch(&mut self) -> Option<Batch<'_>> {
        let current = self.current.take().filter(|current| !current.is_used_up())?;
        let view = self.view(&current.delivery);
        let Delivery { deliver, header, .. } = &current.delivery;
        Some(Batch {
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
        })
    }

    /// Takes the next message of the batch that was found.
    pub fn take_message(&mut self) -> Option<Message<'_>> {
        let current = self.current.as_mut().filter(|current| !current.is_used_up())?;
        let (index, start) = (current.taken, current.payload_at);
        let Delivery { stream, deliver, header, .. } = &current.delivery;
        let body = self.streams[*stream].body(&current.delivery);
        // The lengths were checked against the payload when the batch came.
        let length = header.message_bytes(body, index);
        let message = Message {
            offset: deliver.first_offset + index as u64,
            stream: deliver.stream.broker(),
            client_id: header.client_id,
            ordered_us: deliver.ordered_us,
            payload: &body[start..start + length],
        };
        current.taken += 1;
        current.payload_at += length;
        Some(message)
    }

    /// Begins to read everything that the topic has now.
    pub fn begin_drain(&mut self) -> Drain {
        self.streams.forget_ends();
        Drain { silence: Silence::new(self.progress_timeout, self.streams.now()), has_news: false }
    }

    /// Looks for the next batch of a drain.
    ///
    /// # Errors
    /// Those of [`crate::Subscriber::drain`].
    pub fn drain(&mut self, drain: &mut Drain) -> Result<Drained<'_>, ClientError> {
        self.streams.ask_ends();
        if !self.has_messages() && self.streams.are_read_to_end() {
            return Ok(Drained::Everything);
        }
        if self.look()? {
            drain.has_news = true;
            return Ok(self.take_batch().map_or(Drained::Nothing, Drained::Batch));
        }
        if std::mem::take(&mut drain.has_news) {
            drain.silence.restart(self.streams.now());
        } else {
            drain.silence.look(self.streams.now());
        }
        if drain.silence.is_too_long() {
            return Err(ClientError::timed_out(self.progress_timeout, self.streams.trouble().cloned()));
        }
        Ok(Drained::Nothing)
    }

    /// Moves every stream to another position. What was received and not read is dropped.
    pub fn seek(&mut self, to: Start) {
        self.current = None;
        self.streams.seek(to);
    }

    /// Makes [`PolledSubscriber::descriptors`] readable when something comes from now on. What came before is found by one
    /// more look.
    pub(super) fn arm(&mut self) {
        self.streams.arm();
    }

    /// Descriptors that become readable when something comes.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.streams.descriptors()
    }

    /// Returns true while a stream is not connected.
    pub(super) fn is_disconnected(&self) -> bool {
        self.streams.are_missing()
    }
}
