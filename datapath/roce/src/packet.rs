//! Packets: IPv4 or IPv6, UDP, base transport header, extended headers, payload, pad, invariant checksum.
//!
//! All from the IP header on: links differ in what comes before. Every field is big-endian but the checksum at the end.

use super::psn::Psn;
use crc32fast::Hasher;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// UDP port of RoCEv2 (annex A17.4; assigned by IANA).
pub const UDP_PORT: u16 = 4791;
/// Most bytes before the payload: IPv6 40, UDP 8, base 12, RETH 16, immediate data 4.
pub const MAX_HEADER_BYTES: usize = 80;
/// Most bytes after the payload: pad 3, checksum 4.
pub const MAX_TRAILER_BYTES: usize = 7;

/// Bytes before a packet that [`decode`] overwrites.
pub const SCRATCH_BYTES: usize = 8;

const IPV4_BYTES: usize = 20;
const IPV6_BYTES: usize = 40;
const UDP_BYTES: usize = 8;
const BTH_BYTES: usize = 12;
const ICRC_BYTES: usize = 4;
const UDP: u8 = 17;
/// The default partition, full and limited membership (IBTA 10.9.3).
const PARTITIONS: [u16; 2] = [0xffff, 0x7fff];
const QUEUE_PAIR_MASK: u32 = 0x00ff_ffff;

/// What a packet of a reliable connection is (IBTA 9.2.1, table of opcodes), and the congestion notification (A17.9.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Opcode {
    SendFirst = 0x00,
    SendMiddle = 0x01,
    SendLast = 0x02,
    SendLastImmediate = 0x03,
    SendOnly = 0x04,
    SendOnlyImmediate = 0x05,
    WriteFirst = 0x06,
    WriteMiddle = 0x07,
    WriteLast = 0x08,
    WriteLastImmediate = 0x09,
    WriteOnly = 0x0a,
    WriteOnlyImmediate = 0x0b,
    ReadRequest = 0x0c,
    ReadResponseFirst = 0x0d,
    ReadResponseMiddle = 0x0e,
    ReadResponseLast = 0x0f,
    ReadResponseOnly = 0x10,
    Acknowledge = 0x11,
    CongestionNotification = 0x81,
}

use Opcode::{
    Acknowledge, CongestionNotification, ReadRequest, ReadResponseFirst, ReadResponseLast, ReadResponseMiddle,
    ReadResponseOnly, SendFirst, SendLast, SendLastImmediate, SendMiddle, SendOnly, SendOnlyImmediate, WriteFirst,
    WriteLast, WriteLastImmediate, WriteMiddle, WriteOnly, WriteOnlyImmediate,
};

impl Opcode {
    /// Of a code on the wire, if it is one that we speak.
    #[must_use]
    pub const fn of(code: u8) -> Option<Self> {
        Some(match code {
            0x00 => SendFirst,
            0x01 => SendMiddle,
            0x02 => SendLast,
            0x03 => SendLastImmediate,
            0x04 => SendOnly,
            0x05 => SendOnlyImmediate,
            0x06 => WriteFirst,
            0x07 => WriteMiddle,
            0x08 => WriteLast,
            0x09 => WriteLastImmediate,
            0x0a => WriteOnly,
            0x0b => WriteOnlyImmediate,
            0x0c => ReadRequest,
            0x0d => ReadResponseFirst,
            0x0e => ReadResponseMiddle,
            0x0f => ReadResponseLast,
            0x10 => ReadResponseOnly,
            0x11 => Acknowledge,
            0x81 => CongestionNotification,
            _ => return None,
        })
    }

    /// Whether a [`Reth`] follows the base header.
    #[must_use]
    pub const fn has_reth(self) -> bool {
        matches!(self, WriteFirst | WriteOnly | WriteOnlyImmediate | ReadRequest)
    }

    /// Whether an [`Aeth`] follows.
    #[must_use]
    pub const fn has_aeth(self) -> bool {
        matches!(self, Acknowledge | ReadResponseFirst | ReadResponseLast | ReadResponseOnly)
    }

