//! What a NIC may touch: protection domains, registered memory, memory windows.

use super::check;
use super::device::Context;
use crate::buffer::Buffer;
use crate::cxl::{Native, RegionOffset};
use rdma_sys as ffi;
use std::any::Any;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

/// Memory, windows and queue pairs that belong together.
pub struct ProtectionDomain {
    domain: NonNull<ffi::ibv_pd>,
    context: Arc<Context>,
}

// SAFETY: libibverbs serialises calls on a domain; the pointer is only passed to it.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// A new domain of a device.
    ///
    /// # Errors
    /// What `ibv_alloc_pd` reports.
    pub fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: the context is open.
        let domain = unsafe { ffi::ibv_alloc_pd(context.raw()) };
        let domain = NonNull::new(domain).ok_or_else(io::Error::last_os_error)?;
        Ok(Arc::new(Self { domain, context: Arc::clone(context) }))
    }

    /// Its device.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(super) fn raw(&self) -> *mut ffi::ibv_pd {
        self.domain.as_ptr()
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: everything in the domain holds it, so it is empty; it is given back once.
        unsafe { ffi::ibv_dealloc_pd(self.domain.as_ptr()) };
    }
}

/// Pages that can be registered.
pub trait Pinned {
    /// Where they are, and what keeps them there.
    fn pages(&self) -> (*mut u8, usize, Arc<dyn Any + Send + Sync>);
}

impl Pinned for Buffer {
    fn pages(&self) -> (*mut u8, usize, Arc<dyn Any + Send + Sync>) {
        let pages = Buffer::pages(self);
        (pages.as_mut_ptr(), pages.len(), Arc::clone(pages) as _)
    }
}

impl Pinned for (&Native, RegionOffset, u64) {
    fn pages(&self) -> (*mut u8, usize, Arc<dyn Any + Send + Sync>) {
        let (memory, at, len) = *self;
        (memory.address(at, len), len as usize, Arc::new(memory.clone()) as _)
    }
}

/// Registered memory. It stays mapped and pinned as long as this lives.
pub struct MemoryRegion {
    region: NonNull<ffi::ibv_mr>,
    domain: Arc<ProtectionDomain>,
    _pages: Arc<dyn Any + Send + Sync>,
}

// SAFETY: libibverbs serialises calls on a region, and its fields do not change.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

impl std::fmt::Debug for MemoryRegion {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "MemoryRegion({} bytes)", self.len())
    }
}

/// What the NIC itself may write, never what a peer may.
const LOCAL: u32 = ffi::IBV_ACCESS_LOCAL_WRITE;

impl MemoryRegion {
    fn register(domain: &Arc<ProtectionDomain>, memory: &impl Pinned, access: u32) -> io::Result<Self> {
        let (address, len, pages) = memory.pages();
        // SAFETY: the pages are mapped, and kept so by what is stored beside the registration.
        let region = unsafe { ffi::embarcadero_ibv_reg_mr(domain.raw(), address.cast(), len, access.cast_signed()) };
        let region = NonNull::new(region).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { region, domain: Arc::clone(domain), _pages: pages })
    }

    /// Memory that this host sends from and receives into.
    ///
    /// # Errors
    /// What `ibv_reg_mr` reports: `ENOMEM` where RLIMIT_MEMLOCK is too low, `EOPNOTSUPP` for a file on fsdax.
    pub fn local(domain: &Arc<ProtectionDomain>, memory: &impl Pinned) -> io::Result<Self> {
        Self::register(domain, memory, LOCAL)
    }

    /// Memory over which windows can be opened; without one, no peer can write it.
    ///
    /// # Errors
    /// As [`MemoryRegion::local`].
    pub fn for_windows(domain: &Arc<ProtectionDomain>, memory: &impl Pinned) -> io::Result<Self> {
        Self::register(domain, memory, LOCAL | ffi::IBV_ACCESS_MW_BIND)
    }

    /// Memory that every queue pair of the domain lets its peer write.
    ///
    /// # Errors
    /// As [`MemoryRegion::local`].
    pub fn writable(domain: &Arc<ProtectionDomain>, memory: &impl Pinned) -> io::Result<Self> {
        Self::register(domain, memory, LOCAL | ffi::IBV_ACCESS_REMOTE_WRITE)
    }

    /// Its domain.
    #[must_use]
    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        // SAFETY: the registration lives.
        unsafe { self.region.as_ref() }.length
    }

    /// Never true of a registration.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn address(&self, at: u64, len: u64) -> u64 {
        assert!(at <= self.len() as u64 && len <= self.len() as u64 - at, "{at}+{len} is outside the registration");
        // SAFETY: the registration lives.
        unsafe { self.region.as_ref() }.addr.addr() as u64 + at
    }

    /// Bytes of it, as a work request names them to the local NIC.
    ///
    /// # Panics
    /// When they are not inside.
    #[must_use]
    pub fn range(&self, at: u64, len: u32) -> LocalRange {
        // SAFETY: the registration lives.
        LocalRange { address: self.address(at, len.into()), len, key: unsafe { self.region.as_ref() }.lkey }
    }

    /// Bytes of it, as a peer names them. Of use only if it was registered [`MemoryRegion::writable`].
    ///
    /// # Panics
    /// When they are not inside.
    #[must_use]
    pub fn remote(&self, at: u64, len: u64) -> RemoteRange {
        // SAFETY: the registration lives.
        RemoteRange { address: self.address(at, len), key: unsafe { self.region.as_ref() }.rkey }
    }

    pub(super) fn raw(&self) -> *mut ffi::ibv_mr {
        self.region.as_ptr()
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: it came from `ibv_reg_mr` and is given back once. Requests that still name it fail with a completion.
        unsafe { ffi::ibv_dereg_mr(self.region.as_ptr()) };
    }
}

