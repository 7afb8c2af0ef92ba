//! Acknowledgement of a connection's batches, in the order in which they came.
//!
//! Level 1 acknowledges a batch once it has its place in the order, level 2 once enough disks have it, too.

use crate::delegation::OrderedLocally;
use embarcadero_cxl::Fabric;
use embarcadero_cxl::layout::{CommitRecord, SESSION_WINDOW, SessionState};
use embarcadero_cxl::leadership::NoLeader;
use embarcadero_cxl::order_index::{StreamId, read_extent};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::replication::read_completion;
use embarcadero_cxl::session_table::{Commit, Session, read_commit, read_progress, read_session};
use embarcadero_cxl::{Damage, Guard, Row};
use embarcadero_wire::{Ack, BrokerId, ErrorCode, Fenced, Stream, UNKNOWN_OFFSET};
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

/// Batches that came on one connection and are not acknowledged yet.
#[derive(Debug)]
pub struct AckQueue {
    session: Session,
    stream: StreamId,
    /// Sequence below which all batches of the session are committed, as last read. 0 in a broker's own order.
    progress: u64,
    /// True to acknowledge a batch only once enough disks have it.
    durable: bool,
    /// Sequences of batches that have no place in the order yet, in order of arrival. [`AckQueue::is_full`] bounds
    /// them.
    outstanding: VecDeque<u64>,
    /// Batches that wait to be durable, in their order. [`AckQueue::is_full`] bounds them.
    committed: VecDeque<Committed>,
}

