//! Batches in flight: sealed, and not acknowledged yet.

use super::buffers::Batch;
use super::message::{MessageId, Status};
use embarcadero_wire::{BatchHeader, UNKNOWN_OFFSET};
use std::collections::VecDeque;

/// Number of batches whose offsets stay known after they were acknowledged.
const REMEMBERED_BATCHES: usize = 4096;

/// BatchState of a batch in flight.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum BatchState {
    /// The batch waits for a connection.
    Queued,
    /// The batch is on this connection. `None`: on no connection, but committed, so that its acknowledgement will come.
    Sent(Option<usize>),
    /// The batch is acknowledged at this offset.
    Acknowledged(u64),
}

/// Batch in flight.
pub(super) struct InFlightBatch {
    pub(super) batch: Batch,
    pub(super) header: BatchHeader,
    pub(super) state: BatchState,
    /// True once the batch was given to a connection, so that a broker may have it.
    sent: bool,
}

/// All batches in flight of a publisher, which numbers its batches from 0.
pub(super) struct InFlightBatches {
    /// Number of the first batch in `batches`. All before it are acknowledged.
    first: u64,
    batches: VecDeque<InFlightBatch>,
    /// Numbers of the batches to hand to a connection, in order.
    queue: VecDeque<u64>,
    /// Offsets of the last [`REMEMBERED_BATCHES`] batches before `first`.
    done: VecDeque<u64>,
}

impl InFlightBatches {
    /// Empty list, with room for `count` batches.
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

    /// Number of batches in flight.
    pub(super) fn len(&self) -> usize {
        self.batches.len()
    }

    /// Returns true when nothing is in flight.
    pub(super) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Appends a sealed batch and queues it.
    pub(super) fn push(&mut self, batch: Batch, header: BatchHeader) {
        self.queue.push_back(self.next_number());
        self.batches.push_back(InFlightBatch { batch, header, state: BatchState::Queued, sent: false });
    }

    /// Batch of a number; `None` once it is retired.
    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut InFlightBatch> {
        number.checked_sub(self.first).and_then(|at| self.batches.get_mut(at as usize))
    }

    /// Number of batches that wait for a connection.
    pub(super) fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Number of the batch to hand to a connection next.
    pub(super) fn next_queued(&self) -> Option<u64> {
        self.queue.front().copied()
    }

    /// Removes the batch of [`InFlightBatches::next_queued`] from the queue.
    pub(super) fn pop_queued(&mut self) {
        self.queue.pop_front();
    }

    /// Returns true if some batch is on a connection.
    pub(super) fn are_on(&self, connection: usize) -> bool {
        self.batches.iter().any(|batch| batch.state == BatchState::Sent(Some(connection)))
    }

    /// Number of the batches that were given to a connection, and are not acknowledged.
    pub(super) fn in_doubt(&self) -> usize {
        let in_doubt = |batch: &&InFlightBatch| batch.sent && !matches!(batch.state, BatchState::Acknowledged(_));
        self.batches.iter().filter(in_doubt).count()
    }

    /// Number of the first batch that was never given to a connection.
    pub(super) fn first_unsent(&self) -> u64 {
        let sent = self.batches.iter().position(|batch| !batch.sent).unwrap_or(self.batches.len());
        self.first + sent as u64
    }

    /// Gives a batch to a connection.
    pub(super) fn send(&mut self, number: u64, connection: usize) {
        if let Some(batch) = self.get_mut(number) {
            (batch.state, batch.sent) = (BatchState::Sent(Some(connection)), true);
        }
    }

    /// Marks a batch as acknowledged at an offset.
    pub(super) fn acknowledge(&mut self, number: u64, first_offset: u64) {
        let Some(batch) = self.get_mut(number) else { return };
        let before = batch.state;
        if !matches!(before, BatchState::Acknowledged(_)) {
            batch.state = BatchState::Acknowledged(first_offset);
        }
        if before == BatchState::Queued {
            self.queue.retain(|queued| *queued != number);
        }
    }

    /// Queues again the batches on connections for which `lost` holds, except those below `committed`. Returns their
    /// number.
    pub(super) fn requeue(&mut self, lost: impl Fn(usize) -> bool, committed: u64) -> u64 {
        let mut again = 0;
        for (number, batch) in (self.first..).zip(&mut self.batches) {
            if matches!(batch.state, BatchState::Sent(Some(connection)) if lost(connection)) {
                batch.state = if number < committed { BatchState::Sent(None) } else { BatchState::Queued };
                again += u64::from(number >= committed);
            }
        }
        self.queue.clear();
        let numbered = (self.first..).zip(&self.batches);
        self.queue.extend(numbered.filter(|(_, batch)| batch.state == BatchState::Queued).map(|(number, _)| number));
        again
    }

    /// Marks the batches that were sent, and for which `is_over` holds, as done at an unknown offset. It gets the number
    /// of a batch, and the connection that the batch is on.
    pub(super) fn give_up(&mut self, is_over: impl Fn(u64, Option<usize>) -> bool) {
        for (number, batch) in (self.first..).zip(&mut self.batches).filter(|(_, batch)| batch.sent) {
            let connection = match batch.state {
                BatchState::Acknowledged(_) => continue,
                BatchState::Sent(connection) => connection,
                BatchState::Queued => None,
            };
            if is_over(number, connection) {
                batch.state = BatchState::Acknowledged(UNKNOWN_OFFSET);
            }
        }
    }

    /// Removes the first batch if it is acknowledged and `is_read` says that no connection reads it any more.
    pub(super) fn retire(&mut self, is_read: impl Fn(u64) -> bool) -> Option<Batch> {
        let InFlightBatch { state: BatchState::Acknowledged(offset), .. } = *self.batches.front()? else { return None };
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

    /// Status of a message; `None` when its batch is not sealed.
    pub(super) fn status(&self, id: MessageId) -> Option<Status> {
        let known = |offset: u64| (offset != UNKNOWN_OFFSET).then(|| offset + u64::from(id.index));
        if let Some(index) = id.batch.checked_sub(self.first) {
            return self.batches.get(index as usize).map(|batch| match batch.state {
                BatchState::Acknowledged(offset) => Status::Acknowledged(known(offset)),
                _ => Status::Pending,
            });
        }
        let back = (self.first - id.batch) as usize;
        let offset = self.done.len().checked_sub(back).and_then(|at| self.done.get(at)).copied();
        Some(Status::Acknowledged(offset.and_then(known)))
    }
}
