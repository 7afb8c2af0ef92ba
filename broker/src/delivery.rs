//! Delivery: batches go to subscribers in the order of the index, straight from CXL memory.
//!
//! Batches that retention removed from the region come from replicas' disks, if the topic is replicated.

use crate::archive::{Archive, ArchiveAnswer, ArchiveError, ArchiveKey, Archived, From};
use crate::topics::{Topic, TopicTable};
use crossbeam_channel::{Receiver, TryRecvError};
use embarcadero_cxl::layout::IndexEntry;
use embarcadero_cxl::order_index::{Extent, OrderIndexReader, ReadError, StreamId, read_extent};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::{Fabric, Native, RegionOffset, Site};
use embarcadero_transport::{Outbox, Outgoing, TransportError};
use embarcadero_wire::{Deliver, ErrorCode, Position, StartKind, Subscribe, SubscribeReady};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Largest number of batches that wait in one subscriber's outbox.
const QUEUED_BATCHES: usize = 8;

/// Subscriber on one connection, and how far its stream is delivered.
pub struct SubscriberSession {
    region: Region<Native>,
    topic: Arc<Topic<Native>>,
    stream: StreamId,
    reader: OrderIndexReader<Native>,
    pin: usize,
    /// Subscription whose start is still to be found; `None` once the stream has begun.
    request: Option<Subscribe>,
    /// Position in the index of the next batch to queue.
    cursor: u64,
    /// Offset of the first message of that batch.
    next_offset: u64,
    /// Position and first offset of each of the last [`QUEUED_BATCHES`] batches that were queued.
    queued: VecDeque<(u64, u64)>,
    /// Read from disks that is under way; `None` while batches come from the region.
    archived: Option<ArchiveRead>,
    /// Time since which retention wants memory that this subscriber still pins.
    unwanted_since: Option<Instant>,
}

/// Read of batches that the region no longer holds.
struct ArchiveRead {
    /// Place of the next batch to read.
    due: From,
    /// Channel of the answer, while one is awaited.
    answer: Option<Receiver<ArchiveAnswer>>,
    /// True until the start is announced. The stream may then begin later than `due`, at the first batch that a disk
    /// has.
    begins: bool,
}

impl ArchiveRead {
    /// Returns a read that goes on at an offset.
    fn at(due: u64) -> Option<Self> {
        Some(Self { due: From::Offset(due), answer: None, begins: false })
    }

    /// Offset of the next message to read; 0 while only a time is known.
    fn offset(&self) -> u64 {
        match self.due {
            From::Offset(due) => due,
            From::Time(_) => 0,
        }
    }

    /// Returns a read for a stream that begins at the first batch that a disk has from `due` on.
    fn begin(due: From) -> Option<Self> {
        Some(Self { due, answer: None, begins: true })
    }
}

impl Drop for SubscriberSession {
    fn drop(&mut self) {
        self.topic.pins.unregister(self.pin);
    }
}

/// Returns a refusal with a detail for the client, an offset.
fn refuse<T>(code: ErrorCode, text: String, detail: u64) -> Result<T, TransportError> {
    Err(TransportError::Refused { code, text, detail })
}

