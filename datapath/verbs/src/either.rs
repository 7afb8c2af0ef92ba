//! Dispatch between the two kinds of device.

/// Evaluates an expression for the object of either kind that an enumeration holds.
macro_rules! either {
    ($value:expr, $kind:ident, $inner:ident => $result:expr) => {
        match $value {
            #[cfg(rdma)]
            $kind::Hardware($inner) => $result,
            $kind::Software($inner) => $result,
        }
    };
}
pub(crate) use either;

/// Error of a call that mixes objects of two devices.
#[cfg(rdma)]
pub(crate) fn of_another_device() -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidInput, "the object belongs to another device")
}
