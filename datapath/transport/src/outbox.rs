//! What waits to be sent on a broker's connection.

use embarcadero_cxl::{Fabric, RegionOffset};
use embarcadero_os::Buffer;
use embarcadero_wire::FRAME_BYTES;
use std::collections::VecDeque;
use std::io;

/// Something to send: bytes of this process, then optionally a range of the region.
#[derive(Debug)]
pub struct Outgoing {
    pub(crate) head: Head,
    pub(crate) batch: Option<(RegionOffset, u64)>,
    /// Position in the order index, for pinning; `u64::MAX` when it reads no batch.
    pub position: u64,
}

#[derive(Debug)]
pub(crate) enum Head {
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
    pub(crate) fn is_for_socket(&self) -> bool {
        matches!(self.head, Head::Bytes(_))
    }

    pub(crate) fn head(&self) -> &[u8] {
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
    pub(crate) queue: VecDeque<Outgoing>,
    /// Bytes of the first that a socket took.
    pub(crate) sent: u64,
    /// Things at the front that a NIC is sending.
    pub(crate) posted: usize,
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

    /// A copy of the first thing that waits, for transports that send it whole: its frame, and the bytes behind that.
    ///
    /// # Panics
    /// When it was sent in part.
    pub fn front<F: Fabric>(&self, memory: &F) -> Option<([u8; FRAME_BYTES], Vec<u8>)> {
        assert!(!self.is_mid_way(), "the first thing was sent in part");
        let first = self.queue.front()?;
        let (frame, rest) = first.head().split_first_chunk()?;
        let mut rest = rest.to_vec();
        if let Some((at, len)) = first.batch {
            rest.resize(len as usize, 0);
            memory.read_bytes(at, &mut rest);
        }
        Some((*frame, rest))
    }

    /// The first thing was sent whole.
    pub fn pop_front(&mut self) {
        self.queue.pop_front();
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
    pub(crate) fn pop_posted(&mut self) {
        self.posted -= usize::from(self.queue.pop_front().is_some());
    }

    /// Takes out what is no frame and comes next.
    pub(crate) fn take_bytes(&mut self) -> Option<Outgoing> {
        let next = self.queue.get(self.posted)?;
        if next.is_for_socket() { self.queue.remove(self.posted) } else { None }
    }

    pub(crate) fn advance(&mut self, mut bytes: u64) {
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
