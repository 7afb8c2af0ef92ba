//! Sequencer: the leader takes batches from every broker's Batchlog and gives each its place in the global order.
//!
//! Only the leader runs one. It writes the leader's area and nothing else: the order indexes, the session table, the
//! topic table, and the progress in each Batchlog.
//!
//! - `recover`: a new leader goes on where its predecessor stopped.
//! - `group`: batches are judged and get their places, a group at a time.
//! - `topic`: one topic's order, and its copy in the mirror.
//! - `sessions`, `topics`: what the control plane asks for. `slots`: the session slots.
//! - `maintenance`: retention, reclaiming, deletion. `gaps`: the leases of gaps.

mod gaps;
mod group;
mod maintenance;
mod recover;
pub mod session;
mod sessions;
mod slots;
mod topic;
mod topics;

pub use crate::takeover::TakeoverError;
pub use recover::{Memory, Predecessor, Takeover};
pub use sessions::{SessionError, SessionRequest};

use crate::mirror::Mirror;
use crossbeam_channel::{Receiver, Sender};
use embarcadero_cxl::broker_table::read_pulse;
use embarcadero_cxl::layout::LeaderArea;
use embarcadero_cxl::leadership::still_leads;
use embarcadero_cxl::region::Region;
use embarcadero_cxl::segment::SegmentAllocator;
use embarcadero_cxl::session_table::{Session, publish_commits};
use embarcadero_cxl::topic_table::TopicConfig;
use embarcadero_cxl::{Damage, Fabric, Site};
use embarcadero_os::Times;
use embarcadero_wire::{BrokerId, ClientId, Epoch, SessionSlot, SessionToken, Term, TopicId};
use group::{Group, Stamp};
use slots::Slot;
use std::collections::BTreeMap;
use std::sync::Arc;
use topic::TopicOrder;
use topics::Closing;

/// Most batches of a topic that are published in one group, held ones included. Its sessions may not know of them if the
/// leader dies, so a successor reads as many again.
pub const GROUP_BATCHES: u64 = 1024;

/// Request of the control plane. The sequencer answers it between groups, so that nothing commits under an epoch after
/// its end was reported.
pub enum Command {
    /// Creates a topic. The answer is the damage of its memory, if it cannot be ordered.
    OpenTopic(TopicConfig, Sender<Result<(), Damage>>),
    /// Deletes a topic. The answer comes once no broker holds its memory. It is the damage of the topic's order if the
    /// deletion cannot end.
    CloseTopic(TopicId, Sender<Result<(), Damage>>),
    /// Opens the next epoch of a client's session on a topic.
    OpenSession {
        /// Session to open.
        request: SessionRequest,
        /// Answer.
        reply: Sender<Result<Session, SessionError>>,
    },
    /// Ends a session in order.
    CloseSession {
        /// Session slot.
        slot: SessionSlot,
        /// Client.
        client_id: ClientId,
        /// Epoch.
        epoch: Epoch,
        /// Token of the session.
        token: SessionToken,
        /// Answer.
        reply: Sender<Result<(), SessionError>>,
    },
}

/// Bounds by which the sequencer goes. All leaders of a region have the same.
#[derive(Clone, Copy, Debug)]
pub struct SequencerLimits {
    /// Most batches of a topic in one group, held ones included: [`GROUP_BATCHES`] but in tests.
    pub group_batches: u64,
    /// Longest time that a gap may last before its session is fenced.
    pub gap_us: u64,
    /// Longest time for which a session that waits for room is excused beyond `gap_us`.
    pub excuse_us: u64,
    /// Time without a connection after which a session with a gap counts as abandoned, and is fenced if memory is short.
    pub abandoned_us: u64,
    /// Time without batches after which a session's slot may go to another client. If its client never committed a batch,
    /// `gap_us` are enough.
    pub idle_us: u64,
}

impl SequencerLimits {
    /// Limits for tests and benches: no lease ends.
    pub const LASTING: Self = Self {
        group_batches: GROUP_BATCHES,
        gap_us: u64::MAX / 2,
        excuse_us: 0,
        abandoned_us: u64::MAX / 2,
        idle_us: u64::MAX / 2,
    };
}

/// Counters of a sequencer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequencerStats {
    /// Batches that were ordered.
    pub ordered: u64,
    /// Batches that had been ordered before.
    pub duplicates: u64,
    /// Batches of sessions that are fenced, closed or unknown.
    pub rejected: u64,
    /// Sessions that were fenced.
    pub fenced: u64,
    /// Batchlogs and topics whose memory was found to be damaged.
    pub damaged: u64,
}

/// Sequencer of a leader.
pub struct Sequencer<F: Fabric> {
    region: Region<F>,
    pool: Arc<dyn SegmentAllocator>,
    mirror: Option<Mirror<F>>,
    area: LeaderArea,
    term: Term,
    limits: SequencerLimits,
    commands: Receiver<Command>,
    /// Topics with a global order, by slot.
    topics: Vec<Option<TopicOrder<F>>>,
    /// Every topic, by slot, whatever its order.
    configs: Vec<Option<TopicConfig>>,
    /// Topics that cannot be ordered, by slot: their memory is damaged.
    damaged: Vec<Option<Damage>>,
    /// Session slots with a damaged row or progress that the log has named.
    damaged_sessions: BTreeMap<SessionSlot, Damage>,
    /// Session slots.
    slots: Vec<Slot>,
    /// Time of the last turn by the steady clock, microseconds.
    now_us: u64,
    /// Deleted topics whose memory brokers still hold.
    closing: Vec<Closing<F>>,
    group: Group,
    /// Batches published by each broker, as last seen.
    pulses: Vec<u64>,
    /// Index of the broker whose Batchlogs are read first in the next turn. All get their turn, even if one could fill
    /// the budget.
    first: usize,
}

