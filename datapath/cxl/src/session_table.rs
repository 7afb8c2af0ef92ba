//! Session table: the owner of every session slot, and the place of each committed batch, in each leader's area.

use crate::fabric::{Fabric, LINE_BYTES, WORD_BYTES};
use crate::layout::{CommitRecord, LeaderArea, SESSION_WINDOW, SessionLine, SessionProgressLine, SessionState};
use crate::leadership::{NoLeader, with_leader};
use crate::region::Region;
use crate::row::{Damage, Row};
use crate::site::Site;
use crate::topic_table::TopicConfig;
use bytemuck::Zeroable;
use embarcadero_wire::{ClientId, Epoch, Incarnation, MAX_ACK_LEVEL, SessionSlot, SessionToken, TopicId};
use serde::Serialize;
use std::mem::{offset_of, size_of};
use std::sync::atomic::{Ordering, fence};

const RECORD_BYTES: u64 = size_of::<CommitRecord>() as u64;
const TAG: u64 = offset_of!(CommitRecord, tag) as u64;
const PROGRESS_EPOCH: u64 = offset_of!(SessionProgressLine, epoch) as u64;

/// Session, as its slot shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Session {
    /// Slot.
    pub slot: SessionSlot,
    /// Client, which chose the number itself; never 0.
    pub client_id: ClientId,
    /// Count of the sessions that used the slot.
    pub epoch: Epoch,
    /// State.
    pub state: SessionState,
    /// Topic slot.
    pub topic: TopicId,
    /// Incarnation of the topic.
    pub topic_incarnation: Incarnation,
    /// Sequences below this were committed when the row was written.
    pub committed: u64,
    /// Acknowledgement level.
    pub ack_level: u8,
    /// Epoch under which the client got the slot.
    pub first_epoch: Epoch,
    /// Sequence of the client's first batch in the slot.
    pub first_sequence: u64,
    /// Secret that the session's client knows. No report has it.
    #[serde(skip)]
    pub token: SessionToken,
}

impl Session {
    /// Returns true if the slot is that of a client's session on a topic.
    #[must_use]
    pub fn belongs_to(&self, topic: &TopicConfig, client_id: ClientId) -> bool {
        (self.topic, self.topic_incarnation, self.client_id) == (topic.id, topic.incarnation, client_id)
    }

    /// Returns true if whoever knows `token` may act as the session's client.
    #[must_use]
    pub fn is_held_by(&self, token: SessionToken) -> bool {
        self.token == token && token != SessionToken::NONE
    }

    /// Returns true if a batch that was committed in this slot under `epoch` is one of this client's. Those of epochs after
    /// this session's do not count.
    #[inline]
    #[must_use]
    pub fn owns(&self, epoch: Epoch) -> bool {
        (self.first_epoch..=self.epoch).contains(&epoch)
    }
}

/// Progress of a session slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Sequences below this are committed.
    pub expected: u64,
    /// Epoch of the slot's session, or of one before it. Sessions after it have not committed anything yet.
    pub epoch: Epoch,
}

impl Progress {
    /// Returns the sequence below which all batches of `session` are committed, as far as its row and this progress
    /// show. `None` if the slot went on to a later session.
    #[inline]
    #[must_use]
    pub fn of(&self, session: &Session) -> Option<u64> {
        match self.epoch.cmp(&session.epoch) {
            std::cmp::Ordering::Less => Some(session.committed),
            std::cmp::Ordering::Equal => Some(self.expected),
            std::cmp::Ordering::Greater => None,
        }
    }
}

/// Fate of a batch, as far as this host sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// The batch is not committed, or not yet.
    Unknown,
    /// The batch is committed.
    At(CommitRecord),
    /// The batch was committed so long ago that its record is gone. Another one, which was committed under this epoch,
    /// has its place.
    Forgotten(Epoch),
}

/// Writes a session's identity and state. Only the leader may.
pub fn publish_session<F: Fabric>(region: &Region<F>, area: LeaderArea, session: &Session) {
    let line = SessionLine {
        client_id: session.client_id,
        epoch: session.epoch,
        state: session.state.code(),
        topic: session.topic,
        topic_incarnation: session.topic_incarnation,
        committed: session.committed,
        ack_level: session.ack_level.into(),
        first_epoch: session.first_epoch,
        first_sequence: session.first_sequence,
        token: session.token,
        ..SessionLine::zeroed()
    };
    region.fabric().publish_versioned(region.layout().session(area, session.slot), &line, Site::SessionFlush);
}

