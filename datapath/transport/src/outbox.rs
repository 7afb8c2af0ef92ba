//! Queue of the frames and batches that a broker sends on one connection.

use embarcadero_cxl::{Fabric, RegionOffset};
use embarcadero_os::Buffer;
use embarcadero_wire::FRAME_BYTES;
use std::collections::VecDeque;
use std::io;

/// Frame, error or delivery to send: bytes of this process, then optionally a range of the region.
#[derive(Debug)]
pub struct Outgoing {
    pub(crate) head: Head,
    pub(crate) batch: Option<(RegionOffset, u64)>,
    /// Position of the batch in the order index, which keeps the batch from being reclaimed; `u64::MAX` without a batch.
    pub position: u64,
}

#[derive(Debug)]
pub(crate) enum Head {
    Frame([u8; FRAME_BYTES]),
    Bytes(Vec<u8>),
    /// A frame and a batch that does not lie in the region.
    Copied(Buffer),
}

/// Bytes that follow the frame of an entry.
pub(crate) enum Payload<'a> {
    /// No bytes follow the frame.
    None,
    /// Batch behind the frame in the same buffer.
    Copied(&'a Buffer),
    /// Batch in the region: its place and its length in bytes.
    InRegion(RegionOffset, u64),
}

impl Outgoing {
    /// Control frame.
    #[must_use]
    pub fn frame(frame: [u8; FRAME_BYTES]) -> Self {
        Self { head: Head::Frame(frame), batch: None, position: u64::MAX }
    }

    /// Bytes of this process for the socket: an error frame and its text, or the rest of a batch.
    #[must_use]
    pub fn bytes(bytes: Vec<u8>) -> Self {
        Self { head: Head::Bytes(bytes), batch: None, position: u64::MAX }
    }

    /// Delivery frame and the batch of `len` bytes at `at`, which is read in place while it is sent.
    #[must_use]
    pub fn batch(frame: [u8; FRAME_BYTES], at: RegionOffset, len: u64, position: u64) -> Self {
        Self { head: Head::Frame(frame), batch: Some((at, len)), position }
    }

    /// Delivery frame and a copy of a batch that does not lie in the region.
    ///
    /// # Errors
    /// Error of the system when memory for the copy runs out.
    pub fn copied(frame: &[u8; FRAME_BYTES], batch: &[u8]) -> io::Result<Self> {
        let mut bytes = Buffer::new(FRAME_BYTES + batch.len())?;
        bytes.extend_from_slice(frame);
        bytes.extend_from_slice(batch);
        Ok(Self { head: Head::Copied(bytes), batch: None, position: u64::MAX })
    }

    /// Returns true for bytes that only the socket carries.
    pub(crate) fn is_for_socket(&self) -> bool {
        matches!(self.head, Head::Bytes(_))
    }

    /// Bytes that follow the frame. Only for entries that are not [`Outgoing::is_for_socket`].
    pub(crate) fn payload(&self) -> Payload<'_> {
        match (&self.head, self.batch) {
            (Head::Copied(bytes), _) => Payload::Copied(bytes),
            (_, Some((at, len))) => Payload::InRegion(at, len),
            (_, None) => Payload::None,
        }
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

/// Queue of what is to be sent on one connection, in order.
#[derive(Debug, Default)]
pub struct Outbox {
    pub(crate) queue: VecDeque<Outgoing>,
    /// Bytes of the first entry that a socket took.
    pub(crate) sent: u64,
    /// Number of entries at the front that a NIC is sending.
    pub(crate) posted: usize,
}

impl Outbox {
    /// Appends an entry.
    #[inline]
    pub fn push(&mut self, outgoing: Outgoing) {
        self.queue.push_back(outgoing);
    }

    /// Returns true when everything was handed to the transport.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Number of entries.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Lowest position in the order index of a batch in the queue; `u64::MAX` when there is none.
    #[must_use]
    pub fn lowest_position(&self) -> u64 {
        self.queue.iter().map(|outgoing| outgoing.position).min().unwrap_or(u64::MAX)
    }

    /// Number of entries at the front that are being sent.
    fn begun(&self) -> usize {
        self.posted.max(usize::from(self.sent > 0))
    }

    /// Copy of the first entry, for transports that send it whole: its frame, and the bytes behind the frame.
    ///
    /// # Panics
    /// When the entry was sent in part.
    pub fn front<F: Fabric>(&self, memory: &F) -> Option<([u8; FRAME_BYTES], Vec<u8>)> {
        assert!(!self.is_mid_way(), "the first entry was sent in part");
        let first = self.queue.front()?;
        let (frame, rest) = first.head().split_first_chunk()?;
        let mut rest = rest.to_vec();
        if let Some((at, len)) = first.batch {
            rest.resize(len as usize, 0);
            memory.read_bytes(at, &mut rest);
        }
        Some((*frame, rest))
    }

    /// Removes the first entry, which was sent whole.
    pub fn pop_front(&mut self) {
        self.queue.pop_front();
    }

    /// Returns true when the first entry was sent in part.
    #[must_use]
    pub fn is_mid_way(&self) -> bool {
        self.begun() > 0
    }

