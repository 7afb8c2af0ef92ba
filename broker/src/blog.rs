//! The Blog: a broker's log of a topic, a chain of pool segments that batches are received into.

use embarcadero_cxl::owner::{SegmentUse, publish_owner, read_owner};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::segment::{PoolError, SegmentAllocator, flush_left_behind};
use embarcadero_cxl::{Fabric, Guard, LINE_BYTES, RegionOffset, Row, Site};
use embarcadero_wire::{BrokerId, Incarnation, TopicId};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Cursor of a log without a segment.
const NO_SEGMENT: u64 = pack(u32::MAX, u32::MAX >> 1);

/// Atomic read-modify-writes per batch, however many messages it has: three for its reservation, one to settle it.
pub const RESERVATION_ATOMICS: u64 = 4;

/// Returns a segment number and a position in that segment, in lines, as one word.
const fn pack(segment: u32, lines: u32) -> u64 {
    (segment as u64) << 32 | lines as u64
}

/// Takes a word of [`pack`] apart.
const fn unpack(word: u64) -> (u32, u64) {
    ((word >> 32) as u32, word as u32 as u64)
}

/// Segment that receives no more batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retired {
    /// Number of the segment.
    pub segment: u32,
    /// Position in the Batchlog (or in the broker's own index) below which all batches of the segment are.
    pub batches_below: u64,
}

/// Segments of a log.
struct Chain {
    /// Place of the next segment in the log, counted from 0.
    ordinal: u64,
    /// Segments that receive no more batches.
    retired: Vec<Retired>,
    /// Segments that give no more reservations, while batches may still be received into earlier ones.
    retiring: Vec<u32>,
}

/// Identity of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlogId {
    /// Topic slot.
    pub topic: TopicId,
    /// Incarnation of the topic slot.
    pub incarnation: Incarnation,
    /// Broker that receives into the log.
    pub broker: BrokerId,
}

// [[DEVIATION_003]] The paper's receivers allocate per message. Here a batch is one reservation, whatever the number of
// its messages: one atomic addition to the cursor, and two to counters.
/// Log of one broker for one topic.
pub struct Blog<F> {
    region: Region<F>,
    id: BlogId,
    pool: Arc<dyn SegmentAllocator>,
    /// Current segment and the next free line in it, as [`pack`] gives them.
    cursor: AtomicU64,
    /// Number of reservations that are neither published nor given up, by segment.
    in_flight: Box<[AtomicU32]>,
    /// Position after the newest batch published from a segment, in the Batchlog or the broker's own index, by segment.
    batches_below: Box<[AtomicU64]>,
    reserved_bytes: AtomicU64,
    chain: Mutex<Chain>,
}

impl<F: Fabric> Blog<F> {
    /// Returns the log of a broker for a topic. It keeps the segments that an earlier process of the broker left. Their
    /// batches are all below `batches`, the present head of the Batchlog. A segment whose owner entry is damaged is left
    /// alone: it stays in use, and the log names the first.
    pub fn new(region: Region<F>, id: BlogId, batches: u64, pool: Arc<dyn SegmentAllocator>) -> Self {
        let mut ordinal = 0;
        let mut retired = Vec::new();
        let mut damaged = Vec::new();
        for segment in 0..region.geometry().segment_count {
            match read_owner(&region, segment) {
                Row::Used(SegmentUse::Blog { topic, incarnation, broker, ordinal: place })
                    if (BlogId { topic, incarnation, broker }) == id =>
                {
                    flush_left_behind(&region, segment);
                    retired.push(Retired { segment, batches_below: batches });
                    ordinal = ordinal.max(place + 1);
                }
                Row::Damaged(damage) => damaged.push((segment, damage)),
                Row::Used(_) | Row::Unused | Row::Unsettled => {}
            }
        }
        if let Some((segment, damage)) = damaged.first() {
            let (topic, count) = (id.topic, damaged.len());
            tracing::error!(%topic, count, segment, %damage, "segments stay in use: nobody knows whether they are this log's");
        }
        let in_flight = (0..region.geometry().segment_count).map(|_| AtomicU32::new(0)).collect();
        let batches_below = (0..region.geometry().segment_count).map(|_| AtomicU64::new(0)).collect();
        Self {
            region,
            id,
            pool,
            batches_below,
            cursor: AtomicU64::new(NO_SEGMENT),
            in_flight,
            reserved_bytes: AtomicU64::new(0),
            chain: Mutex::new(Chain { ordinal, retired, retiring: Vec::new() }),
        }
    }

    /// Size of the largest batch that fits into a segment, in bytes.
    pub(crate) fn max_batch_bytes(&self) -> u64 {
        self.region.geometry().segment_bytes
    }

    /// Number of bytes that were ever reserved in this process, in whole lines.
    pub(crate) fn reserved_bytes(&self) -> u64 {
        self.reserved_bytes.load(Ordering::Relaxed)
    }

