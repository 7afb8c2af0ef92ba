//! Broker's end of a connection: the traits of a transport and of the code that takes batches.

use crate::outbox::Outbox;
use crate::window::Window;
use embarcadero_cxl::{Fabric, RegionOffset};
use embarcadero_wire::batch::BodyError;
use embarcadero_wire::{BatchHeader, ErrorCode, Frame, WireError, encode_error};
use std::io;
use std::os::fd::RawFd;

/// Reason for which a broker's connection ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The peer closed the connection.
    #[error("the peer closed the connection")]
    Closed,
    /// The system reports an error.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The peer does not speak the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A batch's body does not fit its header.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// The broker refuses what the peer asked for.
    #[error("{text}")]
    Refused {
        /// Kind of refusal.
        code: ErrorCode,
        /// Text for the peer.
        text: String,
        /// Value of [`embarcadero_wire::ErrorFrame::detail`].
        detail: u64,
    },
}

impl TransportError {
    /// Refusal without detail.
    pub fn refused(code: ErrorCode, text: impl Into<String>) -> Self {
        Self::Refused { code, text: text.into(), detail: 0 }
    }

    /// Error frame for the peer; `None` when the peer can no longer be reached.
    #[must_use]
    pub fn frame(&self) -> Option<Vec<u8>> {
        let (code, detail) = match self {
            Self::Closed | Self::Io(_) => return None,
            Self::Wire(_) => (ErrorCode::BadFrame, 0),
            Self::Body(_) => (ErrorCode::BadBatch, 0),
            Self::Refused { code, detail, .. } => (*code, *detail),
        };
        Some(encode_error(code, &self.to_string(), detail))
    }
}

/// Decision of a [`Landing`] about a batch that is arriving.
#[derive(Debug)]
pub enum Placement {
    /// Header and body go to this offset of the region.
    At(RegionOffset),
    /// No room is free for the batch now: the connection reads no further.
    Wait,
    /// The connection closes, and the peer is told why.
    Refuse(TransportError),
}

/// Decision of a [`Landing`] about a publisher that needs a landing window.
pub enum WindowPlacement {
    /// The publisher may fill this window.
    Granted(Window),
    /// No room is free for a landing window now.
    Wait,
    /// The connection closes, and the peer is told why.
    Refuse(TransportError),
}

/// Destination of received batches: checks headers, reserves room, and takes complete batches.
pub trait Landing {
    /// Decides where a batch goes, when its header has come and its body has not. Called again after
    /// [`Placement::Wait`].
    fn place(&mut self, header: &BatchHeader) -> Placement;

    /// Reserves a landing window of `bytes`, which the peer's NIC fills with batches. `starved` says that the publisher
    /// can send nothing without it. Transports without landing windows never call this.
    fn grant_window(&mut self, bytes: u64, starved: bool) -> WindowPlacement;

    /// Decides whether a batch is taken that already lies at `at` in a landing window, behind those admitted before.
    /// Called again after [`Placement::Wait`].
    fn admit(&mut self, header: &BatchHeader, at: RegionOffset) -> Placement;

    /// Takes a batch that lies complete where it was placed or admitted. `in_memory` says that the bytes are in the
    /// region's memory, so that no cache of this host has to be flushed.
    ///
    /// # Errors
    /// [`TransportError::Refused`], after which the connection ends.
    fn complete(&mut self, header: BatchHeader, at: RegionOffset, in_memory: bool) -> Result<(), TransportError>;
}

/// Reason for which [`Connection::receive`] returned.
#[derive(Debug)]
pub enum Received {
    /// Nothing more can be taken from the connection now.
    Nothing,
    /// The landing said [`Placement::Wait`]: call again later.
    Waiting,
    /// The budget is used up: there may be more.
    More,
    /// A control frame came.
    Frame(Frame),
}

/// Broker's end of one connection. All calls return at once.
pub trait Connection<F: Fabric>: Send {
    /// Takes up to `budget` batches and hands each to `landing`. Returns at the first control frame.
    ///
    /// # Errors
    /// [`TransportError`]. The connection can then only send the frame of the error.
    fn receive<L: Landing>(&mut self, memory: &F, landing: &mut L, budget: usize) -> Result<Received, TransportError>;

    /// Sends as much of the outbox as the transport takes, in order; the rest stays. Returns a measure of progress (bytes,
    /// or requests to the device), which is 0 when nothing moved.
    ///
    /// # Errors
    /// [`TransportError::Io`] or [`TransportError::Closed`]; [`TransportError::Refused`] when the outbox holds something
    /// that this peer cannot be sent.
    fn send(&mut self, memory: &F, outbox: &mut Outbox) -> Result<u64, TransportError>;

    /// Descriptor that becomes readable when the peer sends or closes, and writable when the rest of an outbox has room.
    /// `None` for transports without sockets.
    fn descriptor(&self) -> Option<RawFd> {
        None
    }

    /// Returns true when [`Connection::receive`] has something to do that no descriptor shows.
    #[must_use]
    fn has_work(&self) -> bool;

    /// Returns true when [`Connection::send`] has something to do even if the outbox is empty.
    #[must_use]
    fn has_to_send(&self) -> bool;

    /// Returns true when the rest of `outbox` is sent only once the connection's socket has room.
    #[must_use]
    fn waits_for_socket(&self, outbox: &Outbox) -> bool;

    /// Ends the sending direction. The peer can still read what was sent before, and still send.
    fn finish(&mut self);

    /// Takes and forgets what the peer still sends. Returns true once the peer has closed.
    fn discard(&mut self) -> bool;

    /// Offsets in the region of the landing windows that the peer may write. Empty for transports that have no windows.
    fn windows(&self) -> impl Iterator<Item = RegionOffset> {
        std::iter::empty()
    }

    /// Bytes that have come of the body that is being received; `None` while none is, and for transports whose batches land
    /// whole.
    fn arriving(&self) -> Option<u64> {
        None
    }

    /// Closes the peer's landing windows. When this returns, the peer can write nothing more into the region.
    fn close_windows(&mut self) {}
}
