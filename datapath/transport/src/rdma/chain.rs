//! Work requests of one connection. They are numbered from 1, posted in chains, and completed in order.

use super::{SEND_DEPTH, SIGNAL_EVERY};
use embarcadero_verbs::{DOORBELL, QueuePair, Request, Sending, Work};
use std::io;

/// Count of the work requests that a connection posted, and of those that are done.
pub(super) struct SendQueue {
    posted: u64,
    done: u64,
    /// Number of the last request that asked for a completion.
    signaled: u64,
    signal_every: u64,
}

impl SendQueue {
    /// Queue without requests. One request in [`SIGNAL_EVERY`] will ask for a completion.
    pub(super) fn new() -> Self {
        Self { posted: 0, done: 0, signaled: 0, signal_every: SIGNAL_EVERY }
    }

    /// Has every later request ask for a completion.
    pub(super) fn signal_all(&mut self) {
        self.signal_every = 1;
    }

    /// Number of requests that can be posted now.
    pub(super) fn room(&self) -> usize {
        (SEND_DEPTH - (self.posted - self.done)) as usize
    }

    /// Number of the request posted last.
    pub(super) fn posted(&self) -> u64 {
        self.posted
    }

    /// Returns true once a request is done.
    pub(super) fn is_done(&self, number: u64) -> bool {
        number <= self.done
    }

    /// Records the completion of a request. Those before it are done too.
    pub(super) fn completed(&mut self, number: u64) {
        self.done = self.done.max(number);
    }

    /// Begins a chain of requests.
    pub(super) fn chain<'a>(&self) -> Chain<'a> {
        let blank = Request { id: 0, signaled: false, work: Work::Send(&[]) };
        Chain {
            requests: [blank; DOORBELL],
            count: 0,
            room: self.room().min(DOORBELL),
            posted: self.posted,
            signaled: self.signaled,
            signal_every: self.signal_every,
        }
    }

    /// Posts a chain with one call. Returns the number of its requests.
    ///
    /// # Errors
    /// The error of the device.
    pub(super) fn post(&mut self, pair: &mut QueuePair<Sending>, chain: &Chain<'_>) -> io::Result<usize> {
        if chain.count == 0 {
            return Ok(0);
        }
        if pair.post(&chain.requests[..chain.count])? < chain.count {
            return Err(io::Error::other("the device took only part of a chain of requests"));
        }
        (self.posted, self.signaled) = (chain.posted + chain.count as u64, chain.signaled);
        Ok(chain.count)
    }
}

/// Requests that are posted together.
pub(super) struct Chain<'a> {
    requests: [Request<'a>; DOORBELL],
    count: usize,
    room: usize,
    /// Requests posted before.
    posted: u64,
    signaled: u64,
    signal_every: u64,
}

impl<'a> Chain<'a> {
    /// Number of requests that the chain still has room for.
    pub(super) fn room(&self) -> usize {
        self.room - self.count
    }

    /// Number of the next request.
    pub(super) fn next_number(&self) -> u64 {
        self.posted + self.count as u64 + 1
    }

    /// Adds a request and returns its number. The request asks for a completion if `signal` is set, or if `signal_every`
    /// requests have not.
    ///
    /// # Panics
    /// When the chain is full.
    pub(super) fn push(&mut self, work: Work<'a>, signal: bool) -> u64 {
        assert!(self.room() > 0, "a chain of {} requests is full", self.count);
        let id = self.next_number();
        let signaled = signal || id - self.signaled >= self.signal_every;
        if signaled {
            self.signaled = id;
        }
        self.requests[self.count] = Request { id, signaled, work };
        self.count += 1;
        id
    }
}
