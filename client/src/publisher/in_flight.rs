//! The batches that a publisher has sealed and that are not acknowledged yet.

use super::{Batch, MessageId, Status};
use embarcadero_wire::{BatchHeader, UNKNOWN_OFFSET};
use std::collections::VecDeque;

/// Batches whose offsets stay known after they were acknowledged.
const REMEMBERED_BATCHES: usize = 4096;

/// Where a batch is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Waits for a connection.
    Queued,
    /// On a connection, or on none but known to be committed: its ack will come.
    Sent(Option<usize>),
    /// Done, at this offset.
    Acknowledged(u64),
}

/// A sealed batch.
pub(super) struct InFlight {
    pub(super) batch: Batch,
    pub(super) header: BatchHeader,
    pub(super) state: State,
}

/// All of them, numbered by the publisher from 0.
pub(super) struct InFlightBatches {
    /// Number of the first in `batches`. All before are acknowledged.
    first: u64,
    batches: VecDeque<InFlight>,
    /// Batches to hand to a connection, in order.
    queue: VecDeque<u64>,
    /// Offsets of the last batches before `first`.
    done: VecDeque<u64>,
}

impl InFlightBatches {
    /// None yet; at most `count` at a time.
    pub(super) fn new(count: usize) -> Self {
        Self {
            first: 0,
            batches: VecDeque::with_capacity(count),
            queue: VecDeque::with_capacity(count),
            done: VecDeque::with_capacity(REMEMBERED_BATCHES),
        }
    }

    /// Number of the first batch that is not retired.
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    /// Number that the next batch gets.
    pub(super) fn next_number(&self) -> u64 {
        self.first + self.batches.len() as u64
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.batches.len()
    }

    /// True when all are retired.
    pub(super) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Adds a sealed batch, to be handed to a connection.
    pub(super) fn push(&mut self, batch: Batch, header: BatchHeader) {
        self.queue.push_back(self.next_number());
        self.batches.push_back(InFlight { batch, header, state: State::Queued });
    }

    /// The batch of a number; `None` once it is retired.
    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut InFlight> {
        number.checked_sub(self.first).and_then(|at| self.batches.get_mut(at as usize))
    }

    /// Batches that wait for a connection.
    pub(super) fn queued(&self) -> usize {
        self.queue.len()
    }

    /// The batch that is to go next.
    pub(super) fn next_queued(&self) -> Option<u64> {
        self.queue.front().copied()
    }

    /// That batch has been given to a connection.
    pub(super) fn pop_queued(&mut self) {
        self.queue.pop_front();
    }

    /// True if some are on a connection.
    pub(super) fn are_on(&self, connection: usize) -> bool {
        self.batches.iter().any(|batch| batch.state == State::Sent(Some(connection)))
    }

    /// A batch is done, at this offset.
    pub(super) fn acknowledge(&mut self, number: u64, first_offset: u64) {
        let Some(batch) = self.get_mut(number) else { return };
        let before = batch.state;
        if !matches!(before, State::Acknowledged(_)) {
            batch.state = State::Acknowledged(first_offset);
        }
        if before == State::Queued {
            self.queue.retain(|queued| *queued != number);
        }
    }

    /// Queues again what was on connections for which `lost` holds, except batches below `committed`. Returns how many.
    pub(super) fn requeue(&mut self, lost: impl Fn(usize) -> bool, committed: u64) -> u64 {
        let mut again = 0;
        for (number, batch) in (self.first..).zip(&mut self.batches) {
            if matches!(batch.state, State::Sent(Some(connection)) if lost(connection)) {
                batch.state = if number < committed { State::Sent(None) } else { State::Queued };
                again += u64::from(number >= committed);
            }
        }
        self.queue.clear();
        let numbered = (self.first..).zip(&self.batches);
        self.queue.extend(numbered.filter(|(_, batch)| batch.state == State::Queued).map(|(number, _)| number));
        again
    }

    /// What was on connections for which `lost` holds is done, as far as anyone will know.
    pub(super) fn give_up(&mut self, lost: impl Fn(usize) -> bool) {
        for batch in &mut self.batches {
            if matches!(batch.state, State::Sent(Some(connection)) if lost(connection)) {
                batch.state = State::Acknowledged(UNKNOWN_OFFSET);
            }
        }
    }

    /// Takes the first batch off if it is acknowledged, and nobody reads it any more.
    pub(super) fn retire(&mut self, is_read: impl Fn(u64) -> bool) -> Option<Batch> {
        let InFlight { state: State::Acknowledged(offset), .. } = *self.batches.front()? else { return None };
        if is_read(self.first) {
            return None;
        }
        if self.done.len() == REMEMBERED_BATCHES {
            self.done.pop_front();
        }
        self.done.push_back(offset);
        self.first += 1;
        self.batches.pop_front().map(|retired| retired.batch)
    }

    /// What became of a message; `None` when its batch is not sealed.
    pub(super) fn status(&self, id: MessageId) -> Option<Status> {
        let known = |offset: u64| (offset != UNKNOWN_OFFSET).then(|| offset + u64::from(id.index));
        if let Some(index) = id.batch.checked_sub(self.first) {
            return self.batches.get(index as usize).map(|batch| match batch.state {
                State::Acknowledged(offset) => Status::Acknowledged(known(offset)),
                _ => Status::Pending,
            });
        }
        let back = (self.first - id.batch) as usize;
        let offset = self.done.len().checked_sub(back).and_then(|at| self.done.get(at)).copied();
        Some(Status::Acknowledged(offset.and_then(known)))
    }
}
