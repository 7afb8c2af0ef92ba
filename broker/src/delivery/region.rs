//! Delivery of batches that lie in the region.

use super::disks::DiskRead;
use super::{QUEUED_BATCHES, SubscriberSession, end_of, refuse, unreadable};
use embarcadero_cxl::layout::IndexEntry;
use embarcadero_cxl::order_index::ReadError;
use embarcadero_cxl::{Fabric, RegionOffset, Site};
use embarcadero_transport::{Outbox, Outgoing, TransportError};
use embarcadero_wire::{Deliver, ErrorCode};
use std::time::{Duration, Instant};

impl<F: Fabric> SubscriberSession<F> {
    /// Queues the next batches of the region, as far as `outbox` has room. Returns the number of batches queued.
    ///
    /// # Errors
    /// A refusal when the next batch is gone, or memory is damaged.
    pub(super) fn poll_region(
        &mut self,
        outbox: &mut Outbox,
        patience: Duration,
        now: Instant,
    ) -> Result<usize, TransportError> {
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

    /// Queues the batch at the cursor, which is sent straight from the region.
    ///
    /// # Errors
    /// A refusal when the batch was lost with an earlier region, or its entry is damaged.
    fn queue(&mut self, outbox: &mut Outbox, entry: &IndexEntry) -> Result<(), TransportError> {
        let at = RegionOffset(entry.location);
        let bytes = u64::from(entry.bytes);
        if bytes == 0 {
            let (first, end) = (entry.first_offset, end_of(entry));
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
            client_id: entry.client_id,
            sequence: entry.sequence,
            ..Deliver::blank()
        };
        outbox.push(Outgoing::batch(frame.encode(), at, bytes, self.cursor));
        if self.queued.len() == QUEUED_BATCHES {
            self.queued.pop_front();
        }
        self.queued.push_back((self.cursor, entry.first_offset));
        self.next_offset = end_of(entry);
        Ok(())
    }

    /// Handles a subscriber that retention has passed: it drops what is unsent, and later goes on from disks. The rest of a
    /// batch that a socket took in part is copied.
    ///
    /// Batches that a NIC is sending stay in memory for `patience` at most.
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
        self.drop_unsent(outbox);
        // The pin holds until this returns.
        outbox.detach(self.region.fabric());
        let reading = outbox.lowest_position();
        let since = *self.unwanted_since.get_or_insert(now);
        // The pin is set whether or not there is a leader.
        let _ = self.topic.pins.set(self.pin, reading);
        if reading != u64::MAX && now.saturating_duration_since(since) < patience {
            return Ok(());
        }
        // Between two leaders nobody can say what is left; the next poll looks again.
        let Some(extent) = self.extent() else { return Ok(()) };
        let earliest = extent.earliest_offset;
        if reading != u64::MAX {
            let text = "the subscriber did not read what retention had to take";
            return refuse(ErrorCode::TooSlow, text.to_owned(), earliest);
        }
        if self.is_replicated() {
            self.disks = Some(DiskRead::at(self.next_offset));
            return Ok(());
        }
        let text = format!(
            "offset out of range: retention trimmed topic {} up to offset {earliest} (entry {trimmed}) before it was read",
            self.topic.config.name
        );
        refuse(ErrorCode::OffsetOutOfRange, text, earliest)
    }

    /// Drops the batches of which nothing was sent, and moves the cursor back to the first of them.
    fn drop_unsent(&mut self, outbox: &mut Outbox) {
        let oldest = outbox.lowest_position();
        let due = outbox.drop_unsent_batches().map_or(oldest, |being_sent| being_sent + 1);
        if due < self.cursor {
            self.cursor = due;
            let known = self.queued.iter().find(|(position, _)| *position == due);
            let Some((_, offset)) = known else { unreachable!("batch {due} was queued, so its offset is known") };
            self.next_offset = *offset;
        }
    }
}
