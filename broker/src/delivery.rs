//! Delivery: batches go to subscribers in the order of the index, straight from CXL memory.

use crate::topics::{Topic, TopicTable};
use embarcadero_datapath::cxl::layout::IndexEntry;
use embarcadero_datapath::cxl::order_index::{Extent, OrderIndexReader, ReadError, StreamId, read_extent};
use embarcadero_datapath::cxl::region::Region;
use embarcadero_datapath::cxl::{Fabric, Native, RegionOffset, Site};
use embarcadero_datapath::transport::{Outbox, Outgoing, TransportError};
use embarcadero_datapath::wire::{
    Deliver, ErrorCode, Position, START_EARLIEST, START_LATEST, START_OFFSET, START_TIMESTAMP, Subscribe,
    SubscribeReady,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Batches that one subscriber may have waiting in its socket's queue.
const QUEUED_BATCHES: usize = 8;

/// A subscriber's stream on one connection.
pub struct SubscriberSession {
    region: Region<Native>,
    topic: Arc<Topic<Native>>,
    stream: StreamId,
    reader: OrderIndexReader<Native>,
    pin: usize,
    /// The request, until its stream exists and the start is found.
    request: Option<Subscribe>,
    cursor: u64,
    /// Since when retention wants what this subscriber still holds.
    unwanted_since: Option<Instant>,
}

impl Drop for SubscriberSession {
    fn drop(&mut self) {
        self.topic.pins.unregister(self.pin);
    }
}

fn refuse<T>(code: ErrorCode, text: String, detail: u64) -> Result<T, TransportError> {
    Err(TransportError::Refused { code, text, detail })
}

impl SubscriberSession {
    /// Checks a subscription.
    ///
    /// # Errors
    /// A refusal that says what is wrong.
    pub fn open(topics: &TopicTable<Native>, request: Subscribe) -> Result<Self, TransportError> {
        let topic =
            topics.get(request.topic, request.topic_incarnation).map_err(ReadError::from).map_err(unreadable)?;
        let Some(topic) = topic else {
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
        if request.start_kind > START_TIMESTAMP {
            return refuse(ErrorCode::BadFrame, format!("start_kind is {}; it must be 0 to 3", request.start_kind), 0);
        }
        let region = topics.region().clone();
        let reader = OrderIndexReader::new(region.clone(), stream);
        let pin = topic.pins.register();
        Ok(Self { region, topic, stream, reader, pin, request: Some(request), cursor: 0, unwanted_since: None })
    }

    fn extent(&self) -> Option<Extent> {
        let extent = read_extent(&self.region, self.stream).ok()?;
        (extent.incarnation == u64::from(self.topic.config.incarnation)).then_some(extent)
    }

    /// Offset after the last complete message.
    fn next_offset(&mut self, extent: &Extent) -> Result<u64, ReadError> {
        let committed = self.reader.poll();
        if committed <= extent.trimmed {
            return Ok(extent.next_offset);
        }
        let last = self.reader.read(committed - 1)?;
        Ok(last.first_offset + u64::from(last.message_count))
    }

    /// Finds where the stream starts; false when it does not exist yet.
    fn start(&mut self, outbox: &mut Outbox) -> Result<bool, TransportError> {
        let Some(request) = self.request else { return Ok(true) };
        // Pinning from 0 keeps everything that is there now.
        let Ok(trimmed) = self.topic.pins.set(self.pin, 0) else { return Ok(false) };
        let Some(extent) = self.extent() else { return Ok(false) };
        let next_offset = self.next_offset(&extent).map_err(unreadable)?;
        let committed = self.reader.committed();
        let low = trimmed.max(extent.base).min(committed);
        let earliest =
            if low < committed { self.reader.read(low).map_err(unreadable)?.first_offset } else { next_offset };
        let (cursor, start_offset) = match request.start_kind {
            START_EARLIEST => (low, earliest),
            START_LATEST => (committed, next_offset),
            START_OFFSET => {
                if request.start < earliest || request.start > next_offset {
                    let text = format!(
                        "offset {} is out of range: topic {} has {earliest} to {next_offset}",
                        request.start, self.topic.config.name
                    );
                    return refuse(ErrorCode::OffsetOutOfRange, text, earliest);
                }
                let after = |entry: &IndexEntry| entry.first_offset + u64::from(entry.message_count) > request.start;
                (self.reader.partition_point(low, committed, after).map_err(unreadable)?, request.start)
            }
            _ => {
                let after = |entry: &IndexEntry| entry.ordered_us >= request.start;
                let cursor = self.reader.partition_point(low, committed, after).map_err(unreadable)?;
                let offset = if cursor < committed {
                    self.reader.read(cursor).map_err(unreadable)?.first_offset
                } else {
                    next_offset
                };
                (cursor, offset)
            }
        };
        self.cursor = cursor;
        self.request = None;
        let ready = SubscribeReady { start_offset, next_offset, ..SubscribeReady::blank() };
        outbox.push(Outgoing::frame(ready.encode()));
        Ok(true)
    }

    /// Answers "how far does the stream reach?".
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn position(&mut self, outbox: &mut Outbox) -> Result<(), TransportError> {
        let next_offset = match self.extent() {
            Some(extent) => {
                let pinned = self.topic.pins.set(self.pin, outbox.lowest_position().min(extent.trimmed));
                pinned.map_err(ReadError::from).and_then(|_| self.next_offset(&extent)).map_err(unreadable)?
            }
            None => 0,
        };
        outbox.push(Outgoing::frame(Position { next_offset, ..Position::blank() }.encode()));
        Ok(())
    }

    /// Queues what is new, as far as the queue has room. Returns how many batches it queued.
    ///
    /// # Errors
    /// What was asked for is gone, or the topic is, or memory is damaged.
    pub fn poll(&mut self, outbox: &mut Outbox, patience: Duration) -> Result<usize, TransportError> {
        if self.topic.is_deleted() {
            return refuse(ErrorCode::TopicDeleted, format!("topic {} is deleted", self.topic.config.name), 0);
        }
        if !self.start(outbox)? {
            return Ok(0);
        }
        let committed = self.reader.poll();
        let reading = outbox.lowest_position();
        if self.cursor >= committed && reading == u64::MAX {
            self.topic.pins.clear(self.pin);
            return Ok(0);
        }
        let Ok(trimmed) = self.topic.pins.set(self.pin, reading.min(self.cursor)) else { return Ok(0) };
        if trimmed > self.cursor.min(reading) {
            self.overtaken(outbox, trimmed, patience)?;
            return Ok(0);
        }
        self.unwanted_since = None;
        let mut queued = 0;
        while self.cursor < committed && outbox.len() < QUEUED_BATCHES {
            let entry = match self.reader.read(self.cursor) {
                Ok(entry) => entry,
                Err(ReadError::NoHead(_)) => break,
                Err(error) => return Err(unreadable(error)),
            };
            self.queue(outbox, &entry)?;
            self.cursor += 1;
            queued += 1;
        }
        Ok(queued)
    }

    /// Retention passed this subscriber. What it is in the middle of stays for a while; then it has to go.
    fn overtaken(&mut self, outbox: &mut Outbox, trimmed: u64, patience: Duration) -> Result<(), TransportError> {
        let oldest = outbox.lowest_position();
        outbox.drop_unsent_batches();
        // What was dropped is due again.
        let due = match outbox.lowest_position() {
            u64::MAX => oldest,
            half_sent => half_sent + 1,
        };
        self.cursor = self.cursor.min(due);
        let since = *self.unwanted_since.get_or_insert_with(Instant::now);
        if outbox.is_mid_way() && since.elapsed() < patience {
            // Whether or not there is a head.
            let _ = self.topic.pins.set(self.pin, outbox.lowest_position());
            return Ok(());
        }
        let earliest = self.extent().map_or(0, |extent| extent.earliest_offset);
        if outbox.is_mid_way() {
            return refuse(
                ErrorCode::TooSlow,
                "the subscriber did not read what retention had to take".to_owned(),
                earliest,
            );
        }
        let text = format!(
            "offset out of range: retention trimmed topic {} up to offset {earliest} (entry {trimmed}) before it was read",
            self.topic.config.name
        );
        refuse(ErrorCode::OffsetOutOfRange, text, earliest)
    }

    fn queue(&mut self, outbox: &mut Outbox, entry: &IndexEntry) -> Result<(), TransportError> {
        let at = RegionOffset(entry.location);
        let bytes = u64::from(entry.bytes);
        let layout = self.region.layout();
        if at.0 < layout.segments || at.0.saturating_add(bytes) > layout.region_bytes {
            return refuse(ErrorCode::Corrupt, format!("index entry {} points outside the pool", self.cursor), 0);
        }
        // SYNC: pairs with the payload flush of the delegation that received it.
        self.region.fabric().invalidate(at, bytes, Site::PayloadRead);
        let frame = Deliver {
            first_offset: entry.first_offset,
            ordered_us: entry.ordered_us,
            batch_bytes: entry.bytes,
            message_count: entry.message_count,
            broker: entry.broker.into(),
            stream: self.stream.stream,
            ..Deliver::blank()
        };
        outbox.push(Outgoing::batch(frame.encode(), at, bytes, self.cursor));
        Ok(())
    }
}

fn unreadable(error: ReadError) -> TransportError {
    let code = if let ReadError::NoHead(_) = error { ErrorCode::Unavailable } else { ErrorCode::Corrupt };
    TransportError::refused(code, error.to_string())
}
