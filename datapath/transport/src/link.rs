//! The client's ends of a connection.

use crate::SendBuffer;
use crate::rdma::RdmaClient;
use crate::tcp::SocketOptions;
use embarcadero_wire::batch::BatchBuilder;
use embarcadero_wire::{BatchHeader, Deliver, ErrorCode, FRAME_BYTES, Frame, WireError};
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

/// What a client connects with.
pub struct LinkOptions {
    /// How long connecting may take.
    pub timeout: Duration,
    /// Kernel buffers.
    pub sockets: SocketOptions,
    /// Largest batch that a publisher sends, header and body, bytes.
    pub batch_bytes: usize,
    /// A publisher's batches are acknowledged; without that it learns from the transport when one is sent.
    pub acknowledged: bool,
    /// Bytes of the ring into which a NIC writes a subscriber's deliveries.
    pub ring_bytes: usize,
    /// The device, for connections over RDMA.
    pub device: Option<Arc<RdmaClient>>,
}

/// Why a client's connection ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// It broke, or the broker closed it.
    #[error(transparent)]
    Lost(#[from] io::Error),
    /// The broker refuses and closes.
    #[error("{text}")]
    Refused {
        /// Kind of refusal; `None` for one that this build does not know.
        code: Option<ErrorCode>,
        /// What the broker says.
        text: String,
        /// See `ErrorFrame::detail`.
        detail: u64,
    },
    /// The broker does not speak the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// A publisher's end of a connection. Never blocks.
pub trait PublisherLink {
    /// Hands a sealed batch, of which `written` bytes are handed over, to the transport; returns how many it took, which is
    /// 0 when the batch has to wait. [`PublisherLink::flush`] must follow the last. The batch is read in place until it
    /// is acknowledged, or as long as [`PublisherLink::batches_in_use`] says.
    ///
    /// # Errors
    /// The connection is lost.
    fn write(&mut self, batch: &mut BatchBuilder<SendBuffer>, written: usize) -> io::Result<usize>;

    /// Sends what [`PublisherLink::write`] took.
    ///
    /// # Errors
    /// The connection is lost.
    fn flush(&mut self) -> io::Result<()>;

    /// Adds the frames that have come to `frames`, as many as there are or 64.
    ///
    /// # Errors
    /// [`LinkError`]; frames that came before are added.
    fn poll(&mut self, frames: &mut Vec<Frame>) -> Result<(), LinkError>;

    /// Of a link without acknowledgements: batches that were handed over and may still be read, the newest ones.
    fn batches_in_use(&mut self) -> usize;

    /// Has [`PublisherLink::descriptors`] become ready for what comes from now on. What came before shows on a last
    /// poll.
    ///
    /// # Errors
    /// The device is gone.
    fn arm(&mut self) -> io::Result<()>;

    /// What to wait for, and whether for room to write too: that is asked for by `writable`.
    fn descriptors(&self, writable: bool) -> impl Iterator<Item = (RawFd, bool)> + use<Self>;
}

/// What came to a subscriber.
#[derive(Debug)]
pub enum Item {
    /// Nothing (more) now.
    Nothing,
    /// A control frame.
    Frame(Frame),
    /// A batch: the frame that it came under, its header, and where its body lies in [`SubscriberLink::bytes`].
    Batch(Deliver, BatchHeader, Range<usize>),
}

/// A subscriber's end of a connection. Never blocks.
pub trait SubscriberLink {
    /// Takes what came next. It gives back the room of what was taken before.
    ///
    /// # Errors
    /// [`LinkError`].
    fn take(&mut self) -> Result<Item, LinkError>;

    /// What the body of the batch that was taken last lies in.
    fn bytes(&self) -> &[u8];

    /// Sends a control frame. False when there is no room for it now.
    ///
    /// # Errors
    /// The connection is lost.
    fn send(&mut self, frame: &[u8; FRAME_BYTES]) -> io::Result<bool>;

    /// As [`PublisherLink::arm`].
    ///
    /// # Errors
    /// The device is gone.
    fn arm(&mut self) -> io::Result<()>;

    /// What to wait for.
    fn descriptors(&self) -> impl Iterator<Item = RawFd> + use<Self>;
}
