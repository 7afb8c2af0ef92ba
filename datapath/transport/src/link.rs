//! Client's ends of a connection: the traits of a publisher's and of a subscriber's.

use crate::send_buffer::SendBuffer;
use embarcadero_wire::batch::BatchBuilder;
use embarcadero_wire::{BatchHeader, Deliver, ErrorCode, FRAME_BYTES, Frame, WireError};
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;

/// Reason for which a client's connection ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The connection broke, or the broker closed it.
    #[error(transparent)]
    Lost(#[from] io::Error),
    /// The broker refuses and closes.
    #[error("{text}")]
    Refused {
        /// Kind of refusal; `None` for one that this build does not know.
        code: Option<ErrorCode>,
        /// Text of the broker.
        text: String,
        /// Value of [`embarcadero_wire::ErrorFrame::detail`].
        detail: u64,
    },
    /// The broker does not speak the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Publisher's end of a connection. Never blocks.
pub trait PublisherLink {
    /// Hands a sealed batch to the transport, from byte `written` on. Returns the number of bytes that the transport took,
    /// which is 0 when the batch has to wait.
    ///
    /// [`PublisherLink::flush`] must follow the last batch. The batch is read in place until it is acknowledged, or as long
    /// as [`PublisherLink::batches_in_use`] counts it.
    ///
    /// # Errors
    /// The connection is lost.
    fn write(&mut self, batch: &mut BatchBuilder<SendBuffer>, written: usize) -> io::Result<usize>;

    /// Sends the batches that [`PublisherLink::write`] took.
    ///
    /// # Errors
    /// The connection is lost.
    fn flush(&mut self) -> io::Result<()>;

    /// Appends the frames that have come to `frames`.
    ///
    /// # Errors
    /// [`LinkError`]. Frames that came before it are appended.
    fn poll(&mut self, frames: &mut Vec<Frame>) -> Result<(), LinkError>;

    /// Number of batches that were handed over and may still be read in place, counted from the newest. Only for
    /// connections without acknowledgements.
    fn batches_in_use(&mut self) -> usize;

    /// Makes [`PublisherLink::descriptors`] ready when something comes from now on. What came before is found by one more
    /// [`PublisherLink::poll`].
    ///
    /// # Errors
    /// The device is gone.
    fn arm(&mut self) -> io::Result<()>;

    /// Descriptors to wait for. The flag beside each asks for room to write too, which is wanted where `writable` is set
    /// and the transport writes to that descriptor.
    fn descriptors(&self, writable: bool) -> impl Iterator<Item = (RawFd, bool)> + use<Self>;
}

/// Item that came to a subscriber.
#[derive(Debug)]
pub enum Item {
    /// Nothing more has come.
    Nothing,
    /// A control frame.
    Frame(Frame),
    /// A batch: its delivery frame, its header, and the range of its body in [`SubscriberLink::bytes`]. The header is an error
    /// if the bytes are none. The memory that the broker read is damaged then, and the connection is sound.
    Batch(Deliver, Result<BatchHeader, WireError>, Range<usize>),
}

/// Subscriber's end of a connection. Never blocks.
pub trait SubscriberLink {
    /// Takes the next item, and gives back the room of the one before.
    ///
    /// What has come is taken in bulk below this call, and later calls find it in memory. TCP reads up to 64 KiB ahead, and
    /// a queue pair collects all completions that are there. A call that handed out a list of items would have to keep the
    /// room of all of them until the last is read.
    ///
    /// # Errors
    /// [`LinkError`].
    fn take(&mut self) -> Result<Item, LinkError>;

    /// Memory in which the body of the batch taken last lies.
    fn bytes(&self) -> &[u8];

    /// Sends a control frame. Returns false when there is no room for it now.
    ///
    /// # Errors
    /// The connection is lost.
    fn send(&mut self, frame: &[u8; FRAME_BYTES]) -> io::Result<bool>;

    /// Number of bytes that have ever come, those of a batch that is not whole yet included. It shows that a large batch
    /// is on its way. 0 over transports on which batches come whole.
    fn received_bytes(&self) -> u64 {
        0
    }

    /// Makes [`SubscriberLink::descriptors`] readable when something comes from now on. What came before is found by one
    /// more [`SubscriberLink::take`].
    ///
    /// # Errors
    /// The device is gone.
    fn arm(&mut self) -> io::Result<()>;

    /// Descriptors that become readable when something comes.
    fn descriptors(&self) -> impl Iterator<Item = RawFd> + use<Self>;
}