    /// Whether immediate data follow, after a [`Reth`] if there is one.
    #[must_use]
    pub const fn has_immediate(self) -> bool {
        matches!(self, SendLastImmediate | SendOnlyImmediate | WriteLastImmediate | WriteOnlyImmediate)
    }

    /// Whether more packets of the message follow: such a packet is as long as the path takes (IBTA 9.2.3).
    #[must_use]
    pub const fn is_followed(self) -> bool {
        matches!(self, SendFirst | SendMiddle | WriteFirst | WriteMiddle | ReadResponseFirst | ReadResponseMiddle)
    }

    /// Whether it begins a message.
    #[must_use]
    pub const fn begins(self) -> bool {
        matches!(
            self,
            SendFirst
                | SendOnly
                | SendOnlyImmediate
                | WriteFirst
                | WriteOnly
                | WriteOnlyImmediate
                | ReadRequest
                | ReadResponseFirst
                | ReadResponseOnly
        )
    }
}

/// Remote memory (IBTA 9.3.3, RDMA extended transport header).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reth {
    /// Address, as the owner of the memory counts.
    pub address: u64,
    /// The right to it.
    pub rkey: u32,
    /// Bytes of the whole message.
    pub bytes: u32,
}

/// What became of requests (IBTA 9.3.5.2, table of syndromes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syndrome {
    /// All up to this packet are done. 0 to 31: credits, encoded; 31 says that they are not counted.
    Done(u8),
    /// No receive was posted. 0 to 31: when to try again, see [`rnr_nanos`].
    NotReady(u8),
    /// A packet is missing before this one.
    Sequence,
    /// Not a request that this responder takes.
    InvalidRequest,
    /// No right to the memory.
    Access,
    /// The responder failed.
    Operation,
}

impl Syndrome {
    const fn of(byte: u8) -> Option<Self> {
        let low = byte & 0x1f;
        Some(match byte >> 5 {
            0b000 => Self::Done(low),
            0b001 => Self::NotReady(low),
            0b011 => match low {
                0 => Self::Sequence,
                1 => Self::InvalidRequest,
                2 => Self::Access,
                3 => Self::Operation,
                _ => return None,
            },
            _ => return None,
        })
    }

    const fn byte(self) -> u8 {
        match self {
            Self::Done(credits) => credits & 0x1f,
            Self::NotReady(timer) => 0x20 | (timer & 0x1f),
            Self::Sequence => 0x60,
            Self::InvalidRequest => 0x61,
            Self::Access => 0x62,
            Self::Operation => 0x63,
        }
    }
}

/// Nanoseconds that an encoded timer of "receiver not ready" stands for (IBTA 9.7.5.2.8, table of timer values).
#[must_use]
pub const fn rnr_nanos(timer: u8) -> u64 {
    // In units of 10 us.
    const TENS: [u32; 32] = [
        65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072,
        4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
    ];
    TENS[(timer & 0x1f) as usize] as u64 * 10_000
}

/// Acknowledgement (IBTA 9.3.5, ACK extended transport header).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aeth {
    /// What became of requests.
    pub syndrome: Syndrome,
    /// Messages that the responder completed, 24 bits.
    pub messages: u32,
}

/// Explicit congestion notification, in the IP header (RFC 3168).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ecn {
    /// The flow takes no notice of it.
    NotCapable = 0,
    /// Capable, ECT(1).
    Capable1 = 1,
    /// Capable, ECT(0).
    Capable0 = 2,
    /// A switch on the way had a queue.
    Congested = 3,
}

/// A packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Sender.
    pub from: IpAddr,
    /// Receiver; of the same family.
    pub to: IpAddr,
    /// UDP port of the sender, by which switches spread flows.
    pub source_port: u16,
    /// Congestion.
    pub ecn: Ecn,
    /// What it is.
    pub opcode: Opcode,
    /// The receiver is to notify its consumer.
    pub solicited: bool,
    /// The sender wants an acknowledgement.
    pub wants_ack: bool,
    /// Queue pair of the receiver, 24 bits.
    pub queue_pair: u32,
    /// Its number.
    pub psn: Psn,
    /// As [`Opcode::has_reth`].
    pub reth: Option<Reth>,
    /// As [`Opcode::has_aeth`].
    pub aeth: Option<Aeth>,
    /// As [`Opcode::has_immediate`].
    pub immediate: Option<u32>,
    /// Without its pad.
    pub payload: &'a [u8],
}

