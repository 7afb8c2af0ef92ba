//! The region as this host maps it.

use crate::cache::{self, FlushMethod, FlushSupport, UnsupportedFlush};
use crate::fabric::{CoherentFabric, Fabric, LINE_BYTES, RegionOffset};
use crate::site::Site;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A shared mapping; unmapped when the last user drops it.
pub struct Mapping {
    map: memmap2::MmapRaw,
    base: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping is plain memory; every access goes through atomics, or through byte copies whose ownership the
// protocol settles (see `Native`).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `bytes` of `file` (a file on tmpfs or hugetlbfs, or a device-dax node).
    ///
    /// # Errors
    /// What `mmap` reports.
    pub fn of_file(file: &File, bytes: u64) -> io::Result<Self> {
        let bytes = usize::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let map = memmap2::MmapOptions::new().len(bytes).map_raw(file)?;
        let base = map.as_mut_ptr();
        Ok(Self { map, base, bytes })
    }

    /// Maps anonymous memory.
    ///
    /// # Errors
    /// What `mmap` reports.
    pub fn anonymous(bytes: u64) -> io::Result<Self> {
        let bytes = usize::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // memmap2 aligns to pages only; the region's own structures need 4 KiB, which that is.
        let map: memmap2::MmapRaw = memmap2::MmapOptions::new().len(bytes).map_anon()?.into();
        let base = map.as_mut_ptr();
        Ok(Self { map, base, bytes })
    }

    /// Asks the kernel for huge pages and touches every page now, so that the data path takes no page faults.
    /// Existing contents stay.
    ///
    /// # Errors
    /// What `madvise` reports when memory cannot be had.
    pub fn prefault(&self) -> io::Result<()> {
        // Huge pages are a wish: tmpfs refuses it where shmem_enabled forbids them.
        let _ = self.map.advise(memmap2::Advice::HugePage);
        self.map.advise(memmap2::Advice::PopulateWrite)
    }

    /// Its first byte, and how many there are.
    pub(super) fn pages(&self) -> (*mut u8, usize) {
        (self.base, self.bytes)
    }
}

/// A [`Fabric`] over real memory. Cheap to clone.
///
/// Safe to hold because words are only touched as atomics, and byte ranges only between reservation and publication
/// (one writer, no reader) or after publication (readers only).
#[derive(Clone)]
pub struct Native {
    mapping: Arc<Mapping>,
    base: *mut u8,
    bytes: u64,
    method: FlushMethod,
}

// SAFETY: `base` points into `mapping`, which this keeps alive and which is itself `Send + Sync`.
unsafe impl Send for Native {}
// SAFETY: as above.
unsafe impl Sync for Native {}

impl Native {
    /// Wraps a mapping; `method` says how lines are written back ([`FlushMethod::None`] on a coherent platform).
    ///
    /// # Errors
    /// [`UnsupportedFlush`] when this CPU lacks the instruction.
    pub fn new(mapping: Mapping, method: FlushMethod) -> Result<Self, UnsupportedFlush> {
        FlushSupport::detect().check(method)?;
        let (base, bytes) = (mapping.base, mapping.bytes as u64);
        Ok(Self { mapping: Arc::new(mapping), base, bytes, method })
    }

    /// The method in use.
    #[must_use]
    pub fn method(&self) -> FlushMethod {
        self.method
    }

    /// The mapping below.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The address of `len` bytes at `at`, for a transport that hands it to the kernel or a NIC.
    ///
    /// # Panics
    /// When the range is not inside the region: a broken caller must not reach other memory.
    #[inline]
    pub fn address(&self, at: RegionOffset, len: u64) -> *mut u8 {
        assert!(at.0 <= self.bytes && len <= self.bytes - at.0, "{at:?}+{len} is outside the region");
        // SAFETY: the offset is within the mapping, as just checked.
        unsafe { self.base.add(at.0 as usize) }
    }

    /// Looks at bytes in place. The caller owns the range by the protocol: reserved by it and not yet published, or
    /// published and pinned.
    #[inline]
    pub fn with_bytes<R>(&self, at: RegionOffset, len: u64, look: impl FnOnce(&[u8]) -> R) -> R {
        let from = self.address(at, len);
        // SAFETY: in bounds and mapped; nobody writes the range while the caller owns it. Bytes have no invalid
        // values, so even a misbehaving peer process can only change what is read.
        look(unsafe { std::slice::from_raw_parts(from, len as usize) })
    }

    /// Writes bytes past the caches: when this returns they are in the region's memory, without a flush.
    pub fn write_past_caches(&self, at: RegionOffset, from: &[u8]) {
        self.stream(at, from);
        cache::lines_stored();
    }

    /// As [`Native::write_past_caches`], but they are there only after [`cache::lines_stored`].
    pub fn stream(&self, at: RegionOffset, from: &[u8]) {
        let before = at.0.next_multiple_of(LINE_BYTES) - at.0;
        let (leader, rest) = from.split_at(from.len().min(before as usize));
        let (lines, tail) = rest.as_chunks();
        for (at, edge) in [(at, leader), (at.add((from.len() - tail.len()) as u64), tail)] {
            self.write_bytes(at, edge);
            if !edge.is_empty() {
                self.flush(at, edge.len() as u64, Site::PayloadFlush);
            }
        }
        let to = self.address(at.add(leader.len() as u64), size_of_val(lines) as u64);
        // SAFETY: in bounds, and at a line unless there is none; `from` is ordinary memory that cannot overlap a range
        // which the caller reserved.
        unsafe { cache::store_lines(to, lines) };
    }

