//! Ethernet below the packets: frames, VLAN tags (IEEE 802.1Q), and the addresses of neighbours.
//!
//! A [`Station`] finds its neighbours by ARP (RFC 826) or by neighbour discovery (RFC 4861).

mod arp;
mod discovery;
mod frame;
mod neighbours;
mod station;

pub use frame::{Header, MAX_HEADER_BYTES, Mac, Place};
pub use neighbours::Neighbours;
pub use station::{NextHop, Station, Taken};

#[cfg(test)]
mod tests {
    use super::Place;
    use std::net::{IpAddr, Ipv6Addr};

    /// A place with the IPv4 address 10.0.0.`last`.
    pub(super) fn place(last: u8, vlan: Option<u16>) -> Place {
        let gateway = Some(IpAddr::from([10, 0, 0, 254]));
        Place { mac: [2, 0, 0, 0, 0, last], address: [10, 0, 0, last].into(), prefix_length: 24, gateway, vlan }
    }

    /// A place with an IPv6 address that ends with `last`, and no gateway.
    pub(super) fn over_ipv6(last: u8, vlan: Option<u16>) -> Place {
        let address = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0x1234, last.into());
        Place { address: address.into(), prefix_length: 64, gateway: None, ..place(last, vlan) }
    }
}
