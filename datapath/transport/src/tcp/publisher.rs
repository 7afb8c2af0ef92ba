//! Publisher's end of a TCP connection.

use super::{is_again, refusal};
use crate::link::{LinkError, PublisherLink};
use crate::send_buffer::SendBuffer;
use embarcadero_wire::batch::BatchBuilder;
use embarcadero_wire::{FRAME_BYTES, Frame};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};

/// Bytes of frames that are read at a time.
const READ_BYTES: usize = 64 * FRAME_BYTES;

/// Socket to a broker, over which batches go and frames come.
pub(crate) struct TcpPublisher {
    stream: TcpStream,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl TcpPublisher {
    /// Takes over a connected socket that has sent its opening frame.
    ///
    /// # Errors
    /// The error of the system call.
    pub(crate) fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, buffer: vec![0; READ_BYTES].into_boxed_slice(), start: 0, end: 0 })
    }

    /// Next frame of the bytes that were read; `None` when more must be read first.
    fn next(&mut self) -> Result<Option<Frame>, LinkError> {
        let Some((frame, rest)) = self.buffer[self.start..self.end].split_first_chunk::<FRAME_BYTES>() else {
            return Ok(None);
        };
        match Frame::decode(frame)? {
            Frame::ErrorFrame(error) => match refusal(&error, rest) {
                Some(refused) => Err(refused),
                None => Ok(None),
            },
            frame => {
                self.start += FRAME_BYTES;
                Ok(Some(frame))
            }
        }
    }
}

impl PublisherLink for TcpPublisher {
    fn write(&mut self, batch: &mut BatchBuilder<SendBuffer>, written: usize) -> io::Result<usize> {
        match self.stream.write(&batch.bytes()[written..]) {
            Err(error) if is_again(&error) => Ok(0),
            written => written,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn poll(&mut self, frames: &mut Vec<Frame>) -> Result<(), LinkError> {
        loop {
            while let Some(frame) = self.next()? {
                frames.push(frame);
            }
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            let room = self.buffer.len() - self.end;
            match self.stream.read(&mut self.buffer[self.end..]) {
                Ok(0) => return Err(LinkError::Lost(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => {
                    self.end += read;
                    if read < room {
                        // The socket has no more: what else comes shows on its descriptor.
                        while let Some(frame) = self.next()? {
                            frames.push(frame);
                        }
                        return Ok(());
                    }
                }
                Err(error) if is_again(&error) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn batches_in_use(&mut self) -> usize {
        0
    }

    fn arm(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn descriptors(&self, writable: bool) -> impl Iterator<Item = (RawFd, bool)> + use<> {
        std::iter::once((self.stream.as_raw_fd(), writable))
    }
}
