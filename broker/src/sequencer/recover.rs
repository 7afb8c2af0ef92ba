//! Recovery: a new leader takes over the order with everything that is committed.

use super::group::{Group, Stamp};
use super::session::Arrival;
use super::slots::Slot;
use super::{Command, Sequencer, SequencerLimits};
use crate::mirror::Mirror;
use crate::takeover::TakeoverError;
use crossbeam_channel::Receiver;
use embarcadero_cxl::batchlog::peek_entry;
use embarcadero_cxl::layout::{CommitRecord, IndexEntry, LeaderArea, SessionState};
use embarcadero_cxl::leadership::{activate_term, claim_term, latest_claim};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::segment::SegmentAllocator;
use embarcadero_cxl::session_table::{
    Commit, Session, SessionCommit, read_commit_at, read_progress_at, read_session_at, repair_torn_session,
    verified_progress_at,
};
use embarcadero_cxl::takeover::{PredecessorState, copy_predecessor};
use embarcadero_cxl::topic_table::{TopicRows, repair_torn_topic};
use embarcadero_cxl::{Damage, Fabric, Guard, Row, Site};
use embarcadero_os::Times;
use embarcadero_wire::{BrokerId, Order, Term};
use std::collections::BTreeMap;
use std::sync::Arc;

/// State of the predecessor, as far as the new leader knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predecessor {
    /// The leader of this term never writes again. [`Term::NONE`] if there was no leader.
    Gone(Term),
    /// The predecessor may go on at any moment.
    MayGoOn,
}

/// Memory that a leader writes.
pub struct Memory<F: Fabric> {
    /// Region.
    pub region: Region<F>,
    /// Allocator for the order indexes.
    pub pool: Arc<dyn SegmentAllocator>,
    /// Mirror of the region, if it has one.
    pub mirror: Option<Region<F>>,
}

/// Takeover of the region's order.
pub struct Takeover<F: Fabric> {
    /// Memory that the leader writes.
    pub memory: Memory<F>,
    /// Area of the new leader.
    pub area: LeaderArea,
    /// Term to lead under, higher than every term before.
    pub term: Term,
    /// State of the predecessor.
    pub before: Predecessor,
    /// Bounds by which the leader goes.
    pub limits: SequencerLimits,
    /// Requests of the control plane.
    pub commands: Receiver<Command>,
}

impl<F: Fabric> Sequencer<F> {
    /// Takes over the region's order, with everything that is committed. The new leader leads when this returns.
    ///
    /// # Errors
    /// [`TakeoverError`].
    pub fn recover(takeover: Takeover<F>, now: impl Into<Times>) -> Result<Self, TakeoverError> {
        let now = now.into();
        let now_us = now.steady_us;
        let Takeover { memory, area, term, before, limits, commands } = takeover;
        let Memory { region, pool, mirror } = memory;
        let claim_first = region.fabric().keeps(Guard::ClaimBeforeCopy);
        if claim_first {
            claim_term(&region, area, term);
        }
        let PredecessorState { begun, from, contested } = copy_predecessor(&region, area);
        region.geometry().topics().for_each(|topic| repair_torn_topic(&region, area, topic));
        region.geometry().sessions().for_each(|slot| repair_torn_session(&region, area, slot));
        let mirror = mirror.map(|mirror| Mirror::take_over(mirror, area, term)).transpose()?;
        let geometry = *region.geometry();
        let mut sequencer = Self {
            region,
            pool,
            mirror,
            area,
            term,
            limits,
            commands,
            topics: geometry.topics().map(|_| None).collect(),
            configs: geometry.topics().map(|_| None).collect(),
            damaged: geometry.topics().map(|_| None).collect(),
            damaged_sessions: BTreeMap::new(),
            slots: vec![Slot::unused(now_us); geometry.max_sessions as usize],
            now_us,
            closing: Vec::new(),
            group: Group::new(geometry.max_sessions, limits.group_batches),
            pulses: geometry.brokers().map(|_| 0).collect(),
            first: area.0.index(),
        };
        let TopicRows { live, damaged } = TopicRows::read(&sequencer.region, area);
        live.into_iter().for_each(|config| sequencer.open_topic(config));
        for (slot, damage) in damaged {
            sequencer.set_damaged(slot.index(), damage);
        }
        // Another broker may have led after the caller looked and before the claim, or may be about to lead. And a
        // predecessor that is gone may have found no room to leave the segment of one that is not.
        let led = from.map_or(Term::NONE, |(_, term)| term);
        let may_go_on = contested || before != Predecessor::Gone(led);
        for topic in sequencer.topics.iter_mut().flatten() {
            topic.begin_term(term, may_go_on || topic.index.written_under() != led);
        }
        if let Err(error) = sequencer.follow_mirror() {
            let superseded = latest_claim(&sequencer.region) > term;
            return Err(if superseded { TakeoverError::Superseded } else { error });
        }
        sequencer.recover_sessions(&begun, now_us);
        if sequencer.region.fabric().keeps(Guard::RetakeUndecided) {
            for slot in 0..sequencer.topics.len() {
                sequencer.retake_undecided(slot, now);
            }
        }
        sequencer.resume_closing();
        if !claim_first {
            claim_term(&sequencer.region, area, term);
        }
        activate_term(&sequencer.region, area, term);
        Ok(sequencer)
    }

