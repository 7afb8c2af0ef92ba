//! Completion queues of a NIC in software, which drive its queue pairs.

use super::super::queue_pair::QueuePairOptions;
use super::super::{Completion, LocalPort};
use super::memory::Domain;
use super::nic::Nic;
use super::pair::{Pair, Side};
use super::wire::{PAIRS, Wire};
use embarcadero_os::Poller;
use embarcadero_roce::{Nanos, packet};
use socket2::Socket;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::IpAddr;
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Time between two looks for queue pairs whose time has come, nanoseconds.
const TICK: Nanos = 1_000_000;
/// Time for which the keeper leaves packets to the threads that poll.
const PATIENCE: Duration = Duration::from_millis(1);
/// Longest sleep of the keeper.
const LONGEST: Duration = Duration::from_secs(1);
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
pub(super) struct Ports(Vec<Port>);

impl Ports {
    /// Makes a port at each of the wires, and its keeper.
    pub fn new(nic: &Arc<Nic>, wires: Vec<Wire>) -> io::Result<Arc<Self>> {
        let (ports, kept): (Vec<_>, Vec<_>) =
            wires.into_iter().map(|wire| Port::new(nic, wire)).collect::<io::Result<Vec<_>>>()?.into_iter().unzip();
        let ports = Arc::new(Self(ports));
        for (index, Kept { packets, ends }) in kept.into_iter().enumerate() {
            let ports = Arc::downgrade(&ports);
            std::thread::Builder::new().name("roce-keeper".to_owned()).spawn(move || {
                // Without it the owner's polling still drives the port.
                let _ = match packets {
                    Some(packets) => keep(&ports, index, &packets, &ends),
                    None => keep_looking(&ports, index, ends),
                };
            })?;
        }
        Ok(ports)
    }

    /// The port with the fewest completion queues.
    fn idlest(self: &Arc<Self>) -> PortHandle {
        let index = (0..self.0.len()).min_by_key(|index| self.0[*index].lock().sinks.len()).unwrap_or(0);
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
        &self.ports.0[self.index]
    }
}

/// Descriptors that a keeper waits for.
struct Kept {
    /// Socket that is readable while packets wait; `None` where only polling finds them.
    packets: Option<Socket>,
    /// Socket that is readable when the port ends, or calls for a keeper that polls.
    ends: UnixStream,
}

/// Queue pairs that are driven together: of one completion queue, or of all that share a wire.
pub(super) struct Port {
    nic: Arc<Nic>,
    state: Mutex<State>,
    /// Number of times that an owner of a completion queue drove the port.
    polled: AtomicU64,
    /// Whether only polling finds packets, so that an owner that goes to sleep has to call the keeper.
    blind: bool,
    /// Whether packets came or went since an owner last went to sleep. Only then is the keeper called.
    active: AtomicBool,
    /// Other end of [`Kept::ends`]. The keeper ends when this is dropped.
    keeper: UnixStream,
}

/// State of a port, under its lock.
struct State {
    wire: Wire,
    /// Queue pairs by number.
    sides: HashMap<u32, Side>,
    /// Numbers of the queue pairs that have something to send, or soon will.
    busy: VecDeque<u32>,
    /// Completions for each completion queue, by its number.
    sinks: HashMap<u32, Sink>,
    /// Time of the last look for queue pairs whose time has come.
    looked_at: Nanos,
    /// Next candidate for a number, so that a number that was given back is not soon used again.
    next: u32,
    /// Number of completion queues that there ever were.
    queues: u32,
}

/// Completions for one completion queue.
struct Sink {
    completions: Vec<Completion>,
    /// Socket whose other end wakes the owner.
    wake: UnixStream,
}

impl Port {
    fn new(nic: &Arc<Nic>, wire: Wire) -> io::Result<(Self, Kept)> {
        let (keeper, ends) = UnixStream::pair()?;
        keeper.set_nonblocking(true)?;
        let packets = wire.waiter()?;
        let state = State {
            wire,
            sides: HashMap::new(),
            busy: VecDeque::new(),
            sinks: HashMap::new(),
            looked_at: 0,
            next: rand::random(),
            queues: 0,
        };
        let port = Self {
            nic: Arc::clone(nic),
            state: Mutex::new(state),
            polled: AtomicU64::new(0),
            blind: packets.is_none(),
            active: AtomicBool::new(false),
            keeper,
        };
        Ok((port, Kept { packets, ends }))
    }

