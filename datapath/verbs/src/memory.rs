//! Memory that a NIC may access: protection domains, registered memory, memory windows.

use crate::device::{Context, Device};
use crate::either::either;
#[cfg(rdma)]
use crate::ibverbs;
use crate::range::{LocalRange, Pinned, RemoteRange, Rights};
use crate::softnic;
use std::io;
use std::sync::Arc;

/// Protection domain: memory, windows and queue pairs that may be used with each other.
pub struct ProtectionDomain {
    context: Arc<Context>,
    pub(crate) kind: Domain,
}

/// Protection domain of either kind of device.
pub(crate) enum Domain {
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
        let kind = match &context.device {
            #[cfg(rdma)]
            Device::Hardware(device) => Domain::Hardware(ibverbs::ProtectionDomain::new(device)?),
            Device::Software(nic) => Domain::Software(nic.domain()),
        };
        Ok(Arc::new(Self { context: Arc::clone(context), kind }))
    }

    /// Device of the domain.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }
}

/// Registered memory. It stays mapped and pinned as long as this value lives.
pub struct MemoryRegion {
    domain: Arc<ProtectionDomain>,
    kind: Region,
}

/// Registered memory of either kind of device.
enum Region {
    #[cfg(rdma)]
    Hardware(Arc<ibverbs::MemoryRegion>),
    Software(softnic::Registration),
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
        either!(&self.kind, Region, region => region.len())
    }

    /// Returns true when the registration has no bytes, which no device allows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Address of `len` bytes at offset `at`.
    fn address(&self, at: u64, len: u64) -> u64 {
        assert!(at <= self.len() as u64 && len <= self.len() as u64 - at, "{at}+{len} is outside the registration");
        either!(&self.kind, Region, region => region.address()) + at
    }

    /// Names `len` bytes at offset `at` for a work request of this host.
    ///
    /// # Panics
    /// If the bytes are not inside the registration.
    #[must_use]
    pub fn range(&self, at: u64, len: u32) -> LocalRange {
        let key = either!(&self.kind, Region, region => region.local_key());
        LocalRange { address: self.address(at, len.into()), len, key }
    }

    /// Names `len` bytes at offset `at` for a peer. The peer can use them only if the memory is
    /// [`MemoryRegion::writable`].
    ///
    /// # Panics
    /// If the bytes are not inside the registration.
    #[must_use]
    pub fn remote(&self, at: u64, len: u64) -> RemoteRange {
        let key = either!(&self.kind, Region, region => region.remote_key());
        RemoteRange { address: self.address(at, len), key }
    }
}

/// Type-2 memory window: part of a registration that the peer of one queue pair can write.
///
/// A request `Work::Open` on the queue pair opens it. Dropping it closes it: once `drop` returns, a write through it
/// fails with a remote access error.
pub struct MemoryWindow {
    address: u64,
    pub(crate) kind: Window,
}

/// Memory window of either kind of device.
pub(crate) enum Window {
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
        let key = either!(&self.kind, Window, window => window.key());
        RemoteRange { address: self.address, key }
    }
}
