//! Packets: IPv4 or IPv6, UDP, base transport header, extended headers, payload, pad, invariant checksum.
//!
//! A packet begins with its IP header; what comes before belongs to the link. All fields are big-endian, except the
//! invariant checksum at the end, which is little-endian.

mod decode;
mod encode;
mod fields;
mod format;
mod opcode;

pub use decode::{NotAPacket, decode, queue_pair};
pub use encode::{Put, Unsound};
pub(crate) use fields::rnr_nanos;
pub use fields::{Aeth, Ecn, Packet, Reth, Syndrome};
pub(crate) use format::internet_checksum;
pub use format::{
    DESTINATION_AT, FRAGMENT_MASK, IPV4_BYTES, IPV4_FIRST, IPV4_FRAGMENT_AT, IPV4_PROTOCOL_AT, IPV4_TO_AT, IPV6_BYTES,
    IPV6_PROTOCOL_AT, IPV6_TO_AT, LOW_24_BITS, MAX_HEADER_BYTES, MAX_TRAILER_BYTES, SCRATCH_BYTES, UDP, UDP_BYTES,
    UDP_PORT, UDP_TO_AT,
};
pub use opcode::Opcode;
pub(crate) use opcode::Part;
