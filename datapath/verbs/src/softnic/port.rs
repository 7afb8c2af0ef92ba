//! Ports of a NIC in software: queue pairs that are driven together.

use super::identity::Identity;
use super::memory::Keys;
use super::numbers::PAIRS;
use super::side::Side;
use super::wire::Wire;
use crate::outcome::Completion;
use embarcadero_roce::{Nanos, packet};
use socket2::Socket;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Time between two looks for queue pairs whose time has come, nanoseconds.
const TICK: Nanos = 1_000_000;
/// Time for which the keeper leaves packets to the threads that poll.
pub(super) const PATIENCE: Duration = Duration::from_millis(1);
/// Longest sleep of the keeper.
const LONGEST: Duration = Duration::from_secs(1);

/// Descriptors that a keeper waits for.
pub(super) struct Kept {
    /// Socket that is readable while packets wait; `None` where only polling finds them.
    pub packets: Option<Socket>,
    /// Socket that is readable when the port ends, or calls for a keeper that polls.
    pub ends: UnixStream,
}

/// Queue pairs that are driven together: of one completion queue, or of all that share a wire.
pub(super) struct Port {
    identity: Arc<Identity>,
    state: Mutex<State>,
    /// Number of times that an owner of a completion queue drove the port.
    pub polled: AtomicU64,
    /// True when only polling finds packets, so that an owner that goes to sleep has to call the keeper.
    blind: bool,
    /// True when packets came or went since an owner last went to sleep. Only then is the keeper called.
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
    /// Makes a port at a wire, and the descriptors for its keeper.
    pub(super) fn new(identity: &Arc<Identity>, wire: Wire) -> io::Result<(Self, Kept)> {
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
            identity: Arc::clone(identity),
            state: Mutex::new(state),
            polled: AtomicU64::new(0),
            blind: packets.is_none(),
            active: AtomicBool::new(false),
            keeper,
        };
        Ok((port, Kept { packets, ends }))
    }

    /// Identity of the NIC.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the queue pair that `make` makes, and returns its number.
    pub(super) fn add(&self, make: impl FnOnce(u32) -> Side) -> io::Result<u32> {
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

    /// Removes a queue pair. From then on no packet finds it.
    pub(super) fn remove(&self, number: u32) {
        self.lock().sides.remove(&number);
    }

    /// Calls `act` with a queue pair, which may then have something to send.
    pub(super) fn with<R>(
        &self,
        number: u32,
        act: impl FnOnce(&mut Side, &mut Vec<Completion>) -> io::Result<R>,
    ) -> io::Result<R> {
        self.active.store(true, Ordering::Relaxed);
        let State { sides, busy, sinks, .. } = &mut *self.lock();
        let gone = |what| io::Error::new(io::ErrorKind::NotFound, format!("{what} of queue pair {number:#x} is gone"));
        let side = sides.get_mut(&number).ok_or_else(|| gone("the state"))?;
        let sink = sinks.get_mut(&side.queue).ok_or_else(|| gone("the completion queue"))?;
        let result = act(side, &mut sink.completions)?;
        if !std::mem::replace(&mut side.busy, true) {
            busy.push_back(number);
        }
        Ok(result)
    }

    /// Looks for the next hop to an address that a queue pair will send to.
    pub(super) fn seek(&self, to: IpAddr) {
        self.lock().wire.seek(to, self.identity.now());
    }

    /// Sends what windows and rates allow.
    pub(super) fn send(&self) {
        self.lock().send(&self.identity.keys, self.identity.now());
    }

    /// Number of completion queues.
    pub(super) fn queues(&self) -> usize {
        self.lock().sinks.len()
    }

    /// Adds a completion queue, which `wake` wakes. Returns its number, and the descriptor that is readable while packets
    /// wait, if there is one.
    pub(super) fn add_queue(&self, wake: UnixStream) -> (u32, Option<RawFd>) {
        let mut state = self.lock();
        let number = state.queues;
        state.queues += 1;
        state.sinks.insert(number, Sink { completions: Vec::new(), wake });
        (number, state.wire.descriptor())
    }

    /// Removes a completion queue.
    pub(super) fn remove_queue(&self, number: u32) {
        self.lock().sinks.remove(&number);
    }

    /// Drives the port for the owner of a completion queue, and swaps the queue's completions with `taken`, which is empty.
    #[inline]
    pub(super) fn poll(&self, queue: u32, taken: &mut Vec<Completion>) -> io::Result<()> {
        self.polled.fetch_add(1, Ordering::Relaxed);
        let mut state = self.lock();
        if state.drive(&self.identity, Some(queue))? {
            self.active.store(true, Ordering::Relaxed);
        }
        if let Some(sink) = state.sinks.get_mut(&queue) {
            std::mem::swap(&mut sink.completions, taken);
        }
        Ok(())
    }

    /// Calls the keeper, if it has to poll for packets while owners sleep and that is of use.
    pub(super) fn call_keeper(&self) {
        if self.blind && self.active.swap(false, Ordering::Relaxed) {
            // Full, it wakes as well.
            let _ = (&self.keeper).write(&[0]);
        }
    }

    /// Drives the port for its keeper. Returns whether packets came, or more is to be sent.
    pub(super) fn drive(&self) -> io::Result<bool> {
        self.lock().drive(&self.identity, None)
    }

    /// Time until something has to be done if no packet comes, between [`PATIENCE`] and [`LONGEST`].
    pub(super) fn rest(&self) -> Duration {
        self.lock().rest(self.identity.now())
    }
}

impl State {
    /// Takes a burst of packets, answers, and sends what windows and rates allow.
    ///
    /// Wakes the owners of completion queues with new completions, except the owner of `of`, which is polling.
    /// Returns whether packets came, or more is to be sent.
    fn drive(&mut self, nic: &Identity, of: Option<u32>) -> io::Result<bool> {
        let now = nic.now();
        let mut reach = nic.keys.reach();
        let Self { wire, sides, busy, sinks, .. } = self;
        let came = wire.receive(now, |bytes| {
            // Bytes that are no packet, or of no queue pair here, are dropped (IBTA 9.6.1).
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
        self.send(&nic.keys, now);
        for (queue, sink) in &self.sinks {
            if Some(*queue) != of && !sink.completions.is_empty() {
                // Full, it wakes as well.
                let _ = (&sink.wake).write(&[0]);
            }
        }
        Ok(came > 0 || !self.busy.is_empty())
    }

    /// Sends what windows and rates allow, as far as the wire has room.
    fn send(&mut self, keys: &Keys, now: Nanos) {
        if self.busy.is_empty() && self.wire.is_flushed() {
            return;
        }
        let reach = keys.reach();
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
            // A rate may let it send before the next look.
            side.busy = !ended || side.wake_at().is_some_and(|at| at < now + TICK);
            if side.busy {
                busy.push_back(number);
            }
        }
        wire.flush();
    }

    /// Time until something has to be done if no packet comes.
    fn rest(&self, now: Nanos) -> Duration {
        let soonest = self.sides.values().filter_map(Side::wake_at).min();
        soonest.map_or(LONGEST, |at| Duration::from_nanos(at.saturating_sub(now))).clamp(PATIENCE, LONGEST)
    }
}
