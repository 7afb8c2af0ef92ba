//! Memory that stays where it is while a NIC may read or write it.

use embarcadero_wire::batch::BatchBuffer;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Page-aligned bytes of a fixed capacity, filled from the front.
///
/// The bytes never move, so a NIC can be told of them once. The pages live as long as the buffer, or a registration of
/// them.
pub struct Buffer {
    pages: Arc<memmap2::MmapRaw>,
    len: usize,
}

impl Buffer {
    /// An empty buffer for up to `capacity` bytes (at least 1).
    ///
    /// # Errors
    /// The error of `mmap`.
    pub fn new(capacity: usize) -> io::Result<Self> {
        let pages = memmap2::MmapOptions::new().len(capacity.max(1)).map_anon()?.into();
        Ok(Self { pages: Arc::new(pages), len: 0 })
    }

    /// A buffer of `len` zero bytes.
    ///
    /// # Errors
    /// The error of `mmap`.
    pub fn zeroed(len: usize) -> io::Result<Self> {
        let mut buffer = Self::new(len)?;
        buffer.len = len;
        Ok(buffer)
    }

    /// Most bytes that the buffer can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.pages.len()
    }

    /// Pages of the buffer. Whoever clones the pointer keeps them mapped.
    pub fn pages(&self) -> &Arc<memmap2::MmapRaw> {
        &self.pages
    }

    /// Appends bytes.
    ///
    /// # Panics
    /// When the bytes exceed the capacity.
    #[inline]
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        let start = self.len;
        self.resize(start + bytes.len());
        self[start..].copy_from_slice(bytes);
    }

    /// Sets the number of bytes in use. Added bytes have any value.
    ///
    /// # Panics
    /// When `len` exceeds the capacity.
    #[inline]
    pub fn resize(&mut self, len: usize) {
        assert!(len <= self.capacity(), "{len} bytes do not fit into a buffer of {}", self.capacity());
        self.len = len;
    }
}

impl BatchBuffer for Buffer {
    fn capacity(&self) -> usize {
        Self::capacity(self)
    }

    #[inline]
    fn resize(&mut self, len: usize) {
        Self::resize(self, len);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: mapped, initialised by the kernel, and `len` is within the mapping. A NIC may write to a registered
        // buffer while this is looked at; bytes have no invalid values, and what is read before a completion says that
        // it is there has no meaning.
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `self` is the only one that gives out the bytes, and it is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_mut_ptr(), self.len) }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Buffer({} of {} bytes)", self.len, self.capacity())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_what_was_put_in() {
        let mut buffer = Buffer::new(10_000).unwrap();
        buffer.extend_from_slice(b"abc");
        buffer.resize(5000);
        buffer[4999] = 7;
        assert_eq!((&buffer[..4], buffer[4999], buffer.len()), (&b"abc\0"[..], 7, 5000));
        assert_eq!(Buffer::zeroed(1).unwrap()[..], [0]);
    }
}
