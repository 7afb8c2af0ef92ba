//! The bytes of the data plane, little-endian. `docs/protocol.md` describes them.
//!
//! Everything begins with a 64-byte frame whose last four bytes are the CRC32C of the 60 before. A batch's frame is
//! also the header under which the batch lies in CXL memory.

#![forbid(unsafe_code)]

pub mod batch;
mod bounds;
mod ids;
mod order;

pub use bounds::{OutOfBounds, within};
pub use ids::{BrokerId, ClientId, Epoch, Incarnation, SessionSlot, Stream, Term, TopicId};
pub use order::Order;

use bytemuck::{Pod, Zeroable};
use std::mem::{offset_of, size_of};

/// Bytes of a frame.
pub const FRAME_BYTES: usize = 64;
/// First four bytes of every frame.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"EMBF");
/// Version of the data protocol.
pub const WIRE_VERSION: u8 = 1;
/// Most bytes of text behind an error frame.
pub const ERROR_TEXT_BYTES: usize = 1024;
/// An offset that is not known any more.
pub const UNKNOWN_OFFSET: u64 = u64::MAX;

/// CRC32C (Castagnoli; RFC 3720, appendix B.4).
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not our protocol.
    #[error("frame magic is {found:#010x}, expected {FRAME_MAGIC:#010x}")]
    Magic {
        /// As received.
        found: u32,
    },
    /// Another version of it.
    #[error("protocol version is {found}, this build speaks {WIRE_VERSION}")]
    Version {
        /// As received.
        found: u8,
    },
    /// Damaged.
    #[error("frame checksum is {found:#010x}, its bytes give {expected:#010x}")]
    Checksum {
        /// As received.
        found: u32,
        /// As computed.
        expected: u32,
    },
    /// A kind that does not exist.
    #[error("frame kind {found} is unknown")]
    Kind {
        /// As received.
        found: u8,
    },
    /// A field out of its bounds.
    #[error("frame field {field} is {value}; it must be {low} to {high}")]
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Least allowed.
        low: u64,
        /// Most allowed.
        high: u64,
    },
}

