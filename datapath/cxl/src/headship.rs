//! Who is the head, and what only a head writes.
//!
//! `[[DEVIATION_011]]` Everything that a head says lies in an area of its own, and the head with the highest epoch counts.
//! Another can so take over from a head that may only be paused, on memory where nobody can be kept from writing: what a
//! deposed head still writes lies where nobody looks any more. It works because of two rules.
//!
//! 1. A successor claims its epoch *before* it reads its predecessor's area ([`claim`], [`inherit`]).
//! 2. Whoever acts on what a head says looks *after* reading it that no higher epoch is claimed ([`of_head`]).
//!
//! So either the reader sees the claim and drops what it read, or what it read was in memory before the claim, and the
//! successor has it too.

use crate::fabric::{CoherentFabric, Fabric, Guard, LINE_BYTES, RegionOffset, Site};
use crate::layout::{ControlLine, HEAD_TOPIC_BYTES, SESSION_BYTES, Seat, SeatLine, SessionLine, TailLine, TopicLine};
use crate::order_index::{StreamId, read_extent_at};
use crate::region::Region;
use bytemuck::Zeroable;
use embarcadero_wire::{BrokerId, Incarnation, Stream, Term};
use serde::Serialize;
use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering, fence};

const CLAIMED: u64 = offset_of!(SeatLine, claimed) as u64;
const LED: u64 = offset_of!(SeatLine, led) as u64;

/// Between two heads, or before the first, nobody can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the region has no head at the moment")]
pub struct NoHead;

/// A head in office: its epoch, and the area that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct InOffice {
    epoch: Term,
    seat: Seat,
}

/// The head that a process last saw in office, so that it need not look for it before every read.
#[derive(Debug, Default)]
pub(super) struct Office {
    /// Epoch, and the seat in the lowest byte; 0 for none.
    packed: AtomicU64,
}

impl Office {
    fn get(&self) -> Option<InOffice> {
        let packed = self.packed.load(Ordering::Relaxed);
        (packed != 0).then_some(InOffice { epoch: Term(packed >> 8), seat: Seat(BrokerId::from(packed as u8)) })
    }

    fn set(&self, InOffice { epoch, seat }: InOffice) {
        self.packed.store(epoch.0 << 8 | u64::from(seat.0.byte()), Ordering::Relaxed);
    }

    /// Changes with the head.
    #[inline]
    pub(super) fn mark(&self) -> u64 {
        self.packed.load(Ordering::Relaxed)
    }
}

/// All seats as memory has them now: (seat, claimed, led).
#[inline]
fn seats<F: Fabric>(region: &Region<F>) -> impl Iterator<Item = (Seat, Term, Term)> {
    let heads = region.geometry().max_heads;
    let fabric = region.fabric();
    fabric.invalidate(region.layout().seat(Seat(BrokerId(0))), u64::from(heads) * LINE_BYTES, Site::SeatRead);
    (0..heads).map(BrokerId).map(Seat).map(move |seat| {
        let at = region.layout().seat(seat);
        (seat, Term(fabric.load(at.add(CLAIMED))), Term(fabric.load(at.add(LED))))
    })
}

/// The head in office.
#[inline]
fn in_office<F: Fabric>(region: &Region<F>) -> Result<InOffice, NoHead> {
    let (seat, claimed, led) = seats(region).max_by_key(|(_, claimed, _)| *claimed).ok_or(NoHead)?;
    if claimed > Term::NONE && claimed == led { Ok(InOffice { epoch: claimed, seat }) } else { Err(NoHead) }
}

/// The highest epoch under which anyone is, or is about to be, the head.
#[inline]
pub fn latest_claim<F: Fabric>(region: &Region<F>) -> Term {
    seats(region).map(|(_, claimed, _)| claimed).max().unwrap_or(Term::NONE)
}

/// The broker that is, or is about to be, the head, and its epoch.
pub fn latest_claimant<F: Fabric>(region: &Region<F>) -> Option<(BrokerId, Term)> {
    let (seat, claimed, _) = seats(region).max_by_key(|(_, claimed, _)| *claimed)?;
    (claimed > Term::NONE).then_some((seat.0, claimed))
}

/// The area that has everything: that of the head in office, or of the one before while another takes over; and the epoch
/// under which that one led. For inspection, and for the successor.
pub fn last_led<F: Fabric>(region: &Region<F>) -> Option<(Seat, Term)> {
    let (seat, _, led) = seats(region).max_by_key(|(_, _, led)| *led)?;
    (led > Term::NONE).then_some((seat, led))
}

