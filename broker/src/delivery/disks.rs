//! Delivery of batches that the region no longer holds, from replicas' disks.

use super::{QUEUED_BATCHES, SubscriberSession, announce, end_of, refuse, unreadable};
use crate::archive::{Archive, ArchiveAnswer, ArchiveError, ArchiveKey, DiskError, ReadFrom};
use crate::replica::store::Archived;
use crossbeam_channel::{Receiver, TryRecvError};
use embarcadero_cxl::Fabric;
use embarcadero_cxl::layout::IndexEntry;
use embarcadero_transport::{Outbox, Outgoing, TransportError};
use embarcadero_wire::{BatchHeader, Deliver, ErrorCode, FRAME_BYTES};

/// Read of batches that the region no longer holds.
pub(super) struct DiskRead {
    /// Place of the next batch to read.
    due: ReadFrom,
    /// Channel of the answer, while one is awaited.
    answer: Option<Receiver<ArchiveAnswer>>,
    /// True until the start of the stream is announced. It may then begin later than `due`, at the first batch that a
    /// disk has.
    begins: bool,
}

impl DiskRead {
    /// Returns a read that goes on at an offset.
    pub(super) fn at(due: u64) -> Self {
        Self { due: ReadFrom::Offset(due), answer: None, begins: false }
    }

    /// Returns a read for a stream that begins at the first batch that a disk has from `due` on.
    pub(super) fn beginning(due: ReadFrom) -> Self {
        Self { due, answer: None, begins: true }
    }

    /// Takes the answer of the archive, or asks for one if there is room for the batches. Returns `None` when there is no
    /// answer yet.
    fn take_answer(&mut self, archive: &Archive, key: ArchiveKey, has_room: bool) -> Option<ArchiveAnswer> {
        let Some(answer) = &self.answer else {
            if has_room {
                self.answer = Some(archive.ask(key, self.due));
            }
            return None;
        };
        let answer = match answer.try_recv() {
            Ok(answer) => answer,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => Err(ArchiveError::Unreachable(DiskError::Stops)),
        };
        self.answer = None;
        Some(answer)
    }
}

impl<F: Fabric> SubscriberSession<F> {
    /// Goes back from disks to the region if the region has the next batch. Returns false if it has not.
    pub(super) fn returns(&mut self, read: &DiskRead, outbox: &Outbox) -> Result<bool, TransportError> {
        let DiskRead { due: ReadFrom::Offset(due), begins: false, .. } = *read else { return Ok(false) };
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
        let after = |entry: &IndexEntry| end_of(entry) > due;
        let cursor = self.reader.partition_point(low, committed, after).map_err(unreadable)?;
        // Retention may have gone on meanwhile.
        let reaches = cursor == committed || self.reader.read(cursor).map_err(unreadable)?.first_offset <= due;
        if reaches {
            (self.cursor, self.next_offset) = (cursor, due);
        } else {
            self.topic.pins.clear(self.pin);
        }
        Ok(reaches)
    }

    /// Asks for batches on disks, and queues those that come. Returns the number of batches queued.
    ///
    /// # Errors
    /// A refusal when no disk has the next batch, or one that may have it does not answer or is damaged.
    pub(super) fn poll_disks(
        &mut self,
        read: &mut DiskRead,
        outbox: &mut Outbox,
        archive: &Archive,
    ) -> Result<usize, TransportError> {
        let key = ArchiveKey {
            topic: self.topic.config.id,
            incarnation: self.topic.config.incarnation,
            stream: self.stream.stream,
        };
        let has_room = outbox.len() < QUEUED_BATCHES;
        if read.answer.is_none() && has_room {
            // An answer to `position` may have set the pin.
            self.topic.pins.clear(self.pin);
        }
        let Some(answer) = read.take_answer(archive, key, has_room) else { return Ok(0) };
        match answer {
            Ok(batches) => {
                if read.begins && !self.begin_at(read, outbox, batches[0].first_offset) {
                    return Ok(0);
                }
                for batch in &batches {
                    self.queue_archived(outbox, batch)?;
                    read.due = ReadFrom::Offset(batch.end_offset());
                }
                Ok(batches.len())
            }
            Err(ArchiveError::Missing(later)) => self.missing(read, outbox, later).map(|()| 0),
            Err(ArchiveError::Unreachable(error)) => {
                refuse(ErrorCode::Unavailable, format!("what is due may be on a disk that does not answer: {error}"), 0)
            }
            Err(ArchiveError::Damaged(error)) => {
                refuse(ErrorCode::Corrupt, format!("what is due may be on a disk that is damaged: {error}"), 0)
            }
        }
    }

    /// Handles a place that is on no disk; `later` is the lowest later offset that is on one. A stream that is yet to begin
    /// begins later, on disks or in the region.
    ///
    /// # Errors
    /// A refusal when the stream has begun already.
    fn missing(&mut self, read: &mut DiskRead, outbox: &mut Outbox, later: Option<u64>) -> Result<(), TransportError> {
        if read.begins
            && let Some(lowest) = later
        {
            read.due = ReadFrom::Offset(lowest);
            return Ok(());
        }
        let earliest = later.or_else(|| self.extent().map(|extent| extent.earliest_offset));
        // Between two leaders nobody can say what the region has: disks are asked again.
        let Some(earliest) = earliest else { return Ok(()) };
        if read.begins {
            self.begin_at(read, outbox, earliest);
            return Ok(());
        }
        let (due, topic) = (read.due, &self.topic.config.name);
        let text =
            format!("{due} is out of range: neither the region nor a replica has it of topic {topic}, but {earliest}");
        refuse(ErrorCode::OffsetOutOfRange, text, earliest)
    }

    /// Begins the stream at an offset on disks, and announces that. Returns false, and does nothing, while nobody leads.
    fn begin_at(&mut self, read: &mut DiskRead, outbox: &mut Outbox, start_offset: u64) -> bool {
        let Some(extent) = self.extent() else { return false };
        read.due = ReadFrom::Offset(start_offset);
        read.begins = false;
        announce(outbox, start_offset, extent.next_offset);
        true
    }

    /// Queues a batch from disk.
    fn queue_archived(&mut self, outbox: &mut Outbox, batch: &Archived) -> Result<(), TransportError> {
        // What is no header is told by the subscriber, too.
        let header: BatchHeader = batch
            .bytes
            .first_chunk::<FRAME_BYTES>()
            .map_or_else(BatchHeader::blank, |bytes| bytemuck::pod_read_unaligned(bytes));
        let frame = Deliver {
            first_offset: batch.first_offset,
            ordered_us: batch.ordered_us,
            batch_bytes: batch.bytes.len() as u32,
            message_count: batch.message_count,
            broker: batch.source,
            stream: self.stream.stream,
            client_id: header.client_id,
            sequence: header.sequence,
            ..Deliver::blank()
        };
        outbox.push(Outgoing::copied(&frame.encode(), &batch.bytes).map_err(TransportError::Io)?);
        Ok(())
    }
}
