//! Identity of a NIC in software.

use super::memory::Keys;
use embarcadero_roce::Nanos;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

/// Properties of a NIC that its ports and queue pairs need.
pub(super) struct Identity {
    /// Name of the device.
    pub name: String,
    /// IP address of the NIC.
    pub address: IpAddr,
    /// Bytes per second of the link.
    pub line_rate: f64,
    /// Keys to registered memory.
    pub keys: Arc<Keys>,
    begun: Instant,
}

impl Identity {
    pub(super) fn new(name: String, address: IpAddr, line_rate: f64) -> Self {
        Self { name, address, line_rate, keys: Arc::default(), begun: Instant::now() }
    }

    /// Nanoseconds since the NIC was opened.
    pub(super) fn now(&self) -> Nanos {
        self.begun.elapsed().as_nanos() as Nanos
    }
}
