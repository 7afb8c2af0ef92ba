//! How bytes reach the region and leave it, shaped after RDMA verbs.
//!
//! A publisher's [`Connection`] places whole batches where the broker's [`Landing`] says (`write_with_imm`: place a
//! batch, then signal) and carries small control frames (`send`). Completions are polled ([`Received`]). The broker's
//! stages are generic over `Connection`, so that another transport adds an implementation and nothing else.

mod channel;
mod poller;
pub mod roce;
pub mod tcp;
pub mod verbs;

pub use channel::Channel;
pub use poller::{Poller, Ready, prepare_polling_thread};

use crate::buffer::Buffer;
use crate::cxl::{Native, RegionOffset};
use crate::wire::batch::BodyError;
use crate::wire::{BatchHeader, ErrorCode, FRAME_BYTES, Frame, WireError};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
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
        Some(crate::wire::encode_error(code, &self.to_string(), detail))
    }
}

/// What carries batches. Nothing falls back to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// RDMA verbs, by a device of the host.
    Verbs,
    /// RDMA by a NIC in software: RoCEv2 over a raw socket, for which the process needs CAP_NET_RAW. It speaks to devices too.
    Roce,
    /// The same at a port of DPDK, without the kernel's network. Needs a build with cargo feature `dpdk`.
    Dpdk,
}

impl Transport {
    /// As it is configured.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Verbs => "verbs",
            Self::Roce => "roce",
            Self::Dpdk => "dpdk",
        }
    }
}

/// How a session is kept inside its landing windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// Type-2 memory windows where the device enforces their bounds (it is tried), else registrations.
    Auto,
    /// Type-2 memory windows, whatever the device makes of them.
    Windows,
    /// A protection domain for each session, and a registration for each landing window.
    Registrations,
}

/// What a broker does with a batch that is about to arrive.
#[derive(Debug)]
pub enum Placement {
    /// Put header and body here.
    At(RegionOffset),
    /// There is no room now: do not read on.
    Wait,
    /// Close the connection, telling the peer why.
    Refuse(TransportError),
}

/// The broker's side of placing a batch: checks its header and reserves its place in the Blog.
pub trait Landing {
    /// Decides where a batch goes. Called again after [`Placement::Wait`].
    fn place(&mut self, header: &BatchHeader) -> Placement;

    /// Reserves a landing window, which a peer's NIC fills with batches. [`Placement::Wait`] when there is none now;
    /// `starved` if the publisher can send nothing without.
    fn lease(&mut self, bytes: u64, starved: bool) -> Placement;

    /// Decides whether the batch that lies at `at`, in a landing window behind those admitted before, is taken.
    /// Called again after [`Placement::Wait`].
    fn admit(&mut self, header: &BatchHeader, at: RegionOffset) -> Placement;

    /// The landing window that begins at `at` is closed: nothing can be written there any more.
    fn close(&mut self, at: RegionOffset);
}

/// A polled completion.
#[derive(Debug)]
pub enum Received {
    /// Nothing (more) to take now.
    Nothing,
    /// The landing said [`Placement::Wait`]; poll again later.
    Waiting,
    /// A batch is complete at this position.
    Batch(BatchHeader, RegionOffset),
    /// A control frame.
    Frame(Frame),
}

/// Something to send: bytes of this process, then optionally a range of the region.
#[derive(Debug)]
pub struct Outgoing {
    head: Head,
    batch: Option<(RegionOffset, u64)>,
    /// Position in the order index, for pinning; `u64::MAX` when it reads no batch.
    pub position: u64,
}

#[derive(Debug)]
enum Head {
    Frame([u8; FRAME_BYTES]),
    Bytes(Vec<u8>),
    /// A frame and a batch that lies in no region.
    Copied(Buffer),
}

impl Outgoing {
    /// A control frame.
    #[must_use]
    pub fn frame(frame: [u8; FRAME_BYTES]) -> Self {
        Self { head: Head::Frame(frame), batch: None, position: u64::MAX }
    }

    /// An error and its text.
    #[must_use]
    pub fn bytes(bytes: Vec<u8>) -> Self {
        Self { head: Head::Bytes(bytes), batch: None, position: u64::MAX }
    }

