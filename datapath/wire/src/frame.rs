//! Frames: their layout, their checksum, and what a receiver refuses.

use crate::batch::BODY_CHECKSUM;
use crate::digest::{DIGEST_SEED, digest, first_set, is_reserved, with_bytes};
use crate::ids::{BrokerId, ClientId, Epoch, Incarnation, SessionSlot, SessionToken, Stream, TopicId};
use crate::{codes, crc32c};
use bytemuck::{Pod, Zeroable};
use std::mem::{offset_of, size_of};

/// Bytes of a frame.
pub const FRAME_BYTES: usize = 64;
/// First four bytes of every frame.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"EMBF");
/// Version of the data protocol. Receivers refuse flags and fields that they do not know, so every addition changes it.
pub const WIRE_VERSION: u8 = 3;
/// Offset that is not known any more.
pub const UNKNOWN_OFFSET: u64 = u64::MAX;
/// Highest acknowledgement level: batches are durable.
pub const MAX_ACK_LEVEL: u8 = 2;

/// Reason why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The bytes are of another protocol.
    #[error("frame magic is {found:#010x}, expected {FRAME_MAGIC:#010x}")]
    Magic {
        /// Magic that was received.
        found: u32,
    },
    /// The peer speaks another version.
    #[error("protocol version is {found}, this build speaks {WIRE_VERSION}")]
    Version {
        /// Protocol version that was received.
        found: u8,
    },
    /// The frame is damaged.
    #[error("frame checksum is {found:#010x}, its bytes give {expected:#010x}")]
    Checksum {
        /// CRC32C that was received.
        found: u32,
        /// CRC32C that the bytes of the frame give.
        expected: u32,
    },
    /// The kind does not exist.
    #[error("frame kind {found} is unknown")]
    Kind {
        /// Kind that was received.
        found: u8,
    },
    /// A flag is set that this version does not know.
    #[error("flags of frame kind {kind} are {found:#x}; this build knows {known:#x}")]
    Flags {
        /// Kind of the frame.
        kind: u8,
        /// Flags that were received.
        found: u16,
        /// Flags that the kind has.
        known: u16,
    },
    /// A reserved byte is not zero.
    #[error("byte {at} of frame kind {kind} is reserved, and not zero")]
    Reserved {
        /// Kind of the frame.
        kind: u8,
        /// Offset of the byte.
        at: usize,
    },
    /// A field is out of its bounds.
    #[error("frame field {field} is {value}; it must be {low} to {high}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Value of the field.
        value: u64,
        /// Least allowed.
        low: u64,
        /// Most allowed.
        high: u64,
    },
}

macro_rules! frames {
    ($($(#[$meta:meta])* $kind:literal $name:ident with $flags:tt {
        $($(#[$fmeta:meta])* $field:ident: $ty:ty = $offset:expr),* $(,)?
    })*) => {
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
                /// Flags of the kind; all others are zero.
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
                /// Digest of the frame: its kind, and the names, types, sizes and offsets of its fields.
                pub const DIGEST: u64 = {
                    let mut all = digest(DIGEST_SEED, stringify!($name), $kind);
                    $(
                        all = digest(all, stringify!($field), $offset);
                        all = digest(all, stringify!($ty), size_of::<$ty>() as u64);
                    )*
                    all
                };

                /// Bits that are zero in every frame of this kind.
                const RESERVED: [u64; 8] = {
                    let mut mask = [0; 8];
                    $(if is_reserved(stringify!($field)) {
                        mask = with_bytes(mask, $offset, size_of::<$ty>());
                    })*
                    mask
                };

                /// Returns a frame of this kind with all other fields zero and no checksum yet.
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
            /// Number of its kind.
            #[must_use]
            pub fn kind(&self) -> u8 {
                match self {
                    $(Self::$name(_) => $kind),*
                }
            }

            /// Checks and decodes a frame: magic, version, checksum, kind, flags and reserved bytes.
            ///
            /// # Errors
            /// [`WireError`] for bytes that no peer of this version sends.
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
                let (kind, found) = (prefix.kind, prefix.flags);
                match kind {
                    $($kind => {
                        if found & !$flags != 0 {
                            return Err(WireError::Flags { kind, found, known: $flags });
                        }
                        // The mask is constant here, so that words without reserved bytes cost nothing.
                        if let Some(at) = first_set(&bytemuck::pod_read_unaligned(bytes), &$name::RESERVED) {
                            return Err(WireError::Reserved { kind, at });
                        }
                        Ok(Self::$name(bytemuck::pod_read_unaligned(bytes)))
                    })*
                    found => Err(WireError::Kind { found }),
                }
            }
        }
    };
}

