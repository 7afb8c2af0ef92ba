//! Completion queues of a NIC in software.

use super::memory::Domain;
use super::nic::Nic;
use super::pair::Pair;
use super::ports::PortHandle;
use super::receives::Receives;
use crate::outcome::Completion;
use crate::port::LocalPort;
use embarcadero_os::{Interest, Poller};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// Token of the descriptor that is readable while packets wait.
const PACKETS: u64 = 0;
/// Token of the descriptor that wakes the owner.
const WOKEN: u64 = 1;

/// Completion queue of a NIC in software. Polling it does the NIC's work for its queue pairs.
pub(crate) struct Queue {
    port: PortHandle,
    /// Number of the queue at its port.
    number: u32,
    poller: Poller,
    /// Other end of the socket that wakes the owner.
    woken: UnixStream,
    /// Completions that are being handed over.
    taken: Vec<Completion>,
}

impl Queue {
    /// Makes a completion queue at the port with the fewest.
    ///
    /// # Errors
    /// The error that the kernel reports: `EPERM` without CAP_NET_RAW.
    pub(crate) fn new(nic: &Arc<Nic>) -> io::Result<Self> {
        let port = nic.ports()?.idlest();
        let poller = Poller::new()?;
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        poller.add(woken.as_raw_fd(), WOKEN, Interest::INPUT)?;
        let (number, packets) = port.add_queue(wake);
        let queue = Self { port, number, poller, woken, taken: Vec::new() };
        if let Some(packets) = packets {
            queue.poller.add(packets, PACKETS, Interest::INPUT)?;
        }
        Ok(queue)
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.poller.descriptor()
    }

    /// Makes a queue pair whose completions come here.
    pub(crate) fn pair(&self, domain: &Domain, port: &LocalPort, shared: Option<&Arc<Receives>>) -> io::Result<Pair> {
        Pair::new(&self.port, self.number, domain, port, shared)
    }

    /// Drives the queue's port, hands completions to `each`, and returns their number.
    #[inline]
    pub(crate) fn poll(&mut self, each: impl FnMut(Completion)) -> io::Result<usize> {
        self.port.poll(self.number, &mut self.taken)?;
        let count = self.taken.len();
        self.taken.drain(..).for_each(each);
        Ok(count)
    }

    #[allow(clippy::unnecessary_wraps, reason = "devices of the host may refuse")]
    pub(crate) fn arm(&mut self) -> io::Result<()> {
        // The descriptor is readable while packets wait, and after a wake, which is taken back here.
        let mut said = [0; 64];
        while self.woken.read(&mut said).is_ok_and(|read| read > 0) {}
        self.port.call_keeper();
        Ok(())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.port.remove_queue(self.number);
    }
}
