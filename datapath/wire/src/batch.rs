//! Batches: a header, messages back to back, zero bytes up to a multiple of four, then one 32-bit length per message.
//!
//! The lengths lie in one table, so a broker checks a batch without touching its messages, and a message costs four bytes.

// [[DEVIATION_007]] The paper puts a 64-byte header before each message.

use super::{BatchHeader, ClientId, Epoch, FRAME_BYTES, Incarnation, SessionSlot, TopicId, WireError, crc32c};
use std::ops::DerefMut;

/// Alignment of batches in landing windows, bytes: a cache line.
pub const ALIGN_BYTES: u64 = 64;
/// Flag of [`BatchHeader`]: `body_checksum` holds the CRC32C of the body.
pub const BODY_CHECKSUM: u16 = 1;
/// Largest batch that the protocol can carry, header and body. Brokers may allow less.
pub const MAX_BATCH_BYTES: u64 = 64 << 20;

impl BatchHeader {
    /// Bytes of the body. Only meaningful after [`BatchHeader::check`].
    #[inline]
    #[must_use]
    pub fn body_bytes(&self) -> u64 {
        self.table_at() + u64::from(self.message_count) * 4
    }

    /// Bytes of header and body.
    #[inline]
    #[must_use]
    pub fn batch_bytes(&self) -> u64 {
        FRAME_BYTES as u64 + self.body_bytes()
    }

    /// Offset of the length table in the body.
    #[inline]
    #[must_use]
    pub(crate) fn table_at(&self) -> u64 {
        u64::from(self.payload_bytes).next_multiple_of(4)
    }

    /// Checks the bounds of the fields.
    ///
    /// # Errors
    /// [`WireError::Field`] with the first field that is wrong.
    pub fn check(&self, max_batch_bytes: u64) -> Result<(), WireError> {
        let field = |field, value, low, high| Err(WireError::Field { field, value, low, high });
        if self.message_count == 0 {
            return field("message_count", 0, 1, max_batch_bytes / 4);
        }
        if self.batch_bytes() > max_batch_bytes {
            return field("batch bytes", self.batch_bytes(), FRAME_BYTES as u64 + 4, max_batch_bytes);
        }
        if self.client_id == ClientId(0) {
            return field("client_id", 0, 1, u64::MAX);
        }
        Ok(())
    }
}

impl BatchHeader {
    /// Bytes of message `index`, below `message_count`, of a body that was checked against this header.
    ///
    /// # Panics
    /// When the body is shorter than the header says.
    #[inline]
    #[must_use]
    pub fn message_bytes(&self, body: &[u8], index: usize) -> usize {
        let table = &body[self.table_at() as usize..];
        u32::from_le_bytes(table.as_chunks().0[index]) as usize
    }

    /// Checks what follows the messages in a body: the padding, and the length table against the payload.
    ///
    /// # Errors
    /// [`BodyError::Padding`], [`BodyError::Lengths`].
    pub fn check_tail(&self, tail: &[u8]) -> Result<(), BodyError> {
        let (padding, table) = tail.split_at((self.table_at() - u64::from(self.payload_bytes)) as usize);
        if padding.iter().any(|byte| *byte != 0) {
            return Err(BodyError::Padding);
        }
        let lengths = table.as_chunks::<4>().0;
        let found: u64 = lengths.iter().map(|length| u64::from(u32::from_le_bytes(*length))).sum();
        if found == u64::from(self.payload_bytes) {
            Ok(())
        } else {
            Err(BodyError::Lengths { found, expected: self.payload_bytes.into() })
        }
    }
}

/// Reason why a body does not belong to its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BodyError {
    /// The body is too short or too long.
    #[error("the batch body has {found} bytes, its header says {expected}")]
    Length {
        /// Bytes that there are.
        found: u64,
        /// Bytes that the header announces.
        expected: u64,
    },
    /// The lengths of the messages do not add up to the payload.
    #[error("the message lengths add up to {found}, the header says payload_bytes = {expected}")]
    Lengths {
        /// Sum of the table.
        found: u64,
        /// Bytes of payload that the header announces.
        expected: u64,
    },
    /// A byte between the messages and the length table is not zero.
    #[error("the padding behind the messages is not zero")]
    Padding,
    /// The body is damaged.
    #[error("the body's checksum is {found:#010x}, the header says {expected:#010x}")]
    Checksum {
        /// CRC32C that the bytes of the body give.
        found: u32,
        /// CRC32C that the header announces.
        expected: u32,
    },
}

