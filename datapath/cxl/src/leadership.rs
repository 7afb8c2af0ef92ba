//! Leadership: who orders, and how readers make sure that it still does.
//!
//! Each leader writes only to an area of its own. Readers use the area of the leader with the highest term. So a new
//! leader can take over although the old one may only be paused. Nobody can stop the old one from writing to shared
//! memory, but nobody reads its area any more. Two rules make this safe.
//!
//! 1. A successor claims its term *before* it reads its predecessor's area ([`claim_term`], [`crate::takeover`]).
//! 2. A reader looks *after* its read that no higher term is claimed ([`with_leader`]).
//!
//! Either a reader sees the claim, and drops what it read. Or its read happened before the claim, and then the
//! successor has copied the same.

// [[DEVIATION_011]] In the paper every sequencer writes the same control block, sequencer halves and session table.

use crate::fabric::{CoherentFabric, Fabric, LINE_BYTES};
use crate::layout::{ControlLine, LeaderArea, TermLine};
use crate::leader_cache::ActiveTerm;
use crate::region::Region;
use crate::row::{Damage, Row};
use crate::site::{Guard, Site};
use bytemuck::Zeroable;
use embarcadero_wire::{BrokerId, Incarnation, Term};
use serde::Serialize;
use std::mem::offset_of;
use std::sync::atomic::{Ordering, fence};

const CLAIMED: u64 = offset_of!(TermLine, claimed) as u64;
const ACTIVE: u64 = offset_of!(TermLine, active) as u64;

/// No term is active: the region is new, or a successor is taking over. Try again soon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the region has no leader at the moment")]
pub struct NoLeader;

/// Reason why it is not known who leads and which brokers are alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownLeader {
    /// No term is active.
    #[error(transparent)]
    NoLeader(#[from] NoLeader),
    /// The leader is changing its statement. Try again soon.
    #[error("the leader is changing its statement")]
    Unsettled,
    /// The leader's statement is damaged.
    #[error("the leader's statement cannot be read: {0}")]
    Damaged(#[from] Damage),
}

/// Terms of one leader area, as memory has them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    pub(crate) area: LeaderArea,
    pub(crate) claimed: Term,
    pub(crate) active: Term,
}

/// Reads the terms of every leader area from memory.
#[inline]
pub(crate) fn read_terms<F: Fabric>(region: &Region<F>) -> impl Iterator<Item = Terms> {
    let (fabric, layout, leaders) = (region.fabric(), region.layout(), region.geometry().max_leaders);
    fabric.invalidate(layout.terms(LeaderArea(BrokerId(0))), u64::from(leaders) * LINE_BYTES, Site::TermRead);
    (0..leaders).map(BrokerId).map(LeaderArea).map(move |area| {
        let at = layout.terms(area);
        Terms { area, claimed: Term(fabric.load(at.add(CLAIMED))), active: Term(fabric.load(at.add(ACTIVE))) }
    })
}

/// Reads which term is active.
#[inline]
fn read_active<F: Fabric>(region: &Region<F>) -> Result<ActiveTerm, NoLeader> {
    let newest = read_terms(region).max_by_key(|terms| terms.claimed).ok_or(NoLeader)?;
    if newest.claimed > Term::NONE && newest.claimed == newest.active {
        Ok(ActiveTerm { term: newest.claimed, area: newest.area })
    } else {
        Err(NoLeader)
    }
}

/// Returns the highest term that is claimed; [`Term::NONE`] in a new region.
#[inline]
pub fn latest_claim<F: Fabric>(region: &Region<F>) -> Term {
    read_terms(region).map(|terms| terms.claimed).max().unwrap_or(Term::NONE)
}

/// Returns the broker that claimed the highest term, and that term. It leads, or is taking over.
pub fn latest_claimant<F: Fabric>(region: &Region<F>) -> Option<(BrokerId, Term)> {
    let newest = read_terms(region).max_by_key(|terms| terms.claimed)?;
    (newest.claimed > Term::NONE).then_some((newest.area.0, newest.claimed))
}

/// Returns the area that was active last, and its term: the leader's, or the predecessor's while a successor takes
/// over. For inspection, and for the successor.
pub fn last_active<F: Fabric>(region: &Region<F>) -> Option<(LeaderArea, Term)> {
    let newest = read_terms(region).max_by_key(|terms| terms.active)?;
    (newest.active > Term::NONE).then_some((newest.area, newest.active))
}

/// Reads from the leader's area. `read` gets the area, and runs again when the leader changed meanwhile.
///
/// # Errors
/// [`NoLeader`] while no term is active.
#[inline]
pub fn with_leader<F: Fabric, R>(region: &Region<F>, mut read: impl FnMut(LeaderArea) -> R) -> Result<R, NoLeader> {
    let cache = region.leader_cache();
    let mut known = match cache.get() {
        Some(known) => known,
        None => read_active(region)?,
    };
    loop {
        let result = read(known.area);
        // SYNC: the terms are read after everything that `read` read; pairs with `claim_term`.
        fence(Ordering::Acquire);
        let now = read_active(region)?;
        // Stored even if it was known: callers that cache what a leader wrote compare versions.
        cache.set(now);
        if now == known || !region.fabric().keeps(Guard::TermAfterRead) {
            return Ok(result);
        }
        known = now;
    }
}

/// Returns true while no higher term than `term` is claimed. Everything that the leader of `term` wrote before the call
/// then counts.
#[inline]
pub fn still_leads<F: Fabric>(region: &Region<F>, term: Term) -> bool {
    // SYNC: what the leader wrote is in memory before the terms are read; pairs with `claim_term`.
    region.fabric().full_fence(Site::TermRead);
    latest_claim(region) == term
}

