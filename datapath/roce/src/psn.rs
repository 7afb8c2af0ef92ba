//! Packet sequence numbers.

use std::fmt;

/// Packet sequence number: 24 bits that wrap around (IBTA 9.7.1).
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Psn(u32);

const BITS: u32 = 24;
const MASK: u32 = (1 << BITS) - 1;

impl Psn {
    /// Takes the lowest 24 bits of `value`.
    #[must_use]
    pub const fn new(value: u32) -> Self {
        Self(value & MASK)
    }

    /// The number, below 2^24.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number of the packet that follows `packets` packets later.
    #[must_use]
    pub(crate) const fn plus(self, packets: u32) -> Self {
        Self::new(self.0.wrapping_add(packets))
    }

    /// Number of packets from `other` to this one; negative if this one came before.
    ///
    /// The result is between -2^23 and 2^23 - 1. Half of all numbers lie ahead of any number, the other half behind it
    /// (IBTA 9.7.1, figure of the valid and the duplicate region).
    #[must_use]
    pub(crate) const fn since(self, other: Self) -> i32 {
        let unused = 32 - BITS;
        (self.0.wrapping_sub(other.0) << unused).cast_signed() >> unused
    }
}

impl fmt::Debug for Psn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "psn {:#08x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_wrap() {
        assert_eq!(Psn::new(0x00ff_ffff).plus(1), Psn::new(0));
        assert_eq!(Psn::new(0).since(Psn::new(0x00ff_ffff)), 1);
        assert_eq!(Psn::new(0x00ff_ffff).since(Psn::new(0)), -1);
        assert_eq!(Psn::new(0x80_0000).since(Psn::new(0)), -(1 << 23));
    }

    proptest! {
        #[test]
        fn what_was_added_is_the_distance(from in 0u32..1 << 24, packets in 0u32..1 << 23) {
            let from = Psn::new(from);
            prop_assert_eq!(from.plus(packets).since(from), packets as i32);
            prop_assert_eq!(from.since(from.plus(packets)), -(packets as i32));
        }
    }
}
