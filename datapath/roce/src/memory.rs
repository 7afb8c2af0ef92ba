//! Memory that peers reach, as the protocol sees it.

use crate::packet::Reth;

/// Kind of access to memory that a peer requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Access {
    Read,
    Write,
}

/// Refusal of access to memory: the key is unknown, is another's, or does not cover the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the key gives no right to that memory")]
pub struct NoAccess;

/// Memory that peers reach with keys. Rights are checked for every packet, so that they end when they are taken away.
pub trait Memory {
    /// Checks that the peer of `queue_pair` may access all bytes of `remote`.
    ///
    /// # Errors
    /// [`NoAccess`].
    fn check(&self, queue_pair: u32, remote: Reth, access: Access) -> Result<(), NoAccess>;

    /// Writes all of `bytes` for the peer of `queue_pair`, or nothing.
    ///
    /// # Errors
    /// [`NoAccess`].
    fn write(&mut self, queue_pair: u32, rkey: u32, address: u64, bytes: &[u8]) -> Result<(), NoAccess>;

    /// Appends all bytes of `remote` to `into` for the peer of `queue_pair`.
    ///
    /// # Errors
    /// [`NoAccess`]; nothing is appended then.
    fn read(&self, queue_pair: u32, remote: Reth, into: &mut Vec<u8>) -> Result<(), NoAccess>;
}