/// Returns a number that changes whenever [`with_leader`] in this process sees another leader.
#[inline]
pub fn leader_version<F: Fabric>(region: &Region<F>) -> u64 {
    region.leader_cache().version()
}

/// Begins a takeover under `term`, which must be higher than every claimed term. Nothing that earlier leaders write
/// from now on counts.
pub fn claim_term<F: Fabric>(region: &Region<F>, area: LeaderArea, term: Term) {
    let at = region.layout().terms(area).add(CLAIMED);
    region.fabric().store(at, term.0);
    region.fabric().flush(at, 8, Site::TermFlush);
    // SYNC: the claim is in memory before the predecessor's area is read; pairs with `with_leader` and `still_leads`.
    region.fabric().full_fence(Site::TermFlush);
}

/// Makes a claimed term active: the takeover is complete, and readers use this area from now on.
pub fn activate_term<F: Fabric>(region: &Region<F>, area: LeaderArea, term: Term) {
    let at = region.layout().terms(area).add(ACTIVE);
    region.fabric().store(at, term.0);
    region.fabric().flush(at, 8, Site::TermFlush);
    region.fabric().fence(Site::TermFlush);
}

/// Returns the highest term that a candidate campaigned for, on memory that is coherent among all hosts.
pub fn highest_candidacy<F: Fabric>(region: &Region<F>) -> Term {
    Term(region.fabric().load(region.layout().election()))
}

/// Candidacy for a term, on memory that is coherent among all hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidacy {
    /// Term to lead under.
    pub term: Term,
    /// Highest candidacy that the candidate saw.
    pub before: Term,
}

/// Campaigns for a term. Returns true if no other candidate has campaigned since this one read the highest candidacy.
pub fn campaign<F: CoherentFabric>(region: &Region<F>, candidacy: Candidacy) -> bool {
    region.fabric().compare_exchange(region.layout().election(), candidacy.before.0, candidacy.term.0)
}

/// Statement of a leader: its identity, and the brokers that are alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LeaderInfo {
    /// Term under which the leader wrote the statement.
    pub term: Term,
    /// Broker id.
    pub broker: BrokerId,
    /// Incarnation of the broker.
    pub incarnation: Incarnation,
    /// Brokers that are alive, one bit each.
    pub broker_mask: u64,
    /// Brokers whose pins count, one bit each: the live ones, and those that may only be paused.
    pub pinning_mask: u64,
}

/// Writes the leader's statement. Only that leader may.
pub fn publish_leader<F: Fabric>(region: &Region<F>, leader: &LeaderInfo) {
    let line = ControlLine {
        term: leader.term,
        incarnation: leader.incarnation,
        broker_mask: leader.broker_mask,
        pinning_mask: leader.pinning_mask,
        ..ControlLine::zeroed()
    };
    region.fabric().publish_versioned(
        region.layout().control_line(LeaderArea(leader.broker)),
        &line,
        Site::ControlFlush,
    );
}

/// Reads the statement of one leader, whether or not it still leads.
pub fn read_leader_at<F: Fabric>(region: &Region<F>, area: LeaderArea) -> Row<LeaderInfo> {
    let at = region.layout().control_line(area);
    let known = region.geometry().broker_mask();
    region.fabric().observe_versioned::<ControlLine, ()>(at, Site::ControlRead, |_| ()).decode(|(line, ())| {
        for (what, value) in [("broker_mask", line.broker_mask), ("pinning_mask", line.pinning_mask)] {
            if value & !known != 0 {
                return Err(Damage { structure: "ControlLine", at, what, value });
            }
        }
        Ok(LeaderInfo {
            term: line.term,
            broker: area.0,
            incarnation: line.incarnation,
            broker_mask: line.broker_mask,
            pinning_mask: line.pinning_mask,
        })
    })
}

/// Reads the statement of the leader.
///
/// # Errors
/// [`UnknownLeader`] while no term is active, and while the statement is not whole.
pub fn read_leader<F: Fabric>(region: &Region<F>) -> Result<LeaderInfo, UnknownLeader> {
    match with_leader(region, |area| read_leader_at(region, area))? {
        Row::Used(leader) => Ok(leader),
        Row::Unused | Row::Unsettled => Err(UnknownLeader::Unsettled),
        Row::Damaged(damage) => Err(UnknownLeader::Damaged(damage)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::AllocatorKind;
    use crate::segment::tests::region;

    #[test]
    fn a_damaged_statement_is_not_that_of_no_leader() {
        let (region, broker) = (region(1, AllocatorKind::Bitmap), BrokerId(0));
        let (area, term, incarnation) = (LeaderArea(broker), Term(1), Incarnation(1));
        assert_eq!(read_leader(&region), Err(UnknownLeader::NoLeader(NoLeader)));
        claim_term(&region, area, term);
        activate_term(&region, area, term);
        assert_eq!(read_leader(&region), Err(UnknownLeader::Unsettled));
        let whole = LeaderInfo { term, broker, incarnation, broker_mask: 0b1001, pinning_mask: 0b1001 };
        publish_leader(&region, &whole);
        assert_eq!(read_leader(&region), Ok(whole));
        // The region has four brokers.
        for (what, line) in [
            ("broker_mask", LeaderInfo { broker_mask: 1 << 4, ..whole }),
            ("pinning_mask", LeaderInfo { pinning_mask: 1 << 63, ..whole }),
        ] {
            publish_leader(&region, &line);
            let read = read_leader(&region);
            assert!(matches!(read, Err(UnknownLeader::Damaged(damage)) if damage.what == what), "{read:?}");
        }
    }
}
