//! What a NIC in software is told.

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

/// A setting that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} is {value}; it must be {bound}")]
pub struct OutOfBounds {
    /// Which.
    pub key: &'static str,
    /// As configured.
    pub value: String,
    /// What it may be.
    pub bound: &'static str,
}

impl DpdkConfig {
    /// Whether its settings can be.
    ///
    /// # Errors
    /// The first that cannot.
    pub fn validate(&self) -> Result<(), OutOfBounds> {
        let of_ipv6 = self.address.is_some_and(|address| address.is_ipv6());
        let prefix = if of_ipv6 { (0..=128, "0 to 128") } else { (0..=32, "0 to 32") };
        let bounds = [
            ("dpdk.mtu", Some(self.mtu), (576..=9000, "576 to 9000")),
            ("dpdk.prefix_length", self.prefix_length.map(u16::from), prefix),
            ("dpdk.vlan", self.vlan, (1..=4094, "1 to 4094")),
            ("dpdk.queues", Some(self.queues), (1..=16, "1 to 16")),
        ];
        for (key, value, (allowed, bound)) in bounds {
            if let Some(value) = value.filter(|value| !allowed.contains(value)) {
                return Err(OutOfBounds { key, value: value.to_string(), bound });
            }
        }
        match self.gateway.filter(|gateway| gateway.is_ipv6() != of_ipv6) {
            Some(gateway) => {
                let bound = "of the family of dpdk.address";
                Err(OutOfBounds { key: "dpdk.gateway", value: gateway.to_string(), bound })
            }
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