/// Why bytes are no packet for us. They are to be dropped without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAPacket {
    /// Shorter than its headers, or than they say.
    #[error("it is shorter than it says")]
    Short,
    /// Neither IPv4 nor IPv6.
    #[error("it is not IP")]
    NotIp,
    /// IPv4 with options, a fragment, or with a wrong header checksum.
    #[error("its IPv4 header has options, a wrong checksum, or is a fragment's")]
    Ipv4,
    /// Not UDP to [`UDP_PORT`], or lengths that disagree.
    #[error("it is not for RoCEv2")]
    Other,
    /// The checksum at its end is wrong.
    #[error("its checksum is wrong")]
    Checksum,
    /// An opcode, transport version, partition, or syndrome that we do not speak.
    #[error("it is not of a reliable connection in the default partition")]
    Unknown,
}

/// Reads fields from the front.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<&'a [u8; N], NotAPacket> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(NotAPacket::Short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, NotAPacket> {
        Ok(u32::from_be_bytes(*self.take()?))
    }

    fn u64(&mut self) -> Result<u64, NotAPacket> {
        Ok(u64::from_be_bytes(*self.take()?))
    }
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// The Internet checksum (RFC 1071) of bytes, an even number below 2^16; 0 over those that have the right one.
#[inline]
pub(super) fn internet_checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// Has fields that routers change be ones, in headers behind [`SCRATCH_BYTES`] of ones, which stand for the local route header of
/// InfiniBand: as the invariant checksum covers them (annex A17.3.3; IBTA 7.8.1).
#[inline]
fn mask(ip_bytes: usize, headers: &mut [u8]) {
    let (scratch, ip) = headers.split_at_mut(SCRATCH_BYTES);
    scratch.fill(0xff);
    if ip_bytes == IPV4_BYTES {
        // Type of service, time to live, header checksum.
        for at in [1, 8, 10, 11] {
            ip[at] = 0xff;
        }
    } else {
        // Traffic class, flow label, hop limit.
        ip[0] |= 0x0f;
        for at in [1, 2, 3, 7] {
            ip[at] = 0xff;
        }
    }
    // UDP checksum; congestion bits of the base header.
    for at in [ip_bytes + 6, ip_bytes + 7, ip_bytes + UDP_BYTES + 4] {
        ip[at] = 0xff;
    }
}

/// The invariant checksum over the start of a packet, at least its IP, UDP and base headers, and the rest.
fn icrc<const N: usize>(ip_bytes: usize, start: &[u8], rest: [&[u8]; N]) -> u32 {
    let headers = ip_bytes + UDP_BYTES + BTH_BYTES;
    let mut masked = [0; SCRATCH_BYTES + IPV6_BYTES + UDP_BYTES + BTH_BYTES];
    let masked = &mut masked[..SCRATCH_BYTES + headers];
    masked[SCRATCH_BYTES..].copy_from_slice(&start[..headers]);
    mask(ip_bytes, masked);
    let mut hasher = Hasher::new();
    hasher.update(masked);
    hasher.update(&start[headers..]);
    rest.iter().for_each(|bytes| hasher.update(bytes));
    hasher.finalize()
}

/// What the IP and UDP headers say.
struct Outer {
    /// Bytes of the header.
    ip_bytes: usize,
    /// Where the checksum begins.
    covered: usize,
    from: IpAddr,
    to: IpAddr,
    ecn: Ecn,
}

/// Looks at the IP and UDP headers.
#[inline]
fn outer(bytes: &[u8]) -> Result<Outer, NotAPacket> {
    let (ip_bytes, end, from, to, ecn) = ip_header(bytes)?;
    let least = ip_bytes + UDP_BYTES + BTH_BYTES + ICRC_BYTES;
    let bytes = bytes.get(..end).filter(|bytes| bytes.len() >= least).ok_or(NotAPacket::Short)?;
    let udp = &bytes[ip_bytes..];
    // The UDP checksum is not looked at (A17.3.1 has senders set it to 0): the invariant checksum covers more.
    if be16(udp, 2) != UDP_PORT || usize::from(be16(udp, 4)) != udp.len() {
        return Err(NotAPacket::Other);
    }
    Ok(Outer { ip_bytes, covered: end - ICRC_BYTES, from, to, ecn })
}

