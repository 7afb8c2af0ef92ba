//! The broker's end of a connection.

use crate::{Outbox, Window};
use embarcadero_cxl::{Fabric, RegionOffset};
use embarcadero_wire::batch::BodyError;
use embarcadero_wire::{BatchHeader, ErrorCode, Frame, WireError, encode_error};
use std::io;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The peer closed it.
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
        /// What the peer is told.
        text: String,
        /// See `ErrorFrame::detail`.
        detail: u64,
    },
}

impl TransportError {
    /// A refusal.
    pub fn refused(code: ErrorCode, text: impl Into<String>) -> Self {
        Self::Refused { code, text: text.into(), detail: 0 }
    }

    /// The error frame that tells the peer, if it can still be told.
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

/// What a broker does with a batch that is about to arrive, or with a window that a publisher needs.
#[derive(Debug)]
pub enum Placement {
    /// Put header and body here.
    At(RegionOffset),
    /// There is no room now: do not read on.
    Wait,
    /// Close the connection, telling the peer why.
    Refuse(TransportError),
}

/// The answer to a publisher that needs a landing window.
pub enum WindowPlacement {
    /// It may fill this one.
    Granted(Window),
    /// There is no room now.
    Wait,
    /// Close the connection, telling the peer why.
    Refuse(TransportError),
}

/// The broker's side of receiving: checks headers, reserves room, and takes complete batches.
pub trait Landing {
    /// Decides where a batch goes whose header came ahead of its body. Called again after [`Placement::Wait`].
    fn place(&mut self, header: &BatchHeader) -> Placement;

    /// Reserves a landing window of `bytes`, which the peer's NIC fills with batches. `starved` if the publisher can send
    /// nothing without it. Never called by transports that do not need windows.
    fn grant_window(&mut self, bytes: u64, starved: bool) -> WindowPlacement;

    /// Decides whether the batch that lies at `at`, in a landing window behind those admitted before, is taken.
    /// Called again after [`Placement::Wait`].
    fn admit(&mut self, header: &BatchHeader, at: RegionOffset) -> Placement;

    /// Takes a batch that lies complete where it was placed or admitted. `in_memory` if no cache of this host has to be
    /// flushed for it.
    ///
    /// # Errors
    /// A refusal; the connection ends.
    fn complete(&mut self, header: BatchHeader, at: RegionOffset, in_memory: bool) -> Result<(), TransportError>;
}

/// Why [`Connection::receive`] returned.
#[derive(Debug)]
pub enum Received {
    /// Nothing (more) to take now.
    Nothing,
    /// The landing said [`Placement::Wait`]; call again later.
    Waiting,
    /// The budget is used up; there may be more.
    More,
    /// A control frame came.
    Frame(Frame),
}

/// The broker's end of one connection. All calls return at once.
pub trait Connection<F: Fabric>: Send {
    /// Takes up to `budget` batches, each handed to `landing`, and no more after a control frame.
    ///
    /// # Errors
    /// [`TransportError`]; the connection is then of no more use than to send the error's frame.
    fn receive<L: Landing>(&mut self, memory: &F, landing: &mut L, budget: usize) -> Result<Received, TransportError>;

    /// Sends as much of the outbox as the transport takes, in order; the rest stays. Returns how much went: 0 when
    /// nothing moved.
    ///
    /// # Errors
    /// [`TransportError::Io`] or [`TransportError::Closed`]; a refusal for what this peer cannot be sent.
    fn send(&mut self, memory: &F, outbox: &mut Outbox) -> Result<u64, TransportError>;
}
