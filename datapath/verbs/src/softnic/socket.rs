//! Sockets of the kernel that carry packets of RoCEv2.
//!
//! A raw socket sends (raw(7), IP_HDRINCL): the kernel chooses route, interface and neighbour. A packet socket receives
//! (packet(7)): unlike a UDP socket it shows the IP header, which the invariant checksum covers. A filter in the kernel
//! gives each queue the packets for its own queue pairs only, so that queues share nothing.

use super::filter::only_for;
use super::numbers::{NUMBERS, PAIRS};
use embarcadero_roce::PathMtu;
use embarcadero_roce::packet::{MAX_HEADER_BYTES, MAX_TRAILER_BYTES, Packet, SCRATCH_BYTES, UDP_PORT};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, SockFilter, Socket, Type};
use std::io;
use std::mem::zeroed;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};

/// Most packets taken, or sent, with one system call.
const BURST: usize = 64;
/// Bytes of the longest packet.
const PACKET_BYTES: usize = PathMtu::Mtu4096.bytes() + MAX_HEADER_BYTES + MAX_TRAILER_BYTES;
/// Bytes of waiting packets that the kernel keeps, if its limits allow: a burst of each of a hundred peers.
const RECEIVE_BUFFER: usize = 32 << 20;
/// Bytes of packets to be sent that the kernel keeps, if its limits allow.
const SEND_BUFFER: usize = 4 << 20;

/// Takes the UDP port of RoCEv2 at an address, so that the kernel does not answer its packets as unreachable.
///
/// Packets that come there are dropped. Other processes of the same user can have the port too.
pub(super) fn take_port(address: IpAddr) -> io::Result<Socket> {
    let at = SocketAddr::new(address, UDP_PORT);
    let socket = Socket::new(Domain::for_address(at), Type::DGRAM, Some(Protocol::UDP))?;
    // BPF_RET: keep nothing.
    socket.attach_filter(&[SockFilter::new(libc::BPF_RET as u16, 0, 0, 0)])?;
    socket.set_reuse_port(true)?;
    socket.bind(&at.into())?;
    Ok(socket)
}

/// Bytes that a frame of an interface carries (netdevice(7), SIOCGIFMTU). `any` is any socket.
pub(super) fn link_mtu(any: &Socket, interface: &str) -> io::Result<usize> {
    // SAFETY: plain data, for which zero is valid.
    let mut request: libc::ifreq = unsafe { zeroed() };
    // The last byte stays 0.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the request lives across the call, which reads its name and writes its number.
    if unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, and so it has written the number.
    Ok(unsafe { request.ifr_ifru.ifru_mtu }.max(0) as usize)
}

