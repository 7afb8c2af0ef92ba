//! Positions in the region.

/// Position in the region, in bytes. Shared memory holds offsets, never pointers: each process maps it elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionOffset(pub u64);

impl RegionOffset {
    /// Returns the position `bytes` bytes further on.
    #[inline]
    #[must_use]
    pub const fn add(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}
