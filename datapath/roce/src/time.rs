//! Time, as the caller tells it.

/// Time in nanoseconds since a start that the caller chooses and never changes.
pub type Nanos = u64;
