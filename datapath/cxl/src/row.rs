//! Rows of the region's tables as one read found them, and damage.

use crate::offset::RegionOffset;

/// Contents of the region that no writer of this layout makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the region is damaged: {structure} at byte {at}: {what} is {value:#x}", at = at.0)]
pub struct Damage {
    /// Name of the structure.
    pub structure: &'static str,
    /// Position of the structure, or of the byte, in the region.
    pub at: RegionOffset,
    /// Name of the part that is wrong.
    pub what: &'static str,
    /// Value of that part.
    pub value: u64,
}

/// Row of a table, as one read found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row<T> {
    /// The row was never written.
    Unused,
    /// The writer is changing the row, or died in the middle of a change.
    Unsettled,
    /// The row has contents that no writer makes.
    Damaged(Damage),
    /// The row is whole.
    Used(T),
}

impl<T> Row<T> {
    /// Returns the contents of a row that is whole. For callers who leave every other row alone.
    #[inline]
    #[must_use]
    pub fn used(self) -> Option<T> {
        match self {
            Self::Used(contents) => Some(contents),
            Self::Unused | Self::Unsettled | Self::Damaged(_) => None,
        }
    }

    /// Decodes the contents of a row that is whole.
    #[inline]
    pub fn decode<U>(self, decode: impl FnOnce(T) -> Result<U, Damage>) -> Row<U> {
        match self {
            Self::Unused => Row::Unused,
            Self::Unsettled => Row::Unsettled,
            Self::Damaged(damage) => Row::Damaged(damage),
            Self::Used(contents) => match decode(contents) {
                Ok(contents) => Row::Used(contents),
                Err(damage) => Row::Damaged(damage),
            },
        }
    }
}