    pub fn nic(&self) -> &Nic {
        &self.nic
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the queue pair that `make` makes, and returns its number.
    pub fn add(&self, make: impl FnOnce(u32) -> Side) -> io::Result<u32> {
        let mut state = self.lock();
        for _ in 0..PAIRS {
            let number = state.wire.first() + state.next % PAIRS;
            state.next = state.next.wrapping_add(1);
            if let Entry::Vacant(free) = state.sides.entry(number) {
                free.insert(make(number));
                return Ok(number);
            }
        }
        Err(io::Error::other(format!("a completion queue has room for {PAIRS} queue pairs")))
    }

    pub fn remove(&self, number: u32) {
        self.lock().sides.remove(&number);
    }

    /// Calls `act` with a queue pair, which may then have something to send.
    pub fn with<R>(
        &self,
        number: u32,
        act: impl FnOnce(&mut Side, &mut Vec<Completion>) -> io::Result<R>,
    ) -> io::Result<R> {
        self.active.store(true, Ordering::Relaxed);
        let State { sides, busy, sinks, .. } = &mut *self.lock();
        let side = sides.get_mut(&number).ok_or(io::ErrorKind::NotFound)?;
        let sink = sinks.get_mut(&side.queue).ok_or(io::ErrorKind::NotFound)?;
        let result = act(side, &mut sink.completions)?;
        if !std::mem::replace(&mut side.busy, true) {
            busy.push_back(number);
        }
        Ok(result)
    }

    /// Looks for the next hop to an address that a queue pair will send to.
    pub fn seek(&self, to: IpAddr) {
        self.lock().wire.seek(to, self.nic.now());
    }

    /// Sends what windows and rates allow.
    pub fn send(&self) {
        self.lock().send(&self.nic, self.nic.now());
    }
}

impl State {
    /// Takes a burst of packets, answers, and sends what windows and rates allow.
    ///
    /// Wakes the owners of completion queues with new completions, except the owner of `of`, which is polling.
    /// Returns whether packets came, or more is to be sent.
    fn drive(&mut self, nic: &Nic, of: Option<u32>) -> io::Result<bool> {
        let now = nic.now();
        let mut reach = nic.keys.reach();
        let Self { wire, sides, busy, sinks, .. } = self;
        let came = wire.receive(now, |bytes| {
            // What is no packet, or nobody's, is dropped (IBTA 9.6.1).
            let Ok(packet) = packet::decode(bytes) else { return };
            let Some(side) = sides.get_mut(&packet.queue_pair) else { return };
            side.take(&packet, now, &mut reach);
            if let Some(sink) = sinks.get_mut(&side.queue) {
                side.collect(&mut sink.completions);
            }
            if !std::mem::replace(&mut side.busy, true) {
                busy.push_back(packet.queue_pair);
            }
        })?;
        drop(reach);
        if now >= self.looked_at + TICK {
            self.looked_at = now;
            for (number, side) in &mut self.sides {
                if !side.busy && side.wake_at().is_some_and(|at| at <= now) {
                    side.busy = true;
                    self.busy.push_back(*number);
                }
            }
        }
        self.send(nic, now);
        for (queue, sink) in &self.sinks {
            if Some(*queue) != of && !sink.completions.is_empty() {
                // Full, it wakes as well.
                let _ = (&sink.wake).write(&[0]);
            }
        }
        Ok(came > 0 || !self.busy.is_empty())
    }

    /// Sends what windows and rates allow, as far as the wire has room.
    fn send(&mut self, nic: &Nic, now: Nanos) {
        if self.busy.is_empty() && self.wire.is_flushed() {
            return;
        }
        let reach = nic.keys.reach();
        let Self { wire, sides, busy, sinks, .. } = self;
        wire.flush();
        for _ in 0..busy.len() {
            let Some(number) = busy.pop_front() else { break };
            let Some(side) = sides.get_mut(&number) else { continue };
            let mut ended = false;
            while !ended && wire.has_room() {
                let room = wire.room();
                ended = side.transmit(now, &reach, room, |packet| wire.stage(packet)) < room;
                if !ended {
                    wire.flush();
                }
            }
            if let Some(sink) = sinks.get_mut(&side.queue) {
                side.collect(&mut sink.completions);
            }
            // A rate may let it send before it is looked for again.
            side.busy = !ended || side.wake_at().is_some_and(|at| at < now + TICK);
            if side.busy {
                busy.push_back(number);
            }
        }
        wire.flush();
    }

