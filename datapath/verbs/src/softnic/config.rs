//! Settings of a NIC in software.

use embarcadero_wire::{OutOfBounds, within};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Settings of a NIC in software over the kernel's sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RoceConfig {
    /// Address of this host that packets go from and come to.
    ///
    /// Unset, a broker takes the address of `data_listen`, or the first that other hosts can reach if that is any address.
    /// A client takes the address from which it reaches the brokers.
    pub address: Option<IpAddr>,
}

/// Settings of a NIC in software at a port of DPDK.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DpdkConfig {
    /// Arguments of DPDK itself (its guide, "EAL parameters"), such as `--vdev=...` or `--allow=0000:3b:00.0`.
    pub eal: Vec<String>,
    /// Name of the port in DPDK (`net_memif0`, `0000:3b:00.0`). Unset takes the first port.
    pub port: Option<String>,
    /// IP address of the port. The kernel does not know it, and nothing else may have it.
    pub address: Option<IpAddr>,
    /// Bits of the address that neighbours share: 0 to 32, for IPv6 to 128. Unset means 24, for IPv6 64.
    pub prefix_length: Option<u8>,
    /// Gateway to other networks, of the address's family.
    pub gateway: Option<IpAddr>,
    /// VLAN of the port, 1 to 4094: its frames have this tag. Unset, they have none.
    pub vlan: Option<u16>,
    /// Number of queues of the port each way, 1 to 16. The port chooses one by a packet's flow; completion queues are
    /// spread over them. With one queue for each polling thread, threads share nothing.
    pub queues: u16,
    /// Bytes that a frame carries, 576 to 9000. Every switch on the way must take frames as long. 4200 has room for packets
    /// with 4096 bytes of payload.
    pub mtu: u16,
}

impl DpdkConfig {
    /// Checks that every setting is within its bounds.
    ///
    /// # Errors
    /// [`OutOfBounds`], which names the first setting that is not.
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

    /// Bits of `address` that neighbours share.
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
