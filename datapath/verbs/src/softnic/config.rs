//! What a NIC in software is told.

use embarcadero_wire::{OutOfBounds, within};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// A NIC in software over the kernel's sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RoceConfig {
    /// Address of this host that packets go from and come to. Unset, a broker takes that of `data_listen`, or if that is
    /// any address, the first that other hosts can reach; a client the one from which it reaches the brokers.
    pub address: Option<IpAddr>,
}

/// A NIC in software at a port of DPDK.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DpdkConfig {
    /// Arguments of DPDK itself (its guide, "EAL parameters"), such as `--vdev=...` or `--allow=0000:3b:00.0`.
    pub eal: Vec<String>,
    /// The port, as DPDK names it (`net_memif0`, `0000:3b:00.0`); unset takes the first.
    pub port: Option<String>,
    /// Address of the port. The kernel does not know of it; nothing else may have it.
    pub address: Option<IpAddr>,
    /// Bits of the address that its neighbours share: 0 to 32, or 128 of IPv6. Unset 24, or 64.
    pub prefix_length: Option<u8>,
    /// Where packets to others go; of the address's family.
    pub gateway: Option<IpAddr>,
    /// The port is in this VLAN alone, 1 to 4094: its frames have that tag. Unset, they have none.
    pub vlan: Option<u16>,
    /// Queues of the port each way, 1 to 16. The port chooses one by a packet's flow; completion queues are spread over
    /// them. One for each thread that polls lets threads share nothing.
    pub queues: u16,
    /// Bytes that a frame carries, 576 to 9000. All on the way must take so many; 4200 has room for packets of 4096.
    pub mtu: u16,
}

impl DpdkConfig {
    /// Whether its settings can be.
    ///
    /// # Errors
    /// The first that cannot.
    pub fn validate(&self) -> Result<(), OutOfBounds> {
        let of_ipv6 = self.address.is_some_and(|address| address.is_ipv6());
        within("dpdk.mtu", self.mtu, 576, 9000)?;
        within("dpdk.queues", self.queues, 1, 16)?;
        if let Some(length) = self.prefix_length {
            within("dpdk.prefix_length", length, 0, if of_ipv6 { 128 } else { 32 })?;
        }
        if let Some(vlan) = self.vlan {
            within("dpdk.vlan", vlan, 1, 4094)?;
        }
        match self.gateway.filter(|gateway| gateway.is_ipv6() != of_ipv6) {
            Some(gateway) => Err(OutOfBounds::new("dpdk.gateway", gateway, "of the family of dpdk.address")),
            None => Ok(()),
        }
    }

    /// The length of the prefix of an address.
    #[cfg(feature = "dpdk")]
    pub(super) fn prefix_length_at(&self, address: IpAddr) -> u8 {
        self.prefix_length.unwrap_or(if address.is_ipv6() { 64 } else { 24 })
    }
}

impl Default for DpdkConfig {
    fn default() -> Self {
        Self {
            eal: Vec::new(),
            port: None,
            address: None,
            prefix_length: None,
            gateway: None,
            vlan: None,
            queues: 1,
            mtu: 4200,
        }
    }
}
