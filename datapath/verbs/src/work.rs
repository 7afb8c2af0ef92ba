//! Work requests, over any kind of memory window.

use crate::range::{LocalRange, RemoteRange};
use std::io;

/// Largest number of work requests that one call posts. They share one write to the NIC's doorbell register.
pub const DOORBELL: usize = 16;

/// Operation of a work request. `W` is a memory window.
pub enum Work<'a, W> {
    /// Sends bytes that the request carries in itself.
    Send(&'a [u8]),
    /// Writes bytes that the request carries in itself to memory of the peer, with immediate data if there are any.
    WriteInline(&'a [u8], RemoteRange, Option<u32>),
    /// Writes registered bytes, or none, to memory of the peer, with immediate data if there are any.
    Write(Option<LocalRange>, RemoteRange, Option<u32>),
    /// Opens a memory window to the peer. It is open when a later request of this queue pair reaches the peer.
    Open(&'a W),
}

/// Work request. `W` is a memory window.
pub struct Request<'a, W> {
    /// Number of the caller's choice, below 2^63; the completion has it. Ids of a queue pair's requests never fall.
    pub id: u64,
    /// True when success has a completion too. Failure always has one.
    pub signaled: bool,
    /// Operation to carry out.
    pub work: Work<'a, W>,
}

impl<W> Clone for Work<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for Work<'_, W> {}

impl<W> Clone for Request<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for Request<'_, W> {}

impl<'a, W> Request<'a, W> {
    /// Replaces the window, if there is one, by what `choose` makes of it.
    pub(crate) fn with_window<V>(self, choose: impl FnOnce(&'a W) -> io::Result<&'a V>) -> io::Result<Request<'a, V>> {
        let Self { id, signaled, work } = self;
        let work = match work {
            Work::Send(bytes) => Work::Send(bytes),
            Work::WriteInline(bytes, to, immediate) => Work::WriteInline(bytes, to, immediate),
            Work::Write(from, to, immediate) => Work::Write(from, to, immediate),
            Work::Open(window) => Work::Open(choose(window)?),
        };
        Ok(Request { id, signaled, work })
    }
}