    fn chain(&self) -> MutexGuard<'_, Chain> {
        self.chain.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lines_per_segment(&self) -> u64 {
        self.region.geometry().segment_bytes / LINE_BYTES
    }

    /// Reserves `bytes` at the end of the log. Exactly one call of [`Blog::published`], [`Blog::give_up`] or
    /// [`Blog::settle`] must follow.
    ///
    /// # Errors
    /// [`PoolError`] when another segment is needed and the pool gives none; try again later.
    ///
    /// # Panics
    /// When `bytes` exceeds a segment.
    #[inline]
    pub fn reserve(&self, bytes: u64) -> Result<RegionOffset, PoolError> {
        let lines = bytes.div_ceil(LINE_BYTES);
        assert!(lines <= self.lines_per_segment(), "a batch of {bytes} bytes exceeds a segment");
        match self.try_reserve(lines) {
            Some(at) => Ok(at),
            None => self.reserve_in_next(lines),
        }
    }

    /// Reserves in the current segment; `None` if there is none, or it has no room.
    #[inline]
    fn try_reserve(&self, lines: u64) -> Option<RegionOffset> {
        // SYNC: pairs with the swap of the cursor in `Blog::extend`, which comes after the segment's owner entry.
        let (segment, _) = unpack(self.cursor.load(Ordering::Acquire));
        if segment == u32::MAX {
            return None;
        }
        let count = &self.in_flight[segment as usize];
        // SYNC: counted before the addition that may succeed, so that whoever sees this segment replaced also sees the
        // count; pairs with the swap in `Blog::extend`, then `Blog::retired`.
        count.fetch_add(1, Ordering::AcqRel);
        let (current, position) = unpack(self.cursor.fetch_add(lines, Ordering::AcqRel));
        if current == segment && position + lines <= self.lines_per_segment() {
            self.reserved_bytes.fetch_add(lines * LINE_BYTES, Ordering::Relaxed);
            return Some(self.region.layout().segment(segment).add(position * LINE_BYTES));
        }
        count.fetch_sub(1, Ordering::AcqRel);
        None
    }

    #[cold]
    fn reserve_in_next(&self, lines: u64) -> Result<RegionOffset, PoolError> {
        loop {
            self.extend(lines)?;
            if let Some(at) = self.try_reserve(lines) {
                return Ok(at);
            }
        }
    }

    /// Takes a segment from the pool, and leaves those that order indexes may need.
    fn take_segment(&self) -> Result<u32, PoolError> {
        let count = self.pool.count();
        if count.is_short() && self.region.fabric().keeps(Guard::IndexReserve) {
            return Err(PoolError::Exhausted { segments: count.all });
        }
        self.pool.allocate()
    }

    /// Starts the next segment, unless another thread did so meanwhile.
    fn extend(&self, lines: u64) -> Result<(), PoolError> {
        let mut chain = self.chain();
        let (segment, position) = unpack(self.cursor.load(Ordering::Acquire));
        if segment != u32::MAX && position + lines <= self.lines_per_segment() {
            return Ok(());
        }
        let next = match self.take_segment() {
            Ok(next) => next,
            Err(error) => {
                // Failed reservations moved the position; bring it back before it overflows into the segment number.
                let full = self.lines_per_segment() as u32;
                let end = if segment == u32::MAX { NO_SEGMENT } else { pack(segment, full) };
                self.cursor.swap(end, Ordering::AcqRel);
                return Err(error);
            }
        };
        let BlogId { topic, incarnation, broker } = self.id;
        let ordinal = chain.ordinal;
        publish_owner(&self.region, next, SegmentUse::Blog { topic, incarnation, broker, ordinal });
        chain.ordinal += 1;
        self.batches_below[next as usize].store(0, Ordering::Release);
        if segment != u32::MAX {
            chain.retiring.push(segment);
        }
        // SYNC: after the owner entry and the reset of the segment's position; pairs with `Blog::reserve`. A swap, so that
        // the counts of all reservations before it are seen after it.
        self.cursor.swap(pack(next, 0), Ordering::AcqRel);
        Ok(())
    }

    /// Settles the reservation at `at`, whose batch has position `index` in the Batchlog or the broker's own index.
    ///
    /// # Panics
    /// When no reservation in the segment is unsettled.
    #[inline]
    pub fn published(&self, at: RegionOffset, index: u64) {
        self.batches_below[self.segment_of(at) as usize].store(index + 1, Ordering::Release);
        self.settle(at);
    }

    /// Settles the reservation at `at`: its batch is published, or nothing was written there. [`Blog::give_up`] is for what
    /// was received in part.
    ///
    /// # Panics
    /// When no reservation in the segment is unsettled.
    #[inline]
    pub fn settle(&self, at: RegionOffset) {
        // SYNC: after the position that `Blog::published` stored; pairs with `Blog::retired`.
        let before = self.in_flight[self.segment_of(at) as usize].fetch_sub(1, Ordering::AcqRel);
        assert!(before > 0, "a reservation was settled twice");
    }