impl<F: Fabric> Sequencer<F> {
    /// Returns false once another broker took over. Nothing that this sequencer does counts then, and it should end.
    #[must_use]
    pub fn leads(&self) -> bool {
        still_leads(&self.region, self.term)
    }

    /// Returns the counters since the start.
    #[must_use]
    pub fn stats(&self) -> SequencerStats {
        self.group.stats
    }

    /// Returns the topics with sessions that wait until their batches are durable, one bit per slot.
    #[must_use]
    pub fn awaited_topics(&self) -> u32 {
        let sessions = self.group.sessions.iter().flatten().map(|order| &order.session);
        sessions.filter(|session| session.ack_level > 1).fold(0, |mask, session| mask | 1 << session.topic.0)
    }

    /// Orders what has arrived, at most `budget` batches per topic, and answers requests. Returns the number of batches
    /// that it took or ordered; 0 once it leads no more.
    pub fn poll(&mut self, now: impl Into<Times>, budget: u64) -> u64 {
        if !self.leads() {
            return 0;
        }
        let now = now.into();
        self.now_us = now.steady_us;
        while let Ok(command) = self.commands.try_recv() {
            self.execute(command, now.steady_us);
        }
        let mut news = self.group.backlog;
        for (broker, seen) in self.region.geometry().brokers().zip(&mut self.pulses) {
            let (_, published) = read_pulse(&self.region, broker);
            news |= *seen != published;
            *seen = published;
        }
        if !news {
            return 0;
        }
        self.group.backlog = false;
        let waiting = std::mem::take(&mut self.group.starved) | std::mem::take(&mut self.group.overdue);
        let mut taken = 0;
        for slot in 0..self.topics.len() {
            taken += self.order_topic(slot, waiting, now, budget.min(self.group.limit));
        }
        self.first = (self.first + 1) % self.pulses.len();
        taken
    }

    /// Orders what has arrived of one topic. `waiting` tells that held batches had their turn before and found no room.
    fn order_topic(&mut self, slot: usize, waiting: bool, now: Times, budget: u64) -> u64 {
        let stamp = Stamp { term: self.term, now_us: now.steady_us };
        let Self { topics, group, region, first, .. } = self;
        let Some(topic) = &mut topics[slot] else { return 0 };
        let newest_us = topic.set_time(now.wall_us);
        let before = topic.index.next();
        if waiting {
            group.drain_all(region.fabric(), topic, stamp);
        }
        group.retake(region.fabric(), topic, stamp);
        let budget = if topic.undecided.is_empty() { budget } else { 0 };
        let mut taken = 0;
        for broker in (*first..topic.brokers.len()).chain(0..*first) {
            taken += group.take_from(region.fabric(), topic, BrokerId(broker as u32), stamp, budget - taken);
        }
        topic.reset_time_if_unused(before, newest_us);
        let ordered = topic.index.next() - before;
        if taken > 0 || ordered > 0 {
            group.backlog = true;
            let decided = group.held == 0 && topic.undecided.is_empty();
            self.publish(slot, before, decided);
        }
        taken.max(ordered)
    }

    /// Publishes a topic's group: first its index entries and the tail, then the sessions, then what brokers may reuse.
    /// An acknowledgement is therefore never seen before its batch. `decided` tells that brokers may reuse the memory of
    /// all batches that were taken, and are not ordered.
    fn publish(&mut self, slot: usize, before: u64, decided: bool) {
        let Some(topic) = &mut self.topics[slot] else { unreachable!("topic slot {slot} was ordered, so it is open") };
        if topic.index.next() > before {
            topic.publish(self.term);
        }
        self.publish_commits();
        if let Some(topic) = &mut self.topics[slot] {
            topic.show_consumed(decided);
        }
        self.region.fabric().fence(Site::ConsumedFlush);
    }

    /// Writes the commit records of the group, in the mirror first. A fence must follow.
    fn publish_commits(&mut self) {
        let commits = &mut self.group.commits;
        if let Some(mirror) = &self.mirror {
            mirror.commit(commits);
        }
        publish_commits(&self.region, self.area, commits);
        commits.clear();
    }

    /// Executes a request of the control plane. It is answered only if this broker still leads: otherwise the successor
    /// may not know of it.
    fn execute(&mut self, command: Command, now_us: u64) {
        match command {
            Command::OpenTopic(config, reply) => {
                let created = self.create_topic(config);
                if self.leads() {
                    let _ = reply.send(created);
                }
            }
            Command::CloseTopic(id, reply) => self.close_topic(id, reply),
            Command::OpenSession { request, reply } => {
                let opened = self.open_session(&request, now_us);
                if self.leads() {
                    let _ = reply.send(opened);
                }
            }
            Command::CloseSession { slot, client_id, epoch, token, reply } => {
                let closed = self.close_session(slot, (client_id, epoch), token);
                if self.leads() {
                    let _ = reply.send(closed);
                }
            }
        }
    }

    /// Leaves a topic out of the order: its memory is damaged.
    fn set_damaged(&mut self, slot: usize, damage: Damage) {
        tracing::error!(topic = slot, %damage, "the topic cannot be ordered");
        self.topics[slot] = None;
        self.damaged[slot] = Some(damage);
        self.group.stats.damaged += 1;
    }
}