/// Reserves numbers of queue pairs at an address: [`PAIRS`] from the returned one on, as long as the socket lives.
fn take_numbers(address: IpAddr) -> io::Result<(u32, UnixDatagram)> {
    let queues = NUMBERS / PAIRS;
    let start: u32 = rand::random_range(0..queues);
    for offset in 0..queues {
        // Numbers 0 and 1 are not for connections (IBTA 10.2.4.3).
        let queue = (start + offset) % queues;
        let name = format!("embarcadero/roce/{address}/{queue}");
        if queue == 0 {
            continue;
        }
        match UnixDatagram::bind_addr(&UnixAddr::from_abstract_name(name)?) {
            Ok(socket) => return Ok((queue * PAIRS, socket)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, "all numbers of queue pairs are taken"))
}

/// Sockets of one queue.
pub(super) struct Sockets {
    sends: Socket,
    receives: Socket,
    /// Number of the first queue pair.
    pub first: u32,
    /// Socket that reserves the numbers of the queue pairs.
    _numbers: UnixDatagram,
    incoming: Box<[u8]>,
    outgoing: Vec<u8>,
    /// End in `outgoing` and destination of each staged packet.
    staged: Vec<(usize, SockAddr)>,
}

impl Sockets {
    /// Opens the sockets of a new queue at an address.
    ///
    /// # Errors
    /// The error that the kernel reports: `EPERM` without CAP_NET_RAW.
    pub(super) fn open(address: IpAddr) -> io::Result<Self> {
        let (first, numbers) = take_numbers(address)?;
        let (domain, ethertype) = match address {
            IpAddr::V4(_) => (Domain::IPV4, libc::ETH_P_IP),
            IpAddr::V6(_) => (Domain::IPV6, libc::ETH_P_IPV6),
        };
        // IPPROTO_RAW: the header is ours, and nothing is received.
        let sends = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
        sends.set_nonblocking(true)?;
        let _ = sends.set_send_buffer_size(SEND_BUFFER);
        // Of no protocol, it receives nothing before the filter is there.
        let receives = Socket::new(Domain::PACKET, Type::DGRAM, None)?;
        receives.attach_filter(&only_for(address, first))?;
        receives.set_nonblocking(true)?;
        if nix::sys::socket::setsockopt(&receives, nix::sys::socket::sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            receives.set_recv_buffer_size(RECEIVE_BUFFER)?;
        }
        receives.bind(&all_interfaces(ethertype as u16))?;
        Ok(Self {
            sends,
            receives,
            first,
            _numbers: numbers,
            incoming: vec![0; BURST * (SCRATCH_BYTES + PACKET_BYTES)].into_boxed_slice(),
            outgoing: Vec::with_capacity(BURST * PACKET_BYTES),
            staged: Vec::with_capacity(BURST),
        })
    }

    /// Descriptor that is readable while packets wait.
    pub(super) fn descriptor(&self) -> RawFd {
        self.receives.as_raw_fd()
    }

    /// Copy of the socket that receives, to wait for packets.
    pub(super) fn waiter(&self) -> io::Result<Socket> {
        self.receives.try_clone()
    }

    /// Hands a burst of packets to `each`, each behind scratch bytes, and returns their number.
    pub(super) fn receive(&mut self, mut each: impl FnMut(&mut [u8])) -> io::Result<usize> {
        // SAFETY: plain data, for which zero is valid.
        let (mut messages, mut buffers): ([libc::mmsghdr; BURST], [libc::iovec; BURST]) = unsafe { zeroed() };
        let rooms = self.incoming.chunks_exact_mut(SCRATCH_BYTES + PACKET_BYTES);
        for ((message, buffer), room) in messages.iter_mut().zip(&mut buffers).zip(rooms) {
            let room = &mut room[SCRATCH_BYTES..];
            *buffer = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
            message.msg_hdr.msg_iov = buffer;
            message.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: messages and buffers live across the call, and each has the room that it says.
        let count = unsafe {
            let descriptor = self.receives.as_raw_fd();
            libc::recvmmsg(descriptor, messages.as_mut_ptr(), BURST as u32, 0, std::ptr::null_mut())
        };
        let Ok(count) = usize::try_from(count) else {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                // ENETDOWN is said once when an interface goes down (packet(7)); it may come back.
                Some(libc::EAGAIN | libc::EINTR | libc::ENETDOWN) => Ok(0),
                _ => Err(error),
            };
        };
        let rooms = self.incoming.chunks_exact_mut(SCRATCH_BYTES + PACKET_BYTES);
        for (message, room) in messages[..count].iter().zip(rooms) {
            // A datagram longer than the longest packet is none.
            if message.msg_hdr.msg_flags & libc::MSG_TRUNC == 0 {
                each(&mut room[..SCRATCH_BYTES + (message.msg_len as usize).min(PACKET_BYTES)]);
            }
        }
        Ok(count)
    }

    /// Number of packets that can be staged now.
    pub(super) fn room(&self) -> usize {
        BURST - self.staged.len()
    }

    /// Returns true when no packet is staged.
    pub(super) fn is_flushed(&self) -> bool {
        self.staged.is_empty()
    }

    /// Adds a packet to those that the next flush sends. There must be room.
    pub(super) fn stage(&mut self, packet: &Packet<'_>) {
        // Packets that the protocol makes are sound.
        if packet.encode(&mut self.outgoing).is_ok() {
            self.staged.push((self.outgoing.len(), SocketAddr::new(packet.to, 0).into()));
        }
    }

    /// Sends the staged packets. Those that the kernel has no room for stay; those that it cannot send are lost.
    pub(super) fn flush(&mut self) {
        let mut sent = 0;
        while sent < self.staged.len() {
            // SAFETY: plain data, for which zero is valid.
            let (mut messages, mut buffers): ([libc::mmsghdr; BURST], [libc::iovec; BURST]) = unsafe { zeroed() };
            let mut start = if sent == 0 { 0 } else { self.staged[sent - 1].0 };
            let waiting = &self.staged[sent..];
            for ((message, buffer), (end, to)) in messages.iter_mut().zip(&mut buffers).zip(waiting) {
                let packet = &mut self.outgoing[start..*end];
                *buffer = libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() };
                message.msg_hdr.msg_iov = buffer;
                message.msg_hdr.msg_iovlen = 1;
                message.msg_hdr.msg_name = to.as_ptr().cast_mut().cast();
                message.msg_hdr.msg_namelen = to.len();
                start = *end;
            }
            let count = waiting.len().min(BURST) as u32;
            // SAFETY: messages, buffers and addresses live across the call, which only reads what they point to.
            let taken = unsafe { libc::sendmmsg(self.sends.as_raw_fd(), messages.as_mut_ptr(), count, 0) };
            match usize::try_from(taken) {
                Ok(taken) => sent += taken,
                Err(_) => match io::Error::last_os_error().raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) => break,
                    // No route, no neighbour, a filter, a queue that is full: of the first.
                    _ => sent += 1,
                },
            }
        }
        if sent == self.staged.len() {
            self.staged.clear();
            self.outgoing.clear();
        } else if sent > 0 {
            let gone = self.staged[sent - 1].0;
            self.outgoing.drain(..gone);
            self.staged.drain(..sent);
            self.staged.iter_mut().for_each(|(end, _)| *end -= gone);
        }
    }
}

/// Link-layer address that stands for all interfaces, for packets of one protocol (packet(7)).
fn all_interfaces(ethertype: u16) -> SockAddr {
    // SAFETY: plain data, for which zero is valid.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ethertype.to_be();
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: the storage is large and aligned enough for every family, and what is put into it has the length stated.
    unsafe {
        *storage.view_as::<libc::sockaddr_ll>() = address;
        SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t)
    }
}
