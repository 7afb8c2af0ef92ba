//! Reasons why a broker cannot take over the region's order.

use embarcadero_cxl::Damage;
use embarcadero_cxl::segment::PoolError;

/// Reason why a broker cannot take over.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// The mirror has no segment for the copy of an order index. The region itself needs none for a takeover.
    #[error("the mirror has no room for the order: {0}")]
    Pool(#[from] PoolError),
    /// The region or the mirror is damaged.
    #[error("{0}; if it is the mirror's, recreate the mirror")]
    Damaged(#[from] Damage),
    /// Another broker claimed a higher term meanwhile, and may have given back what this one was reading.
    #[error("a higher term was claimed during the takeover")]
    Superseded,
}