    /// Brings the mirror up to the region, and completes its takeover.
    fn follow_mirror(&mut self) -> Result<(), TakeoverError> {
        let Some(mirror) = &mut self.mirror else { return Ok(()) };
        for config in self.configs.iter().flatten() {
            mirror.topic(config);
        }
        for topic in self.topics.iter_mut().flatten() {
            topic.mirror = Some(mirror.follow(&topic.config, &topic.index)?);
        }
        mirror.follow_sessions(&self.region);
        mirror.activate();
        Ok(())
    }

    /// Takes up the open sessions, and brings them up to the index. The predecessor may have published a group in the
    /// index and died before it told the sessions. `begun` has the position of each index before the sessions were
    /// copied, by topic slot.
    fn recover_sessions(&mut self, begun: &[u64], now_us: u64) {
        for slot in self.region.geometry().sessions() {
            let progress = read_progress_at(&self.region, self.area, slot);
            let row = read_session_at(&self.region, self.area, slot);
            self.slots[slot.index()].row = row;
            let session = match row {
                Row::Used(session) => session,
                Row::Unused | Row::Unsettled => continue,
                Row::Damaged(damage) => {
                    self.report_session(slot, damage);
                    continue;
                }
            };
            let config = self.configs.get(session.topic.index()).and_then(Option::as_ref);
            let Some(config) = config.filter(|config| config.incarnation == session.topic_incarnation) else {
                continue;
            };
            // In total order a client may have committed batches ahead of a gap.
            let ahead = config.order != Order::Strong;
            self.slots[slot.index()].used = ahead || session.committed > session.first_sequence;
            if session.state == SessionState::Open {
                let committed = progress.of(&session).unwrap_or(session.committed);
                let mut order = self.known_session(Session { committed, ..session }, config.order, now_us);
                order.session = session;
                self.group.sessions[slot.index()] = Some(order);
            }
        }
        if !self.region.fabric().keeps(Guard::RecoverBeforeAccept) {
            return;
        }
        for (slot, begun) in begun.iter().enumerate() {
            match self.entries_since(slot, *begun) {
                Ok(entries) => entries.iter().for_each(|(at, entry)| self.recover_commit(slot, *at, entry, now_us)),
                Err(damage) => self.set_damaged(slot, damage),
            }
        }
        self.publish_commits();
        self.region.fabric().fence(Site::RecordFlush);
        self.verify_progress();
    }

    /// Fences the sessions of which nobody knows what is committed. Their clients learn the reason when they come back.
    fn verify_progress(&mut self) {
        for index in 0..self.group.sessions.len() {
            let Some(order) = &self.group.sessions[index] else { continue };
            let session @ Session { slot, .. } = order.session;
            if let Err(damage) = verified_progress_at(&self.region, self.area, slot, Some(&session)) {
                self.group.sessions[index] = None;
                self.report_session(slot, damage);
                self.show_session(&Session { state: SessionState::Fenced, ..session });
            }
        }
    }

