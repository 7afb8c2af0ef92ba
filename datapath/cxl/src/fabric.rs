//! Access to shared memory: loads, stores and cache control.

pub use crate::offset::RegionOffset;
use crate::row::{Damage, Row};
use crate::site::{Guard, Site};
use bytemuck::Pod;
use embarcadero_wire::first_set;
use std::sync::atomic::{Ordering, fence};

/// Bytes of a cache line, the unit in which memory moves between a host's cache and the region.
pub const LINE_BYTES: u64 = 64;
const _: () = assert!(LINE_BYTES == embarcadero_wire::batch::ALIGN_BYTES, "batches begin at lines");

/// Bytes of a word, the unit in which memory is loaded and stored.
pub(crate) const WORD_BYTES: u64 = size_of::<u64>() as u64;
const WORDS: usize = (LINE_BYTES / WORD_BYTES) as usize;

/// Structure of exactly one cache line. `Pod` proves at compile time that it has no padding and no pointers.
pub trait Line: Pod {
    /// Name of the structure, for errors.
    const NAME: &'static str;
    /// Bits that are zero in every line that a writer of this layout made.
    const RESERVED: [u64; 8];
}

/// Line that readers may look at while it changes. Its last word is a version: odd while it changes, 0 before the first
/// write.
pub trait Versioned: Line {
    /// Offset of the version in the line.
    const VERSION_AT: u64 = LINE_BYTES - WORD_BYTES;
}

