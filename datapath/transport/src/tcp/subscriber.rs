//! Subscriber's end of a TCP connection.

use super::{is_again, refusal};
use crate::link::{Item, LinkError, SubscriberLink};
use embarcadero_wire::batch::MAX_BATCH_BYTES;
use embarcadero_wire::{BatchHeader, ERROR_TEXT_BYTES, FRAME_BYTES, Frame, WireError};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};

/// Initial bytes of the receive buffer, which grows to hold a batch.
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes that are read beyond a frame in one call.
const READ_AHEAD: usize = 64 << 10;

/// Socket to a broker, from which deliveries are received into a buffer.
pub(crate) struct TcpSubscriber {
    stream: TcpStream,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Number of bytes ever read from the socket.
    received: u64,
}

/// Decodes a frame that must be a batch's header.
pub(crate) fn decode_header(bytes: &[u8; FRAME_BYTES]) -> Result<BatchHeader, WireError> {
    match Frame::decode(bytes)? {
        Frame::BatchHeader(header) => Ok(header),
        other => Err(WireError::Kind { found: other.kind() }),
    }
}

impl TcpSubscriber {
    /// Takes over a connected socket that has sent its request.
    ///
    /// # Errors
    /// The error of the system call.
    pub(crate) fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, buffer: vec![0; BUFFER_BYTES], start: 0, end: 0, received: 0 })
    }

    /// Reads until `bytes` are in the buffer, and up to `ahead` more. Returns false when they have not come.
    fn fill(&mut self, bytes: usize, ahead: usize) -> io::Result<bool> {
        while self.end - self.start < bytes {
            if self.start + bytes + ahead > self.buffer.len() {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
                if bytes + ahead > self.buffer.len() {
                    self.buffer.resize(bytes + ahead, 0);
                }
            }
            let limit = self.start + bytes + ahead;
            match self.stream.read(&mut self.buffer[self.end..limit]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    self.end += read;
                    self.received += read as u64;
                }
                Err(error) if is_again(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Frame at `at` bytes behind the start of what was read. [`TcpSubscriber::fill`] must have read it.
    fn frame_at(&self, at: usize) -> &[u8; FRAME_BYTES] {
        let bytes = &self.buffer[self.start + at..self.end];
        assert!(bytes.len() >= FRAME_BYTES, "{} bytes of a frame were read", bytes.len());
        &bytes.as_chunks().0[0]
    }
}

impl SubscriberLink for TcpSubscriber {
    fn take(&mut self) -> Result<Item, LinkError> {
        if !self.fill(FRAME_BYTES, READ_AHEAD)? {
            return Ok(Item::Nothing);
        }
        match Frame::decode(self.frame_at(0))? {
            Frame::Deliver(deliver) => {
                let bytes = u64::from(deliver.batch_bytes);
                let (low, high) = (FRAME_BYTES as u64, MAX_BATCH_BYTES);
                if !(low..=high).contains(&bytes) {
                    return Err(WireError::Field { field: "batch_bytes", value: bytes, low, high }.into());
                }
                if !self.fill(FRAME_BYTES + bytes as usize, 0)? {
                    return Ok(Item::Nothing);
                }
                let header = decode_header(self.frame_at(FRAME_BYTES));
                let body = self.start + 2 * FRAME_BYTES;
                self.start += FRAME_BYTES + bytes as usize;
                Ok(Item::Batch(deliver, header, body..self.start))
            }
            Frame::ErrorFrame(error) => {
                if !self.fill(FRAME_BYTES + (error.text_bytes as usize).min(ERROR_TEXT_BYTES), 0)? {
                    return Ok(Item::Nothing);
                }
                let refused = refusal(&error, &self.buffer[self.start + FRAME_BYTES..self.end]);
                Err(refused.unwrap_or_else(|| LinkError::Lost(io::ErrorKind::InvalidData.into())))
            }
            frame => {
                self.start += FRAME_BYTES;
                Ok(Item::Frame(frame))
            }
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer
    }

    fn send(&mut self, frame: &[u8; FRAME_BYTES]) -> io::Result<bool> {
        match self.stream.write(frame) {
            Ok(sent) if sent == frame.len() => Ok(true),
            // A frame is the only thing that this socket carries this way: there is room for all of it, or for none.
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(error) if is_again(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn received_bytes(&self) -> u64 {
        self.received
    }

    fn arm(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn descriptors(&self) -> impl Iterator<Item = RawFd> + use<> {
        std::iter::once(self.stream.as_raw_fd())
    }
}