    #[inline]
    fn word(&self, at: RegionOffset) -> &AtomicU64 {
        let from = self.address(at, 8);
        assert!(at.0.is_multiple_of(8), "{at:?} is not aligned to 8");
        // SAFETY: in bounds, aligned, alive as long as `self`, and only ever accessed atomically.
        unsafe { AtomicU64::from_ptr(from.cast()) }
    }

    /// A line, looked up once for all its words.
    #[inline]
    fn line(&self, at: RegionOffset) -> &[AtomicU64; 8] {
        let from = self.address(at, LINE_BYTES);
        assert!(at.0.is_multiple_of(LINE_BYTES), "{at:?} is not aligned to a line");
        // SAFETY: in bounds, aligned, alive as long as `self`, and its words are only ever accessed atomically.
        unsafe { &*from.cast() }
    }

    #[inline]
    fn for_lines(&self, at: RegionOffset, len: u64, mut each: impl FnMut(*const u8)) {
        let first = at.0 & !(LINE_BYTES - 1);
        let end = at.0 + len;
        self.address(at, len);
        let mut line = first;
        while line < end {
            // SAFETY: between the first line of a range that was checked and its end.
            each(unsafe { self.base.add(line as usize) });
            line += LINE_BYTES;
        }
    }
}

impl Fabric for Native {
    #[inline]
    fn bytes(&self) -> u64 {
        self.bytes
    }

    #[inline]
    fn load(&self, at: RegionOffset) -> u64 {
        self.word(at).load(Ordering::Acquire)
    }

    #[inline]
    fn store(&self, at: RegionOffset, value: u64) {
        self.word(at).store(value, Ordering::Release);
    }

    #[inline]
    fn store_words(&self, at: RegionOffset, words: &[u64; 8]) {
        if self.method == FlushMethod::Movdir64b {
            let to = self.address(at, LINE_BYTES);
            assert!(at.0.is_multiple_of(LINE_BYTES), "{at:?} is not aligned to a line");
            // SAFETY: checked just above; `new` checked the CPU. The store is atomic as a whole line.
            unsafe { cache::direct_store(to, words) };
            return;
        }
        for (to, word) in self.line(at).iter().zip(words) {
            to.store(*word, Ordering::Release);
        }
    }

    #[inline]
    fn load_words(&self, at: RegionOffset) -> [u64; 8] {
        let line = self.line(at);
        let mut words = [0u64; 8];
        for (word, from) in words.iter_mut().zip(line).rev() {
            *word = from.load(Ordering::Acquire);
        }
        words
    }

    #[inline]
    fn flush(&self, at: RegionOffset, len: u64, _site: Site) {
        if self.method == FlushMethod::None {
            return;
        }
        // SAFETY: `for_lines` passes lines of the mapping.
        self.for_lines(at, len, |line| unsafe { cache::write_back(self.method, line) });
    }

    #[inline]
    fn fence(&self, _site: Site) {
        cache::store_fence(self.method);
    }

    #[inline]
    fn full_fence(&self, _site: Site) {
        cache::full_fence(self.method);
        fence(Ordering::SeqCst);
    }

    #[inline]
    fn invalidate(&self, at: RegionOffset, len: u64, _site: Site) {
        if self.method == FlushMethod::None {
            return;
        }
        // SAFETY: `for_lines` passes lines of the mapping.
        self.for_lines(at, len, |line| unsafe { cache::drop_line(self.method, line) });
        cache::full_fence(self.method);
    }

    fn read_bytes(&self, at: RegionOffset, into: &mut [u8]) {
        self.with_bytes(at, into.len() as u64, |from| into.copy_from_slice(from));
    }

    fn write_bytes(&self, at: RegionOffset, from: &[u8]) {
        let to = self.address(at, from.len() as u64);
        // SAFETY: in bounds; `from` is ordinary memory that cannot overlap a range which the caller reserved.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }

    #[inline]
    fn is_coherent(&self) -> bool {
        self.method == FlushMethod::None
    }
}

impl CoherentFabric for Native {
    #[inline]
    fn fetch_or(&self, at: RegionOffset, bits: u64) -> u64 {
        self.word(at).fetch_or(bits, Ordering::AcqRel)
    }

    #[inline]
    fn fetch_and(&self, at: RegionOffset, bits: u64) -> u64 {
        self.word(at).fetch_and(bits, Ordering::AcqRel)
    }

    #[inline]
    fn compare_exchange(&self, at: RegionOffset, before: u64, after: u64) -> bool {
        self.word(at).compare_exchange(before, after, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_past_caches_is_there_and_nothing_else(at in 0u64..200, from: Vec<u8>) {
            const BYTES: usize = 4096;
            let from = &from[..from.len().min(BYTES - at as usize)];
            let method = FlushSupport::detect().best().unwrap_or(FlushMethod::None);
            let native = Native::new(Mapping::anonymous(BYTES as u64).unwrap(), method).unwrap();
            let mut expected = vec![7; BYTES];
            native.write_bytes(RegionOffset(0), &expected);
            native.write_past_caches(RegionOffset(at), from);
            expected[at as usize..][..from.len()].copy_from_slice(from);
            let mut found = vec![0; BYTES];
            native.read_bytes(RegionOffset(0), &mut found);
            prop_assert_eq!(found, expected);
        }
    }
}
