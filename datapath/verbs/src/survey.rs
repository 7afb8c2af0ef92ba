//! What RDMA devices this build and this host have.

#[cfg(rdma)]
use super::ibverbs;
use serde::Serialize;
use std::io;
use std::net::Ipv6Addr;

/// A device and its capabilities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceReport {
    /// Name, as in /sys/class/infiniband.
    pub name: String,
    /// Version of its firmware.
    pub firmware: String,
    /// NUMA node; `None` where the kernel does not know.
    pub numa_node: Option<u32>,
    /// It has type-2 memory windows: what a window opens to a queue pair can be closed again.
    pub memory_windows: bool,
    /// Its ports.
    pub ports: Vec<PortReport>,
}

/// A port of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortReport {
    /// Number, from 1.
    pub number: u8,
    /// `down`, `init`, `armed`, `active` or `active defer`.
    pub state: &'static str,
    /// Path MTU in force, bytes.
    pub mtu: u32,
    /// `Ethernet` (RoCE), `InfiniBand` or `unknown`.
    pub link_layer: &'static str,
    /// Its addresses.
    pub gids: Vec<Gid>,
}

/// An address of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gid {
    /// Its index in the port's table.
    pub index: u32,
    /// The address; an IPv4 one is mapped (`::ffff:10.0.0.1`).
    pub address: Ipv6Addr,
    /// `IB`, `RoCE v1`, `RoCE v2` or `unknown`.
    pub kind: &'static str,
}

/// Why the host's devices cannot be listed.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    /// The build cannot.
    #[error("this build has no RDMA devices: {0}")]
    NotBuilt(&'static str),
    /// The library reports an error.
    #[error("libibverbs cannot list devices: {0}")]
    Library(#[source] io::Error),
}

/// Says why this build has no RDMA devices of the host; `None` if it has.
#[must_use]
pub fn rdma_missing() -> Option<&'static str> {
    if cfg!(rdma) { None } else { Some(env!("EMBARCADERO_NO_RDMA")) }
}

/// Says whether this build has DPDK.
#[must_use]
pub fn has_dpdk() -> bool {
    cfg!(feature = "dpdk")
}

/// Surveys every RDMA device of this host; one that cannot be opened comes with its reason.
///
/// # Errors
/// [`SurveyError`].
pub fn survey() -> Result<Vec<(String, io::Result<DeviceReport>)>, SurveyError> {
    #[cfg(rdma)]
    return ibverbs::survey().map_err(SurveyError::Library);
    #[cfg(not(rdma))]
    Err(SurveyError::NotBuilt(env!("EMBARCADERO_NO_RDMA")))
}
