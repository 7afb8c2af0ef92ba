//! Lengths, bits and checksums of the wire format.

use crc32fast::Hasher;

/// UDP port of RoCEv2 (annex A17.4; assigned by IANA).
pub const UDP_PORT: u16 = 4791;
/// Most bytes before the payload.
pub const MAX_HEADER_BYTES: usize = IPV6_BYTES + UDP_BYTES + BTH_BYTES + RETH_BYTES + IMMEDIATE_BYTES;
/// Most bytes after the payload.
pub const MAX_TRAILER_BYTES: usize = MAX_PAD_BYTES + ICRC_BYTES;

/// Bytes before a packet that [`crate::packet::decode`] overwrites.
///
/// InfiniBand's local route header has as many (IBTA 7.7). The invariant checksum counts them as ones (A17.3.3).
pub const SCRATCH_BYTES: usize = 8;

/// Bytes of an IPv4 header without options (RFC 791, 3.1).
pub const IPV4_BYTES: usize = 20;
/// Offset of the type of service in an IPv4 header (RFC 791, 3.1).
pub(super) const IPV4_CLASS_AT: usize = 1;
/// Offset of the total length in an IPv4 header (RFC 791, 3.1).
pub(super) const IPV4_LENGTH_AT: usize = 2;
/// Offset of flags and fragment offset in an IPv4 header (RFC 791, 3.1).
pub const IPV4_FRAGMENT_AT: usize = 6;
/// Offset of the time to live in an IPv4 header (RFC 791, 3.1).
pub(super) const IPV4_HOPS_AT: usize = 8;
/// Offset of the protocol number in an IPv4 header (RFC 791, 3.1).
pub const IPV4_PROTOCOL_AT: usize = 9;
/// Offset of the checksum in an IPv4 header (RFC 791, 3.1).
pub(super) const IPV4_CHECKSUM_AT: usize = 10;
/// Offset of the sender's address in an IPv4 header (RFC 791, 3.1).
pub(super) const IPV4_FROM_AT: usize = 12;
/// Offset of the receiver's address in an IPv4 header (RFC 791, 3.1).
pub const IPV4_TO_AT: usize = 16;
/// Bytes of an IPv6 header (RFC 8200, 3).
pub const IPV6_BYTES: usize = 40;
/// Offset of the payload length in an IPv6 header (RFC 8200, 3).
pub(super) const IPV6_LENGTH_AT: usize = 4;
/// Offset of the next header's protocol number in an IPv6 header (RFC 8200, 3).
pub const IPV6_PROTOCOL_AT: usize = 6;
/// Offset of the hop limit in an IPv6 header (RFC 8200, 3).
pub(super) const IPV6_HOPS_AT: usize = 7;
/// Offset of the sender's address in an IPv6 header (RFC 8200, 3).
pub(super) const IPV6_FROM_AT: usize = 8;
/// Offset of the receiver's address in an IPv6 header (RFC 8200, 3).
pub const IPV6_TO_AT: usize = 24;
/// First byte of an IPv4 header without options: version 4, five words (RFC 791, 3.1).
pub const IPV4_FIRST: u8 = 0x45;
/// IPv4 flag "don't fragment", in the byte that has the flags (RFC 791, 3.1).
pub(super) const DONT_FRAGMENT: u8 = 0x40;
/// IPv4 bits that only fragments have: "more fragments", and the offset (RFC 791, 3.1).
pub const FRAGMENT_MASK: u16 = 0x3fff;
/// Version 6, in the first word of an IPv6 header (RFC 8200, 3).
pub(super) const IPV6_VERSION: u32 = 6 << 28;
/// Position of the traffic class in the first word of an IPv6 header (RFC 8200, 3).
pub(super) const TRAFFIC_CLASS_SHIFT: u32 = 20;
/// Bits of an IPv4 type of service or IPv6 traffic class that tell of congestion (RFC 3168, 5).
pub(super) const ECN_MASK: u8 = 0b11;
/// Hops that a packet may take: the default of IP (RFC 1700, "IP time to live").
pub(super) const TIME_TO_LIVE: u8 = 64;
/// Bytes of a UDP header (RFC 768).
pub const UDP_BYTES: usize = 8;
/// Offset of the receiver's port in a UDP header (RFC 768).
pub const UDP_TO_AT: usize = 2;
/// Offset of the length in a UDP header (RFC 768).
pub(super) const UDP_LENGTH_AT: usize = 4;
/// Offset of the checksum in a UDP header (RFC 768).
pub(super) const UDP_CHECKSUM_AT: usize = 6;
/// IP protocol number of UDP (assigned by IANA).
pub const UDP: u8 = 17;
/// Bytes of the base transport header (IBTA 9.2).
pub(super) const BTH_BYTES: usize = 12;
/// Bytes of an RDMA extended transport header (IBTA 9.3.3).
pub(super) const RETH_BYTES: usize = 16;
/// Bytes of an ACK extended transport header (IBTA 9.3.5).
pub(super) const AETH_BYTES: usize = 4;
/// Bytes of immediate data (IBTA 9.3, immediate data).
pub(super) const IMMEDIATE_BYTES: usize = 4;
/// Bytes of the invariant checksum (IBTA 7.8.1).
pub(super) const ICRC_BYTES: usize = 4;
/// Most bytes that pad a payload to whole words (IBTA 9.2.4, pad count).
pub(super) const MAX_PAD_BYTES: usize = 3;
/// Default partition, with full and with limited membership (IBTA 10.9.3).
pub(super) const PARTITIONS: [u16; 2] = [0xffff, 0x7fff];
/// Low 24 bits: queue pairs, packet numbers and message counts have no more (IBTA 9.2.7, 9.2.9, 9.3.5).
pub const LOW_24_BITS: u32 = 0x00ff_ffff;