/// Checks the padding and that the lengths add up to the payload, without touching the messages.
///
/// # Errors
/// [`BodyError`].
pub fn check_lengths(header: &BatchHeader, body: &[u8]) -> Result<(), BodyError> {
    if body.len() as u64 != header.body_bytes() {
        return Err(BodyError::Length { found: body.len() as u64, expected: header.body_bytes() });
    }
    header.check_tail(&body[header.payload_bytes as usize..])
}

/// Checks the body's checksum, if the batch carries one.
///
/// # Errors
/// [`BodyError::Checksum`].
pub fn check_body(header: &BatchHeader, body: &[u8]) -> Result<(), BodyError> {
    if header.flags & BODY_CHECKSUM == 0 {
        return Ok(());
    }
    let found = crc32c(body);
    if found == header.body_checksum {
        Ok(())
    } else {
        Err(BodyError::Checksum { found, expected: header.body_checksum })
    }
}

/// Fields of a header that are the same for a whole session: the sender, and where its batches belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOrigin {
    /// Client.
    pub client_id: ClientId,
    /// Session epoch.
    pub session_epoch: Epoch,
    /// Session slot.
    pub session_slot: SessionSlot,
    /// Topic slot.
    pub topic: TopicId,
    /// Topic incarnation.
    pub topic_incarnation: Incarnation,
}

impl BatchOrigin {
    /// Returns the origin that a header names.
    #[must_use]
    pub fn of(header: &BatchHeader) -> Self {
        let BatchHeader { client_id, session_epoch, session_slot, topic, topic_incarnation, .. } = *header;
        Self { client_id, session_epoch, session_slot, topic, topic_incarnation }
    }
}

/// Bytes of the largest message that a batch of `capacity` bytes holds.
#[must_use]
pub const fn largest_message(capacity: usize) -> usize {
    capacity.saturating_sub(FRAME_BYTES + 3 + 4)
}

/// Memory of a fixed capacity into which a batch is built.
pub trait BatchBuffer: DerefMut<Target = [u8]> {
    /// Most bytes that the buffer holds.
    fn capacity(&self) -> usize;

    /// Sets the number of bytes in use, at most the capacity. Added bytes have any value.
    fn resize(&mut self, len: usize);
}

impl BatchBuffer for Vec<u8> {
    fn capacity(&self) -> usize {
        Self::capacity(self)
    }

    fn resize(&mut self, len: usize) {
        Self::resize(self, len, 0);
    }
}

/// Batch under construction, in one buffer that is sent as it is.
#[derive(Debug)]
pub struct BatchBuilder<B = Vec<u8>> {
    bytes: B,
    lengths: Vec<u32>,
}

impl BatchBuilder {
    /// Begins a batch of at most `capacity` bytes, header and length table included, in memory of its own.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self::in_buffer(Vec::with_capacity(capacity.max(FRAME_BYTES)))
    }
}

impl<B: BatchBuffer> BatchBuilder<B> {
    /// Begins a batch in `buffer`, which has room for a header at least. Its capacity bounds header, messages and table.
    #[must_use]
    pub fn in_buffer(mut buffer: B) -> Self {
        buffer.resize(FRAME_BYTES);
        Self { bytes: buffer, lengths: Vec::with_capacity(1024) }
    }

    /// Most bytes of the batch.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Buffer in which the batch is built.
    pub fn buffer_mut(&mut self) -> &mut B {
        &mut self.bytes
    }

    #[inline]
    fn append(&mut self, bytes: &[u8]) {
        let start = self.bytes.len();
        self.bytes.resize(start + bytes.len());
        self.bytes[start..].copy_from_slice(bytes);
    }

    /// Bytes of the batch if it were sealed now.
    #[inline]
    #[must_use]
    pub fn batch_bytes(&self) -> usize {
        self.bytes.len().next_multiple_of(4) + self.lengths.len() * 4
    }

