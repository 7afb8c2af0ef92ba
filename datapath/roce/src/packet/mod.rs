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
pub use fields::{Aeth, Ecn, Packet, Reth, Syndrome, rnr_nanos};
pub(crate) use format::{LOW_24_BITS, internet_checksum};
pub use format::{MAX_HEADER_BYTES, MAX_TRAILER_BYTES, SCRATCH_BYTES, UDP_PORT};
pub use opcode::Opcode;
pub(crate) use opcode::Part;
