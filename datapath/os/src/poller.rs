//! Readiness of sockets.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// Interest with which a socket is watched. A peer that hangs up is always seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// True for something to read.
    pub input: bool,
    /// True for room to write.
    pub room: bool,
}

impl Interest {
    /// Something to read.
    pub const INPUT: Self = Self { input: true, room: false };

    fn events(self) -> u32 {
        let mut events = libc::EPOLLRDHUP;
        if self.input {
            events |= libc::EPOLLIN;
        }
        if self.room {
            events |= libc::EPOLLOUT;
        }
        events as u32
    }
}

/// A ready socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Token that was given to [`Poller::add`].
    pub token: u64,
    /// True when the socket has something to read, or its peer is gone.
    pub readable: bool,
    /// True when the peer is gone, or sends nothing more. What it sent before may still be unread.
    pub hung_up: bool,
    /// True when the socket has room to write.
    pub writable: bool,
}

/// An epoll instance (epoll(7)), level-triggered.
pub struct Poller {
    epoll: OwnedFd,
    events: Vec<libc::epoll_event>,
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl Poller {
    /// Instance that reports at most 64 sockets per call.
    ///
    /// # Errors
    /// The error of `epoll_create1`.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers are passed.
        let raw = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let epoll = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { epoll, events: vec![libc::epoll_event { events: 0, u64: 0 }; 64] })
    }

    /// Descriptor that becomes readable when one of the watched sockets is ready.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    fn control(&self, operation: libc::c_int, socket: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest.events(), u64: token };
        // SAFETY: the event lives across the call; the kernel checks the descriptors.
        check(unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, socket, &raw mut event) }).map(drop)
    }

    /// Watches a socket.
    ///
    /// # Errors
    /// The error of `epoll_ctl`.
    pub fn add(&self, socket: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, socket, token, interest)
    }

    /// Changes what a socket is watched for.
    ///
    /// # Errors
    /// The error of `epoll_ctl`.
    pub fn modify(&self, socket: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, socket, token, interest)
    }

    /// Stops watching a socket.
    ///
    /// # Errors
    /// The error of `epoll_ctl`.
    pub fn remove(&self, socket: RawFd) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, socket, 0, Interest::INPUT)
    }

    /// Waits for ready sockets; `Duration::ZERO` only looks.
    ///
    /// # Errors
    /// The error of `epoll_wait`, other than an interruption.
    pub fn wait(&mut self, timeout: Duration, ready: &mut Vec<Ready>) -> io::Result<()> {
        ready.clear();
        let count = if timeout.is_zero() {
            // SAFETY: the buffer holds as many events as stated.
            unsafe {
                libc::epoll_wait(self.epoll.as_raw_fd(), self.events.as_mut_ptr(), self.events.len() as libc::c_int, 0)
            }
        } else {
            let time = libc::timespec {
                tv_sec: timeout.as_secs() as libc::time_t,
                tv_nsec: libc::c_long::from(timeout.subsec_nanos() as i32),
            };
            // SAFETY: as above; the time lives across the call and no signal mask is given. The system call is made
            // directly because the C library's wrapper is younger than the kernels we run on (5.11).
            unsafe {
                libc::syscall(
                    libc::SYS_epoll_pwait2,
                    self.epoll.as_raw_fd(),
                    self.events.as_mut_ptr(),
                    self.events.len() as libc::c_int,
                    &raw const time,
                    std::ptr::null::<libc::sigset_t>(),
                    0usize,
                ) as libc::c_int
            }
        };
        let count = match check(count) {
            Ok(count) => count as usize,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        const HANGUP: u32 = (libc::EPOLLHUP | libc::EPOLLERR | libc::EPOLLRDHUP) as u32;
        const INPUT: u32 = libc::EPOLLIN as u32 | HANGUP;
        ready.extend(self.events.iter().take(count).map(|event| Ready {
            token: event.u64,
            readable: event.events & INPUT != 0,
            hung_up: event.events & HANGUP != 0,
            writable: event.events & libc::EPOLLOUT as u32 != 0,
        }));
        Ok(())
    }
}

/// Waits until one of the sockets can be read, or the time is over. The flag beside a socket asks for room to write too.
///
/// # Errors
/// The error of `poll`.
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn look(poller: &mut Poller) -> Vec<Ready> {
        let mut ready = Vec::new();
        poller.wait(Duration::ZERO, &mut ready).unwrap();
        ready
    }

    #[test]
    fn a_socket_that_is_not_read_still_shows_that_its_peer_hung_up() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut poller = Poller::new().unwrap();
        poller.add(near.as_raw_fd(), 7, Interest::INPUT).unwrap();
        far.write_all(b"unread").unwrap();
        assert_eq!(look(&mut poller), [Ready { token: 7, readable: true, hung_up: false, writable: false }]);

        poller.modify(near.as_raw_fd(), 7, Interest { input: false, room: false }).unwrap();
        assert_eq!(look(&mut poller), []);
        poller.modify(near.as_raw_fd(), 7, Interest { input: false, room: true }).unwrap();
        assert_eq!(look(&mut poller), [Ready { token: 7, readable: false, hung_up: false, writable: true }]);

        poller.modify(near.as_raw_fd(), 7, Interest { input: false, room: false }).unwrap();
        drop(far);
        assert_eq!(look(&mut poller), [Ready { token: 7, readable: true, hung_up: true, writable: false }]);
    }
}
