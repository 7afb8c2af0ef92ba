//! Spare segments for a leader whose predecessor may still write.

use embarcadero_cxl::Fabric;
use embarcadero_cxl::leadership::last_active;
use embarcadero_cxl::order_index::{StreamId, is_open};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::segment::{PoolError, SegmentAllocator};
use embarcadero_cxl::topic_table::TopicRows;
use embarcadero_wire::Stream;

/// Takes one segment from `pool` for each global order index that the predecessor was filling.
///
/// # Errors
/// [`PoolError`] when the pool has too few. Those taken so far go back.
pub(crate) fn spare_segments<F: Fabric>(
    region: &Region<F>,
    pool: &dyn SegmentAllocator,
) -> Result<Vec<u32>, PoolError> {
    let Some((area, _)) = last_active(region) else { return Ok(Vec::new()) };
    let mut spares = Vec::new();
    // A topic whose row is damaged is not continued, and needs no spare.
    for topic in TopicRows::read(region, area).live {
        let id = StreamId { topic: topic.id, stream: Stream::GLOBAL };
        if !topic.order.is_global() || !is_open(region, id, area) {
            continue;
        }
        match pool.allocate() {
            Ok(spare) => spares.push(spare),
            Err(error) => {
                for spare in spares {
                    if let Err(error) = pool.release(spare) {
                        tracing::error!(segment = spare, %error, "a spare segment could not be returned");
                    }
                }
                return Err(error);
            }
        }
    }
    Ok(spares)
}