impl SubscriberSession {
    /// Opens a session after a check of the subscription against the topic.
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
            queued: VecDeque::new(),
            archived: None,
            unwanted_since: None,
        })
    }

    /// Reads the stream's extent. `None` while the stream of this incarnation does not exist, or nobody leads.
    fn extent(&self) -> Option<Extent> {
        let extent = read_extent(&self.region, self.stream).ok()?;
        (extent.incarnation == self.topic.config.incarnation).then_some(extent)
    }

    /// Reads the offset after the last committed message.
    fn next_offset(&mut self, extent: &Extent) -> Result<u64, ReadError> {
        let committed = self.reader.poll_beyond(extent)?;
        if committed <= extent.trimmed {
            return Ok(extent.next_offset);
        }
        let last = self.reader.read(committed - 1)?;
        Ok(last.first_offset + u64::from(last.message_count))
    }

    /// Returns true when batches that retention removed may be on disks.
    fn is_archived(&self) -> bool {
        self.topic.config.replication_factor > 1
    }

    /// Finds where the stream starts, in the region or on disks, and announces it. Returns false while the stream does
    /// not exist or nobody leads.
    fn start(&mut self, outbox: &mut Outbox) -> Result<bool, TransportError> {
        let Some(request) = self.request else { return Ok(true) };
        // Pinning from 0 keeps everything that is there now.
        let Ok(trimmed) = self.topic.pins.set(self.pin, 0) else { return Ok(false) };
        let Some(extent) = self.extent() else { return Ok(false) };
        let next_offset = match self.next_offset(&extent) {
            Err(ReadError::NoLeader(_)) => return Ok(false),
            known => known.map_err(unreadable)?,
        };
        let committed = self.reader.committed();
        let mut low = trimmed.max(extent.base).min(committed);
        // Entries without bytes stand for messages that were lost with an earlier region.
        while low < committed && self.reader.read(low).map_err(unreadable)?.bytes == 0 {
            low += 1;
        }
        let earliest =
            if low < committed { self.reader.read(low).map_err(unreadable)?.first_offset } else { next_offset };
        let archived = self.is_archived() && earliest > 0;
        let Some(kind) = StartKind::from_code(request.start_kind) else {
            return refuse(ErrorCode::BadFrame, format!("start_kind is {}; it must be 0 to 3", request.start_kind), 0);
        };
        let (cursor, start_offset) = match kind {
            StartKind::Earliest if archived => {
                self.request = None;
                self.archived = ArchiveRead::begin(From::Offset(0));
                return Ok(true);
            }
            StartKind::Timestamp if archived && self.begins_after(low, committed, request.start)? => {
                self.request = None;
                self.archived = ArchiveRead::begin(From::Time(request.start));
                return Ok(true);
            }
            StartKind::Offset if archived && request.start < earliest => {
                self.request = None;
                self.archived = ArchiveRead::at(request.start);
                (low, request.start)
            }
            StartKind::Earliest => (low, earliest),
            StartKind::Latest => (committed, next_offset),
            StartKind::Offset => {
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
            StartKind::Timestamp => {
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
        (self.cursor, self.next_offset) = (cursor, start_offset);
        self.request = None;
        let ready = SubscribeReady { start_offset, next_offset, ..SubscribeReady::blank() };
        outbox.push(Outgoing::frame(ready.encode()));
        Ok(true)
    }

    /// Returns true when the region's first batch was ordered at `since_us` or later, or the region has none. Earlier
    /// batches, on disks, may then qualify as well.
    fn begins_after(&mut self, low: u64, committed: u64, since_us: u64) -> Result<bool, TransportError> {
        Ok(low >= committed || self.reader.read(low).map_err(unreadable)?.ordered_us >= since_us)
    }

    /// Answers a subscriber that asks for the offset after the last committed message.
    ///
    /// # Errors
    /// A refusal when the index cannot be read.
    pub fn position(&mut self, outbox: &mut Outbox) -> Result<(), TransportError> {
        // Between two leaders nobody can say; the client asks again.
        let extent = read_extent(&self.region, self.stream).map_err(ReadError::from).map_err(unreadable)?;
        let exists = extent.incarnation == self.topic.config.incarnation;
        let next_offset = match Some(extent).filter(|_| exists) {
            Some(extent) => {
                let pinned = self.topic.pins.set(self.pin, outbox.lowest_position().min(extent.trimmed));
                pinned.map_err(ReadError::from).and_then(|_| self.next_offset(&extent)).map_err(unreadable)?
            }
            None => 0,
        };
        outbox.push(Outgoing::frame(Position { next_offset, ..Position::blank() }.encode()));
        Ok(())
    }

    /// Queues the next batches in `outbox`, as far as it has room. Returns the number of batches queued.
    ///
    /// # Errors
    /// A refusal when the next batch is gone, the topic is deleted, or memory is damaged.
    pub fn poll(
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
        if self.archived.is_some() && !self.returns(outbox)? {
            return self.poll_archive(outbox, archive);
        }
        let committed = self.reader.poll();
        let reading = outbox.lowest_position();
        if self.cursor >= committed && reading == u64::MAX {
            self.topic.pins.clear(self.pin);
            return Ok(0);
        }
        let Ok(trimmed) = self.topic.pins.set(self.pin, reading.min(self.cursor)) else { return Ok(0) };
        if trimmed > self.cursor.min(reading) {
            self.overtaken(outbox, trimmed, patience, now)?;
            return Ok(0);
        }
        self.unwanted_since = None;
        let mut queued = 0;
        while self.cursor < committed && outbox.len() < QUEUED_BATCHES {
            let entry = match self.reader.read(self.cursor) {
                Ok(entry) => entry,
                Err(ReadError::NoLeader(_)) => break,
                Err(error) => return Err(unreadable(error)),
            };
            if entry.bytes == 0 && outbox.lowest_position() != u64::MAX {
                // The batches before the lost ones go out before the refusal.
                break;
            }
            self.queue(outbox, &entry)?;
            self.cursor += 1;
            queued += 1;
        }
        Ok(queued)
    }

    /// Handles a subscriber that retention has passed: it drops what is unsent, and later goes on from disks.
    ///
    /// A batch that is half sent stays in memory for `patience` at most.
    ///
    /// # Errors
    /// A refusal when the patience is over, or no disk can have the batches.
    fn overtaken(
        &mut self,
        outbox: &mut Outbox,
        trimmed: u64,
        patience: Duration,
        now: Instant,
    ) -> Result<(), TransportError> {
        let oldest = outbox.lowest_position();
        outbox.drop_unsent_batches();
        // Batches that were dropped are queued anew.
        let due = match outbox.lowest_position() {
            u64::MAX => oldest,
            half_sent => half_sent + 1,
        };
        if due < self.cursor {
            self.cursor = due;
            let known = self.queued.iter().find(|(position, _)| *position == due);
            self.next_offset = known.map_or(self.next_offset, |(_, offset)| *offset);
        }
        let since = *self.unwanted_since.get_or_insert(now);
        if outbox.is_mid_way() && now.saturating_duration_since(since) < patience {
            // Whether or not there is a leader.
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
        if self.is_archived() {
            self.archived = ArchiveRead::at(self.next_offset);
            self.topic.pins.clear(self.pin);
            return Ok(());
        }
        let text = format!(
            "offset out of range: retention trimmed topic {} up to offset {earliest} (entry {trimmed}) before it was read",
            self.topic.config.name
        );
        refuse(ErrorCode::OffsetOutOfRange, text, earliest)
    }

    /// Goes back from disks to the region once the region has the next batch. Returns false while it has not.
    fn returns(&mut self, outbox: &Outbox) -> Result<bool, TransportError> {
        let Some(ArchiveRead { due: From::Offset(due), begins: false, .. }) = self.archived else { return Ok(false) };
        // Batches that were queued from the region before may still be on their way.
        let reading = outbox.lowest_position();
        let Some(extent) = self.extent().filter(|extent| reading == u64::MAX && extent.earliest_offset <= due) else {
            return Ok(false);
        };
        let Ok(trimmed) = self.topic.pins.set(self.pin, 0) else { return Ok(false) };
        let Ok(committed) = self.reader.poll_beyond(&extent) else {
            self.topic.pins.clear(self.pin);
            return Ok(false);
        };
        let low = trimmed.min(committed);
        let after = |entry: &IndexEntry| entry.first_offset + u64::from(entry.message_count) > due;
        let cursor = self.reader.partition_point(low, committed, after).map_err(unreadable)?;
        // Retention may have gone on meanwhile.
        let reaches = cursor == committed || self.reader.read(cursor).map_err(unreadable)?.first_offset <= due;
        if reaches {
            (self.cursor, self.next_offset, self.archived) = (cursor, due, None);
        } else {
            self.topic.pins.clear(self.pin);
        }
        Ok(reaches)
    }

    /// Asks for batches on disks, and queues those that come. Returns the number of batches queued.
    ///
    /// # Errors
    /// A refusal when no disk has the next batch, or one that may have it does not answer.
    fn poll_archive(&mut self, outbox: &mut Outbox, archive: &Archive) -> Result<usize, TransportError> {
        let key = ArchiveKey {
            topic: self.topic.config.id,
            incarnation: self.topic.config.incarnation,
            stream: self.stream.stream,
        };
        let Some(read) = &mut self.archived else { return Ok(0) };
        let Some(answer) = &read.answer else {
            if outbox.len() < QUEUED_BATCHES {
                // An answer to `position` may have set the pin.
                self.topic.pins.clear(self.pin);
                read.answer = Some(archive.ask(key, read.due));
            }
            return Ok(0);
        };
        let answer = match answer.try_recv() {
            Ok(answer) => answer,
            Err(TryRecvError::Empty) => return Ok(0),
            Err(TryRecvError::Disconnected) => Err(ArchiveError::Unreachable("the broker stops".to_owned())),
        };
        read.answer = None;
        match answer {
            Ok(batches) => {
                if std::mem::take(&mut read.begins) {
                    self.begin_at(outbox, batches.first().map_or(0, |first| first.first_offset));
                }
                let count = batches.len();
                for batch in &batches {
                    self.queue_archived(outbox, batch)?;
                }
                Ok(count)
            }
            // The disks begin later: so does the stream.
            Err(ArchiveError::Missing(Some(lowest))) if read.begins => {
                read.due = From::Offset(lowest);
                Ok(0)
            }
            Err(ArchiveError::Missing(None)) if read.begins => {
                read.begins = false;
                let Some(extent) = self.extent() else { return Ok(0) };
                self.begin_at(outbox, extent.earliest_offset);
                Ok(0)
            }
            Err(ArchiveError::Missing(later)) => {
                let earliest = later.or(self.extent().map(|extent| extent.earliest_offset)).unwrap_or(0);
                let due = self.archived.as_ref().map_or(0, ArchiveRead::offset);
                let topic = &self.topic.config.name;
                let text = format!(
                    "offset {due} is out of range: neither the region nor a replica has it of topic {topic}, but {earliest}"
                );
                refuse(ErrorCode::OffsetOutOfRange, text, earliest)
            }
            Err(ArchiveError::Unreachable(error)) => {
                refuse(ErrorCode::Unavailable, format!("what is due may be on a disk that does not answer: {error}"), 0)
            }
        }
    }

    /// Announces the start of a stream that begins on disks.
    fn begin_at(&mut self, outbox: &mut Outbox, start_offset: u64) {
        if let Some(read) = &mut self.archived {
            read.due = From::Offset(start_offset);
        }
        let next_offset = self.extent().map_or(start_offset, |extent| extent.next_offset);
        let ready = SubscribeReady { start_offset, next_offset, ..SubscribeReady::blank() };
        outbox.push(Outgoing::frame(ready.encode()));
    }

    /// Queues a batch from disk.
    fn queue_archived(&mut self, outbox: &mut Outbox, batch: &Archived) -> Result<(), TransportError> {
        let end = batch.end_offset();
        let frame = Deliver {
            first_offset: batch.first_offset,
            ordered_us: batch.ordered_us,
            batch_bytes: batch.bytes.len() as u32,
            message_count: batch.message_count,
            broker: batch.source,
            stream: self.stream.stream,
            ..Deliver::blank()
        };
        outbox.push(Outgoing::copied(&frame.encode(), &batch.bytes).map_err(TransportError::Io)?);
        if let Some(read) = &mut self.archived {
            read.due = From::Offset(end);
        }
        Ok(())
    }

    /// Queues the batch at the cursor, which is sent straight from the region.
    ///
    /// # Errors
    /// A refusal when the batch was lost with an earlier region, or its entry is damaged.
    fn queue(&mut self, outbox: &mut Outbox, entry: &IndexEntry) -> Result<(), TransportError> {
        let at = RegionOffset(entry.location);
        let bytes = u64::from(entry.bytes);
        if bytes == 0 {
            let (first, end) = (entry.first_offset, entry.first_offset + u64::from(entry.message_count));
            let text = format!(
                "offsets {first} to {} of topic {} were lost with an earlier region; go on at {end}",
                end - 1,
                self.topic.config.name
            );
            return refuse(ErrorCode::OffsetOutOfRange, text, end);
        }
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
        if self.queued.len() == QUEUED_BATCHES {
            self.queued.pop_front();
        }
        self.queued.push_back((self.cursor, entry.first_offset));
        self.next_offset = entry.first_offset + u64::from(entry.message_count);
        Ok(())
    }
}

/// Returns the refusal of a subscriber whose index cannot be read.
fn unreadable(error: ReadError) -> TransportError {
    let code = if let ReadError::NoLeader(_) = error { ErrorCode::Unavailable } else { ErrorCode::Corrupt };
    TransportError::refused(code, error.to_string())
}