    /// Settles the reservation of `bytes` at `at`, whose batch is given up. What came of the batch leaves this host's cache
    /// first: another host may get the segment, and must not find it overwritten later.
    ///
    /// # Panics
    /// When no reservation in the segment is unsettled.
    pub fn give_up(&self, at: RegionOffset, bytes: u64) {
        self.write_back(at, bytes);
        self.settle(at);
    }

    /// Writes what lies in `bytes` at `at` back from the CPU cache. It is in memory when this returns.
    pub(crate) fn write_back(&self, at: RegionOffset, bytes: u64) {
        self.region.fabric().flush(at, bytes, Site::PayloadFlush);
        // SYNC: before the segment can have another holder; pairs with that holder's first store.
        self.region.fabric().fence(Site::PayloadFlush);
    }

    /// Counts a batch at `at` as a reservation of its own, inside a reservation (a landing window) that is not settled
    /// yet.
    ///
    /// # Panics
    /// When no reservation in the segment is unsettled.
    #[inline]
    pub fn share(&self, at: RegionOffset) {
        let before = self.in_flight[self.segment_of(at) as usize].fetch_add(1, Ordering::AcqRel);
        assert!(before > 0, "a batch lies outside every reservation");
    }

    /// Shortens the reservation of `bytes` at `at` to its first `used` bytes, if no other reservation came after it.
    /// Call it before the reservation is settled; all arguments are multiples of a line.
    pub(crate) fn give_back(&self, at: RegionOffset, bytes: u64, used: u64) {
        let segment = self.segment_of(at);
        let base = self.region.layout().segment(segment);
        let line = |offset: u64| pack(segment, ((at.0 + offset - base.0) / LINE_BYTES) as u32);
        if self.cursor.compare_exchange(line(bytes), line(used), Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            self.reserved_bytes.fetch_sub(bytes - used, Ordering::Relaxed);
        }
    }

    /// Returns the number of the segment that a position of the region lies in.
    #[inline]
    pub fn segment_of(&self, at: RegionOffset) -> u32 {
        ((at.0 - self.region.layout().segments) / self.region.geometry().segment_bytes) as u32
    }

    /// Returns the number of the segment that a position lies in, or `None` for one outside the pool. For positions that
    /// were read from memory.
    pub(crate) fn segment_at(&self, at: RegionOffset) -> Option<u32> {
        let inside = at.0.checked_sub(self.region.layout().segments)? / self.region.geometry().segment_bytes;
        u32::try_from(inside).ok().filter(|segment| *segment < self.region.geometry().segment_count)
    }

    /// Returns true for a position in the segment that gives reservations now.
    pub(crate) fn is_current(&self, at: RegionOffset) -> bool {
        unpack(self.cursor.load(Ordering::Acquire)).0 == self.segment_of(at)
    }

    /// Returns true for a position in the segment that gives reservations now, while that has room.
    pub(crate) fn gives_room_at(&self, at: RegionOffset) -> bool {
        let (segment, position) = unpack(self.cursor.load(Ordering::Acquire));
        segment == self.segment_of(at) && position < self.lines_per_segment()
    }

    /// Returns the segments that receive no more batches.
    pub fn retired(&self) -> Vec<Retired> {
        let mut chain = self.chain();
        let Chain { retired, retiring, .. } = &mut *chain;
        retiring.retain(|&segment| {
            // SYNC: before the position is read; pairs with `Blog::reserve` and `Blog::settle`.
            let busy = self.in_flight[segment as usize].load(Ordering::Acquire) > 0;
            if !busy {
                let batches_below = self.batches_below[segment as usize].load(Ordering::Acquire);
                retired.push(Retired { segment, batches_below });
            }
            busy
        });
        retired.clone()
    }

    /// Gives a retired segment back to the pool. Call it only when nobody will read the segment again.
    ///
    /// # Panics
    /// When the segment is not retired.
    pub fn release(&self, segment: u32) {
        let mut chain = self.chain();
        let before = chain.retired.len();
        chain.retired.retain(|retired| retired.segment != segment);
        assert!(chain.retired.len() < before, "segment {segment} is not retired");
        publish_owner(&self.region, segment, SegmentUse::Free);
        if let Err(error) = self.pool.release(segment) {
            tracing::error!(segment, %error, "a segment could not be returned");
        }
    }

    /// Gives all segments of a deleted topic back to the pool. Returns false while batches are still being received;
    /// call it again then.
    pub(crate) fn abandon(&self) -> bool {
        {
            let mut chain = self.chain();
            let (segment, _) = unpack(self.cursor.swap(NO_SEGMENT, Ordering::AcqRel));
            if segment != u32::MAX {
                chain.retiring.push(segment);
            }
        }
        for retired in self.retired() {
            self.release(retired.segment);
        }
        self.chain().retiring.is_empty()
    }
}
