//! The bytes of the data plane: frames, batches, ids and the orders that a topic can promise. No I/O.
//!
//! Everything that travels begins with a 64-byte frame whose last four bytes are the CRC32C of the 60 before. The frame of
//! a batch is also the header under which the batch lies in CXL memory. All integers are little-endian.
//! `docs/reference/protocol.md` is the specification.

#![forbid(unsafe_code)]

pub mod batch;
mod bounds;
mod codes;
mod digest;
mod error_code;
mod frame;
mod ids;
mod order;

pub use bounds::{OutOfBounds, within};
pub use digest::{DIGEST_SEED, digest, first_set, is_reserved, with_bytes};
pub use error_code::{ERROR_TEXT_BYTES, ErrorCode, encode_error};
pub use frame::{
    Ack, BatchHeader, Deliver, ErrorFrame, FRAME_BYTES, FRAME_MAGIC, FRAMES, Fenced, Frame, MAX_ACK_LEVEL, OpenPublish,
    Position, PublishReady, RdmaAccept, RdmaConnect, StartKind, Subscribe, SubscribeReady, UNKNOWN_OFFSET,
    WIRE_VERSION, WindowGrant, WireError,
};
pub use ids::{BrokerId, ClientId, Epoch, Incarnation, SessionSlot, SessionToken, Stream, Term, TopicId};
pub use order::Order;

/// CRC32C (Castagnoli; RFC 3720, appendix B.4).
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_matches_the_rfc() {
        // RFC 3720, appendix B.4: 32 bytes of zeros, of ones, and ascending.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
    }
}
