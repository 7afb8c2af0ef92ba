//! Choice of the RDMA device that a client's configuration asks for.

use crate::config::ClientConfig;
use crate::error::ClientError;
use embarcadero_transport::TransportKind;
use embarcadero_transport::rdma::RdmaClient;
use embarcadero_verbs::{Context, VerbsError};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::Arc;

/// Largest batch that is still in the core's own cache when it is sent, bytes. Larger batches save a NIC in software
/// nothing, as its costs are per packet (`docs/performance/lab-notes/2026-11-26-software-nics.md`).
const CACHED_BATCH: usize = 128 << 10;

/// Upper bound of batch sizes under load, bytes; `None` where the transport sets none.
pub(crate) fn loaded_batch_bytes(transport: TransportKind) -> Option<usize> {
    match transport {
        TransportKind::Roce | TransportKind::Dpdk => Some(CACHED_BATCH),
        TransportKind::Tcp | TransportKind::Verbs => None,
    }
}

/// Opens the first of the configured devices that can be used. With `roce` and `dpdk` this process is the device.
pub(crate) fn open(config: &ClientConfig) -> Result<Arc<RdmaClient>, ClientError> {
    let unusable =
        |source: VerbsError| ClientError::Device { transport: config.transport.name(), source: Arc::new(source) };
    let found = match config.transport {
        TransportKind::Roce => Context::software(config.roce.address.or_else(|| address_towards(&config.bootstrap))),
        TransportKind::Dpdk => Context::dpdk(&config.dpdk),
        TransportKind::Tcp | TransportKind::Verbs => match &config.rdma.devices[..] {
            [] => Context::find(None),
            [first, others @ ..] => others
                .iter()
                .fold(Context::find(Some(first)), |found, other| found.or_else(|_| Context::find(Some(other)))),
        },
    };
    let (context, port) = found.map_err(unusable)?;
    let failed = context.error("make a protection domain");
    RdmaClient::new((context, port)).map_err(|error| unusable(failed(error)))
}

/// Address of this host from which it reaches one of the endpoints.
fn address_towards(endpoints: &[String]) -> Option<IpAddr> {
    let towards = |to: SocketAddr| {
        // Nothing is sent: connecting only chooses a route.
        let any = if to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect(to).ok()?;
        socket.local_addr().ok().map(|address| address.ip())
    };
    endpoints.iter().filter_map(|endpoint| endpoint.to_socket_addrs().ok()).flatten().find_map(towards)
}
