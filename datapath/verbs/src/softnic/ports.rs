//! Ports of one NIC, and the keepers that drive them while nobody polls.

use super::identity::Identity;
use super::port::{Kept, PATIENCE, Port};
use super::wire::Wire;
use embarcadero_os::{Interest, Poller};
use socket2::Socket;
use std::any::Any;
use std::io::{self, ErrorKind, Read};
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Sleep of a keeper that polls for packets, after none came.
const NAP: Duration = Duration::from_micros(100);
/// Time for which a keeper polls without rest, after the last packet or after an owner went to sleep.
const LOOKING: Duration = Duration::from_micros(200);
/// Time without a poll after which an owner counts as asleep.
const ASLEEP: Duration = Duration::from_micros(10);
/// Token of the descriptor that is readable while packets wait.
const PACKETS: u64 = 0;
/// Token of every other descriptor.
const OTHER: u64 = 1;

/// Ports of one NIC. They live and end together, as those of DPDK hand each other packets.
pub(super) struct Ports {
    ports: Vec<Port>,
    /// NIC that they belong to, which stays open as long as they live.
    _nic: Arc<dyn Any + Send + Sync>,
}

impl Ports {
    /// Makes a port at each of the wires, and its keeper. `nic` is kept open.
    pub(super) fn new(
        identity: &Arc<Identity>,
        wires: Vec<Wire>,
        nic: Arc<dyn Any + Send + Sync>,
    ) -> io::Result<Arc<Self>> {
        let (ports, kept): (Vec<_>, Vec<_>) = wires
            .into_iter()
            .map(|wire| Port::new(identity, wire))
            .collect::<io::Result<Vec<_>>>()?
            .into_iter()
            .unzip();
        let ports = Arc::new(Self { ports, _nic: nic });
        for (index, Kept { packets, ends }) in kept.into_iter().enumerate() {
            let ports = Arc::downgrade(&ports);
            std::thread::Builder::new().name("roce-keeper".to_owned()).spawn(move || {
                // A keeper ends with the port, or when the kernel refuses it a descriptor. The owners' polling still drives
                // the port then, and reports what the kernel says.
                let _ = match packets {
                    Some(packets) => keep(&ports, index, &packets, &ends),
                    None => keep_polling(&ports, index, ends),
                };
            })?;
        }
        Ok(ports)
    }

    /// The port with the fewest completion queues.
    pub(super) fn idlest(self: &Arc<Self>) -> PortHandle {
        let index = (0..self.ports.len()).min_by_key(|index| self.ports[*index].queues()).unwrap_or(0);
        PortHandle { ports: Arc::clone(self), index }
    }
}

/// Handle of one of the ports of a NIC.
#[derive(Clone)]
pub(super) struct PortHandle {
    ports: Arc<Ports>,
    index: usize,
}

impl PortHandle {
    /// Handle of the port with that index; `None` once the NIC's ports are gone.
    fn upgrade(ports: &Weak<Ports>, index: usize) -> Option<Self> {
        Some(Self { ports: ports.upgrade()?, index })
    }
}

impl Deref for PortHandle {
    type Target = Port;

    fn deref(&self) -> &Port {
        &self.ports.ports[self.index]
    }
}

/// Runs the keeper of a port whose packets wake it: it drives the port while no owner polls.
fn keep(ports: &Weak<Ports>, index: usize, packets: &Socket, ends: &UnixStream) -> io::Result<()> {
    let mut poller = Poller::new()?;
    poller.add(packets.as_raw_fd(), PACKETS, Interest::INPUT)?;
    poller.add(ends.as_raw_fd(), OTHER, Interest::INPUT)?;
    let mut ready = Vec::new();
    let (mut rest, mut polled, mut in_charge) = (PATIENCE, 0, false);
    loop {
        poller.wait(rest, &mut ready)?;
        if ready.iter().any(|ready| ready.token == OTHER) {
            return Ok(());
        }
        if !in_charge && !ready.is_empty() {
            std::thread::sleep(PATIENCE);
        }
        let Some(port) = PortHandle::upgrade(ports, index) else { return Ok(()) };
        let before = std::mem::replace(&mut polled, port.polled.load(Ordering::Relaxed));
        in_charge = before == polled;
        if in_charge {
            port.drive()?;
        }
        rest = port.rest();
    }
}

/// Runs the keeper of a port whose packets wake nobody: it polls for them while all owners sleep.
fn keep_polling(ports: &Weak<Ports>, index: usize, mut calls: UnixStream) -> io::Result<()> {
    let (mut polled, mut polled_at) = (0, Instant::now());
    let mut rest = PATIENCE;
    let mut said = [0; 64];
    loop {
        calls.set_read_timeout(Some(rest))?;
        let mut looks_until = match calls.read(&mut said) {
            Ok(0) => return Ok(()),
            Ok(_) => Instant::now() + LOOKING,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Instant::now(),
            Err(error) => return Err(error),
        };
        loop {
            let Some(port) = PortHandle::upgrade(ports, index) else { return Ok(()) };
            let before = std::mem::replace(&mut polled, port.polled.load(Ordering::Relaxed));
            let now = Instant::now();
            if before != polled {
                polled_at = now;
            }
            let in_charge = now > polled_at + ASLEEP;
            if in_charge && port.drive()? {
                looks_until = now + LOOKING;
            }
            if now >= looks_until {
                rest = if in_charge { NAP } else { PATIENCE };
                break;
            }
            drop(port);
            std::thread::yield_now();
        }
    }
}
