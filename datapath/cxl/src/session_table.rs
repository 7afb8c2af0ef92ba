//! The session table: what is committed of each session, as everyone may read it.

use crate::fabric::{Fabric, LINE_BYTES, RegionOffset, Site};
use crate::layout::{CommitRecord, LeaderArea, SESSION_WINDOW, SessionLine};
use crate::leadership::{NoLeader, with_leader};
use crate::region::Region;
use bytemuck::Zeroable;
use embarcadero_wire::{ClientId, Epoch, Incarnation, SessionSlot, TopicId};
use serde::Serialize;

/// Life of a session slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SessionState {
    /// Nobody's.
    Free,
    /// Batches commit.
    Open,
    /// Nothing commits any more under this epoch.
    Fenced,
    /// Its client left in order.
    Closed,
}

/// Who a slot belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Session {
    /// Row.
    pub slot: SessionSlot,
    /// Client, chosen by itself; never 0.
    pub client_id: ClientId,
    /// Grows with each session in this row.
    pub epoch: Epoch,
    /// State.
    pub state: SessionState,
    /// Topic slot.
    pub topic: TopicId,
    /// Incarnation of the topic.
    pub topic_incarnation: Incarnation,
    /// Sequences below this were committed when the line was written.
    pub committed: u64,
    /// Acknowledgement level.
    pub ack_level: u8,
}

/// Where a batch went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// Not (yet) committed, as far as this host sees.
    Unknown,
    /// Committed, its first message at this offset.
    At(CommitRecord),
    /// Committed so long ago that its record is gone.
    Forgotten,
}

/// Writes a slot's identity. Only the leader may.
pub fn publish_session<F: Fabric>(region: &Region<F>, area: LeaderArea, session: &Session) {
    let line = SessionLine {
        client_id: session.client_id,
        epoch: session.epoch,
        state: session.state as u32,
        topic: session.topic,
        topic_incarnation: session.topic_incarnation,
        committed: session.committed,
        ack_level: session.ack_level.into(),
        ..SessionLine::zeroed()
    };
    region.fabric().publish_versioned(region.layout().session(area, session.slot), &line, Site::SessionFlush);
}

/// Ends a session whose row an earlier leader was changing when it died: of each word the old or the new one is there, and
/// nobody was told of the change. Its epoch moves past both, so that no epoch ever names two sessions. Only the leader may,
/// before it leads.
pub fn repair_torn_session<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot) {
    let (fabric, at) = (region.fabric(), region.layout().session(area, slot));
    let line: SessionLine = fabric.observe_line(at, Site::SessionRead);
    if line.version & 1 == 1 {
        let (epoch, committed) = (line.epoch.next(), read_progress_at(region, area, slot));
        let fenced = SessionLine { epoch, state: SessionState::Fenced as u32, committed, ..line };
        fabric.publish_versioned(at, &fenced, Site::SessionFlush);
    }
}

/// Reads a slot's identity; `None` when it was never used or is being written.
///
/// # Errors
/// [`NoLeader`].
pub fn read_session<F: Fabric>(region: &Region<F>, slot: SessionSlot) -> Result<Option<Session>, NoLeader> {
    with_leader(region, |area| read_session_at(region, area, slot))
}

/// As [`read_session`], as a certain leader has it.
pub fn read_session_at<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot) -> Option<Session> {
    if slot.0 >= region.geometry().max_sessions {
        return None;
    }
    let (line, ()) = region.fabric().observe_versioned::<SessionLine, ()>(
        region.layout().session(area, slot),
        Site::SessionRead,
        |_| (),
    )?;
    let state = match line.state {
        0 => SessionState::Free,
        1 => SessionState::Open,
        2 => SessionState::Fenced,
        3 => SessionState::Closed,
        _ => return None,
    };
    Some(Session {
        slot,
        client_id: line.client_id,
        epoch: line.epoch,
        state,
        topic: line.topic,
        topic_incarnation: line.topic_incarnation,
        committed: line.committed,
        ack_level: line.ack_level as u8,
    })
}

