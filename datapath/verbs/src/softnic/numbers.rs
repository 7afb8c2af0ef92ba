//! Numbers of queue pairs.

/// Most queue pairs of a port. The low 12 bits of their numbers count them, the high 12 bits stand for the port.
pub(super) const PAIRS: u32 = 1 << 12;

/// Numbers of queue pairs: 24 bits (IBTA 9.2.7).
pub(super) const NUMBERS: u32 = 1 << 24;