frames! {
    /// Batch: its header, on the wire and in CXL memory. [`crate::batch`] describes the body.
    3 BatchHeader with BODY_CHECKSUM {
        client_id: ClientId = 8,
        sequence: u64 = 16,
        session_epoch: Epoch = 24,
        /// Bytes of the messages, without padding and length table.
        payload_bytes: u32 = 28,
        message_count: u32 = 32,
        /// CRC32C of the body, if flag [`crate::batch::BODY_CHECKSUM`] is set.
        body_checksum: u32 = 36,
        topic: TopicId = 40,
        topic_incarnation: Incarnation = 44,
        session_slot: SessionSlot = 48,
        reserved: [u32; 2] = 52,
    }
    /// Client to broker, first frame: request to publish under a session.
    1 OpenPublish with 0 {
        client_id: ClientId = 8,
        /// First sequence whose acknowledgement the client still wants.
        resume_from: u64 = 16,
        session_epoch: Epoch = 24,
        session_slot: SessionSlot = 28,
        topic: TopicId = 32,
        topic_incarnation: Incarnation = 36,
        ack_level: u32 = 40,
        reserved: u32 = 44,
        /// Token of the session, as the leader gave it to the client.
        token: SessionToken = 48,
        reserved_low: u32 = 56,
    }
    /// Broker to client: the session may publish. Acknowledgements of committed batches from `resume_from` on follow.
    2 PublishReady with 0 {
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
    4 Ack with 0 {
        sequence: u64 = 8,
        /// Offset of the batch's first message, or [`UNKNOWN_OFFSET`].
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
    5 Fenced with 0 {
        /// Sequences below this are committed; resubmit from here under the next epoch.
        committed: u64 = 8,
        session_epoch: Epoch = 16,
        reserved: u32 = 20,
        reserved_tail: [u64; 4] = 24,
        reserved_low: u32 = 56,
    }
    /// Client to broker, first frame: request for a stream.
    6 Subscribe with 0 {
        /// Offset, or microseconds since 1970, as `start_kind` says.
        start: u64 = 8,
        /// A [`StartKind`].
        start_kind: u32 = 16,
        topic: TopicId = 20,
        topic_incarnation: Incarnation = 24,
        stream: Stream = 28,
        reserved: [u64; 3] = 32,
        reserved_low: u32 = 56,
    }
    /// Broker to client: start of the stream.
    7 SubscribeReady with 0 {
        /// Offset of the first message that the client asked for.
        start_offset: u64 = 8,
        /// Offset after the last message that is committed.
        next_offset: u64 = 16,
        reserved: [u64; 4] = 24,
        reserved_low: u32 = 56,
    }
    /// Broker to client: one batch follows, header and body, as it lies in CXL memory.
    8 Deliver with 0 {
        first_offset: u64 = 8,
        ordered_us: u64 = 16,
        /// Bytes that follow.
        batch_bytes: u32 = 24,
        message_count: u32 = 28,
        /// Broker that received the batch.
        broker: BrokerId = 32,
        stream: Stream = 36,
        /// Client and sequence of the batch that was ordered. Its header says the same, unless memory was changed since.
        client_id: ClientId = 40,
        sequence: u64 = 48,
        reserved: u32 = 56,
    }
    /// Broker to client: reason why the connection closes. `text_bytes` of UTF-8 follow.
    9 ErrorFrame with 0 {
        /// An [`crate::ErrorCode`].
        code: u32 = 8,
        text_bytes: u32 = 12,
        /// Offset from which the subscriber can read on, for `OffsetOutOfRange` and `TooSlow`. Zero for other codes.
        detail: u64 = 16,
        reserved: [u64; 4] = 24,
        reserved_low: u32 = 56,
    }
    /// Client to broker: request for the end of the stream. Broker to client: the answer, in line with the deliveries.
    10 Position with 0 {
        next_offset: u64 = 8,
        reserved: [u64; 5] = 16,
        reserved_low: u32 = 56,
    }
    /// Client to broker, before the opening frame: request to use a queue pair. The socket stays open beside it.
    11 RdmaConnect with 0 {
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
    12 RdmaAccept with 0 {
        gid: [u8; 16] = 8,
        queue_pair: u32 = 24,
        first_psn: u32 = 28,
        mtu: u32 = 32,
        lid: u32 = 36,
        reserved: [u32; 5] = 40,
    }
    /// Broker to publisher, on the queue pair: a landing window to write batches into.
    13 WindowGrant with 0 {
        /// Address of the window in the broker's memory.
        address: u64 = 8,
        /// Number of the window on this connection, counted from 0. Writes into it carry it as immediate data.
        number: u32 = 16,
        rkey: u32 = 20,
        bytes: u32 = 24,
        reserved_high: u32 = 28,
        reserved: [u64; 3] = 32,
        reserved_low: u32 = 56,
    }
}

codes! {
    /// Meaning of [`Subscribe::start`].
    pub enum StartKind: u32 {
        /// An offset.
        Offset = 0,
        /// The earliest message that is kept; `start` is ignored.
        Earliest = 1,
        /// The next message to come; `start` is ignored.
        Latest = 2,
        /// The first batch that was ordered at or after a time, in microseconds since 1970.
        Timestamp = 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Any 64 bytes, under a valid prefix and checksum when `sealed`.
    fn frame(bytes: [u8; 32], more: [u8; 32], sealed: bool) -> [u8; FRAME_BYTES] {
        let mut frame = [0u8; FRAME_BYTES];
        frame[..32].copy_from_slice(&bytes);
        frame[32..].copy_from_slice(&more);
        if sealed {
            frame[..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
            frame[5] = WIRE_VERSION;
            let checksum = crc32c(&frame[..60]);
            frame[60..].copy_from_slice(&checksum.to_le_bytes());
        }
        frame
    }

    /// Offsets of the reserved bytes of a kind, from the table of fields.
    fn reserved_bytes(kind: u8) -> Vec<usize> {
        let (.., fields) = FRAMES.iter().find(|(of, ..)| *of == kind).unwrap();
        let ends = fields.iter().skip(1).map(|(_, at)| *at).chain([60]);
        fields
            .iter()
            .zip(ends)
            .filter(|((name, _), _)| name.starts_with("reserved"))
            .flat_map(|((_, at), end)| *at..end)
            .collect()
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_cleanly(bytes: [u8; 32], more: [u8; 32], kind in 0u8..16) {
            prop_assert!(Frame::decode(&frame(bytes, more, false)).is_err());
            let mut bytes = bytes;
            bytes[4] = kind;
            match Frame::decode(&frame(bytes, more, true)) {
                Ok(decoded) => prop_assert_eq!(decoded.kind(), kind),
                Err(WireError::Kind { found }) => prop_assert!(found == kind && !(1..=13).contains(&kind)),
                Err(WireError::Flags { found, known, .. }) => prop_assert!(found & !known != 0),
                Err(WireError::Reserved { at, .. }) => prop_assert!(reserved_bytes(kind).contains(&at)),
                Err(error) => prop_assert!(false, "{error}"),
            }
        }

        #[test]
        fn reserved_bytes_and_unknown_flags_are_refused(kind in 1u8..=13, flags: u16, pick: prop::sample::Index, value: u8) {
            let mut bytes = [0; FRAME_BYTES];
            bytes[4] = kind;
            bytes[6..8].copy_from_slice(&flags.to_le_bytes());
            let reserved = reserved_bytes(kind);
            let mut damaged = false;
            if !reserved.is_empty() {
                bytes[*pick.get(&reserved)] = value;
                damaged = value != 0;
            }
            let known = if kind == 3 { BODY_CHECKSUM } else { 0 };
            let sealed = frame(bytes[..32].try_into().unwrap(), bytes[32..].try_into().unwrap(), true);
            prop_assert_eq!(Frame::decode(&sealed).is_ok(), !damaged && flags & !known == 0);
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
}
