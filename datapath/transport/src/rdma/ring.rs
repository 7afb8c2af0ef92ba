//! Subscriber's ring, counted in cache lines. The broker finds room for each delivery; the subscriber computes the same
//! places.
//!
//! A delivery lies in one piece. Where it does not fit before the end of the ring, both ends skip the lines that are left.

use embarcadero_verbs::RemoteRange;
use embarcadero_wire::batch::ALIGN_BYTES;
use std::ops::Range;

/// Least bytes of a ring.
pub(super) const LEAST_BYTES: u64 = 64 * ALIGN_BYTES;

/// First line of the next delivery, which has `lines` lines and comes behind `head`, and the number of lines skipped.
fn next(ring_lines: u64, head: u64, lines: u64) -> (u64, u64) {
    let at = head % ring_lines;
    let skipped = if at + lines > ring_lines { ring_lines - at } else { 0 };
    ((at + skipped) % ring_lines, skipped)
}

/// Ring as the broker writes it.
pub(super) struct RingWriter {
    to: RemoteRange,
    lines: u64,
    /// Number of lines ever written or skipped.
    head: u64,
    /// Number of lines that the subscriber gave back.
    released: u64,
}

impl RingWriter {
    /// Empty ring of `bytes` that begins at `to`.
    pub(super) fn new(to: RemoteRange, bytes: u64) -> Self {
        Self { to, lines: bytes / ALIGN_BYTES, head: 0, released: 0 }
    }

    /// Returns true if a delivery of `bytes` fits into the empty ring.
    pub(super) fn can_hold(&self, bytes: u64) -> bool {
        bytes.div_ceil(ALIGN_BYTES) <= self.lines
    }

    /// Finds room for `bytes` in one piece. Returns its first line and its address; `None` while there is no room.
    pub(super) fn place(&mut self, bytes: u64) -> Option<(u32, RemoteRange)> {
        let lines = bytes.div_ceil(ALIGN_BYTES);
        if lines > self.lines {
            return None;
        }
        let (at, skipped) = next(self.lines, self.head, lines);
        if self.head == self.released {
            // Empty: the rest up to the ring's end need not stay free.
            self.released += skipped;
        }
        if self.head + skipped + lines - self.released > self.lines {
            return None;
        }
        self.head += skipped + lines;
        Some((at as u32, self.to.offset(at * ALIGN_BYTES)))
    }

    /// Takes back what the subscriber has read: all up to `lines`, counted modulo 2^32. Returns false when the subscriber
    /// claims more than was written.
    pub(super) fn release(&mut self, lines: u32) -> bool {
        self.released += u64::from(lines.wrapping_sub(self.released as u32));
        self.released <= self.head
    }
}

/// Ring as the subscriber reads it.
pub(super) struct RingReader {
    lines: u64,
    /// Number of lines ever taken or skipped.
    taken: u64,
    /// Number of lines, of those taken or skipped, that the broker was told of.
    released: u64,
}

impl RingReader {
    /// Empty ring of `bytes`.
    pub(super) fn new(bytes: u64) -> Self {
        Self { lines: bytes / ALIGN_BYTES, taken: 0, released: 0 }
    }

    /// Takes a delivery of `bytes` at `line`. Returns its range in the ring; `None` when it cannot lie there.
    pub(super) fn take(&mut self, line: u32, bytes: u64) -> Option<Range<usize>> {
        let lines = bytes.div_ceil(ALIGN_BYTES);
        let (at, skipped) = next(self.lines, self.taken, lines);
        if at != u64::from(line) || lines > self.lines {
            return None;
        }
        self.taken += skipped + lines;
        let start = (at * ALIGN_BYTES) as usize;
        Some(start..start + bytes as usize)
    }

    /// Number of lines taken or skipped, modulo 2^32, if the broker was not told of it.
    pub(super) fn due_release(&self) -> Option<u32> {
        (self.taken != self.released).then_some(self.taken as u32)
    }

    /// Records that the broker was told.
    pub(super) fn released(&mut self) {
        self.released = self.taken;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        /// The writer never hands out what is still read, and the reader finds each delivery where it was written.
        #[test]
        fn both_ends_agree(
            lines in 64u64..256,
            start in 0u64..1 << 33,
            steps in prop::collection::vec((1u64..80 * ALIGN_BYTES, 0usize..4), 1..200),
        ) {
            let to = RemoteRange { address: 0, key: 0 };
            let mut writer = RingWriter { to, lines, head: start, released: start };
            let mut reader = RingReader { lines, taken: start, released: start };
            let mut under_way: VecDeque<(u32, u64)> = VecDeque::new();
            let mut unread: Vec<Range<u64>> = Vec::new();
            for (bytes, reads) in steps {
                if let Some((line, at)) = writer.place(bytes) {
                    prop_assert_eq!(at.address, u64::from(line) * ALIGN_BYTES);
                    let range = at.address..at.address + bytes.next_multiple_of(ALIGN_BYTES);
                    prop_assert!(range.end <= lines * ALIGN_BYTES);
                    prop_assert!(unread.iter().all(|held| range.end <= held.start || range.start >= held.end));
                    unread.push(range);
                    under_way.push_back((line, bytes));
                } else {
                    prop_assert!(!writer.can_hold(bytes) || !unread.is_empty());
                }
                for _ in 0..reads {
                    let Some((line, bytes)) = under_way.pop_front() else { break };
                    let range = reader.take(line, bytes);
                    prop_assert_eq!(range.map(|range| range.start as u64), Some(unread.remove(0).start));
                    if let Some(released) = reader.due_release() {
                        prop_assert!(writer.release(released));
                        reader.released();
                    }
                }
            }
            prop_assert!(!writer.release((writer.head + 1) as u32));
        }

        #[test]
        fn a_delivery_elsewhere_is_noticed(line: u32, bytes in 1u64..1 << 20) {
            let mut reader = RingReader::new(LEAST_BYTES);
            let taken = reader.take(line, bytes);
            prop_assert_eq!(taken.is_some(), line == 0 && bytes <= LEAST_BYTES);
        }
    }
}
