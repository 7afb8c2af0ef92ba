//! ARP for IPv4 over Ethernet (RFC 826).

use super::frame::Mac;
use std::net::Ipv4Addr;

/// Bytes of a message.
const BYTES: usize = 28;
/// Begin of a message: Ethernet, IPv4, and the lengths of their addresses.
const KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];
/// Operation of a question.
const REQUEST: [u8; 2] = [0, 1];
/// Operation of an answer.
const REPLY: [u8; 2] = [0, 2];

/// Question for the owner of an IPv4 address, or the answer to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arp {
    /// True for an answer, false for a question.
    pub answers: bool,
    /// Addresses of the sender.
    pub from: (Mac, Ipv4Addr),
    /// Addresses of the target; a question does not know the first.
    pub to: (Mac, Ipv4Addr),
}

impl Arp {
    /// Reads a message; `None` if the bytes are none for IPv4 over Ethernet.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; BYTES] = bytes.first_chunk()?;
        let address = |at: usize| Some(Ipv4Addr::from(*bytes[at..].first_chunk::<4>()?));
        let mac = |at: usize| bytes[at..].first_chunk::<6>().copied();
        let answers = match [bytes[6], bytes[7]] {
            REQUEST => false,
            REPLY => true,
            _ => return None,
        };
        let arp = Self { answers, from: (mac(8)?, address(14)?), to: (mac(18)?, address(24)?) };
        (bytes[..6] == KIND).then_some(arp)
    }

    /// Bytes of the message.
    pub(super) fn encode(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[..6].copy_from_slice(&KIND);
        bytes[6..8].copy_from_slice(if self.answers { &REPLY } else { &REQUEST });
        bytes[8..14].copy_from_slice(&self.from.0);
        bytes[14..18].copy_from_slice(&self.from.1.octets());
        bytes[18..24].copy_from_slice(&self.to.0);
        bytes[24..].copy_from_slice(&self.to.1.octets());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arp_is_read_as_it_was_made(answers: bool, from: (Mac, u32), to: (Mac, u32)) {
            let arp = Arp { answers, from: (from.0, from.1.into()), to: (to.0, to.1.into()) };
            prop_assert_eq!(Arp::decode(&arp.encode()), Some(arp));
        }

        #[test]
        fn any_bytes_are_read_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Arp::decode(&bytes);
        }
    }
}
