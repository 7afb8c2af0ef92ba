//! Settings that name a transport, and the isolation of RDMA sessions.

use embarcadero_wire::OutOfBounds;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Transport that carries batches. None falls back to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    /// TCP.
    Tcp,
    /// RDMA verbs, by a device of the host.
    Verbs,
    /// RDMA by a NIC in software: RoCEv2 over a raw socket, for which the process needs CAP_NET_RAW. Its peer may be
    /// a device.
    Roce,
    /// RDMA by a NIC in software at a port of DPDK, past the kernel's network. Needs a build with cargo feature `dpdk`.
    Dpdk,
}

impl TransportKind {
    /// Name in configurations.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Verbs => "verbs",
            Self::Roce => "roce",
            Self::Dpdk => "dpdk",
        }
    }
}

impl fmt::Display for TransportKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for TransportKind {
    type Err = OutOfBounds;

    fn from_str(text: &str) -> Result<Self, OutOfBounds> {
        let kinds = [Self::Tcp, Self::Verbs, Self::Roce, Self::Dpdk];
        let named = kinds.into_iter().find(|kind| kind.name() == text);
        named.ok_or_else(|| OutOfBounds::new("transport", text, "tcp, verbs, roce or dpdk"))
    }
}

/// Means by which each RDMA session is confined to its landing windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// Type-2 memory windows where a trial shows that the device enforces their bounds, else registrations.
    Auto,
    /// Type-2 memory windows, without a trial.
    Windows,
    /// One protection domain per session, and one registration per landing window.
    Registrations,
}
