//! Start of a subscriber's stream: the place that the subscription asks for, in the region or on disks.

use super::disks::DiskRead;
use super::{SubscriberSession, announce, end_of, refuse, unreadable};
use crate::archive::ReadFrom;
use embarcadero_cxl::Fabric;
use embarcadero_cxl::layout::IndexEntry;
use embarcadero_cxl::order_index::ReadError;
use embarcadero_transport::{Outbox, TransportError};
use embarcadero_wire::{ErrorCode, StartKind};

/// Part of a stream that the region has.
struct Held {
    /// Position of the first batch that can be read; `committed` if there is none.
    low: u64,
    /// Position after the last committed batch.
    committed: u64,
    /// Offset of the first message that can be read; `next_offset` if there is none.
    earliest: u64,
    /// Offset after the last committed message.
    next_offset: u64,
}

impl<F: Fabric> SubscriberSession<F> {
    /// Finds where the stream starts, in the region or on disks, and announces a start in the region. Returns false while
    /// the stream does not exist or nobody leads.
    ///
    /// # Errors
    /// A refusal when the stream has no such place, or the index cannot be read.
    pub(super) fn start(&mut self, outbox: &mut Outbox) -> Result<bool, TransportError> {
        let Some(request) = self.request else { return Ok(true) };
        let Some(held) = self.held()? else { return Ok(false) };
        let Some(kind) = StartKind::from_code(request.start_kind) else {
            return refuse(ErrorCode::BadFrame, format!("start_kind is {}; it must be 0 to 3", request.start_kind), 0);
        };
        let on_disks = self.is_replicated() && held.earliest > 0;
        let (cursor, start_offset) = match kind {
            StartKind::Earliest if on_disks => {
                self.request = None;
                self.disks = Some(DiskRead::beginning(ReadFrom::Offset(0)));
                return Ok(true);
            }
            StartKind::Timestamp if on_disks && self.begins_after(&held, request.start)? => {
                self.request = None;
                self.disks = Some(DiskRead::beginning(ReadFrom::Time(request.start)));
                return Ok(true);
            }
            StartKind::Offset if on_disks && request.start < held.earliest => {
                self.disks = Some(DiskRead::at(request.start));
                (held.low, request.start)
            }
            StartKind::Earliest => (held.low, held.earliest),
            StartKind::Latest => (held.committed, held.next_offset),
            StartKind::Offset => (self.find_offset(&held, request.start)?, request.start),
            StartKind::Timestamp => self.find_time(&held, request.start)?,
        };
        (self.cursor, self.next_offset) = (cursor, start_offset);
        self.request = None;
        announce(outbox, start_offset, held.next_offset);
        Ok(true)
    }

    /// Pins the stream and reads which part of it the region has. Returns `None` while the stream does not exist or nobody
    /// leads.
    fn held(&mut self) -> Result<Option<Held>, TransportError> {
        // A pin at 0 keeps everything that is there now.
        let Ok(trimmed) = self.topic.pins.set(self.pin, 0) else { return Ok(None) };
        let Some(extent) = self.extent() else { return Ok(None) };
        let next_offset = match self.end_offset(&extent) {
            Err(ReadError::NoLeader(_)) => return Ok(None),
            known => known.map_err(unreadable)?,
        };
        let committed = self.reader.committed();
        let mut low = trimmed.max(extent.base).min(committed);
        while low < committed {
            let entry = self.reader.read(low).map_err(unreadable)?;
            // An entry without bytes stands for messages that were lost with an earlier region.
            if entry.bytes > 0 {
                return Ok(Some(Held { low, committed, earliest: entry.first_offset, next_offset }));
            }
            low += 1;
        }
        Ok(Some(Held { low, committed, earliest: next_offset, next_offset }))
    }

    /// Returns true when the region's first batch was ordered at `since_us` or later, or the region has none. Earlier
    /// batches, on disks, may then qualify as well.
    fn begins_after(&mut self, held: &Held, since_us: u64) -> Result<bool, TransportError> {
        Ok(held.low >= held.committed || self.reader.read(held.low).map_err(unreadable)?.ordered_us >= since_us)
    }

    /// Finds the position of the batch that has the message with offset `start`.
    fn find_offset(&mut self, held: &Held, start: u64) -> Result<u64, TransportError> {
        let Held { low, committed, earliest, next_offset } = *held;
        if start < earliest || start > next_offset {
            let name = &self.topic.config.name;
            let text = format!("offset {start} is out of range: topic {name} has {earliest} to {next_offset}");
            return refuse(ErrorCode::OffsetOutOfRange, text, earliest);
        }
        let after = |entry: &IndexEntry| end_of(entry) > start;
        self.reader.partition_point(low, committed, after).map_err(unreadable)
    }

    /// Finds the position and first offset of the first batch that was ordered at `start_us` or later.
    fn find_time(&mut self, held: &Held, start_us: u64) -> Result<(u64, u64), TransportError> {
        let after = |entry: &IndexEntry| entry.ordered_us >= start_us;
        let cursor = self.reader.partition_point(held.low, held.committed, after).map_err(unreadable)?;
        if cursor >= held.committed {
            return Ok((cursor, held.next_offset));
        }
        Ok((cursor, self.reader.read(cursor).map_err(unreadable)?.first_offset))
    }
}
