//! A broker in this process, on a region of its own, for examples and for tests of clients.

use embarcadero_broker::{Broker, BrokerConfig, BrokerError};
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::{AllocatorKind, Geometry};
use embarcadero_cxl::region::{Creation, RegionError, RegionFile};
use embarcadero_wire::OutOfBounds;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes of the region.
const REGION_BYTES: u64 = 256 << 20;
/// Bytes of each of its segments.
const SEGMENT_BYTES: u64 = 1 << 20;

/// Reason why no broker was started.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The region is too small for its tables.
    #[error(transparent)]
    Geometry(#[from] OutOfBounds),
    /// The region cannot be made.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The broker does not start.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// Running broker. Dropping it stops the broker and removes the region.
pub struct LocalBroker {
    broker: Broker,
    region: PathBuf,
}

impl LocalBroker {
    /// Makes a region in /dev/shm and starts a broker on free ports of loopback.
    ///
    /// # Errors
    /// [`LocalError`].
    pub fn start() -> Result<Self, LocalError> {
        static REGIONS: AtomicU32 = AtomicU32::new(0);
        let number = REGIONS.fetch_add(1, Ordering::Relaxed);
        let region = PathBuf::from(format!("/dev/shm/embarcadero-local-{}-{number}", std::process::id()));
        let geometry = Geometry::with_segments_of(SEGMENT_BYTES, AllocatorKind::Bitmap).fit(REGION_BYTES)?;
        RegionFile::create(&region, &geometry, FlushMethod::None, Creation::default())?;
        let mut config = BrokerConfig {
            data_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            control_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            ..BrokerConfig::default()
        };
        config.cxl.path.clone_from(&region);
        match Broker::start(config) {
            Ok(broker) => Ok(Self { broker, region }),
            Err(error) => {
                // It is ours, and of no use.
                let _ = std::fs::remove_file(&region);
                Err(error.into())
            }
        }
    }

    /// Returns the address of the control plane, `host:port`.
    #[must_use]
    pub fn control(&self) -> String {
        self.broker.info().control.to_string()
    }
}

impl Drop for LocalBroker {
    fn drop(&mut self) {
        self.broker.stop();
        let _ = std::fs::remove_file(&self.region);
    }
}
