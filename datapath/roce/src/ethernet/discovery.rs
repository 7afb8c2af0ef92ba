//! Neighbour discovery for IPv6 (RFC 4861).

use super::frame::Mac;
use crate::packet::{IPV6_BYTES, IPV6_PROTOCOL_AT, internet_checksum};
use std::net::Ipv6Addr;

/// First byte of an IPv6 header: version 6.
const IPV6_FIRST: u8 = 0x60;
/// Bytes of a message before its options (4.3, 4.4).
const LEAST_BYTES: usize = 24;
/// Bytes that an option's length counts by (4.6).
const OPTION_UNIT: usize = 8;
/// IP protocol number of ICMPv6 (assigned by IANA).
pub(super) const PROTOCOL: u8 = 58;
/// Type of a neighbour solicitation (4.3).
const SOLICITATION: u8 = 135;
/// Type of a neighbour advertisement (4.4).
const ADVERTISEMENT: u8 = 136;
/// Hop limit of every message (4.3, 4.4). A packet with a smaller one was forwarded by a router, and does not count.
const HOP_LIMIT: u8 = 255;
/// Flag of an advertisement: it was asked for (4.4).
const SOLICITED: u8 = 0x40;
/// Flag of an advertisement: it replaces the address known so far (4.4).
const OVERRIDE: u8 = 0x20;
/// Option with the sender's Ethernet address, in a solicitation (4.6.1).
const SOURCE_ADDRESS: u8 = 1;
/// Option with the target's Ethernet address, in an advertisement (4.6.1).
const TARGET_ADDRESS: u8 = 2;

/// Address of all hosts of a network (RFC 4291, 2.7.1).
pub(super) const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Solicited-node address of `address`: all hosts whose address ends alike listen to it (RFC 4291, 2.7.1).
pub(super) fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

/// Ethernet address of frames to a group (RFC 2464, 7).
pub(super) fn group(address: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = address.octets();
    [0x33, 0x33, a, b, c, d]
}

/// Neighbour solicitation, or the advertisement that answers one (4.3, 4.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Discovery {
    /// True for an advertisement, false for a solicitation.
    pub answers: bool,
    /// IP address of the sender.
    pub from: Ipv6Addr,
    /// IP address of the receiver.
    pub to: Ipv6Addr,
    /// Address that is asked for, or that answers.
    pub target: Ipv6Addr,
    /// Ethernet address of the sender, if the message has it.
    pub mac: Option<Mac>,
}

impl Discovery {
    /// Option that has the sender's Ethernet address.
    const fn option(answers: bool) -> u8 {
        if answers { TARGET_ADDRESS } else { SOURCE_ADDRESS }
    }

    /// Returns the checksum over a message and its pseudo-header (RFC 8200, 8.1); 0 if the message contains the right one.
    fn checksum(addresses: &[u8], message: &[u8]) -> u16 {
        let lengths = (message.len() as u32).to_be_bytes();
        internet_checksum(&[addresses, &lengths, &[0, 0, 0, PROTOCOL], message].concat())
    }

    /// Reads a packet from its IP header on, by the rules of sections 7.1.1 and 7.1.2.
    pub(super) fn decode(packet: &[u8]) -> Option<Self> {
        let header: &[u8; IPV6_BYTES] = packet.first_chunk()?;
        let address = |bytes: &[u8]| bytes.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets));
        let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let message = packet[IPV6_BYTES..].get(..len)?;
        if len < LEAST_BYTES || !len.is_multiple_of(OPTION_UNIT) {
            return None;
        }
        let answers = match message[..2] {
            [SOLICITATION, 0] => false,
            [ADVERTISEMENT, 0] => true,
            _ => return None,
        };
        let ip_is_right = header[0] >> 4 == 6 && header[IPV6_PROTOCOL_AT] == PROTOCOL && header[7] == HOP_LIMIT;
        if !ip_is_right || Self::checksum(&header[8..], message) != 0 {
            return None;
        }
        let (from, to, target) = (address(&header[8..])?, address(&header[24..])?, address(&message[8..])?);
        let mut mac = None;
        let mut options = &message[LEAST_BYTES..];
        while let [kind, units, ..] = *options {
            let (option, rest) = options.split_at_checked(OPTION_UNIT * usize::from(units)).filter(|_| units > 0)?;
            if kind == Self::option(answers) {
                mac = option[2..].first_chunk().copied();
            }
            options = rest;
        }
        let to_everybody = answers && to.is_multicast() && message[4] & SOLICITED != 0;
        let of_nobody = !answers && from.is_unspecified() && mac.is_some();
        (!target.is_multicast() && !to_everybody && !of_nobody).then_some(Self { answers, from, to, target, mac })
    }

    /// Makes the packet, from its IP header on.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut message = vec![0; LEAST_BYTES];
        message[0] = if self.answers { ADVERTISEMENT } else { SOLICITATION };
        if self.answers {
            message[4] = OVERRIDE | if self.to.is_multicast() { 0 } else { SOLICITED };
        }
        message[8..24].copy_from_slice(&self.target.octets());
        if let Some(mac) = self.mac {
            message.extend([Self::option(self.answers), 1]);
            message.extend(mac);
        }
        let addresses = [self.from.octets(), self.to.octets()].concat();
        let checksum = Self::checksum(&addresses, &message);
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        let len = (message.len() as u16).to_be_bytes();
        let first = [IPV6_FIRST, 0, 0, 0, len[0], len[1], PROTOCOL, HOP_LIMIT];
        [&first[..], &addresses, &message].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn discovery_is_read_as_it_was_made(
            answers: bool, from: u128, to: u128, target in 0..0xff_u128 << 120, mac: Option<Mac>, damage in 0usize..640,
        ) {
            let mac = mac.filter(|_| from != 0);
            let said = Discovery { answers, from: from.into(), to: to.into(), target: target.into(), mac };
            let mut bytes = said.encode();
            prop_assert_eq!(Discovery::decode(&bytes), Some(said));
            // Every wrong bit is noticed, except in the traffic class, in the flow label and behind the message.
            if let Some(byte) = bytes.get_mut(damage / 8).filter(|_| !(4..32).contains(&damage)) {
                *byte ^= 0x80 >> (damage % 8);
                prop_assert_eq!(Discovery::decode(&bytes), None);
            }
        }

        #[test]
        fn any_bytes_are_read_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _ = Discovery::decode(&bytes);
        }
    }
}