macro_rules! frames {
    ($($(#[$meta:meta])* $kind:literal $name:ident { $($(#[$fmeta:meta])* $field:ident: $ty:ty = $offset:expr),* $(,)? })*) => {
        $(
            $(#[$meta])*
            #[allow(missing_docs)] // fields whose names say it
            #[repr(C)]
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
            pub struct $name {
                /// [`FRAME_MAGIC`].
                pub magic: u32,
                /// Kind of the frame.
                pub kind: u8,
                /// [`WIRE_VERSION`].
                pub version: u8,
                /// Meaning depends on the kind.
                pub flags: u16,
                $($(#[$fmeta])* pub $field: $ty,)*
                /// CRC32C of the bytes before.
                pub checksum: u32,
            }
            const _: () = {
                assert!(size_of::<$name>() == FRAME_BYTES);
                $(assert!(offset_of!($name, $field) == $offset);)*
                assert!(offset_of!($name, checksum) == 60);
            };
            impl $name {
                /// A frame of this kind with all other fields zero and no checksum yet.
                #[must_use]
                pub fn blank() -> Self {
                    Self { magic: FRAME_MAGIC, kind: $kind, version: WIRE_VERSION, ..Self::zeroed() }
                }

                /// Computes the checksum and returns the bytes to send.
                #[must_use]
                pub fn encode(mut self) -> [u8; FRAME_BYTES] {
                    self.checksum = crc32c(&bytemuck::bytes_of(&self)[..FRAME_BYTES - 4]);
                    bytemuck::cast(self)
                }
            }
        )*

        /// Kind and name of every frame, and its fields with their offsets.
        pub const FRAMES: &[(u8, &str, &[(&str, usize)])] =
            &[$(($kind, stringify!($name), &[$((stringify!($field), $offset)),*])),*];

        /// Any frame.
        #[allow(missing_docs)] // each variant is documented at its structure
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Frame { $($name($name)),* }

        impl Frame {
            /// The number of its kind.
            #[must_use]
            pub fn kind(&self) -> u8 {
                match self {
                    $(Self::$name(_) => $kind),*
                }
            }

            /// Checks and decodes a frame.
            ///
            /// # Errors
            /// [`WireError`] for anything that no honest peer sends.
            #[inline]
            pub fn decode(bytes: &[u8; FRAME_BYTES]) -> Result<Self, WireError> {
                let prefix: BatchHeader = bytemuck::pod_read_unaligned(bytes);
                if prefix.magic != FRAME_MAGIC {
                    return Err(WireError::Magic { found: prefix.magic });
                }
                if prefix.version != WIRE_VERSION {
                    return Err(WireError::Version { found: prefix.version });
                }
                let expected = crc32c(&bytes[..FRAME_BYTES - 4]);
                if prefix.checksum != expected {
                    return Err(WireError::Checksum { found: prefix.checksum, expected });
                }
                match prefix.kind {
                    $($kind => Ok(Self::$name(bytemuck::pod_read_unaligned(bytes))),)*
                    found => Err(WireError::Kind { found }),
                }
            }
        }
    };
}

frames! {
    /// A batch: its header on the wire and in CXL memory. Body: see [`batch`].
    3 BatchHeader {
        client_id: ClientId = 8,
        sequence: u64 = 16,
        session_epoch: Epoch = 24,
        /// Bytes of the messages, without padding and length table.
        payload_bytes: u32 = 28,
        message_count: u32 = 32,
        /// CRC32C of the body, if flag [`batch::BODY_CHECKSUM`] is set.
        body_checksum: u32 = 36,
        topic: TopicId = 40,
        topic_incarnation: Incarnation = 44,
        session_slot: SessionSlot = 48,
        reserved: [u32; 2] = 52,
    }
    /// Client to broker, first frame: "I publish under this session".
    1 OpenPublish {
        client_id: ClientId = 8,
        /// The client wants to know what became of its batches from here on.
        resume_from: u64 = 16,
        session_epoch: Epoch = 24,
        session_slot: SessionSlot = 28,
        topic: TopicId = 32,
        topic_incarnation: Incarnation = 36,
        ack_level: u32 = 40,
        reserved: [u32; 4] = 44,
    }
    /// Broker to client: "go on". Acks for what is committed from `resume_from` on follow.
    2 PublishReady {
        /// Sequences below this are committed.
        committed: u64 = 8,
        /// Largest batch, header and body.
        max_batch_bytes: u64 = 16,
        window_batches: u32 = 24,
        broker: BrokerId = 28,
        reserved: [u64; 3] = 32,
        reserved_low: u32 = 56,
    }
    /// Broker to client: a batch is committed.
    4 Ack {
        sequence: u64 = 8,
        /// Offset of its first message, or [`UNKNOWN_OFFSET`].
        first_offset: u64 = 16,
        /// Sequences below this are committed (strong order).
        committed: u64 = 24,
        session_epoch: Epoch = 32,
        /// Stream of the offset.
        stream: Stream = 36,
        reserved: [u64; 2] = 40,
        reserved_low: u32 = 56,
    }
    /// Broker to client: nothing commits under this epoch any more.
    5 Fenced {
        /// Sequences below this are committed; resubmit from here under the next epoch.
        committed: u64 = 8,
        session_epoch: Epoch = 16,
        reserved: u32 = 20,
        reserved_tail: [u64; 4] = 24,
        reserved_low: u32 = 56,
    }
    /// Client to broker, first frame: "send me a stream".
    6 Subscribe {
        /// Offset, or microseconds since 1970, as `start_kind` says.
        start: u64 = 8,
        /// One of [`START_OFFSET`], [`START_EARLIEST`], [`START_LATEST`], [`START_TIMESTAMP`].
        start_kind: u32 = 16,
        topic: TopicId = 20,
        topic_incarnation: Incarnation = 24,
        stream: Stream = 28,
        reserved: [u64; 3] = 32,
        reserved_low: u32 = 56,
    }
    /// Broker to client: where the stream starts.
    7 SubscribeReady {
        /// Offset of the first message that the client asked for.
        start_offset: u64 = 8,
        /// Offset after the last message that was there.
        next_offset: u64 = 16,
        reserved: [u64; 4] = 24,
        reserved_low: u32 = 56,
    }
    /// Broker to client: one batch follows, header and body, as it lies in CXL memory.
    8 Deliver {
        first_offset: u64 = 8,
        ordered_us: u64 = 16,
        /// Bytes that follow.
        batch_bytes: u32 = 24,
        message_count: u32 = 28,
        /// Broker that received the batch.
        broker: BrokerId = 32,
        stream: Stream = 36,
        reserved: [u64; 2] = 40,
        reserved_low: u32 = 56,
    }
    /// Broker to client: why the connection closes. `text_bytes` of UTF-8 follow.
    9 ErrorFrame {
        /// An [`ErrorCode`].
        code: u32 = 8,
        text_bytes: u32 = 12,
        /// For `OffsetOutOfRange`: the earliest offset.
        detail: u64 = 16,
        reserved: [u64; 4] = 24,
        reserved_low: u32 = 56,
    }
    /// Both ways: "how far does the stream reach?" and the answer, in line with the deliveries.
    10 Position {
        next_offset: u64 = 8,
        reserved: [u64; 5] = 16,
        reserved_low: u32 = 56,
    }
    /// Client to broker, before the opening frame: "use a queue pair". The socket stays open beside it.
    11 RdmaConnect {
        /// Global address of the client's port.
        gid: [u8; 16] = 8,
        queue_pair: u32 = 24,
        first_psn: u32 = 28,
        /// Path MTU of the client's port, bytes.
        mtu: u32 = 32,
        lid: u32 = 36,
        /// A subscriber's ring, into which deliveries are written; all zero for a publisher.
        ring_address: u64 = 40,
        ring_bytes: u32 = 48,
        ring_rkey: u32 = 52,
        /// A publisher's largest batch, header and body; 0 for a subscriber.
        batch_bytes: u32 = 56,
    }
    /// Broker to client: the other end of the queue pair, ready to send and receive.
    12 RdmaAccept {
        gid: [u8; 16] = 8,
        queue_pair: u32 = 24,
        first_psn: u32 = 28,
        mtu: u32 = 32,
        lid: u32 = 36,
        reserved: [u32; 5] = 40,
    }
    /// Broker to publisher, on the queue pair: a landing window to write batches into.
    13 WindowGrant {
        /// Where it begins in the broker's memory.
        address: u64 = 8,
        /// Its number on this connection, counted from 0: the immediate data of writes into it.
        number: u32 = 16,
        rkey: u32 = 20,
        bytes: u32 = 24,
        reserved_high: u32 = 28,
        reserved: [u64; 3] = 32,
        reserved_low: u32 = 56,
    }
}

/// Start at an offset.
pub const START_OFFSET: u32 = 0;
/// Start at the earliest message that is kept.
pub const START_EARLIEST: u32 = 1;
/// Start at the next message to come.
pub const START_LATEST: u32 = 2;
/// Start at the first batch that was ordered at or after a time.
pub const START_TIMESTAMP: u32 = 3;

/// Why a broker closes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// The bytes are not our protocol.
    BadFrame = 1,
    /// No such topic, or another incarnation of it.
    UnknownTopic = 2,
    /// The session is not that client's, or not open.
    UnknownSession = 3,
    /// The batch does not fit, or its fields disagree with its body.
    BadBatch = 4,
    /// No memory came free in time.
    PoolExhausted = 5,
    /// The offset is not kept.
    OffsetOutOfRange = 6,
    /// The topic is being deleted.
    TopicDeleted = 7,
    /// The acknowledgement level is not offered.
    AckLevel = 8,
    /// Stored bytes fail their check.
    Corrupt = 9,
    /// The broker is full or going away.
    Unavailable = 10,
    /// The subscriber did not read in time.
    TooSlow = 11,
    /// The broker has no device for the transport that was asked for.
    NoTransport = 12,
    /// Retention took batches that were to be acknowledged once they were replicated.
    NotReplicated = 13,
}

impl ErrorCode {
    /// The code of a number.
    #[must_use]
    pub const fn from_u32(code: u32) -> Option<Self> {
        Some(match code {
            1 => Self::BadFrame,
            2 => Self::UnknownTopic,
            3 => Self::UnknownSession,
            4 => Self::BadBatch,
            5 => Self::PoolExhausted,
            6 => Self::OffsetOutOfRange,
            7 => Self::TopicDeleted,
            8 => Self::AckLevel,
            9 => Self::Corrupt,
            10 => Self::Unavailable,
            11 => Self::TooSlow,
            12 => Self::NoTransport,
            13 => Self::NotReplicated,
            _ => return None,
        })
    }
}

/// An error frame and its text, ready to send.
#[must_use]
pub fn encode_error(code: ErrorCode, text: &str, detail: u64) -> Vec<u8> {
    let mut end = text.len().min(ERROR_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = &text.as_bytes()[..end];
    let frame = ErrorFrame { code: code as u32, text_bytes: text.len() as u32, detail, ..ErrorFrame::blank() };
    let mut bytes = frame.encode().to_vec();
    bytes.extend_from_slice(text);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn crc32c_matches_the_rfc() {
        // RFC 3720, appendix B.4: 32 bytes of zeros, of ones, and ascending.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_cleanly(bytes: [u8; 32], more: [u8; 32]) {
            let mut frame = [0u8; 64];
            frame[..32].copy_from_slice(&bytes);
            frame[32..].copy_from_slice(&more);
            prop_assert!(Frame::decode(&frame).is_err());
            // The same bytes with a valid prefix and checksum reach the kinds.
            frame[..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
            frame[5] = WIRE_VERSION;
            let checksum = crc32c(&frame[..60]);
            frame[60..].copy_from_slice(&checksum.to_le_bytes());
            match Frame::decode(&frame) {
                Ok(_) => prop_assert!((1..=13).contains(&frame[4])),
                Err(error) => prop_assert_eq!(error, WireError::Kind { found: frame[4] }),
            }
        }

        #[test]
        fn a_flipped_bit_never_passes(sequence: u64, client_id: u64, bit in 0usize..512) {
            let client_id = ClientId(client_id);
            let header = BatchHeader { sequence, client_id, message_count: 1, ..BatchHeader::blank() };
            let mut bytes = header.encode();
            let Ok(Frame::BatchHeader(decoded)) = Frame::decode(&bytes) else { panic!("does not decode") };
            prop_assert_eq!((decoded.sequence, decoded.client_id), (sequence, client_id));
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Frame::decode(&bytes).is_err());
        }
    }

    #[test]
    fn error_text_is_cut_at_a_character() {
        let long = "é".repeat(ERROR_TEXT_BYTES);
        let bytes = encode_error(ErrorCode::BadFrame, &long, 0);
        assert_eq!(bytes.len(), FRAME_BYTES + ERROR_TEXT_BYTES);
        assert!(std::str::from_utf8(&bytes[FRAME_BYTES..]).is_ok());
    }
}
