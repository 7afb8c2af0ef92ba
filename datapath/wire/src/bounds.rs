//! The error of a value that is out of bounds, wherever it was set.

/// A configured value that is out of its bounds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} is {value}; it must be {bound}")]
pub struct OutOfBounds {
    /// Name of the setting, with the sections that it is in: `cxl.segment_bytes`.
    pub key: &'static str,
    /// The value that was found.
    pub value: String,
    /// What is allowed, as it follows "it must be".
    pub bound: String,
}

impl OutOfBounds {
    /// The error of `key`, which is `value` and must be `bound`.
    pub fn new(key: &'static str, value: impl ToString, bound: impl Into<String>) -> Self {
        Self { key, value: value.to_string(), bound: bound.into() }
    }
}

/// Checks that a number is within its bounds, both allowed.
///
/// # Errors
/// [`OutOfBounds`] when it is not.
pub fn within<T: PartialOrd + ToString>(key: &'static str, value: T, low: T, high: T) -> Result<(), OutOfBounds> {
    if value >= low && value <= high {
        return Ok(());
    }
    Err(OutOfBounds::new(key, value, format!("{} to {}", low.to_string(), high.to_string())))
}
