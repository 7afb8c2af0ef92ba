//! Broker's end of a TCP connection.
//!
//! The thread that reads the socket is the receiver. It reads a batch's header, reserves the place in the Blog with one
//! atomic addition, and receives the body at that address.

// [[DEVIATION_003]] The paper's separate receiver pool copies through the heap.

use super::{SocketOptions, is_again, prepare};
use crate::connection::{Connection, Landing, Placement, Received, TransportError};
use crate::outbox::Outbox;
use embarcadero_cxl::{Fabric, Native, RegionOffset};
use embarcadero_wire::{BatchHeader, FRAME_BYTES, Frame};
use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};

/// Ranges that one `sendmsg` gathers.
const GATHER: usize = 64;

fn message(ranges: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data, for which zero is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = ranges.as_mut_ptr();
    message.msg_iovlen = ranges.len() as _;
    message
}

/// Receives up to `len` bytes into the region at `at`, then up to `rest.len()` into `rest`. Returns the number of bytes
/// received; 0 means that the peer closed.
///
/// # Errors
/// The error of the system call; [`io::ErrorKind::WouldBlock`] when nothing has come.
pub fn receive_into(
    stream: &TcpStream,
    memory: &Native,
    at: RegionOffset,
    len: u64,
    rest: &mut [u8],
) -> io::Result<usize> {
    let mut ranges = [
        libc::iovec { iov_base: memory.address(at, len).cast(), iov_len: len as usize },
        libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() },
    ];
    let mut message = message(&mut ranges);
    // SAFETY: both ranges are writable for their lengths: `address` checked the first against the region, which its
    // caller has reserved, and the second is exclusively borrowed.
    let received = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    if received < 0 { Err(io::Error::last_os_error()) } else { Ok(received as usize) }
}

struct Body {
    header: BatchHeader,
    at: RegionOffset,
    bytes: u64,
    received: u64,
}

/// Broker's end of a TCP connection.
pub(crate) struct TcpConnection {
    stream: TcpStream,
    header: [u8; FRAME_BYTES],
    filled: usize,
    body: Option<Body>,
}

impl TcpConnection {
    /// Takes over an accepted socket.
    ///
    /// # Errors
    /// The error of the system call.
    pub(crate) fn new(stream: TcpStream, options: SocketOptions) -> io::Result<Self> {
        prepare(&stream, options)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, header: [0; FRAME_BYTES], filled: 0, body: None })
    }

    /// Receives more of the body that is under way.
    fn receive_body(&mut self, memory: &Native, body: &mut Body) -> Result<Progress, TransportError> {
        let missing = body.bytes - body.received;
        let want = missing as usize + FRAME_BYTES;
        let at = body.at.add(FRAME_BYTES as u64 + body.received);
        let received = match receive_into(&self.stream, memory, at, missing, &mut self.header) {
            Ok(0) => return Err(TransportError::Closed),
            Ok(received) => received,
            Err(error) if is_again(&error) => return Ok(Progress::Blocked),
            Err(error) => return Err(error.into()),
        };
        if (received as u64) < missing {
            body.received += received as u64;
            return Ok(if received < want { Progress::Blocked } else { Progress::Partial });
        }
        self.filled = received - missing as usize;
        Ok(Progress::Complete)
    }

    /// Reads the rest of a header. Returns false when part of it has not come.
    fn receive_header(&mut self) -> Result<bool, TransportError> {
        if self.filled < FRAME_BYTES {
            match self.stream.read(&mut self.header[self.filled..]) {
                Ok(0) => return Err(TransportError::Closed),
                Ok(read) => self.filled += read,
                Err(error) if is_again(&error) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.filled == FRAME_BYTES)
    }
}

/// Progress of receiving a body.
enum Progress {
    Complete,
    Partial,
    /// The socket has no more.
    Blocked,
}

impl Connection<Native> for TcpConnection {
    fn receive<L: Landing>(
        &mut self,
        memory: &Native,
        landing: &mut L,
        budget: usize,
    ) -> Result<Received, TransportError> {
        let mut taken = 0;
        loop {
            if let Some(mut body) = self.body.take() {
                match self.receive_body(memory, &mut body)? {
                    Progress::Complete => {}
                    progress => {
                        self.body = Some(body);
                        if let Progress::Blocked = progress {
                            return Ok(Received::Nothing);
                        }
                        continue;
                    }
                }
                landing.complete(body.header, body.at, false)?;
                taken += 1;
                if taken == budget {
                    return Ok(Received::More);
                }
            }
            if !self.receive_header()? {
                return Ok(Received::Nothing);
            }
            match Frame::decode(&self.header)? {
                Frame::BatchHeader(header) => match landing.place(&header) {
                    Placement::At(at) => {
                        memory.write_bytes(at, &self.header);
                        self.filled = 0;
                        self.body = Some(Body { header, at, bytes: header.body_bytes(), received: 0 });
                    }
                    Placement::Wait => return Ok(Received::Waiting),
                    Placement::Refuse(error) => return Err(error),
                },
                frame => {
                    self.filled = 0;
                    return Ok(Received::Frame(frame));
                }
            }
        }
    }

    fn send(&mut self, memory: &Native, outbox: &mut Outbox) -> Result<u64, TransportError> {
        let mut total = 0;
        while !outbox.is_empty() {
            let mut ranges = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; GATHER];
            let mut used = 0;
            let mut skip = outbox.sent;
            let mut wanted = 0;
            for outgoing in &outbox.queue {
                if used + 2 > GATHER {
                    break;
                }
                let head = outgoing.head();
                if skip < head.len() as u64 {
                    let head = &head[skip as usize..];
                    ranges[used] = libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
                    used += 1;
                    wanted += head.len() as u64;
                    skip = 0;
                } else {
                    skip -= head.len() as u64;
                }
                if let Some((at, len)) = outgoing.batch {
                    let (at, len) = (at.add(skip), len - skip);
                    skip = 0;
                    ranges[used] = libc::iovec { iov_base: memory.address(at, len).cast(), iov_len: len as usize };
                    used += 1;
                    wanted += len;
                }
            }
            let message = message(&mut ranges[..used]);
            // SAFETY: every range is readable for its length: heads live in the outbox, batches were checked against
            // the region and are pinned while they are in the outbox. The kernel only reads them.
            let sent = unsafe {
                libc::sendmsg(self.stream.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
            };
            if sent < 0 {
                let error = io::Error::last_os_error();
                if is_again(&error) {
                    return Ok(total);
                }
                return Err(error.into());
            }
            outbox.advance(sent as u64);
            total += sent as u64;
            if (sent as u64) < wanted {
                return Ok(total);
            }
        }
        Ok(total)
    }

    fn descriptor(&self) -> Option<RawFd> {
        Some(self.stream.as_raw_fd())
    }

    fn has_work(&self) -> bool {
        false
    }

    fn has_to_send(&self) -> bool {
        false
    }

    fn waits_for_socket(&self, outbox: &Outbox) -> bool {
        !outbox.is_empty()
    }

    fn arriving(&self) -> Option<u64> {
        self.body.as_ref().map(|body| body.received)
    }

    fn finish(&mut self) {
        // Fails only if the peer has closed already.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    fn discard(&mut self) -> bool {
        let mut scratch = [0u8; 4096];
        for _ in 0..256 {
            match self.stream.read(&mut scratch) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return !is_again(&error),
            }
        }
        false
    }
}
