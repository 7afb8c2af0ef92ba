//! A publisher's connection to one broker. Never blocks once it is connected.

use crate::error::ClientError;
use crate::verbs::{PublishPair, VerbsDevice};
use embarcadero_datapath::transport::tcp::{SocketOptions, connect};
use embarcadero_datapath::wire::batch::BatchBuilder;
use embarcadero_datapath::wire::{ERROR_TEXT_BYTES, ErrorCode, ErrorFrame, FRAME_BYTES, Frame, OpenPublish};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// Bytes of frames that are read at a time.
const READ_BYTES: usize = 64 * FRAME_BYTES;

/// What a link has to say.
#[derive(Debug)]
pub(crate) enum LinkEvent {
    /// Nothing now.
    Nothing,
    /// A frame.
    Frame(Frame),
    /// The broker refuses and closes.
    Refused(ErrorCode, String),
    /// The connection is gone.
    Lost,
}

/// What a link is opened with.
pub(crate) struct LinkOptions {
    pub(crate) timeout: Duration,
    pub(crate) sockets: SocketOptions,
    /// Largest batch, header and body.
    pub(crate) batch_bytes: usize,
    /// Batches are acknowledged.
    pub(crate) acknowledged: bool,
    /// The device, for a link over verbs.
    pub(crate) device: Option<Arc<VerbsDevice>>,
}

pub(crate) struct Link {
    /// Beside the socket, if batches and frames travel over a queue pair.
    verbs: Option<Box<PublishPair>>,
    stream: TcpStream,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Link {
    /// Connects and sends the opening frame; the answer comes through [`Link::poll`].
    pub(crate) fn open(address: SocketAddr, options: &LinkOptions, open: OpenPublish) -> io::Result<Self> {
        let mut stream = connect(address, options.timeout, options.sockets)?;
        let verbs = match &options.device {
            Some(device) => {
                let pair = PublishPair::open(device, &mut stream, options)?;
                Some(Box::new(pair))
            }
            None => None,
        };
        stream.write_all(&open.encode())?;
        stream.set_nonblocking(true)?;
        Ok(Self { verbs, stream, buffer: vec![0; READ_BYTES].into_boxed_slice(), start: 0, end: 0 })
    }

    /// What to wait for: the socket (also for room, if `writable`), and what else becomes readable.
    pub(crate) fn descriptors(&self, writable: bool) -> impl Iterator<Item = (RawFd, bool)> {
        let (pair, writable) =
            (self.verbs.as_ref().map(|verbs| (verbs.descriptor(), false)), writable && self.verbs.is_none());
        std::iter::once((self.stream.as_raw_fd(), writable)).chain(pair)
    }

    /// Call before the last look that comes before waiting for [`Link::descriptors`].
    pub(crate) fn arm(&mut self) -> io::Result<()> {
        if let Some(verbs) = &mut self.verbs {
            return verbs.arm();
        }
        Ok(())
    }

    /// Hands a sealed batch, of which `written` bytes are handed over, to the transport; returns how many it took.
    /// [`Link::flush`] must follow.
    pub(crate) fn write(&mut self, batch: &mut BatchBuilder, written: usize) -> io::Result<usize> {
        if let Some(verbs) = &mut self.verbs {
            return verbs.stage(batch).map(|staged| if staged { batch.bytes().len() } else { 0 });
        }
        match self.stream.write(&batch.bytes()[written..]) {
            Ok(written) => Ok(written),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Batches that were handed over and are still read in place, at most; of a link without acknowledgements.
    pub(crate) fn in_use(&mut self) -> usize {
        if let Some(verbs) = &mut self.verbs {
            return verbs.in_use();
        }
        0
    }

    /// Sends what the last calls of [`Link::write`] took.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if let Some(verbs) = &mut self.verbs {
            return verbs.flush();
        }
        Ok(())
    }

    /// Takes the next frame.
    pub(crate) fn poll(&mut self) -> LinkEvent {
        let failed = match self.verbs.as_mut().map(|verbs| verbs.poll()) {
            Some(Ok(Some(frame))) => return LinkEvent::Frame(frame),
            Some(Ok(None)) | None => false,
            // The socket may know why.
            Some(Err(_)) => true,
        };
        match self.poll_socket() {
            LinkEvent::Nothing if failed => LinkEvent::Lost,
            event => event,
        }
    }

    fn poll_socket(&mut self) -> LinkEvent {
        loop {
            if let Some(frame) = self.buffer[self.start..self.end].first_chunk::<FRAME_BYTES>() {
                match Frame::decode(frame) {
                    Ok(Frame::ErrorFrame(error)) => {
                        // Its text may not have come yet.
                        if let Some(event) = self.refusal(&error) {
                            return event;
                        }
                    }
                    Ok(frame) => {
                        self.start += FRAME_BYTES;
                        return LinkEvent::Frame(frame);
                    }
                    Err(_) => return LinkEvent::Lost,
                }
            }
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            match self.stream.read(&mut self.buffer[self.end..]) {
                Ok(0) => return LinkEvent::Lost,
                Ok(read) => self.end += read,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    return LinkEvent::Nothing;
                }
                Err(_) => return LinkEvent::Lost,
            }
        }
    }

    fn refusal(&self, error: &ErrorFrame) -> Option<LinkEvent> {
        let (code, text) = decode_refusal(error, &self.buffer[self.start + FRAME_BYTES..self.end])?;
        Some(match code {
            Some(code) => LinkEvent::Refused(code, text),
            None => LinkEvent::Lost,
        })
    }
}

/// The code and text of an error frame; `None` while bytes of the text are missing.
pub(crate) fn decode_refusal(error: &ErrorFrame, rest: &[u8]) -> Option<(Option<ErrorCode>, String)> {
    let bytes = (error.text_bytes as usize).min(ERROR_TEXT_BYTES);
    let text = rest.get(..bytes)?;
    Some((ErrorCode::from_u32(error.code), String::from_utf8_lossy(text).into_owned()))
}

pub(crate) fn refused(code: ErrorCode, text: String, detail: u64) -> ClientError {
    match code {
        ErrorCode::OffsetOutOfRange => ClientError::OffsetOutOfRange { earliest: detail, text },
        _ => ClientError::Broker { code, text },
    }
}