    /// Number of messages.
    #[inline]
    #[must_use]
    pub fn message_count(&self) -> u32 {
        self.lengths.len() as u32
    }

    /// Returns true while the batch has no message.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// Returns true when a message of `bytes` bytes still fits.
    #[inline]
    #[must_use]
    pub fn fits(&self, bytes: usize) -> bool {
        // Padding of at most 3 and four bytes of table.
        self.bytes.len() + bytes + 3 + (self.lengths.len() + 1) * 4 <= self.bytes.capacity()
    }

    /// Appends a message.
    ///
    /// # Panics
    /// When it does not [fit](BatchBuilder::fits).
    #[inline]
    pub fn push(&mut self, message: &[u8]) {
        assert!(self.fits(message.len()), "the message does not fit");
        self.append(message);
        self.lengths.push(message.len() as u32);
    }

    /// Appends a message of `bytes` zero bytes, which `fill` then writes in place.
    ///
    /// # Panics
    /// When it does not [fit](BatchBuilder::fits).
    #[inline]
    pub fn push_with(&mut self, bytes: usize, fill: impl FnOnce(&mut [u8])) {
        assert!(self.fits(bytes), "the message does not fit");
        let start = self.bytes.len();
        self.bytes.resize(start + bytes);
        self.bytes[start..].fill(0);
        fill(&mut self.bytes[start..]);
        self.lengths.push(bytes as u32);
    }

    /// Writes padding, length table and header. The batch can be sent afterwards.
    pub fn seal(&mut self, origin: &BatchOrigin, sequence: u64, checksum: bool) -> BatchHeader {
        let payload_bytes = (self.bytes.len() - FRAME_BYTES) as u32;
        let padding = self.bytes.len().next_multiple_of(4) - self.bytes.len();
        self.append(&[0; 3][..padding]);
        let table = self.bytes.len();
        self.bytes.resize(table + self.lengths.len() * 4);
        for (place, length) in self.bytes[table..].as_chunks_mut().0.iter_mut().zip(&self.lengths) {
            *place = length.to_le_bytes();
        }
        let mut header =
            BatchHeader { payload_bytes, message_count: self.lengths.len() as u32, sequence, ..BatchHeader::blank() };
        if checksum {
            header.flags = BODY_CHECKSUM;
            header.body_checksum = crc32c(&self.bytes[FRAME_BYTES..]);
        }
        self.address(header, origin)
    }

    /// Writes the header again, for another session epoch. The body stays.
    pub fn readdress(&mut self, header: &BatchHeader, origin: &BatchOrigin) -> BatchHeader {
        self.address(*header, origin)
    }

    fn address(&mut self, mut header: BatchHeader, origin: &BatchOrigin) -> BatchHeader {
        header.client_id = origin.client_id;
        header.session_epoch = origin.session_epoch;
        header.session_slot = origin.session_slot;
        header.topic = origin.topic;
        header.topic_incarnation = origin.topic_incarnation;
        self.bytes[..FRAME_BYTES].copy_from_slice(&header.encode());
        header
    }

    /// Bytes of the batch, complete once it is sealed.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Empties the buffer for another batch, and keeps its memory.
    pub fn clear(&mut self) {
        self.bytes.resize(FRAME_BYTES);
        self.lengths.clear();
    }
}

/// Messages of a received batch, in place.
#[derive(Clone, Copy, Debug)]
pub struct BatchView<'a> {
    payload: &'a [u8],
    table: &'a [u8],
}

impl<'a> BatchView<'a> {
    /// Checks the body against its header, its checksum included.
    ///
    /// # Errors
    /// [`BodyError`].
    pub fn parse(header: &BatchHeader, body: &'a [u8]) -> Result<Self, BodyError> {
        check_lengths(header, body)?;
        check_body(header, body)?;
        Ok(Self::of_checked(header, body))
    }

    /// Returns the view of a body that [`BatchView::parse`] has checked, without the cost of another check.
    ///
    /// # Panics
    /// If the body is shorter than its header says.
    #[must_use]
    pub fn of_checked(header: &BatchHeader, body: &'a [u8]) -> Self {
        Self { payload: &body[..header.payload_bytes as usize], table: &body[header.table_at() as usize..] }
    }

