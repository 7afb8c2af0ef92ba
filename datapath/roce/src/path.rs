//! Limits of a path.

use crate::packet::{MAX_HEADER_BYTES, MAX_TRAILER_BYTES};

/// Bytes of the longest message: 2^31 (IBTA 9.3.3, DMA length).
pub const MAX_MESSAGE_BYTES: u32 = 1 << 31;

/// Most payload bytes of one packet on a path (IBTA 7.7.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
#[allow(missing_docs)]
pub enum PathMtu {
    Mtu256 = 256,
    Mtu512 = 512,
    Mtu1024 = 1024,
    Mtu2048 = 2048,
    Mtu4096 = 4096,
}

impl PathMtu {
    /// Number of bytes, 256 to 4096.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self as usize
    }

    /// Number of packets that carry a message of `bytes` bytes. An empty message takes one packet.
    #[must_use]
    pub(crate) const fn packets(self, bytes: u32) -> u32 {
        if bytes == 0 { 1 } else { bytes.div_ceil(self as u32) }
    }

    /// Returns the largest path MTU whose packets fit into frames that carry `link_mtu` bytes.
    /// `None` if not even 256 bytes of payload fit.
    #[must_use]
    pub const fn of_link(link_mtu: usize) -> Option<Self> {
        Self::of_payload(link_mtu.saturating_sub(MAX_HEADER_BYTES + MAX_TRAILER_BYTES))
    }

    /// Returns the largest path MTU of at most `bytes` bytes; `None` below 256.
    #[must_use]
    pub const fn of_payload(bytes: usize) -> Option<Self> {
        Some(match bytes {
            4096.. => Self::Mtu4096,
            2048.. => Self::Mtu2048,
            1024.. => Self::Mtu1024,
            512.. => Self::Mtu512,
            256.. => Self::Mtu256,
            _ => return None,
        })
    }
}
