//! Error of a value that is out of bounds, for every setting and every format.

/// Value that is out of its bounds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} is {value}; it must be {bound}")]
pub struct OutOfBounds {
    /// Name of the setting with its sections, such as `cxl.segment_bytes`.
    pub key: &'static str,
    /// Value that was found.
    pub value: String,
    /// Values that are allowed; the text follows "it must be".
    pub bound: String,
}

impl OutOfBounds {
    /// Error of the setting `key`, whose value is `value` and must be `bound`.
    pub fn new(key: &'static str, value: impl ToString, bound: impl Into<String>) -> Self {
        Self { key, value: value.to_string(), bound: bound.into() }
    }
}

/// Checks that `low <= value <= high`.
///
/// # Errors
/// [`OutOfBounds`] when it is not.
pub fn within<T: PartialOrd + ToString>(key: &'static str, value: T, low: T, high: T) -> Result<(), OutOfBounds> {
    if value >= low && value <= high {
        return Ok(());
    }
    Err(OutOfBounds::new(key, value, format!("{} to {}", low.to_string(), high.to_string())))
}
