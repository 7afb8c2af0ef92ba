//! Reading packets.

use super::fields::{Aeth, Ecn, Packet, Reth, Syndrome};
use super::format::{
    ACK_REQUEST, BTH_BYTES, DESTINATION_AT, FRAGMENT_MASK, ICRC_BYTES, IPV4_BYTES, IPV4_CLASS_AT, IPV4_FIRST,
    IPV4_FRAGMENT_AT, IPV4_FROM_AT, IPV4_LENGTH_AT, IPV4_PROTOCOL_AT, IPV4_TO_AT, IPV6_BYTES, IPV6_FROM_AT,
    IPV6_LENGTH_AT, IPV6_PROTOCOL_AT, IPV6_TO_AT, LOW_24_BITS, MAX_PAD_BYTES, PAD_SHIFT, PARTITIONS, SCRATCH_BYTES,
    SOLICITED, SYNDROME_SHIFT, UDP, UDP_BYTES, UDP_LENGTH_AT, UDP_PORT, UDP_TO_AT, VERSION_MASK, internet_checksum,
    mask,
};
use super::opcode::Opcode;
use crate::psn::Psn;
use std::net::IpAddr;

/// Reason why bytes are no packet of a reliable connection. They are to be dropped without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAPacket {
    /// The bytes end before their headers do, or before the length that these state.
    #[error("the packet is shorter than its headers, or than they state")]
    Short,
    /// The bytes are neither IPv4 nor IPv6.
    #[error("the packet is neither IPv4 nor IPv6")]
    NotIp,
    /// The IPv4 header has options or a wrong checksum, or is that of a fragment.
    #[error("the IPv4 header has options or a wrong checksum, or is that of a fragment")]
    Ipv4,
    /// The packet is not UDP to [`UDP_PORT`], or its lengths disagree.
    #[error("the packet is not UDP to port {UDP_PORT}, or its lengths disagree")]
    Other,
    /// The invariant checksum is wrong.
    #[error("the packet's invariant checksum is wrong")]
    Checksum,
    /// The opcode, transport version, partition or syndrome is not one of a reliable connection.
    #[error("the packet is not of a reliable connection in the default partition")]
    Unknown,
}

/// Bytes whose fields are read from the front.
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

/// Reads a 16-bit field.
fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Fields of the IP header.
struct IpHeader {
    /// Bytes of the header.
    bytes: usize,
    /// Offset of the end of the packet.
    end: usize,
    from: IpAddr,
    to: IpAddr,
    ecn: Ecn,
}

/// Reads the IP and UDP headers.
#[inline]
fn outer(bytes: &[u8]) -> Result<IpHeader, NotAPacket> {
    let ip = ip_header(bytes)?;
    let least = ip.bytes + UDP_BYTES + BTH_BYTES + ICRC_BYTES;
    let bytes = bytes.get(..ip.end).filter(|bytes| bytes.len() >= least).ok_or(NotAPacket::Short)?;
    let udp = &bytes[ip.bytes..];
    // The UDP checksum is not checked (A17.3.1 has senders set it to 0): the invariant checksum covers more.
    if be16(udp, UDP_TO_AT) != UDP_PORT || usize::from(be16(udp, UDP_LENGTH_AT)) != udp.len() {
        return Err(NotAPacket::Other);
    }
    Ok(ip)
}

