//! Protection domains, registered memory and memory windows of libibverbs.

use super::call::check;
use super::device::Context;
use crate::range::{Pinned, Rights};
use rdma_sys as ffi;
use std::any::Any;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

/// Protection domain.
pub(crate) struct ProtectionDomain {
    domain: NonNull<ffi::ibv_pd>,
    _context: Arc<Context>,
}

// SAFETY: libibverbs serialises calls on a domain; the pointer is only passed to it.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// Makes a domain of a device.
    ///
    /// # Errors
    /// The error of `ibv_alloc_pd`.
    pub(crate) fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: the context is open.
        let domain = unsafe { ffi::ibv_alloc_pd(context.raw()) };
        let domain = NonNull::new(domain).ok_or_else(io::Error::last_os_error)?;
        Ok(Arc::new(Self { domain, _context: Arc::clone(context) }))
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

/// Registered memory. It stays mapped and pinned as long as this value lives.
pub(crate) struct MemoryRegion {
    region: NonNull<ffi::ibv_mr>,
    domain: Arc<ProtectionDomain>,
    _pages: Arc<dyn Any + Send + Sync>,
}

// SAFETY: libibverbs serialises calls on a region, and its fields do not change.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    /// Registers memory.
    ///
    /// # Errors
    /// The error of `ibv_reg_mr`.
    pub(crate) fn new(domain: &Arc<ProtectionDomain>, memory: &impl Pinned, rights: Rights) -> io::Result<Arc<Self>> {
        let (address, len, pages) = memory.pages();
        let access = ffi::IBV_ACCESS_LOCAL_WRITE
            | match rights {
                Rights::Local => 0,
                Rights::Windows => ffi::IBV_ACCESS_MW_BIND,
                Rights::RemoteWrite => ffi::IBV_ACCESS_REMOTE_WRITE,
            };
        // SAFETY: the pages are mapped, and kept so by what is stored beside the registration.
        let region = unsafe { ffi::embarcadero_ibv_reg_mr(domain.raw(), address.cast(), len, access.cast_signed()) };
        let region = NonNull::new(region).ok_or_else(io::Error::last_os_error)?;
        Ok(Arc::new(Self { region, domain: Arc::clone(domain), _pages: pages }))
    }

    fn fields(&self) -> &ffi::ibv_mr {
        // SAFETY: the registration lives, and the library does not change it.
        unsafe { self.region.as_ref() }
    }

    pub(crate) fn len(&self) -> usize {
        self.fields().length
    }

    /// Address of the first byte.
    pub(crate) fn address(&self) -> u64 {
        self.fields().addr.addr() as u64
    }

    pub(crate) fn local_key(&self) -> u32 {
        self.fields().lkey
    }

    pub(crate) fn remote_key(&self) -> u32 {
        self.fields().rkey
    }

    fn raw(&self) -> *mut ffi::ibv_mr {
        self.region.as_ptr()
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: it came from `ibv_reg_mr` and is given back once. Requests that still name it fail with a completion.
        unsafe { ffi::ibv_dereg_mr(self.region.as_ptr()) };
    }
}

/// Type-2 memory window. Dropping it closes it.
pub(crate) struct MemoryWindow {
    window: NonNull<ffi::ibv_mw>,
    /// Key that it is opened under.
    key: u32,
    at: u64,
    len: u64,
    region: Arc<MemoryRegion>,
}

// SAFETY: libibverbs serialises calls on a window.
unsafe impl Send for MemoryWindow {}

impl MemoryWindow {
    /// Makes a closed window over `len` bytes at offset `at` of a registration, which has them.
    ///
    /// # Errors
    /// The error of `ibv_alloc_mw`.
    pub(crate) fn new(region: &Arc<MemoryRegion>, at: u64, len: u64) -> io::Result<Self> {
        // SAFETY: the domain lives.
        let window = unsafe { ffi::ibv_alloc_mw(region.domain.raw(), ffi::IBV_MW_TYPE_2) };
        let window = NonNull::new(window).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: just made. A type-2 window is opened under another key than it has (IBTA 1.4, o10-37.2.32).
        let key = unsafe { ffi::ibv_inc_rkey(window.as_ref().rkey) };
        Ok(Self { window, key, at, len, region: Arc::clone(region) })
    }

    /// Key (rkey) that the window is opened under.
    pub(crate) fn key(&self) -> u32 {
        self.key
    }

    /// Fields of the request that opens the window.
    pub(super) fn bind(&self) -> (*mut ffi::ibv_mw, u32, ffi::ibv_mw_bind_info) {
        let info = ffi::ibv_mw_bind_info {
            mr: self.region.raw(),
            addr: self.region.address() + self.at,
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
