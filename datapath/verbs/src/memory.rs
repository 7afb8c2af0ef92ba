//! What a NIC may touch: protection domains, registered memory, memory windows.

use super::device::Context;
#[cfg(rdma)]
use super::ibverbs;
use super::{either, softnic};
use embarcadero_cxl::{Native, RegionOffset};
use embarcadero_os::buffer::Buffer;
use std::any::Any;
use std::io;
use std::sync::Arc;

/// Pages that can be registered.
pub trait Pinned {
    /// Where they are, and what keeps them there.
    fn pages(&self) -> (*mut u8, usize, Arc<dyn Any + Send + Sync>);

    /// Of which region they are, and where in it they begin.
    fn region(&self) -> Option<(&Native, RegionOffset)> {
        None
    }
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

    fn region(&self) -> Option<(&Native, RegionOffset)> {
        Some((self.0, self.1))
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

/// Memory, windows and queue pairs that belong together.
pub struct ProtectionDomain {
    context: Arc<Context>,
    pub(super) kind: Domain,
}

pub(super) enum Domain {
    #[cfg(rdma)]
    Hardware(Arc<ibverbs::ProtectionDomain>),
    Software(softnic::Domain),
}

impl ProtectionDomain {
    /// A new domain of a device.
    ///
    /// # Errors
    /// What `ibv_alloc_pd` reports.
    pub fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        let kind = match &**context {
            #[cfg(rdma)]
            Context::Hardware(device) => Domain::Hardware(ibverbs::ProtectionDomain::new(device)?),
            Context::Software(nic) => Domain::Software(nic.domain()),
        };
        Ok(Arc::new(Self { context: Arc::clone(context), kind }))
    }

    /// Its device.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }
}

/// What a registration lets be done with memory, besides that the NIC itself reads and writes it for this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rights {
    Local,
    Windows,
    RemoteWrite,
}

/// Registered memory. It stays mapped and pinned as long as this lives.
pub struct MemoryRegion {
    domain: Arc<ProtectionDomain>,
    kind: Region,
}

enum Region {
    #[cfg(rdma)]
    Hardware(Arc<ibverbs::MemoryRegion>),
    Software(softnic::Registration),
}

impl Region {
    fn len(&self) -> usize {
        either!(self, region => region.len())
    }

    fn address(&self) -> u64 {
        either!(self, region => region.address())
    }

    fn local_key(&self) -> u32 {
        either!(self, region => region.local_key())
    }

    fn remote_key(&self) -> u32 {
        either!(self, region => region.remote_key())
    }
}

impl std::fmt::Debug for MemoryRegion {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "MemoryRegion({} bytes)", self.len())
    }
}

impl MemoryRegion {
    fn register(domain: &Arc<ProtectionDomain>, memory: &impl Pinned, rights: Rights) -> io::Result<Self> {
        let kind = match &domain.kind {
            #[cfg(rdma)]
            Domain::Hardware(domain) => Region::Hardware(ibverbs::MemoryRegion::new(domain, memory, rights)?),
            Domain::Software(domain) => Region::Software(domain.register(memory, rights)),
        };
        Ok(Self { domain: Arc::clone(domain), kind })
    }

    /// Memory that this host sends from and receives into.
    ///
    /// # Errors
    /// What `ibv_reg_mr` reports: `ENOMEM` where RLIMIT_MEMLOCK is too low, `EOPNOTSUPP` for a file on fsdax.
    pub fn local(domain: &Arc<ProtectionDomain>, memory: &impl Pinned) -> io::Result<Self> {
        Self::register(domain, memory, Rights::Local)
    }

    /// Memory over which windows can be opened; without one, no peer can write it.
    ///
    /// # Errors
    /// As [`MemoryRegion::local`].
    pub fn for_windows(domain: &Arc<ProtectionDomain>, memory: &impl Pinned) -> io::Result<Self> {
        Self::register(domain, memory, Rights::Windows)
    }

    /// Memory that every queue pair of the domain lets its peer write.
    ///
    /// # Errors
    /// As [`MemoryRegion::local`].
    pub fn writable(domain: &Arc<ProtectionDomain>, memory: &impl Pinned) -> io::Result<Self> {
        Self::register(domain, memory, Rights::RemoteWrite)
    }

    /// Its domain.
    #[must_use]
    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.kind.len()
    }

    /// Never true of a registration.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn address(&self, at: u64, len: u64) -> u64 {
        assert!(at <= self.len() as u64 && len <= self.len() as u64 - at, "{at}+{len} is outside the registration");
        self.kind.address() + at
    }

    /// Bytes of it, as a work request names them to the local NIC.
    ///
    /// # Panics
    /// When they are not inside.
    #[must_use]
    pub fn range(&self, at: u64, len: u32) -> LocalRange {
        LocalRange { address: self.address(at, len.into()), len, key: self.kind.local_key() }
    }

    /// Bytes of it, as a peer names them. Of use only if it was registered [`MemoryRegion::writable`].
    ///
    /// # Panics
    /// When they are not inside.
    #[must_use]
    pub fn remote(&self, at: u64, len: u64) -> RemoteRange {
        RemoteRange { address: self.address(at, len), key: self.kind.remote_key() }
    }
}

/// A type-2 memory window: opened over part of a region for the peer of one queue pair, by a [`super::Work::Open`] on
/// it. Dropping it closes it: once `drop` returns, a write through it fails with a remote access error.
pub struct MemoryWindow {
    address: u64,
    pub(super) kind: Window,
}

pub(super) enum Window {
    #[cfg(rdma)]
    Hardware(ibverbs::MemoryWindow),
    Software(softnic::Window),
}

impl MemoryWindow {
    /// A window over `len` bytes at `at` of a region, closed so far.
    ///
    /// # Errors
    /// What `ibv_alloc_mw` reports.
    ///
    /// # Panics
    /// When the bytes are not inside the region.
    pub fn new(region: &MemoryRegion, at: u64, len: u64) -> io::Result<Self> {
        let address = region.address(at, len);
        let kind = match &region.kind {
            #[cfg(rdma)]
            Region::Hardware(region) => Window::Hardware(ibverbs::MemoryWindow::new(region, at, len)?),
            Region::Software(region) => Window::Software(region.window(at, len)),
        };
        Ok(Self { address, kind })
    }

    /// How a peer names it, once it is open.
    #[must_use]
    pub fn remote(&self) -> RemoteRange {
        let key = match &self.kind {
            #[cfg(rdma)]
            Window::Hardware(window) => window.key(),
            Window::Software(window) => window.key(),
        };
        RemoteRange { address: self.address, key }
    }
}