/// Repairs a session row that an earlier leader left half written. Each word is the old or the new one, and no client was
/// told. The epoch moves past both, so that no epoch names two sessions. The session is fenced; a slot that was about to
/// get another client is nobody's (a leader empties the row first). Only a successor may, before it activates its term.
pub fn repair_torn_session<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot) {
    let (fabric, at) = (region.fabric(), region.layout().session(area, slot));
    // A damaged row stays as it is: no session gets its slot.
    let Ok(line) = fabric.observe_line::<SessionLine>(at, Site::SessionRead) else { return };
    if line.version & 1 == 1 {
        let (epoch, committed) = (line.epoch.next(), read_progress_at(region, area, slot).expected);
        let nobody = line.client_id == ClientId::default() || line.state == SessionState::Free.code();
        let repaired = if nobody || line.first_epoch == Epoch::default() {
            SessionLine { epoch, committed, version: line.version, ..SessionLine::zeroed() }
        } else {
            SessionLine { epoch, state: SessionState::Fenced.code(), committed, ..line }
        };
        fabric.publish_versioned(at, &repaired, Site::SessionFlush);
    }
}

/// Reads a session slot.
///
/// # Errors
/// [`NoLeader`].
pub fn read_session<F: Fabric>(region: &Region<F>, slot: SessionSlot) -> Result<Row<Session>, NoLeader> {
    with_leader(region, |area| read_session_at(region, area, slot))
}

/// Reads a session slot of one leader's area. A slot that the region does not have is unused.
pub fn read_session_at<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot) -> Row<Session> {
    if slot.0 >= region.geometry().max_sessions {
        return Row::Unused;
    }
    let at = region.layout().session(area, slot);
    region.fabric().observe_versioned::<SessionLine, ()>(at, Site::SessionRead, |_| ()).decode(|(line, ())| {
        let damage = |what, value: u32| Damage { structure: "SessionLine", at, what, value: value.into() };
        if line.topic.0 >= region.geometry().max_topics {
            return Err(damage("topic", line.topic.0));
        }
        Ok(Session {
            slot,
            client_id: line.client_id,
            epoch: line.epoch,
            state: SessionState::from_code(line.state).ok_or_else(|| damage("state", line.state))?,
            topic: line.topic,
            topic_incarnation: line.topic_incarnation,
            committed: line.committed,
            ack_level: u8::try_from(line.ack_level)
                .ok()
                .filter(|level| *level <= MAX_ACK_LEVEL)
                .ok_or_else(|| damage("ack_level", line.ack_level))?,
            first_epoch: line.first_epoch,
            first_sequence: line.first_sequence,
            token: line.token,
        })
    })
}

/// Batch that has its place in the order.
#[derive(Clone, Copy, Debug)]
pub struct SessionCommit {
    /// Slot of the session.
    pub slot: SessionSlot,
    /// Place of the batch.
    pub record: CommitRecord,
    /// Sequence that the session expects next.
    pub expected: u64,
}

/// Writes commit records and progress words, and starts their write-back; a fence must follow. Only the sequencer may.
///
/// Two records of a session share a line, and all share its progress word. A line that neighbours in `batches` share is
/// written back once.
#[inline]
pub fn publish_commits<F: Fabric>(region: &Region<F>, area: LeaderArea, batches: &[SessionCommit]) {
    let (fabric, layout) = (region.fabric(), region.layout());
    for SessionCommit { slot, record, expected } in batches {
        let at = layout.commit_record(area, *slot, record.tag - 1);
        let words: [u64; 4] = bytemuck::cast(*record);
        // SYNC: the tag is stored last; pairs with `read_commit_at`, which loads it first. On memory that is not
        // coherent the record lies within one line and travels whole.
        for (index, word) in words.iter().enumerate() {
            fabric.store(at.add(index as u64 * WORD_BYTES), *word);
        }
        fabric.store(layout.session_progress(area, *slot), *expected);
    }
    let (mut last_line, mut last_slot) = (u64::MAX, None);
    for SessionCommit { slot, record, .. } in batches {
        let at = layout.commit_record(area, *slot, record.tag - 1);
        if at.0 / LINE_BYTES != last_line {
            last_line = at.0 / LINE_BYTES;
            fabric.flush(at, RECORD_BYTES, Site::RecordFlush);
        }
        if last_slot != Some(*slot) {
            last_slot = Some(*slot);
            fabric.flush(layout.session_progress(area, *slot), 8, Site::RecordFlush);
        }
    }
}

/// Writes the progress of a session slot, and starts its write-back; a fence must follow. Only the leader may.
pub fn store_progress<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot, progress: Progress) {
    let (at, fabric) = (region.layout().session_progress(area, slot), region.fabric());
    // SYNC: the epoch is stored first; pairs with `read_progress_at`, which loads it last. What belongs to a session is
    // never taken for that of one before it.
    fabric.store(at.add(PROGRESS_EPOCH), progress.epoch.0.into());
    fabric.store(at, progress.expected);
    fabric.flush(at, LINE_BYTES, Site::RecordFlush);
}