impl AckQueue {
    /// Returns an empty queue for the batches of a session, as its row showed it when the connection was opened. They
    /// appear in `stream`.
    #[must_use]
    pub fn new(session: Session, stream: StreamId) -> Self {
        Self {
            session,
            stream,
            progress: if stream.stream == Stream::GLOBAL { session.committed } else { 0 },
            durable: session.ack_level >= 2,
            outstanding: VecDeque::with_capacity(SESSION_WINDOW as usize),
            committed: VecDeque::new(),
        }
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

    /// Reads the sequence below which all batches of the session are committed, and returns it. It stays the same while
    /// there is no leader, in a broker's own order, and once the slot has gone on to another session.
    pub(crate) fn read_progress<F: Fabric>(&mut self, region: &Region<F>) -> u64 {
        if self.stream.stream == Stream::GLOBAL {
            let read = read_progress(region, self.session.slot).ok();
            let shown = read.and_then(|progress| progress.of(&self.session));
            self.progress = self.progress.max(shown.unwrap_or(0));
        }
        self.progress
    }

    /// Session, as its row showed it when the connection was opened.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// Returns true if a batch of this sequence may be taken now: it is no further ahead than the window.
    pub(crate) fn is_in_window<F: Fabric>(&mut self, region: &Region<F>, sequence: u64) -> bool {
        let within = |progress: u64| sequence < progress.saturating_add(SESSION_WINDOW);
        within(self.progress) || within(self.read_progress(region))
    }

    /// Reads the fate of a batch of this client; [`Commit::Unknown`] for what another session committed in the slot.
    fn read_commit<F: Fabric>(&self, region: &Region<F>, sequence: u64) -> Result<Commit, Damage> {
        let commit = read_commit(region, self.session.slot, sequence)?;
        let (Commit::At(CommitRecord { session_epoch: epoch, .. }) | Commit::Forgotten(epoch)) = commit else {
            return Ok(commit);
        };
        let own = self.session.owns(epoch) || !region.fabric().keeps(Guard::RecordOwner);
        Ok(if own { commit } else { Commit::Unknown })
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
        let committed = self.read_progress(region);
        let from = from.max(committed.saturating_sub(SESSION_WINDOW)).max(self.session.first_sequence);
        for sequence in from..committed.saturating_add(SESSION_WINDOW) {
            let commit = self.read_commit(region, sequence)?;
            // A batch below the progress is committed, also if its record was lost.
            if sequence >= committed && !matches!(commit, Commit::At(_)) {
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
            Commit::Forgotten(_) | Commit::Unknown => {
                let position = if self.durable { read_extent(region, self.stream)?.committed } else { 0 };
                Committed { sequence, first_offset: UNKNOWN_OFFSET, position: position.saturating_sub(1) }
            }
        })
    }

    fn ack(&self, batch: Committed, committed: u64) -> Ack {
        let Committed { sequence, first_offset, .. } = batch;
        let session_epoch = self.session.epoch;
        Ack { sequence, first_offset, committed, session_epoch, stream: self.stream.stream, ..Ack::blank() }
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
                Stream::GLOBAL => self.read_commit(region, sequence)?,
                _ => break,
            };
            if commit == Commit::Unknown {
                break;
            }
            let Ok(placed) = self.place(region, sequence, commit) else { break };
            self.outstanding.pop_front();
            if self.durable {
                self.committed.push_back(placed);
                continue;
            }
            // The progress word may lag behind the record for a moment; a client only ever sees it grow.
            let progress = self.read_progress(region);
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
        let Ok(completion) = read_completion(region, self.stream.topic, broker) else { return Ok(0) };
        let shown_through = completion.durable_through.max(completion.lost_through);
        let waiting = self.committed.front().is_some_and(|batch| batch.position < shown_through);
        // A line that shows more than there is decides nothing: the leader counts anew.
        if waiting && read_extent(region, self.stream).is_ok_and(|tail| shown_through > tail.committed) {
            return Ok(0);
        }
        let progress = if waiting { self.read_progress(region) } else { self.progress };
        let mut sent = 0;
        while let Some(batch) = self.committed.front().copied() {
            if completion.is_lost(batch.position) {
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
    pub fn status<F: Fabric>(&mut self, region: &Region<F>) -> SessionStatus {
        let Ok(row) = read_session(region, self.session.slot) else { return SessionStatus::Open };
        match row {
            // Being rewritten right now: look again next time.
            Row::Unused | Row::Unsettled => SessionStatus::Open,
            Row::Damaged(damage) => SessionStatus::Damaged(damage),
            Row::Used(row)
                if (row.client_id, row.epoch) == (self.session.client_id, self.session.epoch)
                    && row.state == SessionState::Open =>
            {
                SessionStatus::Open
            }
            Row::Used(_) => SessionStatus::Fenced(Fenced {
                committed: self.read_progress(region),
                session_epoch: self.session.epoch,
                ..Fenced::blank()
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topics::tests::region;
    use bytemuck::Zeroable;
    use embarcadero_cxl::Native;
    use embarcadero_cxl::layout::{IndexEntry, LeaderArea};
    use embarcadero_cxl::leadership::{activate_term, claim_term};
    use embarcadero_cxl::order_index::{IndexOptions, OrderIndexWriter};
    use embarcadero_cxl::replication::{Completion, publish_completion};
    use embarcadero_cxl::segment::PartitionAllocator;
    use embarcadero_cxl::session_table::{Progress, SessionCommit, publish_commits, publish_session, store_progress};
    use embarcadero_wire::{ClientId, Epoch, Incarnation, SessionSlot, SessionToken, Term, TopicId};
    use std::sync::Arc;

    const AREA: LeaderArea = LeaderArea(BrokerId(0));
    const SLOT: SessionSlot = SessionSlot(0);

    fn session(client: u64, epoch: u32, first_epoch: u32, first_sequence: u64) -> Session {
        Session {
            slot: SLOT,
            client_id: ClientId(client),
            epoch: Epoch(epoch),
            state: SessionState::Open,
            topic: TopicId(0),
            topic_incarnation: Incarnation(1),
            committed: first_sequence,
            ack_level: 1,
            first_epoch: Epoch(first_epoch),
            first_sequence,
            token: SessionToken(1),
        }
    }

    fn led() -> Region<Native> {
        let region = region();
        claim_term(&region, AREA, Term(1));
        activate_term(&region, AREA, Term(1));
        region
    }

    /// Writes what the sequencer does for a batch that it commits.
    fn commit(region: &Region<Native>, sequence: u64, epoch: u32) {
        let record = CommitRecord {
            first_offset: 100 + sequence,
            position: sequence,
            broker: BrokerId(0),
            session_epoch: Epoch(epoch),
            tag: sequence + 1,
        };
        publish_commits(region, AREA, &[SessionCommit { slot: SLOT, record, expected: sequence + 1 }]);
    }

    fn open(region: &Region<Native>, session: Session) -> AckQueue {
        publish_session(region, AREA, &session);
        let progress = Progress { expected: session.committed, epoch: session.epoch };
        store_progress(region, AREA, SLOT, progress);
        AckQueue::new(session, StreamId { topic: TopicId(0), stream: Stream::GLOBAL })
    }

    fn polled(acks: &mut AckQueue, region: &Region<Native>) -> Vec<(u64, u64, u64)> {
        let mut sent = Vec::new();
        acks.poll(region, BrokerId(0), |ack| sent.push((ack.sequence, ack.first_offset, ack.committed))).unwrap();
        sent
    }

    fn replayed(acks: &mut AckQueue, region: &Region<Native>, from: u64) -> Vec<(u64, u64)> {
        let mut sent = Vec::new();
        acks.replay(region, from, |ack| sent.push((ack.sequence, ack.first_offset))).unwrap();
        sent
    }

    /// The broker stood still, and the slot went to another client meanwhile.
    #[test]
    fn another_clients_record_acknowledges_nothing() {
        let region = led();
        let mut stalled = open(&region, session(1, 1, 1, 0));
        stalled.expect(0);
        let _next = open(&region, session(2, 2, 2, 0));
        commit(&region, 0, 2);
        assert_eq!((polled(&mut stalled, &region), stalled.read_progress(&region)), (vec![], 0));
        commit(&region, SESSION_WINDOW, 2);
        assert_eq!(polled(&mut stalled, &region), [], "a later record has the place");
        assert!(matches!(stalled.status(&region), SessionStatus::Fenced(Fenced { committed: 0, .. })));
    }

    #[test]
    fn records_of_earlier_epochs_of_the_client_count() {
        let region = led();
        open(&region, session(1, 2, 1, 0));
        commit(&region, 0, 2);
        let mut acks = open(&region, Session { committed: 1, ..session(1, 3, 1, 0) });
        acks.expect(0);
        assert_eq!(polled(&mut acks, &region), [(0, 100, 1)]);
    }

    /// A client that asks for acks from 0 on gets none of the client before it in the slot.
    #[test]
    fn acks_are_repeated_from_the_clients_first_batch_on() {
        let region = led();
        (0..5).for_each(|sequence| commit(&region, sequence, 1));
        let mut acks = open(&region, session(2, 2, 2, 5));
        assert_eq!(replayed(&mut acks, &region, 0), []);
        commit(&region, 5, 2);
        assert_eq!(replayed(&mut acks, &region, 0), [(5, 105)]);
    }

    #[test]
    fn a_committed_batch_whose_record_is_lost_is_acknowledged() {
        let region = led();
        let mut acks = open(&region, session(1, 1, 1, 0));
        [0, 1, 2, 4].into_iter().for_each(|sequence| commit(&region, sequence, 1));
        let all = [(0, 100), (1, 101), (2, 102), (3, UNKNOWN_OFFSET), (4, 104)];
        assert_eq!(replayed(&mut acks, &region, 0), all);
    }

    /// This broker is slow: retention took a later batch that was on no disk, before it told of one that is.
    #[test]
    fn a_batch_that_is_on_disks_is_acknowledged_also_when_a_later_one_is_lost() {
        let region = led();
        let id = StreamId { topic: TopicId(0), stream: Stream::GLOBAL };
        let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BrokerId(0)));
        let options = IndexOptions { id, incarnation: Incarnation(1), writer: AREA, term: Term(1) };
        let mut index = OrderIndexWriter::open(region.clone(), options, pool).unwrap();
        let mut acks = open(&region, Session { ack_level: 2, ..session(1, 1, 1, 0) });
        for sequence in 0..2 {
            index.make_room().unwrap();
            index.append(IndexEntry { message_count: 1, ..IndexEntry::zeroed() });
            acks.expect(sequence);
            commit(&region, sequence, 1);
        }
        index.write_back_entries();
        index.publish_tail(Term(1));
        let completion = Completion { durable_through: 2, lost_from: 1, lost_through: 2, awaited: true };
        publish_completion(&region, AREA, id.topic, BrokerId(0), completion);
        let mut sent = Vec::new();
        let polled = acks.poll(&region, BrokerId(0), |ack| sent.push(ack.sequence));
        assert!(matches!(polled, Err(AckError::Lost { sequence: 1 })), "{polled:?}");
        assert_eq!(sent, [0]);
    }
}
