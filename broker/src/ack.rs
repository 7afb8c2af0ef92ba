//! Acknowledgement of a connection's batches, in the order in which they came.
//!
//! Level 1 acknowledges a batch once it has its place in the order, level 2 once enough disks have it, too.

use crate::delegation::OrderedLocally;
use embarcadero_cxl::Fabric;
use embarcadero_cxl::layout::{SESSION_WINDOW, SessionState};
use embarcadero_cxl::leadership::NoLeader;
use embarcadero_cxl::order_index::{StreamId, read_extent};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::replication::read_completion;
use embarcadero_cxl::session_table::{Commit, read_commit, read_progress, read_session};
use embarcadero_cxl::{Damage, Row};
use embarcadero_wire::{Ack, BrokerId, ClientId, Epoch, ErrorCode, Fenced, SessionSlot, Stream, UNKNOWN_OFFSET};
use std::collections::VecDeque;

/// State of a connection's session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionStatus {
    /// The session takes batches.
    Open,
    /// The session's epoch is fenced: nothing commits under it any more. The frame tells the client.
    Fenced(Fenced),
    /// The session's row in the region is damaged.
    Damaged(Damage),
}

/// Batch that has its place in the order and may have to wait until it is durable.
#[derive(Clone, Copy, Debug)]
struct Committed {
    sequence: u64,
    first_offset: u64,
    /// Position in the order index.
    position: u64,
}

/// Reason why batches cannot be acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AckError {
    /// Retention removed a batch before enough replicas had it.
    #[error("batch {sequence} of the session was removed by retention before it was replicated")]
    Lost {
        /// Sequence of the first lost batch in its session.
        sequence: u64,
    },
    /// The record of a commit is damaged.
    #[error(transparent)]
    Damaged(#[from] Damage),
    /// No leader can say what is committed.
    #[error(transparent)]
    NoLeader(#[from] NoLeader),
}

impl AckError {
    /// Returns the code with which a client is refused.
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            Self::Lost { .. } => ErrorCode::NotReplicated,
            Self::Damaged(_) => ErrorCode::Corrupt,
            Self::NoLeader(_) => ErrorCode::Unavailable,
        }
    }
}

/// Session whose batches an [`AckQueue`] acknowledges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AckOptions {
    /// Session slot.
    pub slot: SessionSlot,
    /// Client that the session belongs to.
    pub client_id: ClientId,
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Stream in which the session's batches appear.
    pub stream: StreamId,
    /// Acknowledgement level, 0 to 2.
    pub ack_level: u32,
}

/// Batches that came on one connection and are not acknowledged yet.
#[derive(Debug)]
pub struct AckQueue {
    slot: SessionSlot,
    client_id: ClientId,
    epoch: Epoch,
    stream: StreamId,
    /// True to acknowledge a batch only once enough disks have it.
    durable: bool,
    /// Sequences of batches that have no place in the order yet, in order of arrival. [`AckQueue::is_full`] bounds
    /// them.
    outstanding: VecDeque<u64>,
    /// Batches that wait to be durable, in their order. [`AckQueue::is_full`] bounds them.
    committed: VecDeque<Committed>,
}

impl AckQueue {
    /// Returns an empty queue for a session.
    #[must_use]
    pub fn new(options: AckOptions) -> Self {
        let AckOptions { slot, client_id, epoch, stream, ack_level } = options;
        let outstanding = VecDeque::with_capacity(SESSION_WINDOW as usize);
        Self { slot, client_id, epoch, stream, durable: ack_level >= 2, outstanding, committed: VecDeque::new() }
    }

    /// Adds a batch that came.
    #[inline]
    pub fn expect(&mut self, sequence: u64) {
        self.outstanding.push_back(sequence);
    }

