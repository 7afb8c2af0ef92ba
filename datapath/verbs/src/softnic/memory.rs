//! Registered memory of a NIC in software, and the keys to it.

use crate::range::{LocalRange, Pinned, Rights};
use embarcadero_cxl::{Native, RegionOffset, cache};
use embarcadero_roce::packet::Reth;
use embarcadero_roce::{Access, Memory, NoAccess};
use std::any::Any;
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// Memory that stays mapped.
struct Pages {
    start: *mut u8,
    len: usize,
    /// CXL region that the memory is part of, and the offset where it begins.
    region: Option<(Native, RegionOffset)>,
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pages are memory of this process that what is kept here keeps mapped, for every thread.
unsafe impl Send for Pages {}
// SAFETY: as above. As with a NIC, code that registers memory for peers expects it to change at any time.
unsafe impl Sync for Pages {}

impl Pages {
    /// Returns true when the `len` bytes at offset `at` are inside the memory.
    fn holds(&self, at: usize, len: usize) -> bool {
        at <= self.len && len <= self.len - at
    }

    /// `len` bytes at offset `at`.
    fn bytes(&self, at: usize, len: usize) -> &[u8] {
        assert!(self.holds(at, len));
        // SAFETY: inside the pages, which are mapped and initialised; bytes have no invalid values.
        unsafe { std::slice::from_raw_parts(self.start.add(at), len) }
    }

    /// Writes bytes at offset `at`. In a CXL region they are in memory, past the caches, after [`cache::fence_lines`].
    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(self.holds(at, bytes.len()));
        if let Some((region, start)) = &self.region {
            return region.stream(start.add(at as u64), bytes);
        }
        // SAFETY: inside the pages, which are mapped writable; a packet's bytes are no part of registered memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(at), bytes.len()) }
    }
}

/// Registered bytes that a request names. It reads them in place.
pub(super) struct LocalBytes {
    pages: Arc<Pages>,
    at: usize,
    len: usize,
}

impl LocalBytes {
    /// Writes as many of `bytes` as fit, from the first byte on.
    pub(super) fn fill(&self, bytes: &[u8]) {
        self.pages.write(self.at, &bytes[..bytes.len().min(self.len)]);
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

impl AsRef<[u8]> for LocalBytes {
    fn as_ref(&self) -> &[u8] {
        self.pages.bytes(self.at, self.len)
    }
}

/// Holder of a key: those who may use it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// Requests of this host alone.
    Host,
    /// Peers of all queue pairs of the domain.
    Domain,
    /// Peer of the queue pair with this number.
    Pair(u32),
}

/// Memory that a key opens.
struct Entry {
    pages: Arc<Pages>,
    /// Offset in the pages where the memory begins.
    at: usize,
    len: usize,
    domain: u32,
    holder: Holder,
}

impl Entry {
    /// Offset in the pages of `len` bytes at an address; `None` if they are not all inside.
    fn find(&self, address: u64, len: u64) -> Option<usize> {
        let from = address.checked_sub(self.pages.start.addr() as u64 + self.at as u64)?;
        let inside = from <= self.len as u64 && len <= self.len as u64 - from;
        inside.then_some(self.at + from as usize)
    }
}

/// Keys of a NIC.
#[derive(Default)]
pub(super) struct Keys {
    entries: RwLock<HashMap<u32, Entry>>,
    /// Number of domains that there ever were.
    domains: AtomicU32,
}

impl Keys {
    /// Draws a key for `entry`.
    fn insert(&self, entry: Entry) -> u32 {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        loop {
            // Not to be guessed.
            let key = rand::random();
            if let std::collections::hash_map::Entry::Vacant(vacant) = entries.entry(key) {
                vacant.insert(entry);
                return key;
            }
        }
    }

    /// Removes a key. When this returns, no access with it is under way, and none follows.
    fn remove(&self, key: u32) {
        self.entries.write().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }

    /// Finds the bytes that a request of this host names.
    pub(super) fn local(&self, domain: u32, range: LocalRange) -> io::Result<LocalBytes> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries
            .get(&range.key)
            .filter(|entry| entry.domain == domain && !matches!(entry.holder, Holder::Pair(_)))
            .and_then(|entry| {
                let at = entry.find(range.address, range.len.into())?;
                Some(LocalBytes { pages: Arc::clone(&entry.pages), at, len: range.len as usize })
            })
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the memory is not registered"))
    }

    /// Opens the memory to peers as long as the result lives. When it is dropped, all that they wrote is in memory.
    pub(super) fn reach(&self) -> Reach<'_> {
        Reach { entries: self.entries.read().unwrap_or_else(PoisonError::into_inner), domain: 0, wrote: false }
    }
}

