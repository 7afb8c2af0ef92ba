//! Options of a client's connections.

use crate::rdma::RdmaClient;
use crate::tcp::SocketOptions;
use std::sync::Arc;
use std::time::Duration;

/// Options of a client's connections.
pub struct LinkOptions {
    /// Longest wait for each step of connecting: the socket, and a broker's answer to a queue pair.
    pub timeout: Duration,
    /// Sizes of kernel buffers.
    pub sockets: SocketOptions,
    /// Largest batch that a publisher sends, header and body, bytes.
    pub batch_bytes: usize,
    /// True when the broker acknowledges a publisher's batches. Otherwise the publisher learns from the transport when
    /// a batch is sent.
    pub acknowledged: bool,
    /// Bytes of the ring into which a NIC writes a subscriber's deliveries.
    pub ring_bytes: usize,
    /// Device for connections over RDMA; `None` for TCP.
    pub device: Option<Arc<RdmaClient>>,
}
