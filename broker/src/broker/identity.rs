//! Claim on a broker id, which one process of a host has at a time.
//!
//! A lock decides, where all processes have the region by the same file or device node, else the heartbeat.

use super::BrokerError;
use embarcadero_cxl::broker_table::{BrokerInfo, read_broker, read_pulse};
use embarcadero_cxl::region::{BrokerLock, RegionError, RegionFile};
use embarcadero_wire::{BrokerId, OutOfBounds};
use std::path::Path;
use std::time::{Duration, Instant};

/// Time that a process which has the id gets to end.
const CLAIM_PATIENCE: Duration = Duration::from_millis(500);
/// Longest time for which the leader holds an id whose process has ended, to give back the memory that it left.
const REAP_PATIENCE: Duration = Duration::from_secs(30);
/// Time for which the heartbeat of a process that has the id by another device node is watched. A live one moves it at
/// least once a second, the largest `heartbeat_ms`.
const WATCH: Duration = Duration::from_secs(3);
/// Time between two attempts to claim an id, or two looks at a heartbeat.
const CLAIM_PERIOD: Duration = Duration::from_millis(5);

/// Claims an id. Waits for a moment if the leader holds it to reap a dead broker.
fn claim(file: &RegionFile, id: BrokerId) -> Result<BrokerLock, RegionError> {
    let lock = lock(file, id)?;
    check_elsewhere(file, id)?;
    Ok(lock)
}

/// Checks that no process has the id by another device node.
fn check_elsewhere(file: &RegionFile, id: BrokerId) -> Result<(), RegionError> {
    let row = read_broker(file.region(), id).used();
    if may_run_elsewhere(row.as_ref(), file.lock_node()?) && is_beating(file, id) {
        return Err(RegionError::BrokerIdTaken { broker: id });
    }
    Ok(())
}

/// Returns true if a row says that its broker runs, and locks its id by another file or device node than `own`. A lock
/// that this process gets then says nothing.
fn may_run_elsewhere(row: Option<&BrokerInfo>, own: u64) -> bool {
    row.is_some_and(|row| row.running && row.lock_node != own)
}

/// Watches the heartbeat of an id. Returns true as soon as it moves.
fn is_beating(file: &RegionFile, id: BrokerId) -> bool {
    let (begun, (first, _)) = (Instant::now(), read_pulse(file.region(), id));
    while begun.elapsed() < WATCH {
        std::thread::sleep(CLAIM_PERIOD);
        if read_pulse(file.region(), id).0 != first {
            return true;
        }
    }
    false
}

/// Locks an id, as [`claim`] does.
fn lock(file: &RegionFile, id: BrokerId) -> Result<BrokerLock, RegionError> {
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
        match file.claim_broker(id).and_then(|lock| check_elsewhere(file, id).map(|()| lock)) {
            Ok(lock) => return Ok((id, lock)),
            Err(RegionError::BrokerIdTaken { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(BrokerError::NoFreeId(max))
}

#[cfg(test)]
mod tests {
    use super::*;
    use embarcadero_cxl::broker_table::{Pulse, publish_broker};
    use embarcadero_cxl::cache::FlushMethod;
    use embarcadero_cxl::layout::{AllocatorKind, Geometry};
    use embarcadero_cxl::region::Creation;
    use embarcadero_wire::Incarnation;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn row(running: bool, lock_node: u64) -> BrokerInfo {
        let (id, incarnation, address) = (BrokerId(0), Incarnation(1), "127.0.0.1:1".parse().unwrap());
        BrokerInfo { id, incarnation, data: address, control: address, process_id: u32::MAX, running, lock_node }
    }

    #[test]
    fn a_lock_says_nothing_of_a_broker_that_runs_by_another_node() {
        assert!(!may_run_elsewhere(None, 7));
        assert!(!may_run_elsewhere(Some(&row(true, 7)), 7));
        assert!(!may_run_elsewhere(Some(&row(false, 8)), 7));
        assert!(may_run_elsewhere(Some(&row(true, 8)), 7));
    }

    /// Two device nodes of one region: each process gets the lock on an id.
    #[test]
    fn an_id_whose_heartbeat_moves_by_another_node_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("region");
        let geometry = Geometry {
            max_brokers: 2,
            max_leaders: 1,
            max_topics: 1,
            max_sessions: 1,
            batchlog_slots: 16,
            segment_count: 1,
            ..Geometry::with_segments_of(1 << 20, AllocatorKind::Bitmap)
        };
        let file = RegionFile::create(&path, &geometry, FlushMethod::None, Creation::default()).unwrap();
        let other = file.lock_node().unwrap() ^ 1;
        publish_broker(file.region(), &row(true, other));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut pulse = Pulse::new(file.region().clone(), BrokerId(0));
                while !done.load(Ordering::Relaxed) {
                    pulse.beat();
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            let wanted = claim_id(&file, Some(BrokerId(0)));
            let free = claim_id(&file, None).map(|(id, _)| id);
            done.store(true, Ordering::Relaxed);
            assert!(matches!(wanted, Err(BrokerError::Region(RegionError::BrokerIdTaken { broker: BrokerId(0) }))));
            assert!(matches!(free, Ok(BrokerId(1))), "{free:?}");
        });
        // It is silent now.
        assert_eq!(claim_id(&file, Some(BrokerId(0))).unwrap().0, BrokerId(0));
    }
}
