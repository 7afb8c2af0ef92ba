//! A publisher's connection to one broker. Never blocks once it is connected.

use crate::error::ClientError;
use embarcadero_datapath::transport::tcp::{SocketOptions, connect};
use embarcadero_datapath::wire::{ERROR_TEXT_BYTES, ErrorCode, ErrorFrame, FRAME_BYTES, Frame, OpenPublish};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
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

pub(crate) struct Link {
    stream: TcpStream,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Link {
    /// Connects and sends the opening frame; the answer comes through [`Link::poll`].
    pub(crate) fn open(
        address: SocketAddr,
        timeout: Duration,
        sockets: SocketOptions,
        open: OpenPublish,
    ) -> io::Result<Self> {
        let mut stream = connect(address, timeout, sockets)?;
        stream.write_all(&open.encode())?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, buffer: vec![0; READ_BYTES].into_boxed_slice(), start: 0, end: 0 })
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Hands bytes to the transport; returns how many it took.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.stream.write(bytes) {
            Ok(written) => Ok(written),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Takes the next frame.
    pub(crate) fn poll(&mut self) -> LinkEvent {
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
