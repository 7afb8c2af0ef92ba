//! Fields of a packet.

use super::format::ECN_MASK;
use super::opcode::Opcode;
use crate::psn::Psn;
use std::net::IpAddr;

/// Memory of the peer (IBTA 9.3.3, RDMA extended transport header).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reth {
    /// Address of the first byte, as the owner of the memory counts.
    pub address: u64,
    /// Key to the memory.
    pub rkey: u32,
    /// Number of bytes of the whole message.
    pub bytes: u32,
}

impl Reth {
    /// The rest of the memory from byte `done` on, which is at most `self.bytes`. Addresses wrap around.
    pub(crate) const fn after(self, done: u32) -> Self {
        Self { address: self.address.wrapping_add(done as u64), bytes: self.bytes - done, ..self }
    }
}

/// Result of requests, as the responder reports it (IBTA 9.3.5.2, table of syndromes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syndrome {
    /// All packets up to this one are done. 0 to 31: credits, encoded; 31 says that they are not counted.
    Ack(u8),
    /// No receive was posted. 0 to 31: code of the time to wait (IBTA 9.7.5.2.8, table of timer values).
    RnrNak(u8),
    /// A packet before this one is missing.
    PsnSequenceError,
    /// The request is malformed, or of a kind that the responder does not execute.
    InvalidRequest,
    /// The key gives no right to the memory.
    RemoteAccessError,
    /// The responder could not carry the request out.
    RemoteOperationalError,
}

impl Syndrome {
    /// Bits of a syndrome below its kind: a value, or the code of a NAK.
    const VALUE_BITS: u32 = 5;
    /// Mask of those bits.
    const VALUE_MASK: u8 = (1 << Self::VALUE_BITS) - 1;
    /// Kind of an acknowledgement.
    const ACK: u8 = 0b000;
    /// Kind of "receiver not ready".
    const RNR_NAK: u8 = 0b001;
    /// Kind of the other errors.
    const NAK: u8 = 0b011;
    /// Code of a NAK: PSN sequence error.
    const NAK_SEQUENCE: u8 = 0;
    /// Code of a NAK: invalid request.
    const NAK_INVALID_REQUEST: u8 = 1;
    /// Code of a NAK: remote access error.
    const NAK_ACCESS: u8 = 2;
    /// Code of a NAK: remote operational error.
    const NAK_OPERATION: u8 = 3;

    /// Syndrome of a byte on the wire; `None` for a reserved one.
    pub(super) const fn from_code(byte: u8) -> Option<Self> {
        let value = byte & Self::VALUE_MASK;
        Some(match (byte >> Self::VALUE_BITS, value) {
            (Self::ACK, _) => Self::Ack(value),
            (Self::RNR_NAK, _) => Self::RnrNak(value),
            (Self::NAK, Self::NAK_SEQUENCE) => Self::PsnSequenceError,
            (Self::NAK, Self::NAK_INVALID_REQUEST) => Self::InvalidRequest,
            (Self::NAK, Self::NAK_ACCESS) => Self::RemoteAccessError,
            (Self::NAK, Self::NAK_OPERATION) => Self::RemoteOperationalError,
            _ => return None,
        })
    }

    /// Byte on the wire.
    pub(super) const fn code(self) -> u8 {
        let (kind, value) = match self {
            Self::Ack(credits) => (Self::ACK, credits & Self::VALUE_MASK),
            Self::RnrNak(timer) => (Self::RNR_NAK, timer & Self::VALUE_MASK),
            Self::PsnSequenceError => (Self::NAK, Self::NAK_SEQUENCE),
            Self::InvalidRequest => (Self::NAK, Self::NAK_INVALID_REQUEST),
            Self::RemoteAccessError => (Self::NAK, Self::NAK_ACCESS),
            Self::RemoteOperationalError => (Self::NAK, Self::NAK_OPERATION),
        };
        kind << Self::VALUE_BITS | value
    }
}

/// Nanoseconds to wait for a receiver that was not ready, by their code, 0 to 31 (IBTA 9.7.5.2.8, table of timer values).
#[must_use]
pub(crate) const fn rnr_nanos(timer: u8) -> u64 {
    // In units of 10 us.
    const TENS: [u32; 32] = [
        65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072,
        4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
    ];
    TENS[(timer & Syndrome::VALUE_MASK) as usize] as u64 * 10_000
}

/// Acknowledgement (IBTA 9.3.5, ACK extended transport header).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aeth {
    /// Result of the requests up to this packet.
    pub syndrome: Syndrome,
    /// Messages that the responder completed, modulo 2^24.
    pub messages: u32,
}

/// Explicit congestion notification, in the IP header (RFC 3168, 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ecn {
    /// The flow ignores congestion marks.
    NotCapable = 0,
    /// The flow heeds congestion marks, ECT(1).
    Capable1 = 1,
    /// The flow heeds congestion marks, ECT(0).
    Capable0 = 2,
    /// A switch on the way marked the packet, because it had a queue.
    Congested = 3,
}

impl Ecn {
    /// Takes the mark out of an IPv4 type of service or an IPv6 traffic class.
    pub(super) const fn of(traffic_class: u8) -> Self {
        match traffic_class & ECN_MASK {
            0 => Self::NotCapable,
            1 => Self::Capable1,
            2 => Self::Capable0,
            _ => Self::Congested,
        }
    }
}

/// Packet of RoCEv2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Address of the sender.
    pub from: IpAddr,
    /// Address of the receiver, of the same family.
    pub to: IpAddr,
    /// UDP port of the sender, by which switches spread flows.
    pub source_port: u16,
    /// Congestion mark.
    pub ecn: Ecn,
    /// Kind of the packet.
    pub opcode: Opcode,
    /// True when the receiver is to notify its consumer.
    pub solicited: bool,
    /// True when the sender wants an acknowledgement.
    pub wants_ack: bool,
    /// Queue pair of the receiver, 24 bits.
    pub queue_pair: u32,
    /// Sequence number of the packet.
    pub psn: Psn,
    /// Memory that the request is about, if [`Opcode::has_reth`].
    pub reth: Option<Reth>,
    /// Acknowledgement, if [`Opcode::has_aeth`].
    pub aeth: Option<Aeth>,
    /// Immediate data, if [`Opcode::has_immediate`].
    pub immediate: Option<u32>,
    /// Payload without its pad.
    pub payload: &'a [u8],
}
