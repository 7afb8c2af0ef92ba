//! RoCEv2 in user space: the protocol of reliable connections, and that of the Ethernet below them ([`ethernet`]), free of
//! input, output and `unsafe`.
//!
//! A [`QueuePair`] is driven from outside: packets and the time go in ([`QueuePair::receive`]), packets come out
//! ([`QueuePair::transmit`]), and completions are polled. One half is the requester, which sends what was posted, the
//! other the responder, which does what the peer asks for.
//!
//! Sources: InfiniBand Architecture Specification volume 1 ("IBTA" below) chapter 9, transport layer; its annexes A16
//! (RoCE) and A17 (RoCEv2); Linux, drivers/infiniband/sw/rxe, where the specification leaves a choice.

pub mod congestion;
pub mod ethernet;
pub mod packet;
pub mod psn;
mod queue_pair;
mod requester;
mod responder;
mod round_trip;

pub use queue_pair::{Attributes, Completion, Failure, Full, QueuePair};
pub use requester::{Operation, Work};
pub use responder::{Access, Memory, NoAccess, Receive};

/// Time in nanoseconds, from any start.
pub type Nanos = u64;

/// Bytes of payload that the path takes in a packet (IBTA 7.7.8).
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
    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self as usize
    }

    /// Packets that a message of so many bytes takes: one, if there are none.
    #[must_use]
    pub const fn packets(self, bytes: u32) -> u32 {
        if bytes == 0 { 1 } else { bytes.div_ceil(self as u32) }
    }

    /// The largest for which a link whose frames carry `link_mtu` bytes has room.
    #[must_use]
    pub const fn of_link(link_mtu: usize) -> Option<Self> {
        Self::of_payload(link_mtu.saturating_sub(packet::MAX_HEADER_BYTES + packet::MAX_TRAILER_BYTES))
    }

    /// The largest of at most so many bytes.
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

/// Largest message (IBTA 9.3.3, DMA length; 2^31).
pub const MAX_MESSAGE_BYTES: u32 = 1 << 31;
