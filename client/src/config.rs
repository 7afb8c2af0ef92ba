//! Configuration of a client.

use embarcadero_transport::TransportKind;
use embarcadero_verbs::{DpdkConfig, RoceConfig};
use embarcadero_wire::{OutOfBounds, within};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Settings of RDMA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RdmaConfig {
    /// Names of devices, as in /sys/class/infiniband. The first that is up is used. Empty stands for all devices.
    pub devices: Vec<String>,
    /// Bytes of the ring into which a subscriber's deliveries are written, 64 KiB to 1 GiB. At least two of the largest
    /// batches must fit.
    pub ring_bytes: usize,
}

impl Default for RdmaConfig {
    fn default() -> Self {
        Self { devices: Vec::new(), ring_bytes: 8 << 20 }
    }
}

/// Configuration of a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ClientConfig {
    /// Control endpoints of brokers, `host:port`, 1 to 1024. One that answers is enough to find the others.
    pub bootstrap: Vec<String>,
    /// Transport of batches and deliveries.
    pub transport: TransportKind,
    /// Settings of RDMA. `devices` counts where `transport` is `verbs`; `ring_bytes` with `roce` and `dpdk` too.
    pub rdma: RdmaConfig,
    /// Settings of the NIC in software, where `transport` is `roce`.
    pub roce: RoceConfig,
    /// Settings of DPDK, where `transport` is `dpdk`.
    pub dpdk: DpdkConfig,
    /// Acknowledgement level: 0 none, 1 ordered and visible, 2 also on the disks of all replicas.
    pub ack_level: u8,
    /// Fixed size of a batch, bytes, header included, 1 KiB to 64 MiB. If unset, the size follows the load between
    /// `batch_size_min` and `batch_size_max`.
    pub batch_size: Option<usize>,
    /// Size of a batch under light load, bytes, header included, 1 KiB to 64 MiB.
    pub batch_size_min: usize,
    /// Largest size of a batch, bytes, header included, `batch_size_min` to 64 MiB. Heavy load or a large message needs it.
    /// Brokers may allow less (`max_batch_bytes`). With `roce` and `dpdk`, load alone grows batches to at most 128 KiB.
    pub batch_size_max: usize,
    /// Most bytes that a publisher holds until they are acknowledged, two of the largest batches to 64 GiB.
    pub buffer_bytes: usize,
    /// True to give each batch a checksum over its body.
    pub batch_checksum: bool,
    /// Most brokers that one publisher sends to; 0 for all.
    pub max_brokers: usize,
    /// Longest wait for a connection, milliseconds, 1 to 600,000. Control calls wait as long for a leader, and 5 s at least.
    pub connect_timeout_ms: u64,
    /// Longest wait of `flush` and of waiting calls without any progress, milliseconds, 1 to 86,400,000.
    pub progress_timeout_ms: u64,
    /// Size of SO_SNDBUF and SO_RCVBUF, bytes. If unset, the kernel chooses; on loopback it is 512 KiB.
    pub socket_buffer_bytes: Option<usize>,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            bootstrap: vec!["127.0.0.1:7000".to_owned()],
            transport: TransportKind::Tcp,
            rdma: RdmaConfig::default(),
            roce: RoceConfig::default(),
            dpdk: DpdkConfig::default(),
            ack_level: 1,
            batch_size: None,
            batch_size_min: 64 << 10,
            batch_size_max: 4 << 20,
            buffer_bytes: 16 << 20,
            batch_checksum: true,
            max_brokers: 0,
            connect_timeout_ms: 2000,
            progress_timeout_ms: 30_000,
            socket_buffer_bytes: None,
        }
    }
}

impl ClientConfig {
    /// Configuration with one control endpoint, and defaults for the rest.
    #[must_use]
    pub fn at(endpoint: impl Into<String>) -> Self {
        Self { bootstrap: vec![endpoint.into()], ..Self::default() }
    }

    /// Checks every bound.
    ///
    /// # Errors
    /// The first value that is out of bounds.
    pub fn validate(&self) -> Result<(), OutOfBounds> {
        within("bootstrap (number of endpoints)", self.bootstrap.len(), 1, 1024)?;
        within("ack_level", self.ack_level, 0, 2)?;
        let (least, most) = self.batch_bytes();
        match self.batch_size {
            Some(bytes) => within("batch_size", bytes, 1024, 64 << 20)?,
            None => {
                within("batch_size_min", least, 1024, 64 << 20)?;
                within("batch_size_max", most, least, 64 << 20)?;
            }
        }
        within("buffer_bytes", self.buffer_bytes, 2 * most, 64 << 30)?;
        within("rdma.ring_bytes", self.rdma.ring_bytes, 64 << 10, 1 << 30)?;
        self.dpdk.validate()?;
        within("connect_timeout_ms", self.connect_timeout_ms, 1, 600_000)?;
        within("progress_timeout_ms", self.progress_timeout_ms, 1, 86_400_000)
    }

    /// Bytes of the smallest and of the largest batch. Both are equal where the size is fixed.
    pub(crate) fn batch_bytes(&self) -> (usize, usize) {
        self.batch_size.map_or((self.batch_size_min, self.batch_size_max), |fixed| (fixed, fixed))
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub(crate) fn progress_timeout(&self) -> Duration {
        Duration::from_millis(self.progress_timeout_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_bounds_are_named() {
        ClientConfig::default().validate().unwrap();
        let error = ClientConfig { batch_size: Some(10), ..ClientConfig::default() }.validate().unwrap_err();
        assert_eq!(error.to_string(), "batch_size is 10; it must be 1024 to 67108864");
        let error = ClientConfig { batch_size_max: 1024, ..ClientConfig::default() }.validate().unwrap_err();
        assert_eq!(error.to_string(), "batch_size_max is 1024; it must be 65536 to 67108864");
        assert!(serde_yaml::from_str::<ClientConfig>("batch_sise: 4096").is_err());
    }
}