/// One host's view of a shared region: loads, stores and cache control.
///
/// A store is visible to this host at once, and to other hosts after [`Fabric::flush`] and [`Fabric::fence`]. A load
/// may return what this host cached earlier, until [`Fabric::invalidate`] drops it. Loads acquire, stores release.
pub trait Fabric: Clone + Send + Sync + 'static {
    /// Bytes of the region.
    fn bytes(&self) -> u64;

    /// Reads the 8-byte word at `at` (aligned to 8), possibly stale.
    fn load(&self, at: RegionOffset) -> u64;

    /// Writes the 8-byte word at `at` (aligned to 8) into this host's cache.
    fn store(&self, at: RegionOffset, value: u64);

    /// Starts the write-back of every line that `len` bytes from `at` touch. Complete only after a fence.
    fn flush(&self, at: RegionOffset, len: u64, site: Site);

    /// Orders all flushes and stores of this thread before its later flushes and stores. A later load may still run
    /// before they are in memory.
    fn fence(&self, site: Site);

    /// Orders all flushes and stores of this thread before its later loads too: they are in memory when this returns.
    /// Needed where two hosts each store a word and then load the other's, and at least one must see the other.
    fn full_fence(&self, site: Site);

    /// Drops this host's copies of the lines, so that the next load comes from memory. What this host changed in them is
    /// written back first. It does not wait for this host's own flushes.
    fn invalidate(&self, at: RegionOffset, len: u64, site: Site);

    /// Copies bytes out of the region, possibly stale.
    fn read_bytes(&self, at: RegionOffset, into: &mut [u8]);

    /// Passes bytes to `look`, where they lie or in a copy. By the protocol the caller owns the range: it reserved the range
    /// and has not published it yet, or the range is published and pinned.
    ///
    /// # Panics
    /// When the range is not inside the region.
    fn with_bytes<R>(&self, at: RegionOffset, len: u64, look: impl FnOnce(&[u8]) -> R) -> R {
        let mut bytes = vec![0; len as usize];
        self.read_bytes(at, &mut bytes);
        look(&bytes)
    }

    /// Copies bytes into the region, through this host's cache.
    fn write_bytes(&self, at: RegionOffset, from: &[u8]);

    /// Returns true when hosts see each other's stores without flushes.
    fn is_coherent(&self) -> bool;

    /// Returns false where a test leaves this guard out.
    #[inline]
    fn keeps(&self, guard: Guard) -> bool {
        let _ = guard;
        true
    }

    /// Reads a word from memory.
    #[inline]
    fn observe(&self, at: RegionOffset, site: Site) -> u64 {
        self.invalidate(at, 8, site);
        self.load(at)
    }

    /// Waits until the line at `at` is in memory, at least as this host just read it.
    ///
    /// A thread or process of the same host may write the line. The read then found its store in the cache that both share,
    /// maybe before the writer's own flush. If the writer stops there, or the host is lost, other hosts never see the store.
    /// So a reader calls this before it acts on what it read, and before it checks that the leader still leads.
    ///
    /// It costs the flush of one line and a full fence, and nothing on coherent memory. Source of the rule: Izraelevitz et
    /// al., "Linearizability of persistent memory objects under a full-system-crash failure model", DISC 2016.
    #[inline]
    fn ensure_in_memory(&self, at: RegionOffset, site: Site) {
        if !self.is_coherent() && self.keeps(Guard::MemoryBeforeAct) {
            self.flush(at, WORD_BYTES, site);
            self.full_fence(site);
        }
    }

    /// Reads the eight words of a line, the last first.
    #[inline]
    fn load_words(&self, at: RegionOffset) -> [u64; WORDS] {
        let mut words = [0; WORDS];
        for word in (0..WORDS).rev() {
            words[word] = self.load(at.add(word as u64 * WORD_BYTES));
        }
        words
    }

    /// Writes the eight words of a line, the last (a commit word) last.
    #[inline]
    fn store_words(&self, at: RegionOffset, words: &[u64; WORDS]) {
        for (index, word) in words.iter().enumerate() {
            self.store(at.add(index as u64 * WORD_BYTES), *word);
        }
    }

    /// Reads a line. When its last word, read first, says that the line is complete, the rest is too.
    ///
    /// # Errors
    /// [`Damage`] when a reserved byte is not zero.
    #[inline]
    fn load_line<T: Line>(&self, at: RegionOffset) -> Result<T, Damage> {
        let line = bytemuck::cast(self.load_words(at));
        check_reserved(at, &line)?;
        Ok(line)
    }

    /// Reads a line from memory.
    ///
    /// # Errors
    /// [`Damage`] when a reserved byte is not zero.
    #[inline]
    fn observe_line<T: Line>(&self, at: RegionOffset, site: Site) -> Result<T, Damage> {
        self.invalidate(at, LINE_BYTES, site);
        self.load_line(at)
    }

    /// Reads a line without reserved bytes from memory.
    #[inline]
    fn observe_words<T: Line>(&self, at: RegionOffset, site: Site) -> T {
        const { assert!(none(&T::RESERVED), "the line has reserved bytes, which are to be checked") };
        self.invalidate(at, LINE_BYTES, site);
        bytemuck::cast(self.load_words(at))
    }

    /// Writes a line, its last word (the commit word) last.
    #[inline]
    fn store_line<T: Line>(&self, at: RegionOffset, line: &T) {
        self.store_words(at, &bytemuck::cast(*line));
    }

    /// Writes a versioned line. The whole line is in memory when this returns.
    fn publish_versioned<T: Versioned>(&self, at: RegionOffset, line: &T, site: Site) {
        self.publish_versioned_with(at, line, site, || {});
    }

    /// Writes a versioned line and what `more` writes and flushes: further lines that the same version guards.
    fn publish_versioned_with<T: Versioned>(&self, at: RegionOffset, line: &T, site: Site, more: impl FnOnce()) {
        let version_at = at.add(T::VERSION_AT);
        let version = self.load(version_at) | 1;
        // SYNC: odd before the first changed word, even after the last; pairs with `observe_versioned`.
        self.store(version_at, version);
        if !self.is_coherent() {
            self.flush(at, LINE_BYTES, site);
            self.fence(site);
        }
        more();
        self.fence(site);
        let words: [u64; WORDS] = bytemuck::cast(*line);
        for (index, word) in words.iter().take(WORDS - 1).enumerate() {
            self.store(at.add(index as u64 * WORD_BYTES), *word);
        }
        self.store(version_at, version + 1);
        self.flush(at, LINE_BYTES, site);
        self.fence(site);
    }

    /// Reads a versioned line from memory, and what `more` reads under the same version.
    fn observe_versioned<T: Versioned, R>(
        &self,
        at: RegionOffset,
        site: Site,
        more: impl FnOnce(&T) -> R,
    ) -> Row<(T, R)> {
        let version_at = at.add(T::VERSION_AT);
        self.invalidate(at, LINE_BYTES, site);
        let before = self.load(version_at);
        if before == 0 {
            return Row::Unused;
        }
        if before & 1 == 1 {
            return Row::Unsettled;
        }
        let line = self.load_line(at);
        let extra = line.as_ref().map(more);
        fence(Ordering::Acquire);
        self.invalidate(at, LINE_BYTES, site);
        if self.load(version_at) != before {
            return Row::Unsettled;
        }
        match (line, extra) {
            (Ok(line), Ok(extra)) => Row::Used((line, extra)),
            (Err(damage), _) => Row::Damaged(damage),
            (_, Err(damage)) => Row::Damaged(*damage),
        }
    }
}

/// Checks the reserved bytes of a line that was read at `at`.
///
/// # Errors
/// [`Damage`] when one is not zero.
#[inline]
pub(crate) fn check_reserved<T: Line>(at: RegionOffset, line: &T) -> Result<(), Damage> {
    let words: [u64; WORDS] = bytemuck::cast(*line);
    first_set(&words, &T::RESERVED).map_or(Ok(()), |byte| {
        let value = u64::from(bytemuck::bytes_of(&words)[byte]);
        Err(Damage { structure: T::NAME, at: at.add(byte as u64), what: "a reserved byte", value })
    })
}

const fn none(mask: &[u64; WORDS]) -> bool {
    let mut word = 0;
    while word < WORDS {
        if mask[word] != 0 {
            return false;
        }
        word += 1;
    }
    true
}

/// Fabric whose hosts share one coherence domain, so that read-modify-write works across them.
pub trait CoherentFabric: Fabric {
    /// Atomically ors `bits` into the word and returns what was there.
    fn fetch_or(&self, at: RegionOffset, bits: u64) -> u64;
    /// Atomically ands `bits` into the word and returns what was there.
    fn fetch_and(&self, at: RegionOffset, bits: u64) -> u64;
    /// Atomically replaces the word if it is `before`. Returns true if it was.
    fn compare_exchange(&self, at: RegionOffset, before: u64, after: u64) -> bool;
}
