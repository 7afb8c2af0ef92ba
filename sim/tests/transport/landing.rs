//! A landing that puts batches one behind the other, and refuses them when it is told to.

use embarcadero_cxl::{LINE_BYTES, RegionOffset};
use embarcadero_transport::{Landing, Placement, TransportError, Window, WindowPlacement};
use embarcadero_wire::{BatchHeader, ErrorCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Place of the first batch. Deliveries have the room before it.
pub(crate) const LOG_AT: u64 = 8 << 20;

#[derive(Default)]
pub(crate) struct TestLanding {
    /// Batches that are complete, and where they lie.
    pub taken: Vec<(BatchHeader, RegionOffset)>,
    /// True when there is no room.
    pub full: bool,
    /// True when every batch is refused.
    pub refuses: bool,
    used: u64,
    /// Bytes of windows that were given back unused.
    given_back: Arc<AtomicU64>,
}

impl TestLanding {
    fn answer(&mut self, at: RegionOffset) -> Placement {
        if self.refuses {
            return Placement::Refuse(TransportError::refused(ErrorCode::TopicDeleted, "gone"));
        }
        if self.full { Placement::Wait } else { Placement::At(at) }
    }

    fn reserve(&mut self, bytes: u64) -> RegionOffset {
        let at = RegionOffset(LOG_AT + self.used);
        self.used += bytes.next_multiple_of(LINE_BYTES);
        at
    }
}

impl Landing for TestLanding {
    fn place(&mut self, header: &BatchHeader) -> Placement {
        if self.full || self.refuses {
            return self.answer(RegionOffset(0));
        }
        Placement::At(self.reserve(header.batch_bytes()))
    }

    fn grant_window(&mut self, bytes: u64, _: bool) -> WindowPlacement {
        let (at, given_back) = (self.reserve(bytes), Arc::clone(&self.given_back));
        WindowPlacement::Granted(Window::new(at, bytes, move |used| {
            given_back.fetch_add(bytes - used, Ordering::Relaxed);
        }))
    }

    fn admit(&mut self, _: &BatchHeader, at: RegionOffset) -> Placement {
        self.answer(at)
    }

    fn complete(&mut self, header: BatchHeader, at: RegionOffset, _: bool) -> Result<(), TransportError> {
        self.taken.push((header, at));
        Ok(())
    }
}
