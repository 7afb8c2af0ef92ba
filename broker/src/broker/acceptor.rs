//! Acceptor: takes in data connections, and hands them to the workers.

use super::threads::spawn;
use super::{BrokerError, io_error};
use crossbeam_channel::Sender;
use embarcadero_os::{Interest, Poller};
use embarcadero_wire::{ErrorCode, encode_error};
use rustix::process::{Resource, getrlimit};
use std::fs::File;
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Wait after a failure that leaves connections unaccepted.
const RETRY: Duration = Duration::from_millis(10);
/// Least number of descriptors that are kept for other things than data connections.
const LEAST_RESERVE: u64 = 64;

/// Largest number of data connections, where `configured` is `max_connections`.
pub(super) fn connection_limit(configured: u64) -> usize {
    let most = if configured > 0 {
        configured
    } else {
        // No limit of the process leaves the system's, which is seen when it is reached.
        getrlimit(Resource::Nofile).current.map_or(u64::MAX, |files| files - (files / 8).max(LEAST_RESERVE).min(files))
    };
    usize::try_from(most).unwrap_or(usize::MAX)
}

/// Opens a descriptor that is closed when another is needed.
fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

/// Returns true for an error that says that no descriptor is free, in this process or on this host.
fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Thread that accepts data connections.
pub(super) struct Acceptor {
    listener: TcpListener,
    /// Channel to each worker. There must be one at least.
    workers: Vec<Sender<TcpStream>>,
    /// Number of connections that the workers have.
    open: Arc<AtomicUsize>,
    /// Largest number of connections.
    most: usize,
    /// Number of connections handed over so far.
    accepted: usize,
    /// Descriptor that is given up to accept a connection, and close it, when no other is free.
    spare: Option<File>,
    /// True from a warning until a connection can be taken again.
    has_warned: bool,
}

impl Acceptor {
    /// Acceptor for a listening socket. The workers count their connections in `open`; there are `most` at most.
    pub(super) fn new(
        listener: TcpListener,
        workers: Vec<Sender<TcpStream>>,
        open: Arc<AtomicUsize>,
        most: usize,
    ) -> Result<Self, BrokerError> {
        listener.set_nonblocking(true).map_err(io_error("prepare the data socket"))?;
        Ok(Self { listener, workers, open, most, accepted: 0, spare: spare(), has_warned: false })
    }

    /// Starts the thread, which runs until `stop`.
    pub(super) fn spawn(mut self, stop: Arc<AtomicBool>) -> Result<JoinHandle<()>, BrokerError> {
        let mut poller = Poller::new().map_err(io_error("watch the data socket"))?;
        poller.add(self.listener.as_raw_fd(), 0, Interest::INPUT).map_err(io_error("watch the data socket"))?;
        spawn("acceptor".to_owned(), move || {
            let mut ready = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let _ = poller.wait(Duration::from_millis(100), &mut ready);
                if !self.accept_all() {
                    std::thread::sleep(RETRY);
                }
            }
        })
    }

    /// Accepts all connections that wait. Returns false if some may be left that cannot be accepted now.
    fn accept_all(&mut self) -> bool {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => self.take(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                // The peer is gone already.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    self.warn(&error.to_string());
                    if !is_out_of_descriptors(&error) || !self.accept_and_close() {
                        return false;
                    }
                }
            }
        }
    }

    /// Hands a connection to the next worker, or refuses it where there are too many.
    fn take(&mut self, stream: TcpStream) {
        let handed_over: usize = self.workers.iter().map(Sender::len).sum();
        if self.open.load(Ordering::Relaxed) + handed_over >= self.most {
            self.warn(&format!("{} connections are open, as many as max_connections allows", self.most));
            refuse(stream, &format!("the broker has {} connections, and takes no more", self.most));
            return;
        }
        self.has_warned = false;
        // A worker that ended drops the connection.
        let _ = self.workers[self.accepted % self.workers.len()].send(stream);
        self.accepted += 1;
    }

    /// Accepts a connection with the spare descriptor and closes it, so that its client does not wait in vain. Returns
    /// false if none could be accepted.
    fn accept_and_close(&mut self) -> bool {
        let had_spare = self.spare.take().is_some();
        let closed = had_spare && self.listener.accept().map(drop).is_ok();
        self.spare = spare();
        closed
    }

    /// Warns once, until a connection is taken again.
    fn warn(&mut self, reason: &str) {
        if !std::mem::replace(&mut self.has_warned, true) {
            tracing::warn!(reason, "connections cannot be accepted");
        }
    }
}

/// Tells a client why it is refused, if its socket takes that at once, and closes the connection.
fn refuse(mut stream: TcpStream, text: &str) {
    let frame = encode_error(ErrorCode::Unavailable, text, 0);
    let _ = stream.set_nonblocking(true).and_then(|()| stream.write_all(&frame));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::unbounded;
    use embarcadero_wire::{FRAME_BYTES, Frame};
    use std::io::Read;

    /// Accepts until `done`: a connection may come a moment after its client has it.
    fn accept_until(acceptor: &mut Acceptor, done: impl Fn(&Acceptor) -> bool) {
        while !done(acceptor) {
            assert!(acceptor.accept_all());
            std::thread::yield_now();
        }
    }

    #[test]
    fn connections_beyond_the_limit_are_told_and_there_is_room_again_once_others_close() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (worker, accepted) = unbounded();
        let open = Arc::new(AtomicUsize::new(0));
        let mut acceptor = Acceptor::new(listener, vec![worker], Arc::clone(&open), 2).unwrap();
        let connect = || TcpStream::connect(address).unwrap();

        // One that its worker has, and one that is handed over.
        let _first = connect();
        accept_until(&mut acceptor, |acceptor| acceptor.accepted == 1);
        accepted.recv().unwrap();
        open.fetch_add(1, Ordering::Relaxed);
        let _second = connect();
        accept_until(&mut acceptor, |acceptor| acceptor.accepted == 2);

        let mut third = connect();
        accept_until(&mut acceptor, |acceptor| acceptor.has_warned);
        assert_eq!(accepted.len(), 1);
        let mut answer = Vec::new();
        third.read_to_end(&mut answer).unwrap();
        let Ok(Frame::ErrorFrame(error)) = Frame::decode(answer.first_chunk::<FRAME_BYTES>().unwrap()) else {
            panic!()
        };
        assert_eq!(ErrorCode::from_code(error.code), Some(ErrorCode::Unavailable));

        open.fetch_sub(1, Ordering::Relaxed);
        let _fourth = connect();
        accept_until(&mut acceptor, |acceptor| acceptor.accepted == 3);
        assert!(!acceptor.has_warned && accepted.len() == 2);
    }

    #[test]
    fn descriptors_are_left_for_other_things_than_connections() {
        assert_eq!(connection_limit(7), 7);
        let files = getrlimit(Resource::Nofile).current.map_or(usize::MAX, |files| files as usize);
        assert!(connection_limit(0) == usize::MAX || connection_limit(0) + LEAST_RESERVE as usize <= files);
    }
}