    /// Reads the entries of a topic that its sessions may not know of.
    fn entries_since(&self, slot: usize, begun: u64) -> Result<Vec<(u64, IndexEntry)>, Damage> {
        let Some(topic) = &self.topics[slot] else { return Ok(Vec::new()) };
        let mut entries = Vec::new();
        // The predecessor may have trimmed entries since then. Their segments are not given back yet.
        for position in begun.saturating_sub(self.limits.group_batches)..topic.index.next() {
            entries.extend(topic.index.entry_or_trimmed(position)?.map(|entry| (position, entry)));
        }
        Ok(entries)
    }

    /// Tells a session of its batch in the index, if it does not know.
    fn recover_commit(&mut self, topic: usize, position: u64, entry: &IndexEntry, now_us: u64) {
        let owner = self.group.sessions.iter_mut().flatten().find(|order| {
            let session = &order.session;
            (session.client_id, session.epoch, session.topic.index()) == (entry.client_id, entry.session_epoch, topic)
        });
        let Some(order) = owner else { return };
        let slot = order.session.slot;
        if entry.sequence >= order.expected() {
            order.committed(entry.sequence, now_us);
        } else if matches!(
            read_commit_at(&self.region, self.area, slot, entry.sequence),
            Ok(Commit::At(_) | Commit::Forgotten(_))
        ) {
            // A damaged record is written again, by this entry or by a later one.
            return;
        }
        let record = CommitRecord {
            first_offset: entry.first_offset,
            position,
            broker: entry.broker.into(),
            session_epoch: entry.session_epoch,
            tag: entry.sequence + 1,
        };
        self.group.commits.push(SessionCommit { slot, record, expected: order.expected() });
    }

    /// Takes again what earlier leaders took from the Batchlogs and may have held for a gap to close. Their memory is
    /// gone, but a ring keeps its entries until they are overwritten. A batch that did commit is a duplicate now.
    fn retake_undecided(&mut self, slot: usize, now: Times) {
        let stamp = Stamp { term: self.term, now_us: now.steady_us };
        let Some(topic) = &mut self.topics[slot] else { return };
        let (next, newest_us) = (topic.index.next(), topic.set_time(now.wall_us));
        let slots = u64::from(self.region.geometry().batchlog_slots);
        for broker in self.region.geometry().brokers() {
            let Some(topic) = &self.topics[slot] else { return };
            let consumed = topic.brokers[broker.index()].consumed.consumed;
            let taken = consumed.consumed_through;
            for index in consumed.decided_through.max(taken.saturating_sub(slots))..taken {
                self.retake(slot, broker, index, stamp);
            }
        }
        if let Some(topic) = &mut self.topics[slot] {
            topic.reset_time_if_unused(next, newest_us);
        }
    }

    /// Takes one Batchlog entry again, or keeps it until there is room. What it releases is published at once: a group
    /// stays small.
    fn retake(&mut self, slot: usize, broker: BrokerId, index: u64, stamp: Stamp) {
        let Self { region, area, topics, group, .. } = self;
        let Some(topic) = &mut topics[slot] else { return };
        let entry = match peek_entry(region, topic.config.id, broker, index) {
            Ok(Some(entry)) => entry,
            // Its slot was reused, so it was decided.
            Ok(None) => return,
            Err(damage) => return group.set_damaged(topic, broker, damage),
        };
        if entry.session_slot.0 >= region.geometry().max_sessions {
            return;
        }
        match read_commit_at(region, *area, entry.session_slot, entry.sequence) {
            Ok(Commit::Unknown) => {}
            Ok(Commit::At(_) | Commit::Forgotten(_)) => return,
            Err(damage) => tracing::error!(%damage, "the window of the session decides instead"),
        }
        topic.undecided.push_back(Arrival { entry, broker, index });
        let before = topic.index.next();
        group.retake(region.fabric(), topic, stamp);
        if topic.index.next() > before {
            // More entries may follow, and be held.
            self.publish(slot, before, false);
        }
    }
}
