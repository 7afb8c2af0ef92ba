//! Maintenance for dead brokers.
//!
//! While a broker's process is gone, the leader does for it what the broker would do when idle. So its memory comes
//! back without it.

use crate::delegation::{Delegation, FlushGroup};
use crate::topics::TopicTable;
use crossbeam_channel::bounded;
use embarcadero_cxl::broker_table::last_incarnation;
use embarcadero_cxl::order_index::{StreamId, read_extent};
use embarcadero_cxl::owner::{SegmentUse, read_owner};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::segment::SegmentAllocator;
use embarcadero_cxl::{Damage, Fabric, Row};
use embarcadero_os::Times;
use embarcadero_wire::{BrokerId, Incarnation, Stream};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Returns the brokers that hold segments, one bit each. A segment whose owner entry is damaged may be held by any broker
/// that ever ran. The log names such a segment once; `reported` has those that it named.
pub(crate) fn holders<F: Fabric>(region: &Region<F>, reported: &mut BTreeSet<u32>) -> u64 {
    let geometry = region.geometry();
    let ever_ran = || {
        let ran = geometry.brokers().filter(|broker| last_incarnation(region, *broker) > Incarnation::NONE);
        ran.fold(0, |mask, broker| mask | 1 << broker.0)
    };
    let mut mask = 0;
    for segment in 0..geometry.segment_count {
        let damage = match read_owner(region, segment) {
            // A torn row is being changed by its holder, or was when the holder died: it names nobody.
            Row::Unused | Row::Unsettled | Row::Used(SegmentUse::Free) => continue,
            Row::Used(SegmentUse::Blog { broker, .. } | SegmentUse::Index { holder: broker, .. })
                if broker.0 < geometry.max_brokers =>
            {
                mask |= 1 << broker.0;
                continue;
            }
            Row::Used(SegmentUse::Blog { broker, .. } | SegmentUse::Index { holder: broker, .. }) => Damage {
                structure: "OwnerLine",
                at: region.layout().owner(segment),
                what: "holder",
                value: broker.0.into(),
            },
            Row::Damaged(damage) => damage,
        };
        if reported.insert(segment) {
            tracing::error!(segment, %damage, "the segment stays in use: nobody knows who holds it");
        }
        mask |= ever_ran();
    }
    mask
}

/// Fewest index entries that one round of maintenance looks at.
const ROUND_ENTRIES: u64 = 4096;

/// Applies retention to a dead broker's orders, and gives back segments that nobody needs. `pool` is the allocator that
/// the broker would use. The caller holds the claim on the broker's id, so no process of the broker does the same.
pub(crate) fn reap<F: Fabric>(region: &Region<F>, broker: BrokerId, pool: Arc<dyn SegmentAllocator>, now: Times) {
    let kept = |topic| {
        [Stream::GLOBAL, Stream::of(broker)]
            .map(|stream| read_extent(region, StreamId { topic, stream }))
            .into_iter()
            .flatten()
            .filter_map(|extent| {
                let damaged = |damage| tracing::error!(%broker, %damage, "an order of a dead broker is not trimmed");
                extent.batches(region).map_err(damaged).ok()
            })
            .max()
    };
    let entries = region.geometry().topics().filter_map(kept).max().unwrap_or(0);
    let topics = Arc::new(TopicTable::new(region.clone(), broker, pool));
    let ((_, queue), (acks, _)) = (bounded(1), bounded(1));
    let mut delegation = Delegation::new(topics, queue, vec![acks], FlushGroup::default()).of_dead_broker();
    for _ in 0..entries / ROUND_ENTRIES + 2 {
        delegation.maintain(now);
    }
}
