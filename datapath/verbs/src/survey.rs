//! Survey of the RDMA devices that this build supports and this host has.

#[cfg(rdma)]
use crate::ibverbs;
use crate::report::DeviceReport;
use std::io;

/// Reason why the host's devices cannot be listed.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    /// The build has no RDMA devices.
    #[error("this build has no RDMA devices: {0}")]
    NotBuilt(&'static str),
    /// libibverbs reports an error.
    #[error("libibverbs cannot list devices: {0}")]
    Library(#[source] io::Error),
}

/// Returns the reason why this build has no RDMA devices of the host; `None` if it has.
#[must_use]
pub fn rdma_missing() -> Option<&'static str> {
    if cfg!(rdma) { None } else { Some(env!("EMBARCADERO_NO_RDMA")) }
}

/// Returns true when this build has DPDK.
#[must_use]
pub fn has_dpdk() -> bool {
    cfg!(feature = "dpdk")
}

/// Version of the DPDK that this build has; `None` in a build without DPDK.
#[must_use]
pub fn dpdk_version() -> Option<String> {
    #[cfg(feature = "dpdk")]
    return Some(crate::softnic::dpdk_version());
    #[cfg(not(feature = "dpdk"))]
    None
}

/// Surveys every RDMA device of this host. For a device that cannot be opened, it returns the reason.
///
/// # Errors
/// [`SurveyError`], if the devices cannot be listed.
pub fn survey() -> Result<Vec<(String, io::Result<DeviceReport>)>, SurveyError> {
    #[cfg(rdma)]
    return ibverbs::survey().map_err(SurveyError::Library);
    #[cfg(not(rdma))]
    Err(SurveyError::NotBuilt(env!("EMBARCADERO_NO_RDMA")))
}
