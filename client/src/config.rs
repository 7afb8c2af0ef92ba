//! What a client is told.

use embarcadero_transport::TransportKind;
use embarcadero_verbs::{DpdkConfig, RoceConfig};
use embarcadero_wire::{OutOfBounds, within};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// RDMA verbs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RdmaConfig {
    /// Devices, as in /sys/class/infiniband, of which the first that is up is used; empty stands for all.
    pub devices: Vec<String>,
    /// Bytes of the ring into which a subscriber's deliveries are written; at least two of the largest batches.
    pub ring_bytes: usize,
}

impl Default for RdmaConfig {
    fn default() -> Self {
        Self { devices: Vec::new(), ring_bytes: 8 << 20 }
    }
}

/// A client's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ClientConfig {
    /// Control endpoints, `host:port`; any broker's will do.
    pub bootstrap: Vec<String>,
    /// How bytes travel.
    pub transport: TransportKind,
    /// RDMA verbs, where `transport` is `verbs`; its ring also with `roce` and `dpdk`.
    pub rdma: RdmaConfig,
    /// The NIC in software, where `transport` is `roce`.
    pub roce: RoceConfig,
    /// DPDK, where `transport` is `dpdk`.
    pub dpdk: DpdkConfig,
    /// Acknowledgement level: 0 none, 1 ordered and visible.
    pub ack_level: u8,
    /// Bytes of a batch, header included, whatever the load. Unset, batches have `batch_size_min` to `batch_size_max`
    /// bytes, by load.
    pub batch_size: Option<usize>,
    /// Bytes of a batch under light load, header included.
    pub batch_size_min: usize,
    /// Bytes of a batch under heavy load, or with a large message, at most; brokers may allow less (`max_batch_bytes`). With
    /// `roce` and `dpdk` load alone makes them no larger than 128 KiB.
    pub batch_size_max: usize,
    /// Bytes that a publisher may hold until they are acknowledged.
    pub buffer_bytes: usize,
    /// Give each batch a checksum over its body.
    pub batch_checksum: bool,
    /// Publish to at most this many brokers; 0 uses all.
    pub max_brokers: usize,
    /// How long to wait for a connection, milliseconds.
    pub connect_timeout_ms: u64,
    /// How long `flush` and waiting calls wait without progress, milliseconds.
    pub progress_timeout_ms: u64,
    /// SO_SNDBUF and SO_RCVBUF, bytes; unset leaves them to the kernel, on loopback to
    /// 512 KiB.
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
    /// Defaults, with one control endpoint.
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

    /// Bytes of the smallest and of the largest batch; the same where the size is fixed.
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
