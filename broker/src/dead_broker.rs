//! What a broker left behind: while its process is gone, the leader does for it what it would do when idle, so that memory
//! comes back without it.

use crate::delegation::{Delegation, FlushGroup};
use crate::topics::TopicTable;
use crossbeam_channel::bounded;
use embarcadero_cxl::order_index::{StreamId, read_extent};
use embarcadero_cxl::owner::{SegmentUse, read_owner};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::segment::SegmentAllocator;
use embarcadero_cxl::{Fabric, Row};
use embarcadero_wire::{BrokerId, Stream};
use std::sync::Arc;

/// Brokers that hold segments, a bit each.
pub fn holders<F: Fabric>(region: &Region<F>) -> u64 {
    let holder = |segment| match read_owner(region, segment) {
        Row::Used(SegmentUse::Blog { broker, .. } | SegmentUse::Index { holder: broker, .. }) => 1 << broker.0,
        _ => 0,
    };
    (0..region.geometry().segment_count).fold(0, |mask, segment| mask | holder(segment))
}

/// Index entries that a round of maintenance looks at, at least.
const ROUND_ENTRIES: u64 = 4096;

/// Applies retention to what `broker` left, and gives back what nobody needs. The caller holds its claim on the id, so that
/// no process of the broker does the same; `pool` is the allocator that it would use.
pub fn reap<F: Fabric>(region: &Region<F>, broker: BrokerId, pool: Arc<dyn SegmentAllocator>, now_us: u64) {
    let kept = |topic| {
        [Stream::GLOBAL, Stream::of(broker)]
            .map(|stream| read_extent(region, StreamId { topic, stream }))
            .into_iter()
            .flatten()
            .map(|extent| extent.committed.saturating_sub(extent.trimmed))
            .max()
    };
    let entries = region.geometry().topics().filter_map(kept).max().unwrap_or(0);
    let topics = Arc::new(TopicTable::new(region.clone(), broker, pool));
    let ((_, queue), (acks, _)) = (bounded(1), bounded(1));
    let mut delegation = Delegation::new(topics, queue, vec![acks], FlushGroup::default());
    for _ in 0..entries / ROUND_ENTRIES + 2 {
        delegation.maintain(now_us);
    }
}