/// Memory as peers reach it.
pub(super) struct Reach<'a> {
    entries: RwLockReadGuard<'a, HashMap<u32, Entry>>,
    /// Domain of the queue pair whose packets are taken.
    pub domain: u32,
    /// True once a peer has written.
    wrote: bool,
}

impl Drop for Reach<'_> {
    fn drop(&mut self) {
        if self.wrote {
            // SYNC: the peers' bytes, stored past the caches, are in memory before their completions are handed over. It
            // pairs with the brokers' flush of lines before they read the region.
            cache::fence_lines();
        }
    }
}

impl Reach<'_> {
    /// Finds the memory that a key opens to the peer of a queue pair.
    fn entry(&self, queue_pair: u32, rkey: u32) -> Option<&Entry> {
        self.entries.get(&rkey).filter(|entry| match entry.holder {
            Holder::Host => false,
            Holder::Domain => entry.domain == self.domain,
            Holder::Pair(number) => number == queue_pair,
        })
    }
}

impl Memory for Reach<'_> {
    fn check(&self, queue_pair: u32, remote: Reth, access: Access) -> Result<(), NoAccess> {
        // Nothing is registered for peers to read.
        let entry = self.entry(queue_pair, remote.rkey).filter(|_| access == Access::Write).ok_or(NoAccess)?;
        entry.find(remote.address, remote.bytes.into()).map(drop).ok_or(NoAccess)
    }

    fn write(&mut self, queue_pair: u32, rkey: u32, address: u64, bytes: &[u8]) -> Result<(), NoAccess> {
        let entry = self.entry(queue_pair, rkey).ok_or(NoAccess)?;
        let at = entry.find(address, bytes.len() as u64).ok_or(NoAccess)?;
        entry.pages.write(at, bytes);
        self.wrote = true;
        Ok(())
    }

    fn read(&self, _: u32, _: Reth, _: &mut Vec<u8>) -> Result<(), NoAccess> {
        Err(NoAccess)
    }
}

/// Protection domain of a NIC in software.
#[derive(Clone)]
pub(crate) struct Domain {
    pub(super) keys: Arc<Keys>,
    pub(super) number: u32,
}

impl Domain {
    pub(super) fn new(keys: &Arc<Keys>) -> Self {
        Self { keys: Arc::clone(keys), number: keys.domains.fetch_add(1, Ordering::Relaxed) }
    }

    pub(crate) fn register(&self, memory: &impl Pinned, rights: Rights) -> Registration {
        let (start, len, keep) = memory.pages();
        let region = memory.region().map(|(region, at)| (region.clone(), at));
        let pages = Arc::new(Pages { start, len, region, _keep: keep });
        let holder = if rights == Rights::RemoteWrite { Holder::Domain } else { Holder::Host };
        let entry = Entry { pages: Arc::clone(&pages), at: 0, len, domain: self.number, holder };
        Registration { key: self.keys.insert(entry), pages, domain: self.clone() }
    }
}

/// Registered memory of a NIC in software.
pub(crate) struct Registration {
    key: u32,
    pages: Arc<Pages>,
    domain: Domain,
}

impl Registration {
    pub(crate) fn len(&self) -> usize {
        self.pages.len
    }

    pub(crate) fn address(&self) -> u64 {
        self.pages.start.addr() as u64
    }

    pub(crate) fn local_key(&self) -> u32 {
        self.key
    }

    pub(crate) fn remote_key(&self) -> u32 {
        self.key
    }

    /// Makes a closed window over `len` bytes at offset `at`, which must be inside.
    pub(crate) fn window(&self, at: u64, len: u64) -> Window {
        // Its key is drawn now, and is of no use before it is open.
        let entry = Entry {
            pages: Arc::clone(&self.pages),
            at: at as usize,
            len: len as usize,
            domain: self.domain.number,
            holder: Holder::Host,
        };
        Window { key: self.domain.keys.insert(entry), keys: Arc::clone(&self.domain.keys) }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.domain.keys.remove(self.key);
    }
}

/// Memory window of a NIC in software.
pub(crate) struct Window {
    key: u32,
    keys: Arc<Keys>,
}

impl Window {
    pub(crate) fn key(&self) -> u32 {
        self.key
    }

    /// Opens the window to the peer of a queue pair.
    pub(super) fn open(&self, queue_pair: u32) {
        let mut entries = self.keys.entries.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get_mut(&self.key) {
            entry.holder = Holder::Pair(queue_pair);
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.keys.remove(self.key);
    }
}