/// Bytes of the IP header, where the packet ends, and both addresses.
#[inline]
fn ip_header(bytes: &[u8]) -> Result<(usize, usize, IpAddr, IpAddr, Ecn), NotAPacket> {
    let ecn = |traffic_class: u8| match traffic_class & 3 {
        0 => Ecn::NotCapable,
        1 => Ecn::Capable1,
        2 => Ecn::Capable0,
        _ => Ecn::Congested,
    };
    match bytes.first().map(|first| first >> 4) {
        Some(4) => {
            let header: &[u8; IPV4_BYTES] = bytes.first_chunk().ok_or(NotAPacket::Short)?;
            // More fragments, or not the first.
            let fragment = be16(header, 6) & 0x3fff != 0;
            if header[0] != 0x45 || fragment || internet_checksum(header) != 0 {
                return Err(NotAPacket::Ipv4);
            }
            if header[9] != UDP {
                return Err(NotAPacket::Other);
            }
            let address = |at: usize| IpAddr::from([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            Ok((IPV4_BYTES, be16(header, 2).into(), address(12), address(16), ecn(header[1])))
        }
        Some(6) => {
            let header: &[u8; IPV6_BYTES] = bytes.first_chunk().ok_or(NotAPacket::Short)?;
            if header[6] != UDP {
                return Err(NotAPacket::Other);
            }
            let address = |at: usize| {
                let mut octets = [0; 16];
                octets.copy_from_slice(&header[at..at + 16]);
                IpAddr::from(octets)
            };
            let traffic_class = (be16(header, 0) >> 4) as u8;
            Ok((IPV6_BYTES, IPV6_BYTES + usize::from(be16(header, 4)), address(8), address(24), ecn(traffic_class)))
        }
        _ => Err(NotAPacket::NotIp),
    }
}

/// Reads a packet, once, from its IP header on, which is behind [`SCRATCH_BYTES`]; what a link has put behind the packet does not
/// matter. The scratch bytes are overwritten, as are fields of the headers: so the checksum covers one piece of memory, and
/// need not wait for that of another.
///
/// # Errors
/// [`NotAPacket`].
#[inline]
pub fn decode(bytes: &mut [u8]) -> Result<Packet<'_>, NotAPacket> {
    let Outer { ip_bytes, covered, from, to, ecn } = outer(bytes.get(SCRATCH_BYTES..).ok_or(NotAPacket::Short)?)?;
    mask(ip_bytes, bytes);
    let (covered, behind) = bytes.split_at(SCRATCH_BYTES + covered);
    if behind.first_chunk() != Some(&crc32fast::hash(covered).to_le_bytes()) {
        return Err(NotAPacket::Checksum);
    }
    let covered = &covered[SCRATCH_BYTES..];
    let mut fields = Fields(&covered[ip_bytes + UDP_BYTES..]);
    let [code, flags, partition @ ..] = *fields.take::<4>()?;
    let opcode = Opcode::of(code).ok_or(NotAPacket::Unknown)?;
    if flags & 0x0f != 0 || !PARTITIONS.contains(&u16::from_be_bytes(partition)) {
        return Err(NotAPacket::Unknown);
    }
    let queue_pair = fields.u32()? & QUEUE_PAIR_MASK;
    let number = fields.u32()?;
    let reth = if opcode.has_reth() {
        Some(Reth { address: fields.u64()?, rkey: fields.u32()?, bytes: fields.u32()? })
    } else {
        None
    };
    let aeth = if opcode.has_aeth() {
        let word = fields.u32()?;
        let syndrome = Syndrome::of((word >> 24) as u8).ok_or(NotAPacket::Unknown)?;
        Some(Aeth { syndrome, messages: word & 0x00ff_ffff })
    } else {
        None
    };
    let immediate = if opcode.has_immediate() { Some(fields.u32()?) } else { None };
    let pad = usize::from(flags >> 4 & 3);
    let payload = fields.0.len().checked_sub(pad).and_then(|bytes| fields.0.get(..bytes)).ok_or(NotAPacket::Short)?;
    Ok(Packet {
        from,
        to,
        source_port: be16(covered, ip_bytes),
        ecn,
        opcode,
        solicited: flags & 0x80 != 0,
        wants_ack: number & 0x8000_0000 != 0,
        queue_pair,
        psn: Psn::new(number),
        reth,
        aeth,
        immediate,
        payload,
    })
}

/// The queue pair of the receiver, if these bytes are a packet; nothing else is looked at.
#[must_use]
pub fn queue_pair(bytes: &[u8]) -> Option<u32> {
    let ip_bytes = if bytes.first()? >> 4 == 4 { IPV4_BYTES } else { IPV6_BYTES };
    let number = bytes.get(ip_bytes + UDP_BYTES + 4..)?.first_chunk()?;
    Some(u32::from_be_bytes(*number) & QUEUE_PAIR_MASK)
}

/// A packet that cannot be written: addresses of two families, headers that its opcode does not have or lacks, or a payload
/// that does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the packet's headers do not go together")]
pub struct Unsound;

/// Memory that a packet is written to.
pub trait Put {
    /// Appends bytes.
    fn put(&mut self, bytes: &[u8]);
}

impl Put for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// All that comes before a payload.
struct Headers {
    bytes: [u8; MAX_HEADER_BYTES],
    len: usize,
}

impl Put for Headers {
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}

impl Packet<'_> {
    /// Appends the packet, from its IP header on, to `into`, with a time to live of 64.
    ///
    /// # Errors
    /// [`Unsound`]; nothing is appended then.
    pub fn encode(&self, into: &mut impl Put) -> Result<(), Unsound> {
        const TIME_TO_LIVE: u8 = 64;
        let sound = self.reth.is_some() == self.opcode.has_reth()
            && self.aeth.is_some() == self.opcode.has_aeth()
            && self.immediate.is_some() == self.opcode.has_immediate()
            && self.payload.len() <= usize::from(u16::MAX) - MAX_HEADER_BYTES - MAX_TRAILER_BYTES;
        if !sound {
            return Err(Unsound);
        }
        let pad = self.payload.len().wrapping_neg() & 3;
        let extended = 16 * usize::from(self.reth.is_some())
            + 4 * usize::from(self.aeth.is_some())
            + 4 * usize::from(self.immediate.is_some());
        let udp_bytes = UDP_BYTES + BTH_BYTES + extended + self.payload.len() + pad + ICRC_BYTES;
        let mut headers = Headers { bytes: [0; MAX_HEADER_BYTES], len: 0 };
        let ip_bytes = match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut header = [0; IPV4_BYTES];
                header[..2].copy_from_slice(&[0x45, self.ecn as u8]);
                header[2..4].copy_from_slice(&((IPV4_BYTES + udp_bytes) as u16).to_be_bytes());
                // Identification 0, as such a packet is never fragmented (RFC 6864).
                header[6..10].copy_from_slice(&[0x40, 0, TIME_TO_LIVE, UDP]);
                header[12..16].copy_from_slice(&Ipv4Addr::octets(&from));
                header[16..].copy_from_slice(&Ipv4Addr::octets(&to));
                let checksum = internet_checksum(&header);
                header[10..12].copy_from_slice(&checksum.to_be_bytes());
                headers.put(&header);
                IPV4_BYTES
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                headers.put(&(0x6000_0000 | u32::from(self.ecn as u8) << 20).to_be_bytes());
                headers.put(&(udp_bytes as u16).to_be_bytes());
                headers.put(&[UDP, TIME_TO_LIVE]);
                headers.put(&Ipv6Addr::octets(&from));
                headers.put(&Ipv6Addr::octets(&to));
                IPV6_BYTES
            }
            _ => return Err(Unsound),
        };
        for word in [self.source_port, UDP_PORT, udp_bytes as u16, 0] {
            headers.put(&word.to_be_bytes());
        }
        // Path migrated: there is no other path (IBTA 17.2.8).
        const MIGRATED: u8 = 0x40;
        headers.put(&[self.opcode as u8, u8::from(self.solicited) << 7 | MIGRATED | (pad as u8) << 4]);
        headers.put(&PARTITIONS[0].to_be_bytes());
        headers.put(&(self.queue_pair & QUEUE_PAIR_MASK).to_be_bytes());
        headers.put(&(u32::from(self.wants_ack) << 31 | self.psn.get()).to_be_bytes());
        if let Some(reth) = self.reth {
            headers.put(&reth.address.to_be_bytes());
            headers.put(&reth.rkey.to_be_bytes());
            headers.put(&reth.bytes.to_be_bytes());
        }
        if let Some(aeth) = self.aeth {
            headers.put(&(u32::from(aeth.syndrome.byte()) << 24 | aeth.messages & 0x00ff_ffff).to_be_bytes());
        }
        if let Some(immediate) = self.immediate {
            headers.put(&immediate.to_be_bytes());
        }
        let (headers, pad) = (&headers.bytes[..headers.len], &[0; 3][..pad]);
        let checksum = icrc(ip_bytes, headers, [self.payload, pad]);
        [headers, self.payload, pad, &checksum.to_le_bytes()].into_iter().for_each(|bytes| into.put(bytes));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Captured from Linux's rxe, without the Ethernet header.
    const WRITE: &str = "45000080e1fd40004011446d0a0000010a000002caaf12b7006c00000b00ffff000abcde80fffff0000070000000000000c0ffee\
        00000040dead00010003070b0f13171b1f22262a2e32363a3e4145494d5155595d6064686c7074787c7f83878b8f93979b9ea2a6aaaeb2b6babdc1c5\
        c9cdd1d5d9dce0e4e8ecf0f404b6f24c";
    const ACK: &str =
        "45000030e3174000401143a30a0000010a000002caaf12b7001c00001100ffff000abcde0000aaaa1f000001f07ceb61";
    const NAK: &str =
        "45000030e32040004011439a0a0000010a000002caaf12b7001c00001100ffff000abcde0000ab1260000002d4c84046";

    /// The first byte of the IP header.
    const IP: usize = SCRATCH_BYTES;

    /// A packet behind scratch bytes.
    fn bytes(hex: &str) -> Vec<u8> {
        let hex = "07".repeat(SCRATCH_BYTES) + hex;
        hex.as_bytes().chunks(2).map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap()).collect()
    }

    #[test]
    fn packets_of_rxe_are_read() {
        let mut write = bytes(WRITE);
        let packet = decode(&mut write).unwrap();
        assert_eq!(
            Packet { payload: &[], ..packet },
            Packet {
                from: IpAddr::from([10, 0, 0, 1]),
                to: IpAddr::from([10, 0, 0, 2]),
                source_port: 0xcaaf,
                ecn: Ecn::NotCapable,
                opcode: WriteOnlyImmediate,
                solicited: false,
                wants_ack: true,
                queue_pair: 0x0a_bcde,
                psn: Psn::new(0xff_fff0),
                reth: Some(Reth { address: 0x7000_0000_0000, rkey: 0x00c0_ffee, bytes: 64 }),
                aeth: None,
                immediate: Some(0xdead_0001),
                payload: &[],
            }
        );
        assert_eq!((packet.payload.len(), &packet.payload[..4]), (64, &[0, 3, 7, 11][..]));
        let mut ack = bytes(ACK);
        let ack = decode(&mut ack).unwrap();
        assert_eq!(ack.aeth, Some(Aeth { syndrome: Syndrome::Done(31), messages: 1 }));
        assert_eq!((ack.opcode, ack.psn), (Acknowledge, Psn::new(0xaaaa)));
        let mut nak = bytes(NAK);
        let nak = decode(&mut nak).unwrap();
        assert_eq!(nak.aeth, Some(Aeth { syndrome: Syndrome::Sequence, messages: 2 }));
    }

    #[test]
    fn every_bit_is_covered() {
        // By the checksum, the IPv4 header's, or a field that is looked at; but what routers may change.
        let may_change = |at: usize| matches!(at - IP, 26 | 27 | 32);
        let write = bytes(WRITE);
        for at in (IP..write.len()).filter(|at| !may_change(*at)) {
            for bit in 0..8 {
                let mut damaged = write.clone();
                damaged[at] ^= 1 << bit;
                assert!(decode(&mut damaged).is_err(), "byte {at}, bit {bit}");
            }
        }
        for bytes in 0..write.len() {
            assert!(decode(&mut write[..bytes].to_vec()).is_err(), "{bytes} bytes");
        }
    }

    #[test]
    fn routers_may_change_what_they_do() {
        let mut write = bytes(WRITE);
        let before = decode(&mut write.clone()).unwrap().psn;
        // One hop, and congestion.
        let ip = &mut write[IP..];
        (ip[1], ip[8]) = (3, 63);
        (ip[10], ip[11]) = (0, 0);
        let checksum = internet_checksum(&ip[..IPV4_BYTES]).to_be_bytes();
        ip[10..12].copy_from_slice(&checksum);
        let packet = decode(&mut write).unwrap();
        assert_eq!((packet.psn, packet.ecn), (before, Ecn::Congested));
    }

    #[test]
    fn timers_are_those_of_the_specification() {
        assert_eq!([0, 1, 12, 14, 31].map(rnr_nanos), [655_360_000, 10_000, 640_000, 1_280_000, 491_520_000]);
    }

    fn address() -> impl Strategy<Value = (IpAddr, IpAddr)> {
        prop_oneof![
            any::<([u8; 4], [u8; 4])>().prop_map(|(from, to)| (IpAddr::from(from), IpAddr::from(to))),
            any::<([u8; 16], [u8; 16])>().prop_map(|(from, to)| (IpAddr::from(from), IpAddr::from(to))),
        ]
    }

    prop_compose! {
        fn packet()(
            (from, to) in address(), source_port: u16, opcode in (0u8..=0x81).prop_filter_map("no opcode", Opcode::of),
            ecn in prop_oneof![Just(Ecn::NotCapable), Just(Ecn::Capable1), Just(Ecn::Capable0), Just(Ecn::Congested)],
            (solicited, wants_ack) in any::<(bool, bool)>(), queue_pair in 0u32..1 << 24, psn: u32,
            (address, rkey, bytes) in any::<(u64, u32, u32)>(), syndrome in any::<u8>().prop_filter_map("none", Syndrome::of),
            messages in 0u32..1 << 24, immediate: u32,
        ) -> Packet<'static> {
            Packet {
                from, to, source_port, ecn, opcode, solicited, wants_ack, queue_pair, psn: Psn::new(psn),
                reth: opcode.has_reth().then_some(Reth { address, rkey, bytes }),
                aeth: opcode.has_aeth().then_some(Aeth { syndrome, messages }),
                immediate: opcode.has_immediate().then_some(immediate),
                payload: &[],
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(packet in packet(), payload in vec(any::<u8>(), 0..4097), after in vec(any::<u8>(), 0..20)) {
            let packet = Packet { payload: &payload, ..packet };
            let mut bytes = vec![7; SCRATCH_BYTES];
            packet.encode(&mut bytes).unwrap();
            prop_assert!(bytes.len() - SCRATCH_BYTES <= MAX_HEADER_BYTES + payload.len() + MAX_TRAILER_BYTES);
            // A link pads short frames.
            bytes.extend(after);
            prop_assert_eq!(queue_pair(&bytes[SCRATCH_BYTES..]), Some(packet.queue_pair));
            prop_assert_eq!(decode(&mut bytes), Ok(packet));
        }

        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in vec(any::<u8>(), 0..200), version in prop_oneof![Just(0x45), Just(0x60)]) {
            let _ = (queue_pair(&bytes), decode(&mut bytes).is_ok());
            if let Some(first) = bytes.get_mut(SCRATCH_BYTES) {
                *first = version;
            }
            let _ = (queue_pair(&bytes), decode(&mut bytes).is_ok());
        }
    }
}