    /// A frame and the batch of `len` bytes at `at`, read in place while it is sent.
    #[must_use]
    pub fn batch(frame: [u8; FRAME_BYTES], at: RegionOffset, len: u64, position: u64) -> Self {
        Self { head: Head::Frame(frame), batch: Some((at, len)), position }
    }

    /// A frame and a batch that comes from elsewhere than the region.
    ///
    /// # Errors
    /// There is no memory.
    pub fn copied(frame: &[u8; FRAME_BYTES], batch: &[u8]) -> io::Result<Self> {
        let mut bytes = Buffer::new(FRAME_BYTES + batch.len())?;
        bytes.extend_from_slice(frame);
        bytes.extend_from_slice(batch);
        Ok(Self { head: Head::Copied(bytes), batch: None, position: u64::MAX })
    }

    /// True for what only a socket carries.
    fn is_for_socket(&self) -> bool {
        matches!(self.head, Head::Bytes(_))
    }

    fn head(&self) -> &[u8] {
        match &self.head {
            Head::Frame(frame) => frame,
            Head::Bytes(bytes) => bytes,
            Head::Copied(bytes) => bytes,
        }
    }

    fn len(&self) -> u64 {
        self.head().len() as u64 + self.batch.map_or(0, |(_, len)| len)
    }
}

/// What waits to be sent on one connection, in order.
#[derive(Debug, Default)]
pub struct Outbox {
    queue: VecDeque<Outgoing>,
    /// Bytes of the first that a socket took.
    sent: u64,
    /// Things at the front that a NIC is sending.
    posted: usize,
}

impl Outbox {
    /// Adds to the end.
    #[inline]
    pub fn push(&mut self, outgoing: Outgoing) {
        self.queue.push_back(outgoing);
    }

    /// True when everything was handed to the transport.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Things that wait.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Lowest position in the order index that is still being read; `u64::MAX` when none is.
    #[must_use]
    pub fn lowest_position(&self) -> u64 {
        self.queue.iter().map(|outgoing| outgoing.position).min().unwrap_or(u64::MAX)
    }

    /// Things at the front that are being sent.
    fn begun(&self) -> usize {
        self.posted.max(usize::from(self.sent > 0))
    }

    /// True when things were sent in part.
    #[must_use]
    pub fn is_mid_way(&self) -> bool {
        self.begun() > 0
    }

    /// Drops the batches that were not begun; one that is half sent must be finished. Frames stay.
    pub fn drop_unsent_batches(&mut self) {
        let mut begun = self.begun();
        self.queue.retain(|outgoing| {
            let keep = begun > 0;
            begun = begun.saturating_sub(1);
            keep || outgoing.batch.is_none()
        });
    }

    /// Drops every batch, so that the region need not be read any more; frames stay. False when a batch is half sent:
    /// then nothing more can follow on this connection.
    pub fn drop_batches(&mut self) -> bool {
        let half_sent = self.queue.iter().take(self.begun()).any(|begun| begun.batch.is_some());
        if !half_sent {
            self.queue.retain(|outgoing| outgoing.batch.is_none());
        }
        !half_sent
    }

    /// The NIC is done with the first.
    fn pop_posted(&mut self) {
        self.posted -= usize::from(self.queue.pop_front().is_some());
    }

    /// Takes out what is no frame and comes next.
    fn take_bytes(&mut self) -> Option<Outgoing> {
        let next = self.queue.get(self.posted)?;
        if next.is_for_socket() { self.queue.remove(self.posted) } else { None }
    }

    fn advance(&mut self, mut bytes: u64) {
        while let Some(front) = self.queue.front() {
            let left = front.len() - self.sent;
            if bytes < left {
                self.sent += bytes;
                return;
            }
            bytes -= left;
            self.sent = 0;
            self.queue.pop_front();
        }
    }
}

/// The broker's end of one connection. All calls return at once.
pub trait Connection: Send {
    /// Takes the next completion.
    ///
    /// # Errors
    /// [`TransportError`]; the connection is then of no more use than to send the error's frame.
    fn receive(&mut self, memory: &Native, landing: &mut impl Landing) -> Result<Received, TransportError>;

    /// Sends as much of the outbox as the transport takes; returns the bytes taken.
    ///
    /// # Errors
    /// [`TransportError::Io`] or [`TransportError::Closed`].
    fn send(&mut self, memory: &Native, outbox: &mut Outbox) -> Result<u64, TransportError>;
}