/// Reads the fate of a batch; [`Commit::Unknown`] while there is no leader. Sequences never repeat within a slot, so an
/// old record is never taken for a new one. Whose batch it is shows the record's epoch: see [`Session::owns`].
///
/// # Errors
/// [`Damage`] of the record.
#[inline]
pub fn read_commit<F: Fabric>(region: &Region<F>, slot: SessionSlot, sequence: u64) -> Result<Commit, Damage> {
    with_leader(region, |area| read_commit_at(region, area, slot, sequence)).unwrap_or(Ok(Commit::Unknown))
}

/// Reads the fate of a batch from one leader's area.
///
/// # Errors
/// [`Damage`] of a record whose tag is not one of its place, or whose broker the region does not have.
#[inline]
pub fn read_commit_at<F: Fabric>(
    region: &Region<F>,
    area: LeaderArea,
    slot: SessionSlot,
    sequence: u64,
) -> Result<Commit, Damage> {
    let at = region.layout().commit_record(area, slot, sequence);
    let fabric = region.fabric();
    fabric.invalidate(at, RECORD_BYTES, Site::RecordRead);
    let mut tag = fabric.load(at.add(TAG));
    loop {
        if tag != 0 && !tag.abs_diff(sequence + 1).is_multiple_of(SESSION_WINDOW) {
            return Err(Damage { structure: "CommitRecord", at, what: "tag", value: tag });
        }
        if tag < sequence + 1 {
            return Ok(Commit::Unknown);
        }
        let word = |index: u64| fabric.load(at.add(index * WORD_BYTES));
        let words = [word(0), word(1), word(2), tag];
        fence(Ordering::Acquire);
        let again = fabric.load(at.add(TAG));
        if again != tag {
            // The record of a later batch. There is at most one for each batch that the client sent since.
            tag = again;
            continue;
        }
        let record: CommitRecord = bytemuck::cast(words);
        if tag > sequence + 1 {
            return Ok(Commit::Forgotten(record.session_epoch));
        }
        if record.broker.0 >= region.geometry().max_brokers {
            return Err(Damage { structure: "CommitRecord", at, what: "broker", value: record.broker.0.into() });
        }
        return Ok(Commit::At(record));
    }
}

/// Reads the progress of a session slot.
///
/// # Errors
/// [`NoLeader`].
#[inline]
pub fn read_progress<F: Fabric>(region: &Region<F>, slot: SessionSlot) -> Result<Progress, NoLeader> {
    with_leader(region, |area| read_progress_at(region, area, slot))
}

/// Reads the progress of a session slot from one leader's area.
#[inline]
pub fn read_progress_at<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot) -> Progress {
    let (at, fabric) = (region.layout().session_progress(area, slot), region.fabric());
    let expected = fabric.observe(at, Site::RecordRead);
    fence(Ordering::Acquire);
    // One that is out of bounds is of no session.
    let epoch = Epoch(fabric.load(at.add(PROGRESS_EPOCH)).try_into().unwrap_or(u32::MAX));
    Progress { expected, epoch }
}

/// Reads the progress of a slot from one leader's area, and compares it with the slot's row and commit records. Returns the
/// sequence below which all batches are committed. Commits must be complete: the leader itself wrote them, or has
/// recovered them. `row` is the slot's session, if it ever had one.
///
/// # Errors
/// [`Damage`] of progress that is less than the row's, that no commit record shows, or that is of a later session.
pub fn verified_progress_at<F: Fabric>(
    region: &Region<F>,
    area: LeaderArea,
    slot: SessionSlot,
    row: Option<&Session>,
) -> Result<u64, Damage> {
    let progress @ Progress { expected, epoch } = read_progress_at(region, area, slot);
    let at = region.layout().session_progress(area, slot);
    let damage = |what, value| Damage { structure: "SessionProgressLine", at, what, value };
    let (shown, epoch_shown) = row.map_or((0, Epoch::default()), |row| (row.committed, row.epoch));
    if epoch > epoch_shown {
        return Err(damage("epoch", epoch.0.into()));
    }
    let follows = || match read_commit_at(region, area, slot, expected - 1) {
        Ok(Commit::Unknown) => false,
        // A damaged record says nothing.
        Ok(Commit::At(_) | Commit::Forgotten(_)) | Err(_) => true,
    };
    let of_row = row.and_then(|row| progress.of(row)).unwrap_or(expected);
    if of_row == shown || (of_row > shown && follows()) {
        return Ok(of_row);
    }
    Err(damage("expected", expected))
}

