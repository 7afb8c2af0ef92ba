//! Ethernet frames, and a station's place in its network.

use std::net::IpAddr;

/// Address of an Ethernet port.
pub type Mac = [u8; 6];

/// Most bytes of a frame before its packet: two addresses of 6, a tag of 4, and a type of 2.
pub const MAX_HEADER_BYTES: usize = 18;
/// Bytes of a header without a tag.
pub(super) const UNTAGGED_BYTES: usize = 14;
/// Bytes of a header that have the sender's address.
pub(super) const SENDER: std::ops::Range<usize> = 6..12;

/// Types of what a frame carries (assigned by IEEE).
pub(super) mod kind {
    pub(in super::super) const IPV4: u16 = 0x0800;
    pub(in super::super) const ARP: u16 = 0x0806;
    pub(in super::super) const TAG: u16 = 0x8100;
    pub(in super::super) const IPV6: u16 = 0x86dd;
}

/// Bits of a tag that name the VLAN; the others are a priority (IEEE 802.1Q, 9.6).
pub(super) const VLAN_MASK: u16 = 0x0fff;
/// Address of all ports.
pub(super) const BROADCAST: Mac = [0xff; 6];

/// Place of a station in its network.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Ethernet address of the port.
    pub mac: Mac,
    /// IP address of the station.
    pub address: IpAddr,
    /// Bits of the address that neighbours share: 0 to 32, for IPv6 to 128.
    pub prefix_length: u8,
    /// Neighbour that packets to other networks go to, of the address's family.
    pub gateway: Option<IpAddr>,
    /// VLAN of the station, 1 to 4094: its frames have this tag, and it takes no others. `None`: frames without a tag.
    pub vlan: Option<u16>,
}

impl Place {
    /// Neighbour that a packet to `to` goes to; `None` if no way leads there.
    pub(super) fn next(&self, to: IpAddr) -> Option<IpAddr> {
        let near = match (self.address, to) {
            (IpAddr::V4(own), IpAddr::V4(to)) => {
                let apart = u32::from(own) ^ u32::from(to);
                apart.checked_shr(32 - u32::from(self.prefix_length)).unwrap_or(0) == 0
            }
            (IpAddr::V6(own), IpAddr::V6(to)) => {
                let apart = u128::from(own) ^ u128::from(to);
                to.is_unicast_link_local() || apart.checked_shr(128 - u32::from(self.prefix_length)).unwrap_or(0) == 0
            }
            _ => return None,
        };
        if near { Some(to) } else { self.gateway }
    }

    /// Makes the header of a frame to `to` that carries something of the type `kind`.
    pub(super) fn header(&self, to: Mac, kind: u16) -> Header {
        let mut header = Header { bytes: [0; MAX_HEADER_BYTES], len: 0 };
        header.put(&to);
        header.put(&self.mac);
        if let Some(vlan) = self.vlan {
            header.put(&kind::TAG.to_be_bytes());
            header.put(&vlan.to_be_bytes());
        }
        header.put(&kind.to_be_bytes());
        header
    }

    /// Makes a frame to `to` that carries `bytes` of the type `kind`.
    pub(super) fn frame(&self, to: Mac, kind: u16, bytes: &[u8]) -> Vec<u8> {
        [self.header(to, kind).as_ref(), bytes].concat()
    }
}

/// Header of a frame: the bytes before its packet.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    bytes: [u8; MAX_HEADER_BYTES],
    len: usize,
}

impl Header {
    fn put(&mut self, field: &[u8]) {
        self.bytes[self.len..self.len + field.len()].copy_from_slice(field);
        self.len += field.len();
    }
}

impl AsRef<[u8]> for Header {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{over_ipv6, place};
    use super::*;

    #[test]
    fn packets_to_other_networks_go_to_the_gateway() {
        let four = place(1, None);
        assert_eq!(four.next([10, 0, 0, 7].into()), Some([10, 0, 0, 7].into()));
        assert_eq!(four.next([10, 0, 1, 7].into()), four.gateway);
        assert_eq!(Place { prefix_length: 0, ..four }.next([11, 0, 1, 7].into()), Some([11, 0, 1, 7].into()));
        assert_eq!(Place { prefix_length: 32, ..four }.next([10, 0, 0, 7].into()), four.gateway);
        let six = over_ipv6(1, None);
        let near: IpAddr = "fd00::9".parse().unwrap();
        assert_eq!(six.next(near), Some(near));
        assert_eq!(six.next("fd01::9".parse().unwrap()), None);
        assert_eq!(six.next([10, 0, 0, 7].into()), None);
        assert!(six.next("fe80::9".parse().unwrap()).is_some());
    }
}
