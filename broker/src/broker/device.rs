//! Opening of a broker's RDMA device.

use super::BrokerError;
use crate::config::BrokerConfig;
use embarcadero_cxl::region::RegionFile;
use embarcadero_transport::TransportKind;
use embarcadero_transport::rdma::{RdmaDevice, WindowBounds};
use embarcadero_verbs::Context;
use embarcadero_wire::OutOfBounds;
use std::io;
use std::sync::Arc;

/// Opens the RDMA device that the configuration asks for, and registers the region on it. Returns `None` over TCP.
///
/// The device may be a NIC in software, which is this process itself.
///
/// # Errors
/// [`BrokerError::Device`] when there is no such device; [`BrokerError::Config`] when batches are too large for it.
pub(super) fn open(config: &BrokerConfig, file: &RegionFile) -> Result<Option<Arc<RdmaDevice>>, BrokerError> {
    let unusable = |source| BrokerError::Device { transport: config.transport, source };
    let region = file.region();
    let nodes = || region.fabric().mapping().nodes();
    let before = nodes();
    let opened = match config.transport {
        TransportKind::Tcp => return Ok(None),
        TransportKind::Roce => {
            let listen = config.data_listen.ip();
            Context::software(config.roce.address.or((!listen.is_unspecified()).then_some(listen)))
        }
        TransportKind::Dpdk => Context::dpdk(&config.dpdk),
        TransportKind::Verbs => {
            file.require_registrable()?;
            Context::find(config.rdma.device.as_deref())
        }
    };
    let bounds = WindowBounds::new(config.rdma.window_bytes, config.max_batch_bytes, region.geometry().segment_bytes);
    let device = RdmaDevice::open(region.fabric(), opened.map_err(unusable)?, config.rdma.isolation, bounds)
        .map_err(unusable)?;
    if config.max_batch_bytes > device.max_message_bytes() {
        let bound = format!("at most {}, the largest message of {}", device.max_message_bytes(), device.device());
        return Err(OutOfBounds::new("max_batch_bytes", config.max_batch_bytes, bound).into());
    }
    warn_if_moved(before, nodes());
    tracing::info!(device = device.device(), isolation = device.isolation(), "RDMA");
    Ok(Some(device))
}

/// NUMA node of each page of the region; `None` for a page that is not in memory.
type Nodes = io::Result<Vec<Option<u32>>>;

/// Logs a warning if the kernel moved pages in order to pin them.
fn warn_if_moved(before: Nodes, after: Nodes) {
    match (before, after) {
        (Ok(before), Ok(after)) => {
            let pages = before.len();
            let moved = before.iter().zip(after).filter(|(was, is)| was.is_some() && *was != is).count();
            if moved > 0 {
                let hint = "the kernel moved the region to another NUMA node to pin it: see cxl.numa_node";
                tracing::warn!(moved, pages, "{hint}");
            }
        }
        // Containers are often not allowed to ask.
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "cannot see whether the kernel moved the region to pin it");
        }
    }
}
