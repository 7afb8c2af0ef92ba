//! Takeover: a successor copies what its predecessor wrote into an area of its own.
//!
//! The predecessor may go on writing meanwhile. A word that depends on another is therefore copied before the other.
//! The consumed Batchlog entries, the durable positions and the session commits come first, then the tails that cover
//! them.

use crate::fabric::{Fabric, LINE_BYTES, RegionOffset, Versioned};
use crate::layout::{LeaderArea, NameLine, SessionLine, SessionRow, TailLine, TopicLine};
use crate::leadership::{last_active, read_terms};
use crate::order_index::{StreamId, read_extent_at};
use crate::own_lines::refresh_leader_area;
use crate::region::Region;
use crate::row::Row;
use crate::site::Site;
use embarcadero_wire::{Stream, Term};
use std::mem::size_of;

/// Bytes of a session's progress and commit records, which follow its identity.
const SESSION_REST_BYTES: u64 = (size_of::<SessionRow>() - size_of::<SessionLine>()) as u64;

/// Attempts to read a line whose writer is changing it. After as many, the line counts as torn.
const ATTEMPTS: u32 = 1000;

/// Predecessor's state, as the successor copied it.
#[derive(Debug)]
pub struct PredecessorState {
    /// Position that each topic's global order had reached when the copy began, by topic slot. Sessions may not know of
    /// batches that were committed near or after it.
    pub begun: Vec<u64>,
    /// Area that was copied, and its term; `None` in a new region. The term may be later than the one before the claim.
    pub from: Option<(LeaderArea, Term)>,
    /// Another broker claimed a term after the predecessor's. It may be about to go on in the same segments. Of two
    /// candidates at least one sees the other, as each claims before it looks.
    pub contested: bool,
}

/// Copies the predecessor's area into `area`, unless they are the same. Call it after
/// [`crate::leadership::claim_term`] and before [`crate::leadership::activate_term`].
pub fn copy_predecessor<F: Fabric>(region: &Region<F>, area: LeaderArea) -> PredecessorState {
    let (layout, geometry) = (region.layout(), region.geometry());
    refresh_leader_area(region, area);
    let Some((from, term)) = last_active(region) else {
        return PredecessorState { begun: vec![0; geometry.max_topics as usize], from: None, contested: false };
    };
    let reached = |topic| read_extent_at(region, from, StreamId { topic, stream: Stream::GLOBAL }).committed;
    let begun = geometry.topics().map(reached).collect();
    let contested = read_terms(region).any(|other| other.area != area && other.claimed > term);
    let state = PredecessorState { begun, from: Some((from, term)), contested };
    if from == area {
        return state;
    }
    let (source, target) = (layout.leader_area(from), layout.leader_area(area));
    let copy = |at: u64, bytes: u64| copy_lines(region, source.add(at), target.add(at), bytes);
    for topic in geometry.topics() {
        let (from, to) = (layout.topic(from, topic), layout.topic(area, topic));
        copy_versioned::<F, TopicLine>(region, from, to, size_of::<NameLine>() as u64);
    }
    for slot in geometry.sessions() {
        let (from, to) = (layout.session(from, slot), layout.session(area, slot));
        if copy_versioned::<F, SessionLine>(region, from, to, 0) {
            copy_lines(region, from.add(LINE_BYTES), to.add(LINE_BYTES), SESSION_REST_BYTES);
        }
    }
    copy(layout.leader.halves, layout.leader.sessions - layout.leader.halves);
    for topic in geometry.topics() {
        copy_steady(region, layout.global_tail(from, topic), layout.global_tail(area, topic));
    }
    copy(layout.leader.directories, layout.leader.bytes - layout.leader.directories);
    region.fabric().fence(Site::TakeoverFlush);
    state
}

/// Copies a line whose words only grow, as it was at one moment. Two reads in a row that return the same values prove
/// that the line held them between the reads. Source: Afek et al., "Atomic snapshots of shared memory", J. ACM 40(4),
/// 1993.
fn copy_steady<F: Fabric>(region: &Region<F>, from: RegionOffset, to: RegionOffset) {
    let fabric = region.fabric();
    let look = || fabric.observe_words::<TailLine>(from, Site::TakeoverRead);
    let mut line = look();
    for _ in 0..ATTEMPTS {
        let again = look();
        if again == line {
            break;
        }
        line = again;
    }
    fabric.store_line(to, &line);
    fabric.flush(to, LINE_BYTES, Site::TakeoverFlush);
}

fn copy_lines<F: Fabric>(region: &Region<F>, from: RegionOffset, to: RegionOffset, bytes: u64) {
    let fabric = region.fabric();
    fabric.invalidate(from, bytes, Site::TakeoverRead);
    for at in (0..bytes).step_by(8) {
        let (word, old) = (fabric.load(from.add(at)), fabric.load(to.add(at)));
        // Most words are zero in both areas.
        if word != old {
            fabric.store(to.add(at), word);
        }
    }
    fabric.flush(to, bytes, Site::TakeoverFlush);
}

/// Copies a versioned line and `more` bytes behind it. Returns false when the line was never written.
fn copy_versioned<F: Fabric, T: Versioned>(
    region: &Region<F>,
    from: RegionOffset,
    to: RegionOffset,
    more: u64,
) -> bool {
    let fabric = region.fabric();
    fabric.invalidate(from, LINE_BYTES, Site::TakeoverRead);
    if fabric.load(from.add(T::VERSION_AT)) == 0 && fabric.load(to.add(T::VERSION_AT)) == 0 {
        return false;
    }
    for _ in 0..ATTEMPTS {
        let copied = fabric.observe_versioned::<T, ()>(from, Site::TakeoverRead, |_| {
            copy_lines(region, from.add(LINE_BYTES), to.add(LINE_BYTES), more);
        });
        match copied {
            Row::Used((line, ())) => {
                fabric.publish_versioned(to, &line, Site::TakeoverFlush);
                return true;
            }
            // It stays as it is, so that readers of the copy see the damage too.
            Row::Damaged(_) => break,
            Row::Unused | Row::Unsettled => std::hint::spin_loop(),
        }
    }
    // Or the writer stopped in the middle of a change, and no client has seen this line. It is copied torn: the
    // successor finds the odd version and repairs it.
    copy_lines(region, from, to, LINE_BYTES + more);
    true
}