    /// Time until something has to be done if no packet comes, between [`PATIENCE`] and [`LONGEST`].
    fn rest(&self, now: Nanos) -> Duration {
        let soonest = self.sides.values().filter_map(Side::wake_at).min();
        soonest.map_or(LONGEST, |at| Duration::from_nanos(at.saturating_sub(now))).clamp(PATIENCE, LONGEST)
    }
}

/// Completion queue of a NIC in software. Polling it does the NIC's work for its queue pairs.
pub struct Queue {
    port: PortHandle,
    /// Number of the queue at its port.
    number: u32,
    poller: Poller,
    /// Other end of [`Sink::wake`].
    woken: UnixStream,
    /// Completions that are being handed over.
    taken: Vec<Completion>,
}

impl Queue {
    /// Makes a completion queue at the port with the fewest.
    ///
    /// # Errors
    /// The error that the kernel reports: `EPERM` without CAP_NET_RAW.
    pub(in super::super) fn new(nic: &Arc<Nic>) -> io::Result<Self> {
        let port = nic.ports()?.idlest();
        let poller = Poller::new()?;
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        poller.add(woken.as_raw_fd(), OTHER, false)?;
        let mut state = port.lock();
        if let Some(descriptor) = state.wire.descriptor() {
            poller.add(descriptor, PACKETS, false)?;
        }
        let number = state.queues;
        state.queues += 1;
        state.sinks.insert(number, Sink { completions: Vec::new(), wake });
        drop(state);
        Ok(Self { port, number, poller, woken, taken: Vec::new() })
    }

    pub(in super::super) fn descriptor(&self) -> RawFd {
        self.poller.descriptor()
    }

    pub(in super::super) fn pair(
        &self,
        domain: &Domain,
        port: &LocalPort,
        options: &QueuePairOptions<'_>,
    ) -> io::Result<Pair> {
        Pair::new(&self.port, self.number, domain, port, options)
    }

    #[inline]
    pub(in super::super) fn poll(&mut self, each: impl FnMut(Completion)) -> io::Result<usize> {
        self.port.polled.fetch_add(1, Ordering::Relaxed);
        let mut state = self.port.lock();
        if state.drive(&self.port.nic, Some(self.number))? {
            self.port.active.store(true, Ordering::Relaxed);
        }
        if let Some(sink) = state.sinks.get_mut(&self.number) {
            std::mem::swap(&mut sink.completions, &mut self.taken);
        }
        drop(state);
        let count = self.taken.len();
        self.taken.drain(..).for_each(each);
        Ok(count)
    }

    #[allow(clippy::unnecessary_wraps, reason = "devices of the host may refuse")]
    pub(in super::super) fn arm(&mut self) -> io::Result<()> {
        // It is readable while packets wait; what the keeper said is taken back.
        let mut said = [0; 64];
        while self.woken.read(&mut said).is_ok_and(|read| read > 0) {}
        if self.port.blind && self.port.active.swap(false, Ordering::Relaxed) {
            // Full, it wakes as well.
            let _ = (&self.port.keeper).write(&[0]);
        }
        Ok(())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.port.lock().sinks.remove(&self.number);
    }
}

/// Runs the keeper of a port whose packets wake it: it drives the port while no owner polls.
fn keep(ports: &Weak<Ports>, index: usize, packets: &Socket, ends: &UnixStream) -> io::Result<()> {
    let mut poller = Poller::new()?;
    poller.add(packets.as_raw_fd(), PACKETS, false)?;
    poller.add(ends.as_raw_fd(), OTHER, false)?;
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
        let mut state = port.lock();
        if in_charge {
            state.drive(&port.nic, None)?;
        }
        rest = state.rest(port.nic.now());
    }
}

/// Runs the keeper of a port whose packets wake nobody: it polls for them while all owners sleep.
fn keep_looking(ports: &Weak<Ports>, index: usize, mut calls: UnixStream) -> io::Result<()> {
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
            if in_charge && port.lock().drive(&port.nic, None)? {
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
