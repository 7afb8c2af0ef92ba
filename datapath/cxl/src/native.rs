//! The region as this host maps it.

use crate::cache::{self, FlushMethod, FlushSupport, UnsupportedFlush};
use crate::fabric::{CoherentFabric, Fabric, LINE_BYTES, RegionOffset};
use crate::site::Site;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Shared mapping of a region's memory. It is unmapped when it is dropped.
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
    /// Maps the first `bytes` of `file`: a file on tmpfs or hugetlbfs, or a device-dax node.
    ///
    /// # Errors
    /// The error of mmap(2), or `InvalidInput` when this machine cannot address as many bytes.
    pub(crate) fn of_file(file: &File, bytes: u64) -> io::Result<Self> {
        let bytes = usize::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let map = memmap2::MmapOptions::new().len(bytes).map_raw(file)?;
        let base = map.as_mut_ptr();
        Ok(Self { map, base, bytes })
    }

    /// Maps `bytes` bytes of anonymous memory, which only this process sees.
    ///
    /// # Errors
    /// The error of mmap(2), or `InvalidInput` when this machine cannot address as many bytes.
    pub fn anonymous(bytes: u64) -> io::Result<Self> {
        let bytes = usize::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // mmap(2) aligns to a page, which is all that the areas of a region need (`AREA_ALIGN`).
        let map: memmap2::MmapRaw = memmap2::MmapOptions::new().len(bytes).map_anon()?.into();
        let base = map.as_mut_ptr();
        Ok(Self { map, base, bytes })
    }

    /// Asks the kernel for huge pages and allocates every page now, so that the data path takes no page faults.
    /// Existing contents stay. Source: madvise(2), `MADV_HUGEPAGE` and `MADV_POPULATE_WRITE`.
    ///
    /// # Errors
    /// The error of madvise(2) when there is too little memory.
    pub fn prefault(&self) -> io::Result<()> {
        // Huge pages are optional. tmpfs refuses them where /sys/kernel/mm/transparent_hugepage/shmem_enabled forbids
        // them (Documentation/admin-guide/mm/transhuge.rst).
        let _ = self.map.advise(memmap2::Advice::HugePage);
        self.map.advise(memmap2::Advice::PopulateWrite)
    }

    /// Returns the address of the mapping, and its length in bytes.
    pub(super) fn pages(&self) -> (*mut u8, usize) {
        (self.base, self.bytes)
    }
}

/// [`Fabric`] over real memory. A clone is cheap, and shares the memory.
///
/// Words are only touched as atomics. A byte range has one writer and no reader between its reservation and its
/// publication, and only readers afterwards. So no access is a data race.
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
    /// Wraps a mapping whose lines are written back by `method`: [`FlushMethod::None`] on a coherent platform.
    ///
    /// # Errors
    /// [`UnsupportedFlush`] when this CPU lacks the instruction.
    pub fn new(mapping: Mapping, method: FlushMethod) -> Result<Self, UnsupportedFlush> {
        FlushSupport::detect().check(method)?;
        let (base, bytes) = (mapping.base, mapping.bytes as u64);
        Ok(Self { mapping: Arc::new(mapping), base, bytes, method })
    }

    /// Flush method in use.
    #[must_use]
    pub(crate) fn method(&self) -> FlushMethod {
        self.method
    }

    /// Mapping of the memory.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Returns the address of `len` bytes at `at`, for a transport that passes it to the kernel or a NIC.
    ///
    /// # Panics
    /// When the range is not inside the region: a faulty caller must not reach other memory.
    #[inline]
    pub fn address(&self, at: RegionOffset, len: u64) -> *mut u8 {
        assert!(at.0 <= self.bytes && len <= self.bytes - at.0, "{at:?}+{len} is outside the region");
        // SAFETY: the offset is within the mapping, as just checked.
        unsafe { self.base.add(at.0 as usize) }
    }

    /// Writes bytes past the caches. They are in the region's memory when this returns, without a flush.
    pub fn write_past_caches(&self, at: RegionOffset, from: &[u8]) {
        self.stream(at, from);
        cache::fence_lines();
    }

    /// Writes bytes past the caches. They are in the region's memory only after [`cache::fence_lines`].
    pub fn stream(&self, at: RegionOffset, from: &[u8]) {
        let before = at.0.next_multiple_of(LINE_BYTES) - at.0;
        let (start, rest) = from.split_at(from.len().min(before as usize));
        let (lines, end) = rest.as_chunks();
        // Only whole lines can go past the caches.
        for (at, edge) in [(at, start), (at.add((from.len() - end.len()) as u64), end)] {
            self.write_bytes(at, edge);
            if !edge.is_empty() {
                self.flush(at, edge.len() as u64, Site::PayloadFlush);
                if self.method == FlushMethod::Clflush {
                    // The fence that follows orders the other methods only.
                    cache::store_fence(self.method);
                }
            }
        }
        let to = self.address(at.add(start.len() as u64), size_of_val(lines) as u64);
        // SAFETY: in bounds, and at a line unless there is none; `from` is ordinary memory that cannot overlap a range
        // which the caller reserved.
        unsafe { cache::store_lines(to, lines) };
    }

    /// Writes back what this host's caches changed in a range, and drops the range from them, also where the mapping has no
    /// flush method. It is complete when this returns. Returns the method; `None` if this CPU has none.
    pub fn flush_out(&self, at: RegionOffset, len: u64) -> Option<FlushMethod> {
        let method = FlushSupport::detect().dropping()?;
        // SAFETY: `for_lines` passes lines of the mapping; the CPU has the instruction.
        self.for_lines(at, len, |line| unsafe { cache::drop_line(method, line) });
        cache::full_fence(method);
        Some(method)
    }

    #[inline]
    fn word(&self, at: RegionOffset) -> &AtomicU64 {
        let from = self.address(at, 8);
        assert!(at.0.is_multiple_of(8), "{at:?} is not aligned to 8");
        // SAFETY: in bounds, aligned, alive as long as `self`, and only ever accessed atomically.
        unsafe { AtomicU64::from_ptr(from.cast()) }
    }

    /// Returns the eight words of the line at `at`, with one check of its bounds.
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
            // SAFETY: checked just above; `new` checked the CPU. The line is stored as a whole (Intel SDM volume 2,
            // MOVDIR64B: 64-byte write atomicity).
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

    #[inline]
    fn with_bytes<R>(&self, at: RegionOffset, len: u64, look: impl FnOnce(&[u8]) -> R) -> R {
        let from = self.address(at, len);
        // SAFETY: in bounds and mapped; nobody writes the range while the caller owns it. Bytes have no invalid
        // values, so even a misbehaving peer process can only change what is read.
        look(unsafe { std::slice::from_raw_parts(from, len as usize) })
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