#[inline]
fn record_at<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot, sequence: u64) -> RegionOffset {
    region.layout().session(area, slot).add(128 + sequence % SESSION_WINDOW * 32)
}

fn progress_at<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot) -> RegionOffset {
    region.layout().session(area, slot).add(64)
}

/// A batch that has its place in the order.
#[derive(Clone, Copy, Debug)]
pub struct SessionCommit {
    /// Slot of its session.
    pub slot: SessionSlot,
    /// Where it is.
    pub record: CommitRecord,
    /// What the session expects next.
    pub expected: u64,
}

/// Writes commit records and progress words and starts their write-back; a fence must follow. Only the sequencer may.
///
/// Two records of a session share a line, and all of them its progress word: what neighbours in `batches` share is
/// written back once.
#[inline]
pub fn publish_commits<F: Fabric>(region: &Region<F>, area: LeaderArea, batches: &[SessionCommit]) {
    let fabric = region.fabric();
    for SessionCommit { slot, record, expected } in batches {
        let at = record_at(region, area, *slot, record.tag - 1);
        let words: [u64; 4] = bytemuck::cast(*record);
        // SYNC: the tag is stored last; pairs with `read_commit`, which loads it first. On memory that is not coherent
        // the record lies within one line and travels whole.
        for (index, word) in words.iter().enumerate() {
            fabric.store(at.add(index as u64 * 8), *word);
        }
        fabric.store(progress_at(region, area, *slot), *expected);
    }
    let (mut last_line, mut last_slot) = (u64::MAX, None);
    for SessionCommit { slot, record, .. } in batches {
        let at = record_at(region, area, *slot, record.tag - 1);
        if at.0 / LINE_BYTES != last_line {
            last_line = at.0 / LINE_BYTES;
            fabric.flush(at, 32, Site::RecordFlush);
        }
        if last_slot != Some(*slot) {
            last_slot = Some(*slot);
            fabric.flush(progress_at(region, area, *slot), 8, Site::RecordFlush);
        }
    }
}

/// Writes the progress word of a session of which no batch commits now. Only the leader may.
pub fn store_progress<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot, expected: u64) {
    let at = progress_at(region, area, slot);
    region.fabric().store(at, expected);
    region.fabric().flush(at, 8, Site::RecordFlush);
}

/// What became of a batch; [`Commit::Unknown`] while there is no leader. Sequence numbers never repeat within a slot, so an
/// old record is never taken for a new.
#[inline]
pub fn read_commit<F: Fabric>(region: &Region<F>, slot: SessionSlot, sequence: u64) -> Commit {
    with_leader(region, |area| read_commit_at(region, area, slot, sequence)).unwrap_or(Commit::Unknown)
}

/// As [`read_commit`], as a certain leader has it.
#[inline]
pub fn read_commit_at<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot, sequence: u64) -> Commit {
    let at = record_at(region, area, slot, sequence);
    let fabric = region.fabric();
    fabric.invalidate(at, 32, Site::RecordRead);
    let tag = fabric.load(at.add(24));
    if tag < sequence + 1 {
        return Commit::Unknown;
    }
    if tag > sequence + 1 {
        return Commit::Forgotten;
    }
    let words = [fabric.load(at), fabric.load(at.add(8)), fabric.load(at.add(16)), tag];
    std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
    if fabric.load(at.add(24)) != tag {
        return Commit::Forgotten;
    }
    Commit::At(bytemuck::cast(words))
}

/// Sequences below this are committed.
///
/// # Errors
/// [`NoLeader`].
#[inline]
pub fn read_progress<F: Fabric>(region: &Region<F>, slot: SessionSlot) -> Result<u64, NoLeader> {
    with_leader(region, |area| read_progress_at(region, area, slot))
}

/// As [`read_progress`], as a certain leader has it.
#[inline]
pub fn read_progress_at<F: Fabric>(region: &Region<F>, area: LeaderArea, slot: SessionSlot) -> u64 {
    region.fabric().observe(progress_at(region, area, slot), Site::RecordRead)
}
