//! TCP: the kernel copies straight between sockets and the region.
//!
//! `[[DEVIATION_003]]` The thread that reads the socket is the receiver: a batch's header is read, its place in the
//! Blog is reserved with one atomic addition, and the body is received at that address. The paper's separate receiver
//! pool copies through the heap.

use super::{Connection, Landing, Outbox, Placement, Received, TransportError};
use crate::cxl::{Fabric, Native, RegionOffset};
use crate::wire::{BatchHeader, FRAME_BYTES, Frame};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

/// Ranges that one `sendmsg` gathers.
const GATHER: usize = 64;

/// Kernel buffers of a data socket on loopback, bytes: what is on its way should stay in the cache.
const LOOPBACK_BUFFER_BYTES: usize = 512 << 10;

/// Sizes of a data socket's kernel buffers, bytes. `None` leaves them to the kernel's tuning, on loopback to
/// 512 KiB.
#[derive(Clone, Copy, Debug, Default)]
pub struct SocketOptions {
    /// SO_SNDBUF.
    pub send_buffer_bytes: Option<usize>,
    /// SO_RCVBUF.
    pub receive_buffer_bytes: Option<usize>,
}

/// Prepares a data socket: no delay (batches are whole), and buffer sizes. On loopback congestion control is `reno`,
/// which every kernel has: a host's default may pace what it sends (BBR does, with a timer per segment), and there is
/// no path to spare.
///
/// # Errors
/// What the kernel reports.
pub fn prepare(stream: &TcpStream, options: SocketOptions) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    let mut default = None;
    if stream.peer_addr()?.ip().is_loopback() {
        socket.set_tcp_congestion(b"reno")?;
        default = Some(LOOPBACK_BUFFER_BYTES);
    }
    if let Some(bytes) = options.send_buffer_bytes.or(default) {
        socket.set_send_buffer_size(bytes)?;
    }
    if let Some(bytes) = options.receive_buffer_bytes.or(default) {
        socket.set_recv_buffer_size(bytes)?;
    }
    Ok(())
}

/// Listens for data connections.
///
/// # Errors
/// What the kernel reports.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// Connects to a broker's data port.
///
/// # Errors
/// What the kernel reports, or a time-out.
pub fn connect(address: SocketAddr, timeout: Duration, options: SocketOptions) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, timeout)?;
    prepare(&stream, options)?;
    Ok(stream)
}

fn again(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn message(ranges: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data, for which zero is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = ranges.as_mut_ptr();
    message.msg_iovlen = ranges.len() as _;
    message
}

/// Receives up to `len` bytes into the region at `at`, then up to `rest.len()` into `rest`. Returns the bytes
/// received; zero means that the peer closed.
///
/// # Errors
/// What the kernel reports; `WouldBlock` when there is nothing.
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

/// A broker's end of a TCP connection.
pub struct TcpConnection {
    stream: TcpStream,
    header: [u8; FRAME_BYTES],
    filled: usize,
    body: Option<Body>,
}

impl TcpConnection {
    /// Takes over an accepted socket.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn new(stream: TcpStream, options: SocketOptions) -> io::Result<Self> {
        prepare(&stream, options)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, header: [0; FRAME_BYTES], filled: 0, body: None })
    }

    /// The socket, for a [`super::Poller`].
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Says that nothing more will be sent. The peer can still read what was.
    pub fn finish(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Reads and forgets what the peer still sends; true when it has closed.
    pub fn discard(&mut self) -> bool {
        let mut scratch = [0u8; 4096];
        for _ in 0..256 {
            match self.stream.read(&mut scratch) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return !again(&error),
            }
        }
        false
    }

    /// Receives more of the body that is under way; true when it is complete.
    fn receive_body(&mut self, memory: &Native) -> Result<Option<Received>, TransportError> {
        let Some(body) = &mut self.body else { return Ok(None) };
        let missing = body.bytes - body.received;
        let want = missing as usize + FRAME_BYTES;
        let at = body.at.add(FRAME_BYTES as u64 + body.received);
        let received = match receive_into(&self.stream, memory, at, missing, &mut self.header) {
            Ok(0) => return Err(TransportError::Closed),
            Ok(received) => received,
            Err(error) if again(&error) => return Ok(Some(Received::Nothing)),
            Err(error) => return Err(error.into()),
        };
        if (received as u64) < missing {
            body.received += received as u64;
            return Ok((received < want).then_some(Received::Nothing));
        }
        self.filled = received - missing as usize;
        let (header, at) = (body.header, body.at);
        self.body = None;
        Ok(Some(Received::Batch(header, at)))
    }
}

impl Connection for TcpConnection {
    fn receive(&mut self, memory: &Native, landing: &mut impl Landing) -> Result<Received, TransportError> {
        loop {
            if self.body.is_some() {
                if let Some(received) = self.receive_body(memory)? {
                    return Ok(received);
                }
                continue;
            }
            if self.filled < FRAME_BYTES {
                match self.stream.read(&mut self.header[self.filled..]) {
                    Ok(0) => return Err(TransportError::Closed),
                    Ok(read) => self.filled += read,
                    Err(error) if again(&error) => return Ok(Received::Nothing),
                    Err(error) => return Err(error.into()),
                }
                if self.filled < FRAME_BYTES {
                    return Ok(Received::Nothing);
                }
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
        while !outbox.queue.is_empty() {
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
                if again(&error) {
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
}

/// Waits until one of the sockets can be read or (where asked) written, or the time is over.
///
/// # Errors
/// What `poll` reports.
pub fn wait_any(sockets: &[(RawFd, bool)], timeout: Duration) -> io::Result<()> {
    let mut watched: Vec<libc::pollfd> = sockets
        .iter()
        .map(|(socket, writable)| libc::pollfd {
            fd: *socket,
            events: if *writable { libc::POLLIN | libc::POLLOUT } else { libc::POLLIN },
            revents: 0,
        })
        .collect();
    let milliseconds = timeout.as_millis().clamp(1, 60_000) as libc::c_int;
    // SAFETY: the array lives across the call and its length is given.
    let result = unsafe { libc::poll(watched.as_mut_ptr(), watched.len() as libc::nfds_t, milliseconds) };
    if result < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(())
}
