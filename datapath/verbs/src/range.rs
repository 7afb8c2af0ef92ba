//! Memory of this host and of peers, as requests name it.

use embarcadero_cxl::{Native, RegionOffset};
use embarcadero_os::buffer::Buffer;
use std::any::Any;
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
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) key: u32,
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

/// Rights that a registration gives to peers. This host's own requests may always use the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    /// No rights.
    Local,
    /// Writes through memory windows.
    Windows,
    /// Writes by the peer of every queue pair of the domain.
    RemoteWrite,
}