/// Reads what the head says: `read` is given the area to read from, perhaps more than once.
///
/// # Errors
/// [`NoHead`] while there is none. That passes.
#[inline]
pub fn of_head<F: Fabric, R>(region: &Region<F>, mut read: impl FnMut(Seat) -> R) -> Result<R, NoHead> {
    let office = region.office();
    let mut known = match office.get() {
        Some(known) => known,
        None => in_office(region)?,
    };
    loop {
        let result = read(known.seat);
        // SYNC: the seats are looked at after what was read; pairs with `claim`.
        fence(Ordering::Acquire);
        let now = in_office(region)?;
        // Remembered even if it was known: whoever caches what a head said compares marks.
        office.set(now);
        if now == known || !region.fabric().keeps(Guard::EpochAfterRead) {
            return Ok(result);
        }
        known = now;
    }
}

/// True while no epoch higher than `epoch` is claimed: what the head of that epoch wrote before asking counts.
#[inline]
pub fn still_leads<F: Fabric>(region: &Region<F>, epoch: Term) -> bool {
    // SYNC: the seats are looked at after what was written is in memory; pairs with `claim`.
    region.fabric().full_fence(Site::SeatRead);
    latest_claim(region) == epoch
}

/// Changes whenever [`of_head`] saw another head than the time before.
#[inline]
pub fn office_mark<F: Fabric>(region: &Region<F>) -> u64 {
    region.office().mark()
}

/// Begins to take over under `epoch`, which must be higher than every claim: from now on nothing counts that earlier
/// heads write.
pub fn claim<F: Fabric>(region: &Region<F>, seat: Seat, epoch: Term) {
    let at = region.layout().seat(seat).add(CLAIMED);
    region.fabric().store(at, epoch.0);
    region.fabric().flush(at, 8, Site::SeatFlush);
    // SYNC: in memory before anything of the predecessor is read; pairs with `of_head`.
    region.fabric().full_fence(Site::SeatFlush);
}

/// Everything is in this head's area: it leads, under the epoch that it claimed.
pub fn lead<F: Fabric>(region: &Region<F>, seat: Seat, epoch: Term) {
    let at = region.layout().seat(seat).add(LED);
    region.fabric().store(at, epoch.0);
    region.fabric().flush(at, 8, Site::SeatFlush);
    region.fabric().fence(Site::SeatFlush);
}

/// The highest epoch that anyone stood for, on memory that is coherent among all hosts.
pub fn highest_candidacy<F: Fabric>(region: &Region<F>) -> Term {
    Term(region.fabric().load(region.layout().election()))
}

/// Candidacy for the head's office, on memory that is coherent among all hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidacy {
    /// Epoch to lead under.
    pub epoch: Term,
    /// Highest candidacy that was seen.
    pub before: Term,
}

/// Stands for election. True if no other did since the candidate looked.
pub fn stand<F: CoherentFabric>(region: &Region<F>, candidacy: Candidacy) -> bool {
    region.fabric().compare_exchange(region.layout().election(), candidacy.before.0, candidacy.epoch.0)
}

/// What a successor took over.
#[derive(Debug)]
pub struct Inheritance {
    /// Position that each topic's global order had reached when it began: whatever was committed before is near it, or
    /// after it.
    pub begun: Vec<u64>,
    /// Whose area it was, and the epoch under which that one led. It may be a later one than was there before the claim.
    pub from: Option<(Seat, Term)>,
    /// Another claimed an epoch after that one had led: whether or not it came to lead, it may be about to go on in the same
    /// segments. Of two candidates at least one sees the other, as each claims before it looks.
    pub contested: bool,
}

/// Copies the area of the head before, if that was another broker. After [`claim`], before [`lead`].
///
/// The predecessor may go on writing meanwhile. What depends on something else is read before it: how far Batchlogs are
/// consumed, what is durable, and what sessions committed, before the tails that cover them all.
pub fn inherit<F: Fabric>(region: &Region<F>, seat: Seat) -> Inheritance {
    let (layout, geometry) = (region.layout(), region.geometry());
    let Some((from, led)) = last_led(region) else {
        return Inheritance { begun: vec![0; geometry.max_topics as usize], from: None, contested: false };
    };
    let reached = |topic| read_extent_at(region, from, StreamId { topic, stream: Stream::GLOBAL }).committed;
    let begun = geometry.topics().map(reached).collect();
    let contested = seats(region).any(|(other, claimed, _)| other != seat && claimed > led);
    let inheritance = Inheritance { begun, from: Some((from, led)), contested };
    if from == seat {
        return inheritance;
    }
    let source = layout.head_area(from);
    let target = layout.head_area(seat);
    let copy = |at: u64, bytes: u64| copy_lines(region, source.add(at), target.add(at), bytes);
    for topic in 0..u64::from(geometry.max_topics) {
        copy_versioned::<F, TopicLine>(region, source, target, topic * HEAD_TOPIC_BYTES, LINE_BYTES);
    }
    for slot in 0..u64::from(geometry.max_sessions) {
        let at = layout.head.sessions + slot * SESSION_BYTES;
        if copy_versioned::<F, SessionLine>(region, source, target, at, 0) {
            copy(at + LINE_BYTES, SESSION_BYTES - LINE_BYTES);
        }
    }
    copy(layout.head.halves, layout.head.sessions - layout.head.halves);
    for topic in 0..u64::from(geometry.max_topics) {
        let tail = topic * HEAD_TOPIC_BYTES + 2 * LINE_BYTES;
        copy_steady(region, source.add(tail), target.add(tail));
    }
    copy(layout.head.directories, layout.head.bytes - layout.head.directories);
    region.fabric().fence(Site::InheritFlush);
    inheritance
}

