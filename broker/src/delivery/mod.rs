//! Delivery: batches go to subscribers in the order of the index, straight from CXL memory.
//!
//! Batches that retention removed from the region come from replicas' disks, if the topic is replicated.

mod disks;
mod region;
mod start;

use crate::archive::Archive;
use crate::topics::{Topic, TopicTable};
use disks::DiskRead;
use embarcadero_cxl::Fabric;
use embarcadero_cxl::layout::IndexEntry;
use embarcadero_cxl::order_index::{Extent, OrderIndexReader, ReadError, StreamId, read_extent};
use embarcadero_cxl::region::Region;
use embarcadero_transport::{Outbox, Outgoing, TransportError};
use embarcadero_wire::{ErrorCode, Position, Subscribe, SubscribeReady};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Largest number of batches that wait in one subscriber's outbox.
const QUEUED_BATCHES: usize = 8;

/// Subscriber on one connection, and how far its stream is delivered.
pub(crate) struct SubscriberSession<F: Fabric> {
    region: Region<F>,
    topic: Arc<Topic<F>>,
    stream: StreamId,
    reader: OrderIndexReader<F>,
    /// Number of this reader on the topic's board of pins.
    pin: usize,
    /// Subscription whose start is still to be found; `None` once the stream has begun.
    request: Option<Subscribe>,
    /// Position in the index of the next batch to queue from the region.
    cursor: u64,
    /// Offset of the first message of that batch.
    next_offset: u64,
    /// Position and first offset of each of the last [`QUEUED_BATCHES`] batches that were queued from the region.
    queued: VecDeque<(u64, u64)>,
    /// Read from disks that is under way; `None` while batches come from the region.
    disks: Option<DiskRead>,
    /// Time since which retention wants memory that this subscriber still pins.
    unwanted_since: Option<Instant>,
}

impl<F: Fabric> SubscriberSession<F> {
    /// Opens a session after a check of the subscription against the topic.
    ///
    /// # Errors
    /// A refusal that says what is wrong.
    pub(crate) fn open(topics: &TopicTable<F>, request: Subscribe) -> Result<Self, TransportError> {
        let Some(topic) = topics.get(request.topic, request.topic_incarnation)? else {
            let text = format!("topic slot {} incarnation {} is not live", request.topic, request.topic_incarnation);
            return refuse(ErrorCode::UnknownTopic, text, 0);
        };
        let stream = topic.stream(topics.broker());
        if stream.stream != request.stream {
            let text = format!(
                "stream {} of topic {} (order {}) is not read at this broker; ask for {}",
                request.stream, topic.config.name, topic.config.order, stream.stream
            );
            return refuse(ErrorCode::UnknownTopic, text, 0);
        }
        let region = topics.region().clone();
        let reader = OrderIndexReader::new(region.clone(), stream);
        let pin = topic.pins.register();
        Ok(Self {
            region,
            topic,
            stream,
            reader,
            pin,
            request: Some(request),
            cursor: 0,
            next_offset: 0,
            queued: VecDeque::with_capacity(QUEUED_BATCHES),
            disks: None,
            unwanted_since: None,
        })
    }

    /// Answers a subscriber that asks for the offset after the last committed message.
    ///
    /// # Errors
    /// A refusal when the index cannot be read.
    pub(crate) fn position(&mut self, outbox: &mut Outbox) -> Result<(), TransportError> {
        // Between two leaders nobody can say; the client asks again.
        let extent = read_extent(&self.region, self.stream).map_err(ReadError::from).map_err(unreadable)?;
        let next_offset = if let Some(extent) = self.of_this_topic(extent) {
            let pinned = self.topic.pins.set(self.pin, outbox.lowest_position().min(extent.trimmed));
            pinned.map_err(ReadError::from).and_then(|_| self.end_offset(&extent)).map_err(unreadable)?
        } else {
            0
        };
        self.topic.check()?;
        outbox.push(Outgoing::frame(Position { next_offset, ..Position::blank() }.encode()));
        Ok(())
    }

    /// Queues the next batches in `outbox`, as far as it has room. Returns the number of batches queued.
    ///
    /// # Errors
    /// A refusal when the next batch is gone, the topic is deleted, or memory is damaged.
    pub(crate) fn poll(
        &mut self,
        outbox: &mut Outbox,
        archive: &Archive,
        patience: Duration,
        now: Instant,
    ) -> Result<usize, TransportError> {
        self.topic.check()?;
        if !self.start(outbox)? {
            return Ok(0);
        }
        if let Some(mut read) = self.disks.take()
            && !self.returns(&read, outbox)?
        {
            let queued = self.poll_disks(&mut read, outbox, archive);
            self.disks = Some(read);
            return queued;
        }
        self.poll_region(outbox, patience, now)
    }

    /// Reads the stream's extent. Returns `None` while the stream of this incarnation does not exist, or nobody leads.
    fn extent(&self) -> Option<Extent> {
        self.of_this_topic(read_extent(&self.region, self.stream).ok()?)
    }

    /// Returns an extent that is of this incarnation. One that is damaged makes the topic unusable.
    fn of_this_topic(&self, extent: Extent) -> Option<Extent> {
        extent.of(self.topic.config.incarnation).unwrap_or_else(|damage| {
            self.topic.mark_damaged(damage);
            None
        })
    }

    /// Reads the offset after the last committed message.
    fn end_offset(&mut self, extent: &Extent) -> Result<u64, ReadError> {
        let committed = self.reader.poll_beyond(extent)?;
        if committed <= extent.trimmed {
            return Ok(extent.next_offset);
        }
        Ok(end_of(&self.reader.read(committed - 1)?))
    }

    /// Returns true when batches that retention removed may be on disks.
    fn is_replicated(&self) -> bool {
        self.topic.config.replication_factor > 1
    }
}

impl<F: Fabric> Drop for SubscriberSession<F> {
    fn drop(&mut self) {
        self.topic.pins.unregister(self.pin);
    }
}

/// Offset after the last message of a batch.
fn end_of(entry: &IndexEntry) -> u64 {
    entry.first_offset + u64::from(entry.message_count)
}

/// Returns a refusal. `detail` is an offset for the client, as the code defines it.
fn refuse<T>(code: ErrorCode, text: String, detail: u64) -> Result<T, TransportError> {
    Err(TransportError::Refused { code, text, detail })
}

/// Tells the client where its stream starts, and the offset after the last committed message.
fn announce(outbox: &mut Outbox, start_offset: u64, next_offset: u64) {
    let ready = SubscribeReady { start_offset, next_offset, ..SubscribeReady::blank() };
    outbox.push(Outgoing::frame(ready.encode()));
}

/// Returns the refusal of a subscriber whose index cannot be read.
fn unreadable(error: ReadError) -> TransportError {
    let code = if let ReadError::NoLeader(_) = error { ErrorCode::Unavailable } else { ErrorCode::Corrupt };
    TransportError::refused(code, error.to_string())
}
