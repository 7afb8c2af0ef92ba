//! TCP: the kernel copies straight between sockets and the region.

mod connection;
mod publisher;
mod subscriber;

pub(crate) use connection::TcpConnection;
pub use connection::receive_into;
pub(crate) use publisher::TcpPublisher;
pub(crate) use subscriber::{TcpSubscriber, decode_header};

use crate::link::LinkError;
use embarcadero_wire::{ERROR_TEXT_BYTES, ErrorCode, ErrorFrame};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// Size of a data socket's kernel buffers on loopback, bytes: bytes under way should stay in the cache.
const LOOPBACK_BUFFER_BYTES: usize = 512 << 10;

/// Silence after which a socket's peer is asked whether it is still there.
pub const KEEPALIVE_TIME: Duration = Duration::from_secs(5);
/// Time between two such questions that have no answer.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Number of such questions without an answer after which the connection ends.
pub const KEEPALIVE_PROBES: u32 = 5;

/// Sizes of a data socket's kernel buffers.
#[derive(Clone, Copy, Debug, Default)]
pub struct SocketOptions {
    /// Bytes of the send buffer (`SO_SNDBUF`). `None` leaves the size to the kernel; on loopback it is 512 KiB.
    pub send_buffer_bytes: Option<usize>,
    /// Bytes of the receive buffer (`SO_RCVBUF`). `None` leaves the size to the kernel; on loopback it is 512 KiB.
    pub receive_buffer_bytes: Option<usize>,
}

/// Prepares a data socket: TCP_NODELAY, as batches are written whole, keep-alive, and the buffer sizes.
///
/// By keep-alive both ends notice that the other's host is gone. There is no TCP_USER_TIMEOUT: it would end connections
/// to subscribers that are slow to read.
///
/// On loopback the congestion control is `reno`, which every kernel has. A host's default may pace what it sends (BBR
/// does, with a timer per segment), and on loopback there is no network to protect.
///
/// # Errors
/// The error of the system call.
pub fn prepare(stream: &TcpStream, options: SocketOptions) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_TIME).with_interval(KEEPALIVE_INTERVAL);
    socket.set_tcp_keepalive(&keepalive.with_retries(KEEPALIVE_PROBES))?;
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
/// The error of the system call.
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
/// The error of the system call, or [`io::ErrorKind::TimedOut`].
pub fn connect(address: SocketAddr, timeout: Duration, options: SocketOptions) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, timeout)?;
    prepare(&stream, options)?;
    Ok(stream)
}

/// Returns true for an error that says that nothing can be read or written right now.
fn is_again(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Refusal that an error frame and the text behind it express; `None` while bytes of the text are missing.
fn refusal(error: &ErrorFrame, rest: &[u8]) -> Option<LinkError> {
    let text = rest.get(..(error.text_bytes as usize).min(ERROR_TEXT_BYTES))?;
    let text = String::from_utf8_lossy(text).into_owned();
    Some(LinkError::Refused { code: ErrorCode::from_code(error.code), text, detail: error.detail })
}
