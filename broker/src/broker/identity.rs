//! Claim on a broker id, which one process of a host has at a time.

use super::BrokerError;
use embarcadero_cxl::broker_table::read_broker;
use embarcadero_cxl::region::{BrokerLock, RegionError, RegionFile};
use embarcadero_wire::{BrokerId, OutOfBounds};
use std::path::Path;
use std::time::{Duration, Instant};

/// Time that a process which has the id gets to end.
const CLAIM_PATIENCE: Duration = Duration::from_millis(500);
/// Longest time for which the leader holds an id whose process has ended, to give back the memory that it left.
const REAP_PATIENCE: Duration = Duration::from_secs(30);
/// Time between two attempts to claim an id.
const CLAIM_PERIOD: Duration = Duration::from_millis(5);

/// Claims an id. Waits for a moment if the leader holds it to reap a dead broker.
fn claim(file: &RegionFile, id: BrokerId) -> Result<BrokerLock, RegionError> {
    let begun = Instant::now();
    loop {
        let patience = if is_running(file, id) { CLAIM_PATIENCE } else { REAP_PATIENCE };
        match file.claim_broker(id) {
            Err(RegionError::BrokerIdTaken { .. }) if begun.elapsed() < patience => std::thread::sleep(CLAIM_PERIOD),
            claimed => return claimed,
        }
    }
}

/// Returns true when the process that the broker table names for the id exists and has not left.
fn is_running(file: &RegionFile, id: BrokerId) -> bool {
    let info = read_broker(file.region(), id).used();
    info.is_some_and(|info| info.running && Path::new("/proc").join(info.process_id.to_string()).exists())
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
