//! Session table: the owner of every session slot, and the place of each committed batch, in each leader's area.

use crate::fabric::{Fabric, LINE_BYTES, WORD_BYTES};
use crate::layout::{CommitRecord, LeaderArea, SESSION_WINDOW, SessionLine, SessionState};
use crate::leadership::{NoLeader, with_leader};
use crate::region::Region;
use crate::row::{Damage, Row};
use crate::site::Site;
use bytemuck::Zeroable;
use embarcadero_wire::{ClientId, Epoch, Incarnation, MAX_ACK_LEVEL, SessionSlot, TopicId};
use serde::Serialize;
use std::mem::{offset_of, size_of};
use std::sync::atomic::{Ordering, fence};

const RECORD_BYTES: u64 = size_of::<CommitRecord>() as u64;
const TAG: u64 = offset_of!(CommitRecord, tag) as u64;

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
}

/// Fate of a batch, as far as this host sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// The batch is not committed, or not yet.
    Unknown,
    /// The batch is committed.
    At(CommitRecord),
    /// The batch was committed so long ago that its record is gone.
    Forgotten,
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
        ..SessionLine::zeroed()
    };
    region.fabric().publish_versioned(region.layout().session(area, session.slot), &line, Site::SessionFlush);
}

/// Repairs a session row that an earlier leader left half written: the session is fenced. Each word is the old or the
/// new one, and no client was told. The epoch moves past both, so that no epoch names two sessions. Only a successor
/// may, before it activates its term.
pub fn repair_torn_session<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot) {
    let (fabric, at) = (region.fabric(), region.layout().session(area, slot));
    // A damaged row stays as it is: no session gets its slot.
    let Ok(line) = fabric.observe_line::<SessionLine>(at, Site::SessionRead) else { return };
    if line.version & 1 == 1 {
        let (epoch, committed) = (line.epoch.next(), read_progress_at(region, area, slot));
        let fenced = SessionLine { epoch, state: SessionState::Fenced.code(), committed, ..line };
        fabric.publish_versioned(at, &fenced, Site::SessionFlush);
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

/// Writes the progress word of a session, and starts its write-back; a fence must follow. Only the leader may.
pub fn store_progress<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot, expected: u64) {
    let at = region.layout().session_progress(area, slot);
    region.fabric().store(at, expected);
    region.fabric().flush(at, 8, Site::RecordFlush);
}

/// Reads the fate of a batch; [`Commit::Unknown`] while there is no leader. Sequences never repeat within a slot, so an
/// old record is never taken for a new one.
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
    let tag = fabric.load(at.add(TAG));
    if tag != sequence + 1 {
        if tag != 0 && !tag.abs_diff(sequence + 1).is_multiple_of(SESSION_WINDOW) {
            return Err(Damage { structure: "CommitRecord", at, what: "tag", value: tag });
        }
        return Ok(if tag < sequence + 1 { Commit::Unknown } else { Commit::Forgotten });
    }
    let word = |index: u64| fabric.load(at.add(index * WORD_BYTES));
    let words = [word(0), word(1), word(2), tag];
    fence(Ordering::Acquire);
    if fabric.load(at.add(TAG)) != tag {
        return Ok(Commit::Forgotten);
    }
    let record: CommitRecord = bytemuck::cast(words);
    if record.broker.0 >= region.geometry().max_brokers {
        return Err(Damage { structure: "CommitRecord", at, what: "broker", value: record.broker.0.into() });
    }
    Ok(Commit::At(record))
}

/// Reads the sequence below which every batch of a session is committed.
///
/// # Errors
/// [`NoLeader`].
#[inline]
pub fn read_progress<F: Fabric>(region: &Region<F>, slot: SessionSlot) -> Result<u64, NoLeader> {
    with_leader(region, |area| read_progress_at(region, area, slot))
}

/// Reads the progress of a session from one leader's area.
#[inline]
pub fn read_progress_at<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot) -> u64 {
    region.fabric().observe(region.layout().session_progress(area, slot), Site::RecordRead)
}

/// Reads the progress of a session slot from one leader's area, and compares it with the slot's row and commit records.
/// Commits must be complete: the leader itself wrote them, or has recovered them. `committed` is that of the row; 0
/// without a row.
///
/// # Errors
/// [`Damage`] of a progress word that is less than the row's, or more without a commit record of the batch before it.
pub fn verified_progress_at<F: Fabric>(
    region: &Region<F>,
    area: LeaderArea,
    slot: SessionSlot,
    committed: u64,
) -> Result<u64, Damage> {
    let expected = read_progress_at(region, area, slot);
    let follows = || match read_commit_at(region, area, slot, expected - 1) {
        Ok(Commit::Unknown) => false,
        // A damaged record says nothing.
        Ok(Commit::At(_) | Commit::Forgotten) | Err(_) => true,
    };
    if expected == committed || (expected > committed && follows()) {
        return Ok(expected);
    }
    let at = region.layout().session_progress(area, slot);
    Err(Damage { structure: "SessionProgressLine", at, what: "expected", value: expected })
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
        assert_eq!(read(5), Ok(Commit::Forgotten));
        // A tag of the place beside it.
        region.fabric().store(region.layout().commit_record(area, slot, 5).add(TAG), 7 + SESSION_WINDOW);
        assert_eq!(read(5), Err("tag"));
    }

    #[test]
    fn progress_that_no_commit_record_shows_is_damage() {
        let (region, area, slot) = (region(1, AllocatorKind::Bitmap), LeaderArea(BrokerId(0)), SessionSlot(0));
        let read = |committed| verified_progress_at(&region, area, slot, committed).map_err(|damage| damage.value);
        assert_eq!((read(0), read(1)), (Ok(0), Err(0)));
        let commit = |tag, expected| {
            let record = CommitRecord { tag, ..CommitRecord::zeroed() };
            publish_commits(&region, area, &[SessionCommit { slot, record, expected }]);
        };
        commit(6, 6);
        assert_eq!((read(0), read(6), read(7)), (Ok(6), Ok(6), Err(6)));
        for damaged in [7, 6 + SESSION_WINDOW, u64::MAX] {
            store_progress(&region, area, slot, damaged);
            assert_eq!(read(0), Err(damaged));
        }
        // The row of a session that was restored says as much, and there may be no record.
        store_progress(&region, area, slot, 500);
        assert_eq!(read(500), Ok(500));
        // The record of a later batch took the place.
        commit(6 + SESSION_WINDOW, 6);
        assert_eq!(read(0), Ok(6));
    }
}
