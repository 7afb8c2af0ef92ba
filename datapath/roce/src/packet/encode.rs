//! Writing packets.

use super::fields::Packet;
use super::format::{
    ACK_REQUEST, AETH_BYTES, BTH_BYTES, DONT_FRAGMENT, ICRC_BYTES, IMMEDIATE_BYTES, IPV4_BYTES, IPV4_CHECKSUM_AT,
    IPV4_FIRST, IPV4_FRAGMENT_AT, IPV4_FROM_AT, IPV4_LENGTH_AT, IPV4_TO_AT, IPV6_BYTES, IPV6_VERSION, LOW_24_BITS,
    MAX_HEADER_BYTES, MAX_PAD_BYTES, MAX_TRAILER_BYTES, MIGRATED, PAD_SHIFT, PARTITIONS, RETH_BYTES, SOLICITED,
    SYNDROME_SHIFT, TIME_TO_LIVE, TRAFFIC_CLASS_SHIFT, UDP, UDP_BYTES, UDP_PORT, icrc, internet_checksum,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Refusal of a packet that contradicts itself.
///
/// The addresses are of two families, the opcode does not go with the headers, or the payload does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the packet contradicts itself: addresses of two families, headers that do not go with its opcode, or too long"
)]
pub struct Unsound;

/// Memory that a packet is appended to.
pub trait Put {
    /// Appends bytes.
    fn put(&mut self, bytes: &[u8]);
}

impl Put for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// Headers before a payload.
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
    /// Appends the packet, from its IP header on, to `into`.
    ///
    /// # Errors
    /// [`Unsound`]; nothing is appended then.
    pub fn encode(&self, into: &mut impl Put) -> Result<(), Unsound> {
        if !self.is_sound() {
            return Err(Unsound);
        }
        let pad = self.payload.len().wrapping_neg() & MAX_PAD_BYTES;
        let extended = RETH_BYTES * usize::from(self.reth.is_some())
            + AETH_BYTES * usize::from(self.aeth.is_some())
            + IMMEDIATE_BYTES * usize::from(self.immediate.is_some());
        let udp_bytes = UDP_BYTES + BTH_BYTES + extended + self.payload.len() + pad + ICRC_BYTES;
        let mut headers = Headers { bytes: [0; MAX_HEADER_BYTES], len: 0 };
        let ip_bytes = self.put_ip(&mut headers, udp_bytes)?;
        for word in [self.source_port, UDP_PORT, udp_bytes as u16, 0] {
            headers.put(&word.to_be_bytes());
        }
        self.put_transport(&mut headers, pad);
        let (headers, pad) = (&headers.bytes[..headers.len], &[0; MAX_PAD_BYTES][..pad]);
        let checksum = icrc(ip_bytes, headers, [self.payload, pad]);
        [headers, self.payload, pad, &checksum.to_le_bytes()].into_iter().for_each(|bytes| into.put(bytes));
        Ok(())
    }

    /// Returns true when the opcode goes with the headers, and the payload fits into an IP packet.
    fn is_sound(&self) -> bool {
        self.reth.is_some() == self.opcode.has_reth()
            && self.aeth.is_some() == self.opcode.has_aeth()
            && self.immediate.is_some() == self.opcode.has_immediate()
            && self.payload.len() <= usize::from(u16::MAX) - MAX_HEADER_BYTES - MAX_TRAILER_BYTES
    }

    /// Appends the IP header of a packet with `udp_bytes` bytes behind it, and returns the header's length.
    fn put_ip(&self, headers: &mut Headers, udp_bytes: usize) -> Result<usize, Unsound> {
        match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut header = [0; IPV4_BYTES];
                header[..2].copy_from_slice(&[IPV4_FIRST, self.ecn as u8]);
                header[IPV4_LENGTH_AT..][..2].copy_from_slice(&((IPV4_BYTES + udp_bytes) as u16).to_be_bytes());
                // Identification 0, as such a packet is never fragmented (RFC 6864).
                header[IPV4_FRAGMENT_AT..][..4].copy_from_slice(&[DONT_FRAGMENT, 0, TIME_TO_LIVE, UDP]);
                header[IPV4_FROM_AT..][..4].copy_from_slice(&Ipv4Addr::octets(&from));
                header[IPV4_TO_AT..].copy_from_slice(&Ipv4Addr::octets(&to));
                let checksum = internet_checksum(&header);
                header[IPV4_CHECKSUM_AT..][..2].copy_from_slice(&checksum.to_be_bytes());
                headers.put(&header);
                Ok(IPV4_BYTES)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                headers.put(&(IPV6_VERSION | u32::from(self.ecn as u8) << TRAFFIC_CLASS_SHIFT).to_be_bytes());
                headers.put(&(udp_bytes as u16).to_be_bytes());
                headers.put(&[UDP, TIME_TO_LIVE]);
                headers.put(&Ipv6Addr::octets(&from));
                headers.put(&Ipv6Addr::octets(&to));
                Ok(IPV6_BYTES)
            }
            _ => Err(Unsound),
        }
    }

    /// Appends the base and extended transport headers of a packet whose payload is padded with `pad` bytes.
    fn put_transport(&self, headers: &mut Headers, pad: usize) {
        let solicited = if self.solicited { SOLICITED } else { 0 };
        let ack_request = if self.wants_ack { ACK_REQUEST } else { 0 };
        headers.put(&[self.opcode.code(), solicited | MIGRATED | (pad as u8) << PAD_SHIFT]);
        headers.put(&PARTITIONS[0].to_be_bytes());
        headers.put(&(self.queue_pair & LOW_24_BITS).to_be_bytes());
        headers.put(&(ack_request | self.psn.get()).to_be_bytes());
        if let Some(reth) = self.reth {
            headers.put(&reth.address.to_be_bytes());
            headers.put(&reth.rkey.to_be_bytes());
            headers.put(&reth.bytes.to_be_bytes());
        }
        if let Some(aeth) = self.aeth {
            let syndrome = u32::from(aeth.syndrome.code()) << SYNDROME_SHIFT;
            headers.put(&(syndrome | aeth.messages & LOW_24_BITS).to_be_bytes());
        }
        if let Some(immediate) = self.immediate {
            headers.put(&immediate.to_be_bytes());
        }
    }
}
