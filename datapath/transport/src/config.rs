//! Which transport a broker offers and a client asks for.

use embarcadero_wire::OutOfBounds;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What carries batches. Nothing falls back to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    /// TCP.
    Tcp,
    /// RDMA verbs, by a device of the host.
    Verbs,
    /// RDMA by a NIC in software: RoCEv2 over a raw socket, for which the process needs CAP_NET_RAW. It speaks to devices too.
    Roce,
    /// The same at a port of DPDK, without the kernel's network. Needs a build with cargo feature `dpdk`.
    Dpdk,
}

impl TransportKind {
    /// As it is configured.
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

/// How each session is confined to its landing windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// Type-2 memory windows where the device enforces their bounds (it is tried), else registrations.
    Auto,
    /// Type-2 memory windows, whatever the device makes of them.
    Windows,
    /// A protection domain for each session, and a registration for each landing window.
    Registrations,
}