/// Reads the places of the batches that a slot's client committed ahead of a gap, from one leader's area. The first that
/// is missing has the sequence `expected`.
pub fn commits_ahead<F: Fabric>(
    region: &Region<F>,
    area: LeaderArea,
    session: &Session,
    expected: u64,
) -> impl Iterator<Item = CommitRecord> {
    let window = expected..expected.saturating_add(SESSION_WINDOW);
    window.filter_map(move |sequence| match read_commit_at(region, area, session.slot, sequence) {
        Ok(Commit::At(record)) if session.owns(record.session_epoch) => Some(record),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::AllocatorKind;
    use crate::segment::tests::region;
    use embarcadero_wire::BrokerId;

    #[test]
    fn a_damaged_commit_record_says_nothing_about_a_batch() {
        let (region, area, slot) = (region(1, AllocatorKind::Bitmap), LeaderArea(BrokerId(0)), SessionSlot(0));
        let read = |sequence| read_commit_at(&region, area, slot, sequence).map_err(|damage| damage.what);
        assert_eq!(read(5), Ok(Commit::Unknown));
        let record = CommitRecord { tag: 6, broker: BrokerId(3), ..CommitRecord::zeroed() };
        let publish = |record| publish_commits(&region, area, &[SessionCommit { slot, record, expected: 6 }]);
        publish(record);
        assert_eq!(read(5), Ok(Commit::At(record)));
        assert_eq!(read(5 + SESSION_WINDOW), Ok(Commit::Unknown));
        // The region has four brokers.
        publish(CommitRecord { broker: BrokerId(4), ..record });
        assert_eq!(read(5), Err("broker"));
        publish(CommitRecord { tag: 6 + SESSION_WINDOW, ..record });
        assert_eq!(read(5), Ok(Commit::Forgotten(record.session_epoch)));
        // A tag of the place beside it.
        region.fabric().store(region.layout().commit_record(area, slot, 5).add(TAG), 7 + SESSION_WINDOW);
        assert_eq!(read(5), Err("tag"));
    }

    fn session(committed: u64) -> Session {
        Session {
            slot: SessionSlot(0),
            client_id: ClientId(1),
            epoch: Epoch(3),
            state: SessionState::Open,
            topic: TopicId(0),
            topic_incarnation: Incarnation(1),
            committed,
            ack_level: 1,
            first_epoch: Epoch(2),
            first_sequence: 0,
            token: SessionToken(4),
        }
    }

    #[test]
    fn a_session_is_held_by_its_token_alone() {
        let held = session(0);
        assert!(held.is_held_by(SessionToken(4)) && !held.is_held_by(SessionToken(5)));
        let nobodys = Session { token: SessionToken::NONE, ..held };
        assert!(!nobodys.is_held_by(SessionToken::NONE));
    }

    #[test]
    fn progress_that_no_commit_record_shows_is_damage() {
        let (region, area, slot) = (region(1, AllocatorKind::Bitmap), LeaderArea(BrokerId(0)), SessionSlot(0));
        let read = |committed| {
            let row = session(committed);
            verified_progress_at(&region, area, slot, Some(&row)).map_err(|damage| damage.value)
        };
        let store = |expected, epoch| store_progress(&region, area, slot, Progress { expected, epoch: Epoch(epoch) });
        // Of the session before: the row alone counts.
        assert_eq!((read(0), read(1)), (Ok(0), Ok(1)));
        store(0, 3);
        assert_eq!((read(0), read(1)), (Ok(0), Err(0)));
        let commit = |tag, expected| {
            let record = CommitRecord { tag, ..CommitRecord::zeroed() };
            publish_commits(&region, area, &[SessionCommit { slot, record, expected }]);
        };
        commit(6, 6);
        assert_eq!((read(0), read(6), read(7)), (Ok(6), Ok(6), Err(6)));
        for damaged in [7, 6 + SESSION_WINDOW, u64::MAX] {
            store(damaged, 3);
            assert_eq!(read(0), Err(damaged));
        }
        // The row of a session that was restored says as much, and there may be no record.
        store(500, 3);
        assert_eq!(read(500), Ok(500));
        // The record of a later batch took the place.
        commit(6 + SESSION_WINDOW, 6);
        assert_eq!(read(0), Ok(6));
        store(6, 4);
        assert_eq!(read(0), Err(4), "the session of that epoch is not there yet");
    }

    #[test]
    fn a_slot_tells_whose_batches_it_holds() {
        let row = session(5);
        assert_eq!([1, 2, 3, 4].map(|epoch| row.owns(Epoch(epoch))), [false, true, true, false]);
        let of = |expected, epoch| Progress { expected, epoch: Epoch(epoch) }.of(&row);
        assert_eq!((of(9, 2), of(9, 3), of(9, 4)), (Some(5), Some(9), None));
    }
}
