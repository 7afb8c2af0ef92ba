//! Acknowledgement: cumulative per connection, in the order in which its batches came.

use embarcadero_datapath::cxl::Fabric;
use embarcadero_datapath::cxl::layout::SESSION_WINDOW;
use embarcadero_datapath::cxl::order_index::StreamId;
use embarcadero_datapath::cxl::region::Region;
use embarcadero_datapath::cxl::session_table::{Commit, SessionState, read_commit, read_progress, read_session};
use embarcadero_datapath::wire::{Ack, Fenced, UNKNOWN_OFFSET};
use std::collections::VecDeque;

/// What a connection's session came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Batches may come.
    Open,
    /// Nothing commits any more; the client must hear of it.
    Fenced(Fenced),
}

/// The batches that came on one connection and are not acknowledged yet.
#[derive(Debug)]
pub struct AckQueue {
    slot: u32,
    client_id: u64,
    epoch: u32,
    /// In order of arrival. Bounded: a batch outside the session's window is not let in.
    outstanding: VecDeque<u64>,
}

impl AckQueue {
    /// An empty queue of a session.
    #[must_use]
    pub fn new(slot: u32, client_id: u64, epoch: u32) -> Self {
        Self { slot, client_id, epoch, outstanding: VecDeque::with_capacity(SESSION_WINDOW as usize) }
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
        self.outstanding.is_empty()
    }

    /// Acks for everything from `from` that is committed already: what a client that reconnects wants to know.
    pub fn replay<F: Fabric>(&self, region: &Region<F>, from: u64, mut send: impl FnMut(Ack)) {
        let committed = read_progress(region, self.slot);
        for sequence in from.max(committed.saturating_sub(SESSION_WINDOW))..committed + SESSION_WINDOW {
            match read_commit(region, self.slot, sequence) {
                Commit::At(record) => send(self.ack(sequence, record.first_offset, committed)),
                Commit::Forgotten if sequence < committed => send(self.ack(sequence, UNKNOWN_OFFSET, committed)),
                Commit::Forgotten | Commit::Unknown => {}
            }
        }
    }

    fn ack(&self, sequence: u64, first_offset: u64, committed: u64) -> Ack {
        Ack { sequence, first_offset, committed, session_epoch: self.epoch, stream: StreamId::GLOBAL, ..Ack::blank() }
    }

    /// Acks for what the sequencer committed since the last call.
    #[inline]
    pub fn poll<F: Fabric>(&mut self, region: &Region<F>, mut send: impl FnMut(Ack)) -> usize {
        let mut sent = 0;
        while let Some(sequence) = self.outstanding.front().copied() {
            let first_offset = match read_commit(region, self.slot, sequence) {
                Commit::At(record) => record.first_offset,
                Commit::Forgotten => UNKNOWN_OFFSET,
                Commit::Unknown => break,
            };
            self.outstanding.pop_front();
            sent += 1;
            // The progress word may lag behind the record for a moment; a client only ever sees it grow.
            send(self.ack(sequence, first_offset, read_progress(region, self.slot)));
        }
        sent
    }

    /// The ack of a batch that this broker ordered by itself.
    #[must_use]
    pub fn local(&mut self, sequence: u64, first_offset: u64, broker: u32) -> Ack {
        if self.outstanding.front() == Some(&sequence) {
            self.outstanding.pop_front();
        } else {
            self.outstanding.retain(|waiting| *waiting != sequence);
        }
        Ack { stream: broker, committed: 0, ..self.ack(sequence, first_offset, 0) }
    }

    /// Whether the session still stands. Not for every batch: reads a line that only changes at its end.
    pub fn standing<F: Fabric>(&self, region: &Region<F>) -> Standing {
        match read_session(region, self.slot) {
            // Being rewritten right now: look again next time.
            None => Standing::Open,
            Some(session)
                if session.client_id == self.client_id
                    && session.epoch == self.epoch
                    && session.state == SessionState::Open =>
            {
                Standing::Open
            }
            Some(session) => Standing::Fenced(Fenced {
                committed: if session.client_id == self.client_id { read_progress(region, self.slot) } else { 0 },
                session_epoch: self.epoch,
                ..Fenced::blank()
            }),
        }
    }
}
