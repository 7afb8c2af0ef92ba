//! Claim on a broker id, which one process of a host has at a time.

use super::BrokerError;
use embarcadero_cxl::region::{BrokerLock, RegionError, RegionFile};
use embarcadero_wire::{BrokerId, OutOfBounds};
use std::time::{Duration, Instant};

/// Longest time for which the leader holds the id of a dead broker while it reaps that broker.
const CLAIM_PATIENCE: Duration = Duration::from_millis(500);

/// Claims an id. Waits for a moment if the leader holds it to reap a dead broker.
fn claim(file: &RegionFile, id: BrokerId) -> Result<BrokerLock, RegionError> {
    let begun = Instant::now();
    loop {
        match file.claim_broker(id) {
            Err(RegionError::BrokerIdTaken { .. }) if begun.elapsed() < CLAIM_PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            claimed => return claimed,
        }
    }
}

/// Claims the id that is `wanted`, else the first that is free.
///
/// # Errors
/// [`BrokerError`] when the id is taken or out of range, or no id is free.
pub(super) fn claim_id(file: &RegionFile, wanted: Option<BrokerId>) -> Result<(BrokerId, BrokerLock), BrokerError> {
    let max = file.region().geometry().max_brokers;
    if let Some(id) = wanted {
        if id.0 >= max {
            return Err(OutOfBounds::new("id", id, format!("0 to {}, the region's max_brokers - 1", max - 1)).into());
        }
        return Ok((id, claim(file, id)?));
    }
    for id in file.region().geometry().brokers() {
        match file.claim_broker(id) {
            Ok(lock) => return Ok((id, lock)),
            Err(RegionError::BrokerIdTaken { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(BrokerError::NoFreeId(max))
}