    /// Iterates over the messages in order.
    pub fn messages(&self) -> Messages<'a> {
        Messages { payload: self.payload, table: self.table }
    }

    /// Number of messages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len() / 4
    }

    /// Returns true for a batch without messages, which no header that was checked has.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }
}

/// Iterator over a batch's messages.
#[derive(Clone, Debug)]
pub struct Messages<'a> {
    payload: &'a [u8],
    table: &'a [u8],
}

impl<'a> Iterator for Messages<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        let (length, table) = self.table.split_first_chunk::<4>()?;
        self.table = table;
        // The lengths were checked against the payload.
        let (message, rest) = self.payload.split_at(u32::from_le_bytes(*length) as usize);
        self.payload = rest;
        Some(message)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Frame;
    use super::*;
    use proptest::prelude::*;

    const ORIGIN: BatchOrigin = BatchOrigin {
        client_id: ClientId(7),
        session_epoch: Epoch(1),
        session_slot: SessionSlot(3),
        topic: TopicId(2),
        topic_incarnation: Incarnation(9),
    };

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..50), checksum: bool,
        ) {
            let mut builder = BatchBuilder::new(64 << 10);
            for message in &messages {
                builder.push_with(message.len(), |into| into.copy_from_slice(message));
            }
            let expected = builder.batch_bytes();
            let header = builder.seal(&ORIGIN, 42, checksum);
            prop_assert_eq!(builder.bytes().len(), expected);
            prop_assert_eq!(header.batch_bytes() as usize, expected);
            header.check(64 << 10).unwrap();
            let (frame, body) = builder.bytes().split_first_chunk::<FRAME_BYTES>().unwrap();
            let Ok(Frame::BatchHeader(header)) = Frame::decode(frame) else { panic!("does not decode") };
            let view = BatchView::parse(&header, body).unwrap();
            prop_assert!(view.messages().eq(messages.iter().map(Vec::as_slice)));
            let mut body = body.to_vec();
            if !header.payload_bytes.is_multiple_of(4) {
                body[header.table_at() as usize - 1] = 1;
                prop_assert_eq!(check_lengths(&header, &body), Err(BodyError::Padding));
            }
            builder.clear();
            prop_assert!(builder.is_empty());
        }

        #[test]
        fn hostile_headers_and_bodies_fail_cleanly(
            payload_bytes: u32, message_count: u32, flags: u16, body in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let header = BatchHeader { payload_bytes, message_count, flags, client_id: ClientId(1), ..BatchHeader::blank() };
            let _ = header.check(MAX_BATCH_BYTES);
            if let Ok(view) = BatchView::parse(&header, &body) {
                prop_assert_eq!(view.messages().count(), message_count as usize);
            }
            // A header that claims just this body: only the lengths can be wrong.
            let count = (body.len() / 8) as u32;
            let header = BatchHeader {
                payload_bytes: (body.len() as u32 - count * 4) & !3, message_count: count, ..BatchHeader::blank()
            };
            if let Ok(view) = BatchView::parse(&header, &body) {
                prop_assert_eq!(view.messages().map(<[u8]>::len).sum::<usize>(), header.payload_bytes as usize);
            }
        }

        #[test]
        fn a_damaged_body_is_seen(message in prop::collection::vec(any::<u8>(), 1..100), at: prop::sample::Index, mask in 1u8..) {
            let mut builder = BatchBuilder::new(1024);
            builder.push(&message);
            let header = builder.seal(&ORIGIN, 0, true);
            let mut body = builder.bytes()[FRAME_BYTES..].to_vec();
            let position = at.index(body.len());
            body[position] ^= mask;
            prop_assert!(BatchView::parse(&header, &body).is_err());
        }
    }

    #[test]
    fn a_full_batch_refuses_more() {
        let mut builder = BatchBuilder::new(256);
        builder.push(&[1; 100]);
        assert!(!builder.fits(largest_message(256)));
        builder.clear();
        assert!(builder.fits(largest_message(256)));
    }
}