/// Offset of the destination queue pair in the base transport header, behind a reserved byte (IBTA 9.2.7).
pub const DESTINATION_AT: usize = 4;
/// Second byte of the base transport header: the peer is to notify its consumer (IBTA 9.2.2).
pub(super) const SOLICITED: u8 = 0x80;
/// Second byte of the base transport header: path migrated, as there is no other path (IBTA 9.2.3, 17.2.8).
pub(super) const MIGRATED: u8 = 0x40;
/// Second byte of the base transport header: position of the pad count (IBTA 9.2.4).
pub(super) const PAD_SHIFT: u32 = 4;
/// Second byte of the base transport header: transport version, of which only 0 exists (IBTA 9.2.5).
pub(super) const VERSION_MASK: u8 = 0x0f;
/// Third word of the base transport header: the sender wants an acknowledgement (IBTA 9.2.8).
pub(super) const ACK_REQUEST: u32 = 1 << 31;
/// Position of the syndrome in an ACK extended transport header (IBTA 9.3.5).
pub(super) const SYNDROME_SHIFT: u32 = 24;

/// Returns the Internet checksum (RFC 1071) of an even number of bytes, fewer than 2^16. Bytes that contain their right
/// checksum have checksum 0.
#[inline]
pub(crate) fn internet_checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// Prepares headers for the invariant checksum, which takes fields that routers change as ones (A17.3.3; IBTA 7.8.1).
/// The headers lie behind [`SCRATCH_BYTES`], which become ones too: they stand for InfiniBand's local route header.
#[inline]
pub(super) fn mask(ip_bytes: usize, headers: &mut [u8]) {
    let (scratch, ip) = headers.split_at_mut(SCRATCH_BYTES);
    scratch.fill(0xff);
    if ip_bytes == IPV4_BYTES {
        for at in [IPV4_CLASS_AT, IPV4_HOPS_AT, IPV4_CHECKSUM_AT, IPV4_CHECKSUM_AT + 1] {
            ip[at] = 0xff;
        }
    } else {
        // Traffic class, flow label, hop limit.
        ip[0] |= 0x0f;
        for at in [1, 2, 3, IPV6_HOPS_AT] {
            ip[at] = 0xff;
        }
    }
    // UDP checksum; congestion bits of the base header.
    let udp_checksum = ip_bytes + UDP_CHECKSUM_AT;
    for at in [udp_checksum, udp_checksum + 1, ip_bytes + UDP_BYTES + DESTINATION_AT] {
        ip[at] = 0xff;
    }
}

/// Returns the invariant checksum of a packet. `start` is at least its IP, UDP and base headers; `rest` follows.
pub(super) fn icrc<const N: usize>(ip_bytes: usize, start: &[u8], rest: [&[u8]; N]) -> u32 {
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
