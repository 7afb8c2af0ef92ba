//! Reasons why a broker cannot take over the region's order.

use embarcadero_cxl::Damage;
use embarcadero_cxl::segment::PoolError;

/// Reason why a broker cannot take over.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// The predecessor may go on, and fills a segment of an order index. There is no other segment to continue in.
    #[error("the order index has no room to go on in: {0}")]
    Pool(#[from] PoolError),
    /// The region or the mirror is damaged.
    #[error("{0}; if it is the mirror's, recreate the mirror")]
    Damaged(#[from] Damage),
    /// Another broker claimed a higher term meanwhile, and may have given back what this one was reading.
    #[error("a higher term was claimed during the takeover")]
    Superseded,
}