/// Registered bytes of this host. A plain value: should its registration be gone when it is used, the NIC refuses it.
#[derive(Clone, Copy, Debug)]
pub struct LocalRange {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) key: u32,
}

/// Where a peer's bytes begin, and the key to them. The peer's NIC checks both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteRange {
    /// Address on the peer.
    pub address: u64,
    /// Its rkey.
    pub key: u32,
}

impl RemoteRange {
    /// The same memory, `bytes` further on.
    #[must_use]
    pub fn offset(self, bytes: u64) -> Self {
        Self { address: self.address.wrapping_add(bytes), ..self }
    }
}

/// A type-2 memory window: opened over part of a region for the peer of one queue pair, by a [`super::Work::Open`] on
/// it. Dropping it closes it: once `drop` returns, a write through it fails with a remote access error.
pub struct MemoryWindow {
    window: NonNull<ffi::ibv_mw>,
    key: u32,
    at: u64,
    len: u64,
    region: Arc<MemoryRegion>,
}

// SAFETY: libibverbs serialises calls on a window.
unsafe impl Send for MemoryWindow {}

impl MemoryWindow {
    /// A window over `len` bytes at `at` of a region, closed so far.
    ///
    /// # Errors
    /// What `ibv_alloc_mw` reports.
    ///
    /// # Panics
    /// When the bytes are not inside the region.
    pub fn new(region: &Arc<MemoryRegion>, at: u64, len: u64) -> io::Result<Self> {
        region.address(at, len);
        // SAFETY: the domain lives.
        let window = unsafe { ffi::ibv_alloc_mw(region.domain.raw(), ffi::IBV_MW_TYPE_2) };
        let window = NonNull::new(window).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: just made. A type-2 window is opened under another key than it has (IBTA 1.4, o10-37.2.32).
        let key = unsafe { ffi::ibv_inc_rkey(window.as_ref().rkey) };
        Ok(Self { window, key, at, len, region: Arc::clone(region) })
    }

    /// How a peer names it, once it is open.
    #[must_use]
    pub fn remote(&self) -> RemoteRange {
        RemoteRange { address: self.region.address(self.at, self.len), key: self.key }
    }

    pub(super) fn bind(&self) -> (*mut ffi::ibv_mw, u32, ffi::ibv_mw_bind_info) {
        let info = ffi::ibv_mw_bind_info {
            mr: self.region.raw(),
            addr: self.region.address(self.at, self.len),
            length: self.len,
            mw_access_flags: ffi::IBV_ACCESS_REMOTE_WRITE,
        };
        (self.window.as_ptr(), self.key, info)
    }
}

impl Drop for MemoryWindow {
    fn drop(&mut self) {
        // SAFETY: it came from `ibv_alloc_mw` and is given back once; an open window is closed by that.
        let result = check(unsafe { ffi::ibv_dealloc_mw(self.window.as_ptr()) });
        // Memory behind a window that may still be open must not be used again: there is no way on. A device that is
        // gone (EIO) writes nothing.
        let closed = result.as_ref().err().is_none_or(|error| error.raw_os_error() == Some(libc::EIO));
        assert!(closed, "a memory window cannot be closed: {result:?}");
    }
}