/// Reads the IP header.
#[inline]
fn ip_header(bytes: &[u8]) -> Result<IpHeader, NotAPacket> {
    match bytes.first().map(|first| first >> 4) {
        Some(4) => {
            let header: &[u8; IPV4_BYTES] = bytes.first_chunk().ok_or(NotAPacket::Short)?;
            let fragment = be16(header, IPV4_FRAGMENT_AT) & FRAGMENT_MASK != 0;
            if header[0] != IPV4_FIRST || fragment || internet_checksum(header) != 0 {
                return Err(NotAPacket::Ipv4);
            }
            if header[IPV4_PROTOCOL_AT] != UDP {
                return Err(NotAPacket::Other);
            }
            let address = |at: usize| IpAddr::from([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            Ok(IpHeader {
                bytes: IPV4_BYTES,
                end: be16(header, IPV4_LENGTH_AT).into(),
                from: address(IPV4_FROM_AT),
                to: address(IPV4_TO_AT),
                ecn: Ecn::of(header[IPV4_CLASS_AT]),
            })
        }
        Some(6) => {
            let header: &[u8; IPV6_BYTES] = bytes.first_chunk().ok_or(NotAPacket::Short)?;
            if header[IPV6_PROTOCOL_AT] != UDP {
                return Err(NotAPacket::Other);
            }
            let address = |at: usize| {
                let mut octets = [0; 16];
                octets.copy_from_slice(&header[at..at + 16]);
                IpAddr::from(octets)
            };
            let traffic_class = (be16(header, 0) >> 4) as u8;
            Ok(IpHeader {
                bytes: IPV6_BYTES,
                end: IPV6_BYTES + usize::from(be16(header, IPV6_LENGTH_AT)),
                from: address(IPV6_FROM_AT),
                to: address(IPV6_TO_AT),
                ecn: Ecn::of(traffic_class),
            })
        }
        _ => Err(NotAPacket::NotIp),
    }
}

/// Reads a packet, whose IP header begins behind [`SCRATCH_BYTES`]. Bytes that the link put behind the packet are ignored.
///
/// A packet can be read only once: the scratch bytes and fields of the headers are overwritten. So the checksum runs
/// over one piece of memory.
///
/// # Errors
/// [`NotAPacket`].
#[inline]
pub fn decode(bytes: &mut [u8]) -> Result<Packet<'_>, NotAPacket> {
    let ip = outer(bytes.get(SCRATCH_BYTES..).ok_or(NotAPacket::Short)?)?;
    mask(ip.bytes, bytes);
    let (covered, behind) = bytes.split_at(SCRATCH_BYTES + ip.end - ICRC_BYTES);
    if behind.first_chunk() != Some(&crc32fast::hash(covered).to_le_bytes()) {
        return Err(NotAPacket::Checksum);
    }
    let covered = &covered[SCRATCH_BYTES..];
    let mut fields = Fields(&covered[ip.bytes + UDP_BYTES..]);
    let [code, flags, partition @ ..] = *fields.take::<4>()?;
    let opcode = Opcode::from_code(code).ok_or(NotAPacket::Unknown)?;
    if flags & VERSION_MASK != 0 || !PARTITIONS.contains(&u16::from_be_bytes(partition)) {
        return Err(NotAPacket::Unknown);
    }
    let queue_pair = fields.u32()? & LOW_24_BITS;
    let number = fields.u32()?;
    let reth = if opcode.has_reth() {
        Some(Reth { address: fields.u64()?, rkey: fields.u32()?, bytes: fields.u32()? })
    } else {
        None
    };
    let aeth = if opcode.has_aeth() {
        let word = fields.u32()?;
        let syndrome = Syndrome::from_code((word >> SYNDROME_SHIFT) as u8).ok_or(NotAPacket::Unknown)?;
        Some(Aeth { syndrome, messages: word & LOW_24_BITS })
    } else {
        None
    };
    let immediate = if opcode.has_immediate() { Some(fields.u32()?) } else { None };
    let pad = usize::from(flags >> PAD_SHIFT) & MAX_PAD_BYTES;
    let payload = fields.0.len().checked_sub(pad).and_then(|bytes| fields.0.get(..bytes)).ok_or(NotAPacket::Short)?;
    Ok(Packet {
        from: ip.from,
        to: ip.to,
        source_port: be16(covered, ip.bytes),
        ecn: ip.ecn,
        opcode,
        solicited: flags & SOLICITED != 0,
        wants_ack: number & ACK_REQUEST != 0,
        queue_pair,
        psn: Psn::new(number),
        reth,
        aeth,
        immediate,
        payload,
    })
}

/// Returns the receiver's queue pair, provided that the bytes are a packet, which is not checked. `None` if they are too
/// short.
#[must_use]
pub fn queue_pair(bytes: &[u8]) -> Option<u32> {
    let ip_bytes = if bytes.first()? >> 4 == 4 { IPV4_BYTES } else { IPV6_BYTES };
    let number = bytes.get(ip_bytes + UDP_BYTES + DESTINATION_AT..)?.first_chunk()?;
    Some(u32::from_be_bytes(*number) & LOW_24_BITS)
}

#[cfg(test)]
mod tests {
    use super::super::format::{MAX_HEADER_BYTES, MAX_TRAILER_BYTES};
    use super::super::rnr_nanos;
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Packets captured from Linux's rxe, without the Ethernet header.
    const WRITE: &str = "45000080e1fd40004011446d0a0000010a000002caaf12b7006c00000b00ffff000abcde80fffff0000070000000000000c0ffee\
        00000040dead00010003070b0f13171b1f22262a2e32363a3e4145494d5155595d6064686c7074787c7f83878b8f93979b9ea2a6aaaeb2b6babdc1c5\
        c9cdd1d5d9dce0e4e8ecf0f404b6f24c";
    const ACK: &str =
        "45000030e3174000401143a30a0000010a000002caaf12b7001c00001100ffff000abcde0000aaaa1f000001f07ceb61";
    const NAK: &str =
        "45000030e32040004011439a0a0000010a000002caaf12b7001c00001100ffff000abcde0000ab1260000002d4c84046";

    /// Offset of the IP header.
    const IP: usize = SCRATCH_BYTES;

    /// Makes a packet behind scratch bytes.
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
                opcode: Opcode::WriteOnlyImmediate,
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
        assert_eq!(ack.aeth, Some(Aeth { syndrome: Syndrome::Ack(31), messages: 1 }));
        assert_eq!((ack.opcode, ack.psn), (Opcode::Acknowledge, Psn::new(0xaaaa)));
        let mut nak = bytes(NAK);
        let nak = decode(&mut nak).unwrap();
        assert_eq!(nak.aeth, Some(Aeth { syndrome: Syndrome::PsnSequenceError, messages: 2 }));
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
            (from, to) in address(), source_port: u16, opcode in proptest::sample::select(Opcode::ALL),
            ecn in prop_oneof![Just(Ecn::NotCapable), Just(Ecn::Capable1), Just(Ecn::Capable0), Just(Ecn::Congested)],
            (solicited, wants_ack) in any::<(bool, bool)>(), queue_pair in 0u32..1 << 24, psn: u32,
            (address, rkey, bytes) in any::<(u64, u32, u32)>(), syndrome in any::<u8>().prop_filter_map("none", Syndrome::from_code),
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