/// Copies a line whose words only grow as it was at one moment: two looks that see the same saw what stood between them
/// (Afek et al., "Atomic snapshots of shared memory", J. ACM 1993). Its writer stops soon, as it leads no more.
fn copy_steady<F: Fabric>(region: &Region<F>, from: RegionOffset, to: RegionOffset) {
    let fabric = region.fabric();
    let look = || fabric.observe_line::<TailLine>(from, Site::InheritRead);
    let mut line = look();
    for _ in 0..COPIES {
        let again = look();
        if again == line {
            break;
        }
        line = again;
    }
    fabric.store_line(to, &line);
    fabric.flush(to, LINE_BYTES, Site::InheritFlush);
}

fn copy_lines<F: Fabric>(region: &Region<F>, from: RegionOffset, to: RegionOffset, bytes: u64) {
    let fabric = region.fabric();
    fabric.invalidate(from, bytes, Site::InheritRead);
    for at in (0..bytes).step_by(8) {
        let (word, old) = (fabric.load(from.add(at)), fabric.load(to.add(at)));
        // Most of it is zero, and stays where it is.
        if word != old {
            fabric.store(to.add(at), word);
        }
    }
    fabric.flush(to, bytes, Site::InheritFlush);
}

/// Copies a versioned line and `more` bytes behind it; a line in the middle of a change as it is seen then. False when it
/// was never written.
fn copy_versioned<F: Fabric, T: crate::fabric::Line>(
    region: &Region<F>,
    source: RegionOffset,
    target: RegionOffset,
    at: u64,
    more: u64,
) -> bool {
    let fabric = region.fabric();
    let (from, to) = (source.add(at), target.add(at));
    fabric.invalidate(from, LINE_BYTES, Site::InheritRead);
    if fabric.load(from.add(56)) == 0 && fabric.load(to.add(56)) == 0 {
        return false;
    }
    for _ in 0..COPIES {
        let copied = fabric.observe_versioned::<T, ()>(from, Site::InheritRead, |_| {
            copy_lines(region, from.add(LINE_BYTES), to.add(LINE_BYTES), more);
        });
        if let Some((line, ())) = copied {
            fabric.publish_versioned(to, &line, Site::InheritFlush);
            return true;
        }
        std::hint::spin_loop();
    }
    // Its writer died or stopped in the middle of it: nobody was told of it. As it is, so that it is seen as such.
    copy_lines(region, from, to, LINE_BYTES + more);
    true
}

/// Times that a line that changes is looked at.
const COPIES: u32 = 1000;

/// Who orders, as the control block says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Headship {
    /// Grows with each head.
    pub epoch: Term,
    /// The head's broker id.
    pub broker: BrokerId,
    /// The head's incarnation.
    pub incarnation: Incarnation,
    /// Bit per broker that the head takes for alive.
    pub broker_mask: u64,
    /// Bit per broker whose pins count: those, and others that may still go on.
    pub pinning_mask: u64,
}

/// Writes what a head says of the brokers. Only that head may.
pub fn publish_headship<F: Fabric>(region: &Region<F>, head: &Headship) {
    let line = ControlLine {
        epoch: head.epoch,
        incarnation: head.incarnation,
        broker_mask: head.broker_mask,
        pinning_mask: head.pinning_mask,
        ..ControlLine::zeroed()
    };
    region.fabric().publish_versioned(region.layout().control_line(Seat(head.broker)), &line, Site::ControlFlush);
}

/// What a head, in office or not, last said of the brokers.
pub fn read_headship_at<F: Fabric>(region: &Region<F>, seat: Seat) -> Option<Headship> {
    let at = region.layout().control_line(seat);
    let (line, ()) = region.fabric().observe_versioned::<ControlLine, ()>(at, Site::ControlRead, |_| ())?;
    Some(Headship {
        epoch: line.epoch,
        broker: seat.0,
        incarnation: line.incarnation,
        broker_mask: line.broker_mask,
        pinning_mask: line.pinning_mask,
    })
}

/// What the head in office says; `None` while there is none, or while it is changing it.
pub fn read_headship<F: Fabric>(region: &Region<F>) -> Option<Headship> {
    of_head(region, |seat| read_headship_at(region, seat)).ok().flatten()
}
