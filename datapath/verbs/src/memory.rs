//! Memory that a NIC may access: protection domains, registered memory, memory windows.

use super::device::Context;
#[cfg(rdma)]
use super::ibverbs;
use super::{either, softnic};
use embarcadero_cxl::{Native, RegionOffset};
use embarcadero_os::buffer::Buffer;
use std::any::Any;
use std::io;
use std::sync::Arc;

/// Memory that can be registered.
pub trait Pinned {
    /// First byte, number of bytes, and the owner that keeps them mapped.
    fn pages(&self) -> (*mut u8, usize, Arc<dyn Any + Send + Sync>);

    /// CXL region that the bytes are part of, and the offset where they begin; `None` for other memory.
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

/// Registered bytes of this host. It is a plain value: once the registration is gone, the NIC refuses it.
#[derive(Clone, Copy, Debug)]
pub struct LocalRange {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) key: u32,
}

/// Address of a peer's bytes, and the key to them. The peer's NIC checks both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteRange {
    /// Address of the first byte, as the peer counts.
    pub address: u64,
    /// Key to the memory (rkey).
    pub key: u32,
}

impl RemoteRange {
    /// Moves the range on by `bytes` bytes.
    #[must_use]
    pub fn offset(self, bytes: u64) -> Self {
        Self { address: self.address.wrapping_add(bytes), ..self }
    }
}

/// Protection domain: memory, windows and queue pairs that may be used with each other.
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
    /// Makes a domain of a device.
    ///
    /// # Errors
    /// The error of `ibv_alloc_pd`.
    pub fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        let kind = match &**context {
            #[cfg(rdma)]
            Context::Hardware(device) => Domain::Hardware(ibverbs::ProtectionDomain::new(device)?),
            Context::Software(nic) => Domain::Software(nic.domain()),
        };
        Ok(Arc::new(Self { context: Arc::clone(context), kind }))
    }

    /// Device of the domain.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }
}

/// Rights that a registration gives to peers. This host's own requests may always use the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rights {
    /// No rights.
    Local,
    /// Writes through memory windows.
    Windows,
    /// Writes by the peer of every queue pair of the domain.
    RemoteWrite,
}

/// Registered memory. It stays mapped and pinned as long as this value lives.
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

    /// Registers memory that this host sends from and receives into.
    ///
    /// # Errors
    /// The error of `ibv_reg_mr`: `ENOMEM` where RLIMIT_MEMLOCK is too low, `EOPNOTSUPP` for a file on fsdax.
    pub fn local(domain: &Arc<ProtectionDomain>, memory: &impl Pinned) -> io::Result<Self> {
        Self::register(domain, memory, Rights::Local)
    }

    /// Registers memory over which windows can be opened. Peers can write it only through a window.
    ///
    /// # Errors
    /// The error of `ibv_reg_mr`, as for [`MemoryRegion::local`].
    pub fn for_windows(domain: &Arc<ProtectionDomain>, memory: &impl Pinned) -> io::Result<Self> {
        Self::register(domain, memory, Rights::Windows)
    }

    /// Registers memory that the peer of every queue pair of the domain can write.
    ///
    /// # Errors
    /// The error of `ibv_reg_mr`, as for [`MemoryRegion::local`].
    pub fn writable(domain: &Arc<ProtectionDomain>, memory: &impl Pinned) -> io::Result<Self> {
        Self::register(domain, memory, Rights::RemoteWrite)
    }

    /// Protection domain of the memory.
    #[must_use]
    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.kind.len()
    }

    /// Whether it has no bytes, which no registration allows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Address of `len` bytes at offset `at`.
    fn address(&self, at: u64, len: u64) -> u64 {
        assert!(at <= self.len() as u64 && len <= self.len() as u64 - at, "{at}+{len} is outside the registration");
        self.kind.address() + at
    }

    /// Names `len` bytes at offset `at` for a work request of this host.
    ///
    /// # Panics
    /// If the bytes are not inside the registration.
    #[must_use]
    pub fn range(&self, at: u64, len: u32) -> LocalRange {
        LocalRange { address: self.address(at, len.into()), len, key: self.kind.local_key() }
    }

    /// Names `len` bytes at offset `at` for a peer. The peer can use them only if the memory is
    /// [`MemoryRegion::writable`].
    ///
    /// # Panics
    /// If the bytes are not inside the registration.
    #[must_use]
    pub fn remote(&self, at: u64, len: u64) -> RemoteRange {
        RemoteRange { address: self.address(at, len), key: self.kind.remote_key() }
    }
}

/// Type-2 memory window: part of a registration that the peer of one queue pair can write.
///
/// A [`super::Work::Open`] on the queue pair opens it. Dropping it closes it: once `drop` returns, a write through it
/// fails with a remote access error.
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
    /// Makes a closed window over `len` bytes at offset `at` of a registration.
    ///
    /// # Errors
    /// The error of `ibv_alloc_mw`.
    ///
    /// # Panics
    /// If the bytes are not inside the registration.
    pub fn new(region: &MemoryRegion, at: u64, len: u64) -> io::Result<Self> {
        let address = region.address(at, len);
        let kind = match &region.kind {
            #[cfg(rdma)]
            Region::Hardware(region) => Window::Hardware(ibverbs::MemoryWindow::new(region, at, len)?),
            Region::Software(region) => Window::Software(region.window(at, len)),
        };
        Ok(Self { address, kind })
    }

    /// Names the window's memory for the peer, which can use it once the window is open.
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
