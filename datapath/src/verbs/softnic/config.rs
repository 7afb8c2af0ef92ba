//! What a NIC in software is told.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};

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
    pub address: Option<Ipv4Addr>,
    /// Bits of the address that its neighbours share, 0 to 32.
    pub prefix_length: u8,
    /// Where packets to others go.
    pub gateway: Option<Ipv4Addr>,
    /// Bytes that a frame carries, 576 to 9000. All on the way must take so many; 4200 has room for packets of 4096.
    pub mtu: u16,
}

/// A setting that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} is {value}; it must be {bound}")]
pub struct OutOfBounds {
    /// Which.
    pub key: &'static str,
    /// As configured.
    pub value: u16,
    /// What it may be.
    pub bound: &'static str,
}

impl DpdkConfig {
    /// Whether its numbers can be.
    ///
    /// # Errors
    /// The first that cannot.
    pub fn validate(&self) -> Result<(), OutOfBounds> {
        let bounds = [
            ("dpdk.mtu", self.mtu, 576..=9000, "576 to 9000"),
            ("dpdk.prefix_length", self.prefix_length.into(), 0..=32, "0 to 32"),
        ];
        match bounds.into_iter().find(|(_, value, allowed, _)| !allowed.contains(value)) {
            Some((key, value, _, bound)) => Err(OutOfBounds { key, value, bound }),
            None => Ok(()),
        }
    }
}

impl Default for DpdkConfig {
    fn default() -> Self {
        Self { eal: Vec::new(), port: None, address: None, prefix_length: 24, gateway: None, mtu: 4200 }
    }
}