    /// Drops the batches of which nothing was sent. Frames stay, and so do batches that are being sent.
    ///
    /// Returns the highest position of a batch that stays.
    pub fn drop_unsent_batches(&mut self) -> Option<u64> {
        let mut begun = self.begun();
        self.queue.retain(|outgoing| {
            let keep = begun > 0;
            begun = begun.saturating_sub(1);
            keep || outgoing.batch.is_none()
        });
        self.queue.iter().filter(|outgoing| outgoing.batch.is_some()).map(|outgoing| outgoing.position).max()
    }

    /// Copies what is left of a batch that a socket took in part. Its place in the region need not be read any more. A batch
    /// that a NIC is sending stays.
    pub fn detach<F: Fabric>(&mut self, memory: &F) {
        if self.sent == 0 || self.posted > 0 {
            return;
        }
        let Some(first) = self.queue.front_mut() else { return };
        let Some((at, len)) = first.batch else { return };
        let head = first.head();
        let mut rest = head[head.len().min(self.sent as usize)..].to_vec();
        let skipped = self.sent.saturating_sub(head.len() as u64);
        let from = rest.len();
        rest.resize(from + (len - skipped) as usize, 0);
        memory.read_bytes(at.add(skipped), &mut rest[from..]);
        *first = Outgoing::bytes(rest);
        self.sent = 0;
    }

    /// Drops every batch, so that the region need not be read any more. Frames stay.
    ///
    /// Returns false, and drops nothing, when a batch is half sent: nothing else can follow on this connection then.
    pub fn drop_batches(&mut self) -> bool {
        let half_sent = self.queue.iter().take(self.begun()).any(|begun| begun.batch.is_some());
        if !half_sent {
            self.queue.retain(|outgoing| outgoing.batch.is_none());
        }
        !half_sent
    }

    /// Removes the first entry, which the NIC has sent.
    pub(crate) fn pop_posted(&mut self) {
        self.posted -= usize::from(self.queue.pop_front().is_some());
    }

    /// Takes the next entry out if only the socket carries it.
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

#[cfg(test)]
mod tests {
    use super::*;
    use embarcadero_cxl::cache::FlushMethod;
    use embarcadero_cxl::{Mapping, Native};

    /// All bytes that an outbox has still to send.
    fn left(outbox: &Outbox, memory: &Native) -> Vec<u8> {
        let mut bytes = Vec::new();
        for outgoing in &outbox.queue {
            bytes.extend_from_slice(outgoing.head());
            if let Some((at, len)) = outgoing.batch {
                memory.with_bytes(at, len, |batch| bytes.extend_from_slice(batch));
            }
        }
        bytes.split_off(outbox.sent as usize)
    }

    /// A socket sends the same whether or not the rest of the first batch was copied. The copy stays when the region's
    /// memory changes.
    #[test]
    fn a_half_sent_batch_is_detached_from_the_region() {
        let memory = Native::new(Mapping::anonymous(1 << 16).unwrap(), FlushMethod::None).unwrap();
        let (first, second) = (RegionOffset(4096), RegionOffset(8192));
        let content: Vec<u8> = (0..200).collect();
        for sent in [1, FRAME_BYTES as u64 - 1, FRAME_BYTES as u64, FRAME_BYTES as u64 + 77, FRAME_BYTES as u64 + 199] {
            memory.write_bytes(first, &content);
            let mut outbox = Outbox::default();
            outbox.push(Outgoing::batch([7; FRAME_BYTES], first, 200, 4));
            outbox.push(Outgoing::batch([8; FRAME_BYTES], second, 64, 5));
            outbox.advance(sent);
            let before = left(&outbox, &memory);
            outbox.detach(&memory);
            memory.write_bytes(first, &[0; 200]);
            assert_eq!((left(&outbox, &memory), outbox.lowest_position()), (before.clone(), 5), "{sent}");
            // An error may follow, and a second call changes nothing.
            outbox.detach(&memory);
            assert!(outbox.drop_batches());
            assert_eq!(left(&outbox, &memory), before[..before.len() - FRAME_BYTES - 64]);
        }
    }

    #[test]
    fn nothing_is_detached_that_is_not_half_sent_over_a_socket() {
        let memory = Native::new(Mapping::anonymous(1 << 16).unwrap(), FlushMethod::None).unwrap();
        for (sent, posted) in [(0, 0), (0, 1)] {
            let mut outbox = Outbox::default();
            outbox.push(Outgoing::batch([7; FRAME_BYTES], RegionOffset(4096), 200, 4));
            (outbox.sent, outbox.posted) = (sent, posted);
            outbox.detach(&memory);
            assert_eq!(outbox.lowest_position(), 4);
        }
    }

    #[test]
    fn batches_that_are_being_sent_stay_and_the_last_one_is_known() {
        let frame = [0; FRAME_BYTES];
        let mut outbox = Outbox::default();
        for position in 4..9 {
            outbox.push(Outgoing::batch(frame, RegionOffset(position * 4096), 64, position));
        }
        outbox.push(Outgoing::frame(frame));
        // A NIC may send several batches at a time.
        outbox.posted = 3;
        assert_eq!((outbox.drop_unsent_batches(), outbox.len()), (Some(6), 4));
        (0..3).for_each(|_| outbox.pop_posted());
        assert_eq!((outbox.drop_unsent_batches(), outbox.len()), (None, 1), "the frame stays");
    }
}