    /// Returns true when no batch waits for its ack.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.outstanding.is_empty() && self.committed.is_empty()
    }

    /// Returns true when a session's window of batches waits to be ordered, or to be durable. No more should be taken
    /// then: only a client that sends the same batches again and again has more.
    #[inline]
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.outstanding.len().max(self.committed.len()) as u64 >= SESSION_WINDOW
    }

    /// Sends the acks of all batches from sequence `from` on that are committed already, for a client that reconnects.
    /// Those that have to be durable first are queued for [`AckQueue::poll`].
    ///
    /// # Errors
    /// [`AckError::NoLeader`] or [`AckError::Damaged`].
    pub fn replay<F: Fabric>(
        &mut self,
        region: &Region<F>,
        from: u64,
        mut send: impl FnMut(Ack),
    ) -> Result<(), AckError> {
        let committed = read_progress(region, self.slot)?;
        for sequence in from.max(committed.saturating_sub(SESSION_WINDOW))..committed.saturating_add(SESSION_WINDOW) {
            let commit = read_commit(region, self.slot, sequence)?;
            if commit == Commit::Unknown || (commit == Commit::Forgotten && sequence >= committed) {
                continue;
            }
            let placed = self.place(region, sequence, commit)?;
            if self.durable {
                self.committed.push_back(placed);
            } else {
                send(self.ack(placed, committed));
            }
        }
        Ok(())
    }

    /// Returns a committed batch with its place in the order.
    ///
    /// The record of the commit may be gone already. The newest position of the order stands in for it then.
    fn place<F: Fabric>(&self, region: &Region<F>, sequence: u64, commit: Commit) -> Result<Committed, NoLeader> {
        Ok(match commit {
            Commit::At(record) => Committed { sequence, first_offset: record.first_offset, position: record.position },
            Commit::Forgotten | Commit::Unknown => {
                let position = if self.durable { read_extent(region, self.stream)?.committed } else { 0 };
                Committed { sequence, first_offset: UNKNOWN_OFFSET, position: position.saturating_sub(1) }
            }
        })
    }

    fn ack(&self, batch: Committed, committed: u64) -> Ack {
        let Committed { sequence, first_offset, .. } = batch;
        Ack { sequence, first_offset, committed, session_epoch: self.epoch, stream: self.stream.stream, ..Ack::blank() }
    }

    /// Sends the acks of batches that the sequencer committed, or that became durable, since the last call. Returns the
    /// number of acks.
    ///
    /// # Errors
    /// [`AckError::Lost`] or [`AckError::Damaged`].
    #[inline]
    pub fn poll<F: Fabric>(
        &mut self,
        region: &Region<F>,
        broker: BrokerId,
        mut send: impl FnMut(Ack),
    ) -> Result<usize, AckError> {
        let mut sent = 0;
        while let Some(sequence) = self.outstanding.front().copied() {
            // In a broker's own order, `AckQueue::local` learns of the places.
            let commit = match self.stream.stream {
                Stream::GLOBAL => read_commit(region, self.slot, sequence)?,
                _ => break,
            };
            if commit == Commit::Unknown {
                break;
            }
            // The progress word may lag behind the record for a moment; a client only ever sees it grow.
            let (Ok(placed), Ok(progress)) = (self.place(region, sequence, commit), read_progress(region, self.slot))
            else {
                break;
            };
            self.outstanding.pop_front();
            if self.durable {
                self.committed.push_back(placed);
                continue;
            }
            sent += 1;
            send(self.ack(placed, progress));
        }
        if !self.committed.is_empty() {
            sent += self.poll_durable(region, broker, send)?;
        }
        Ok(sent)
    }

    /// Sends the acks of batches that enough disks have by now.
    fn poll_durable<F: Fabric>(
        &mut self,
        region: &Region<F>,
        broker: BrokerId,
        mut send: impl FnMut(Ack),
    ) -> Result<usize, AckError> {
        let (Ok(completion), Ok(progress)) =
            (read_completion(region, self.stream.topic, broker), read_progress(region, self.slot))
        else {
            return Ok(0);
        };
        let progress = if self.stream.stream == Stream::GLOBAL { progress } else { 0 };
        let shown_through = completion.durable_through.max(completion.lost_through);
        let waiting = self.committed.front().is_some_and(|batch| batch.position < shown_through);
        // A line that shows more than there is decides nothing: the leader counts anew.
        if waiting && read_extent(region, self.stream).is_ok_and(|tail| shown_through > tail.committed) {
            return Ok(0);
        }
        let mut sent = 0;
        while let Some(batch) = self.committed.front().copied() {
            if batch.position < completion.lost_through {
                return Err(AckError::Lost { sequence: batch.sequence });
            }
            if batch.position >= completion.durable_through {
                break;
            }
            self.committed.pop_front();
            sent += 1;
            send(self.ack(batch, progress));
        }
        Ok(sent)
    }

    /// Takes the place of a batch in this broker's own order. Returns its ack, or `None` when the batch has to be
    /// durable first; the ack then comes from [`AckQueue::poll`].
    #[must_use]
    pub(crate) fn local(&mut self, ordered: &OrderedLocally) -> Option<Ack> {
        let OrderedLocally { sequence, first_offset, position, .. } = *ordered;
        if self.outstanding.front() == Some(&sequence) {
            self.outstanding.pop_front();
        } else {
            self.outstanding.retain(|waiting| *waiting != sequence);
        }
        let batch = Committed { sequence, first_offset, position };
        if self.durable {
            self.committed.push_back(batch);
            return None;
        }
        Some(self.ack(batch, 0))
    }

    /// Reads whether the session still takes batches. That changes once at most, so look every few milliseconds rather
    /// than at every batch.
    pub fn status<F: Fabric>(&self, region: &Region<F>) -> SessionStatus {
        let (Ok(session), Ok(committed)) = (read_session(region, self.slot), read_progress(region, self.slot)) else {
            return SessionStatus::Open;
        };
        match session {
            // Being rewritten right now: look again next time.
            Row::Unused | Row::Unsettled => SessionStatus::Open,
            Row::Damaged(damage) => SessionStatus::Damaged(damage),
            Row::Used(session)
                if session.client_id == self.client_id
                    && session.epoch == self.epoch
                    && session.state == SessionState::Open =>
            {
                SessionStatus::Open
            }
            Row::Used(session) => SessionStatus::Fenced(Fenced {
                committed: if session.client_id == self.client_id { committed } else { 0 },
                session_epoch: self.epoch,
                ..Fenced::blank()
            }),
        }
    }
}
