//! Acknowledgement: in the order in which a connection's batches came; at level 2, once they are on enough disks.

use crate::delegation::OrderedLocally;
use embarcadero_cxl::Fabric;
use embarcadero_cxl::layout::{SESSION_WINDOW, SessionState};
use embarcadero_cxl::leadership::NoLeader;
use embarcadero_cxl::order_index::{StreamId, read_extent};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::replication::read_completion;
use embarcadero_cxl::session_table::{Commit, read_commit, read_progress, read_session};
use embarcadero_cxl::{Damage, Row};
use embarcadero_wire::{Ack, BrokerId, ClientId, Epoch, Fenced, SessionSlot, Stream, UNKNOWN_OFFSET};
use std::collections::VecDeque;

/// Whether a connection's session still takes batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionStatus {
    /// Batches may come.
    Open,
    /// Nothing commits any more; the client must hear of it.
    Fenced(Fenced),
    /// The session's row is damaged.
    Damaged(Damage),
}

/// A batch that has its place in the order and waits to be durable.
#[derive(Clone, Copy, Debug)]
struct Committed {
    sequence: u64,
    first_offset: u64,
    position: u64,
}

/// Batches that retention took before enough replicas had them: they cannot be acknowledged any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("batch {sequence} of the session was removed by retention before it was replicated")]
pub struct Lost {
    /// The first of them.
    pub sequence: u64,
}

/// The session whose batches an [`AckQueue`] acknowledges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AckOptions {
    /// Row in the session table.
    pub slot: SessionSlot,
    /// Client.
    pub client_id: ClientId,
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Stream in which its batches appear.
    pub stream: StreamId,
    /// Acknowledgement level.
    pub ack_level: u32,
}

/// The batches that came on one connection and are not acknowledged yet.
#[derive(Debug)]
pub struct AckQueue {
    slot: SessionSlot,
    client_id: ClientId,
    epoch: Epoch,
    stream: StreamId,
    /// Acknowledge only what is on enough disks.
    durable: bool,
    /// In order of arrival. Bounded, see [`AckQueue::is_full`].
    outstanding: VecDeque<u64>,
    /// Bounded likewise.
    committed: VecDeque<Committed>,
}

impl AckQueue {
    /// An empty queue of a session.
    #[must_use]
    pub fn new(options: AckOptions) -> Self {
        let AckOptions { slot, client_id, epoch, stream, ack_level } = options;
        let outstanding = VecDeque::with_capacity(SESSION_WINDOW as usize);
        Self { slot, client_id, epoch, stream, durable: ack_level >= 2, outstanding, committed: VecDeque::new() }
    }

    /// A batch came.
    #[inline]
    pub fn expect(&mut self, sequence: u64) {
        self.outstanding.push_back(sequence);
    }

    /// True when nothing waits.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.outstanding.is_empty() && self.committed.is_empty()
    }

    /// True when so much waits to be ordered, or to be durable, that no more should come: more than a session's window
    /// comes only from a client that sends the same batches again and again.
    #[inline]
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.outstanding.len().max(self.committed.len()) as u64 >= SESSION_WINDOW
    }

    /// Acks for everything from `from` that is committed already: what a client that reconnects wants to know. What is
    /// not durable yet, and has to be, follows from [`AckQueue::poll`].
    ///
    /// # Errors
    /// [`NoLeader`]: nobody can say.
    pub fn replay<F: Fabric>(
        &mut self,
        region: &Region<F>,
        from: u64,
        mut send: impl FnMut(Ack),
    ) -> Result<(), NoLeader> {
        let committed = read_progress(region, self.slot)?;
        for sequence in from.max(committed.saturating_sub(SESSION_WINDOW))..committed + SESSION_WINDOW {
            let commit = read_commit(region, self.slot, sequence);
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

    /// Where a committed batch is in the order. One whose record is gone is no later than the newest.
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

    /// Acks for what the sequencer committed since the last call, and for what became durable.
    ///
    /// # Errors
    /// [`Lost`].
    #[inline]
    pub fn poll<F: Fabric>(
        &mut self,
        region: &Region<F>,
        broker: BrokerId,
        mut send: impl FnMut(Ack),
    ) -> Result<usize, Lost> {
        let mut sent = 0;
        while let Some(sequence) = self.outstanding.front().copied() {
            // A broker's own order is told by `AckQueue::local`.
            let commit = match self.stream.stream {
                Stream::GLOBAL => read_commit(region, self.slot, sequence),
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

    fn poll_durable<F: Fabric>(
        &mut self,
        region: &Region<F>,
        broker: BrokerId,
        mut send: impl FnMut(Ack),
    ) -> Result<usize, Lost> {
        let (Ok(completion), Ok(progress)) =
            (read_completion(region, self.stream.topic, broker), read_progress(region, self.slot))
        else {
            return Ok(0);
        };
        let progress = if self.stream.stream == Stream::GLOBAL { progress } else { 0 };
        let mut sent = 0;
        while let Some(batch) = self.committed.front().copied() {
            if batch.position < completion.lost_through {
                return Err(Lost { sequence: batch.sequence });
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

    /// A batch that this broker ordered by itself: its ack, unless that comes from [`AckQueue::poll`] once it is durable.
    #[must_use]
    pub fn local(&mut self, ordered: &OrderedLocally) -> Option<Ack> {
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

    /// Whether the session still stands. Not for every batch: reads a line that only changes at its end.
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
