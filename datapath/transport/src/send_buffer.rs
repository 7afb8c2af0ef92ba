//! Memory in which publishers fill batches.

use embarcadero_os::Buffer;
use embarcadero_verbs::{LocalRange, MemoryRegion, ProtectionDomain};
use embarcadero_wire::batch::BatchBuffer;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Buffer that batches are filled in and sent from in place. It keeps its registration on each device that sent from it.
#[derive(Debug)]
pub struct SendBuffer {
    registrations: Vec<MemoryRegion>,
    bytes: Buffer,
}

impl SendBuffer {
    /// Buffer for batches of up to `capacity` bytes, header and length table included.
    ///
    /// # Errors
    /// Error of the system when memory for the buffer runs out.
    pub fn new(capacity: usize) -> io::Result<Self> {
        Ok(Self { registrations: Vec::new(), bytes: Buffer::new(capacity.max(embarcadero_wire::FRAME_BYTES))? })
    }

    /// Range of the bytes in use, as a NIC that sends them in place names them. Registers the buffer once per domain.
    pub(crate) fn local(&mut self, domain: &Arc<ProtectionDomain>) -> io::Result<LocalRange> {
        let len = self.bytes.len() as u32;
        if let Some(known) = self.registrations.iter().find(|region| Arc::ptr_eq(region.domain(), domain)) {
            return Ok(known.range(0, len));
        }
        let region = MemoryRegion::local(domain, &self.bytes)?;
        let range = region.range(0, len);
        self.registrations.push(region);
        Ok(range)
    }
}

impl Deref for SendBuffer {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for SendBuffer {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl BatchBuffer for SendBuffer {
    fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    #[inline]
    fn resize(&mut self, len: usize) {
        self.bytes.resize(len);
    }
}
