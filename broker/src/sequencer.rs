//! Global order: the leader's sequencer takes batches from every broker's Batchlog and gives each its place.

use crate::delegation::since;
use crate::mirror::Mirror;
use crate::replica::completion::trimmable;
use crate::session::{Arrival, SessionOrder, Verdict};
use bytemuck::Zeroable;
use crossbeam_channel::{Receiver, Sender, bounded};
use embarcadero_cxl::batchlog::{BatchlogReader, lap_of, peek_entry};
use embarcadero_cxl::layout::{CommitRecord, IndexEntry, LeaderArea, SESSION_WINDOW};
use embarcadero_cxl::leadership::{activate_term, claim_term, last_active, read_leader_at, still_leads};
use embarcadero_cxl::order_index::{
    ConsumedWriter, IndexOptions, OrderIndexWriter, Retention, StreamId, is_open, lowest_pin,
};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::replication::{Completion, read_completion_at};
use embarcadero_cxl::segment::{PoolError, SegmentAllocator, free_segments};
use embarcadero_cxl::session_table::{
    Commit, Session, SessionCommit, SessionState, publish_commits, publish_session, read_commit_at, read_progress_at,
    read_session_at, repair_torn_session,
};
use embarcadero_cxl::tables::{
    TopicConfig, TopicState, live_topics_at, publish_topic, read_pulse, read_released, read_stalls, read_topic_at,
    repair_torn_topic,
};
use embarcadero_cxl::takeover::{PredecessorState, copy_predecessor};
use embarcadero_cxl::{Fabric, Guard, Site};
use embarcadero_wire::{BrokerId, ClientId, Epoch, Incarnation, SessionSlot, Stream, Term, TopicId};
use std::sync::Arc;

/// Most batches that are published in one group. Recovery re-reads as many.
pub const GROUP_BATCHES: u64 = 1024;

/// Why a session cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// No such topic, or it is being deleted.
    #[error("topic slot {0} is not live")]
    UnknownTopic(TopicId),
    /// All rows are taken.
    #[error("all {0} sessions of the region are in use; close some, or create the region with a larger max_sessions")]
    TableFull(u32),
}

/// What the control plane asks of the sequencer; answered in turn with ordering, so that nothing commits under an
/// epoch after its end was reported.
pub enum Command {
    /// Make a topic.
    OpenTopic(TopicConfig, Sender<()>),
    /// A topic goes.
    CloseTopic(TopicId, Sender<()>),
    /// Open the next epoch of a client's session on a topic.
    OpenSession {
        /// Topic slot.
        topic: TopicId,
        /// Client.
        client_id: ClientId,
        /// Acknowledgement level.
        ack_level: u8,
        /// Answer.
        reply: Sender<Result<Session, SessionError>>,
    },
    /// End a session in order.
    CloseSession {
        /// Row.
        slot: SessionSlot,
        /// Client.
        client_id: ClientId,
        /// Epoch.
        epoch: Epoch,
        /// Answer.
        reply: Sender<()>,
    },
}

/// Times that the sequencer goes by, microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Leases {
    /// How long a gap may last before the session is fenced.
    pub gap_us: u64,
    /// After what time without batches a session's row may go to another client.
    pub idle_us: u64,
}

/// What is known of the leader before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predecessor {
    /// The leader of this epoch never writes again; [`Term::NONE`] if there was none.
    Gone(Term),
    /// It may go on at any moment.
    MayGoOn,
}

/// Where a leader writes.
pub struct Memory<F: Fabric> {
    /// The region.
    pub region: Region<F>,
    /// Allocator for the order indexes.
    pub pool: Arc<dyn SegmentAllocator>,
    /// Its mirror, if it has one.
    pub mirror: Option<Region<F>>,
}

/// Takes a segment for each order index that a successor has to go on with in one of its own.
pub(crate) fn spare_segments<F: Fabric>(
    region: &Region<F>,
    pool: &dyn SegmentAllocator,
) -> Result<Vec<u32>, PoolError> {
    let Some((area, _)) = last_active(region) else { return Ok(Vec::new()) };
    let mut spares = Vec::new();
    for topic in live_topics_at(region, area) {
        let id = StreamId { topic: topic.id, stream: Stream::GLOBAL };
        if !topic.order.is_global() || !is_open(region, id, area) {
            continue;
        }
        match pool.allocate() {
            Ok(spare) => spares.push(spare),
            Err(error) => {
                for spare in spares {
                    let _ = pool.release(spare);
                }
                return Err(error);
            }
        }
    }
    Ok(spares)
}

struct BrokerOrder<F: Fabric> {
    reader: BatchlogReader<F>,
    consumed: ConsumedWriter<F>,
    dirty: bool,
}

struct TopicOrder<F: Fabric> {
    config: TopicConfig,
    index: OrderIndexWriter<F>,
    /// Its copy on the second region, if there is one.
    mirror: Option<OrderIndexWriter<F>>,
    brokers: Vec<BrokerOrder<F>>,
    last_ordered_us: u64,
}

impl<F: Fabric> TopicOrder<F> {
    /// As [`OrderIndexWriter::make_room`], in both regions.
    #[inline]
    fn make_room(&mut self) -> Result<(), PoolError> {
        self.index.make_room()?;
        self.mirror.as_mut().map_or(Ok(()), OrderIndexWriter::make_room)
    }

    /// As [`OrderIndexWriter::append`], in both regions.
    #[inline]
    fn append(&mut self, entry: IndexEntry) -> u64 {
        if let Some(mirror) = &mut self.mirror {
            mirror.append(entry);
        }
        self.index.append(entry)
    }

    /// Shows what was appended: an acknowledgement that follows is of what both regions have.
    fn publish(&mut self, term: Term) {
        let indexes = [Some(&mut self.index), self.mirror.as_mut()];
        for index in indexes.into_iter().flatten() {
            index.write_back_entries();
            index.publish_tail(term);
            // SYNC: the tail is in memory before any commit record; pairs with `read_commit` in the ack stage.
            index.fence();
        }
    }
}

struct Closing<F: Fabric> {
    config: TopicConfig,
    order: Option<TopicOrder<F>>,
    reply: Sender<()>,
}

/// Figures for the curious.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequencerStats {
    /// Batches ordered.
    pub ordered: u64,
    /// Batches that had been ordered before.
    pub duplicates: u64,
    /// Batches of sessions that were fenced, closed or never there.
    pub rejected: u64,
    /// Sessions fenced.
    pub fenced: u64,
}

/// The only writer of a leader's area: global order, topics, session table, sequencer halves.
pub struct Sequencer<F: Fabric> {
    region: Region<F>,
    pool: Arc<dyn SegmentAllocator>,
    mirror: Option<Mirror<F>>,
    area: LeaderArea,
    term: Term,
    leases: Leases,
    commands: Receiver<Command>,
    topics: Vec<Option<TopicOrder<F>>>,
    sessions: Vec<Option<SessionOrder>>,
    /// Batches published by each broker, as last seen and not yet fully taken.
    pulses: Vec<u64>,
    backlog: bool,
    /// The broker whose Batchlogs are read first in the next turn: all have theirs, also when one could fill the budget.
    first: usize,
    /// Batches that wait for a gap to close, over all sessions.
    held: u32,
    /// Held batches have their turn but found no room in the index.
    starved: bool,
    /// Topics that brokers are letting go of.
    closing: Vec<Closing<F>>,
    /// Every topic, with whatever order.
    configs: Vec<Option<TopicConfig>>,
    /// Stall counters of the brokers, as last seen.
    stalls: Vec<u64>,
    /// Commits of the present group, to be shown once the index is.
    commits: Vec<SessionCommit>,
    stats: SequencerStats,
}

/// A broker that takes over the region's order.
pub struct Takeover<F: Fabric> {
    /// Where it writes.
    pub memory: Memory<F>,
    /// Its area.
    pub area: LeaderArea,
    /// Term to lead under, which must be higher than any before.
    pub term: Term,
    /// What it knows of the leader before.
    pub before: Predecessor,
    /// Times to go by.
    pub leases: Leases,
    /// What the control plane asks.
    pub commands: Receiver<Command>,
}

impl<F: Fabric> Sequencer<F> {
    /// Takes over the region's order, with everything that is committed. When it returns, the region has a new leader.
    ///
    /// # Errors
    /// [`PoolError`]: there are no segments to take over into from a leader that may go on, and so that one stays.
    pub fn recover(takeover: Takeover<F>, now_us: u64) -> Result<Self, PoolError> {
        let Takeover { memory, area, term, before, leases, commands } = takeover;
        let Memory { region, pool, mirror } = memory;
        // Found before anything is claimed.
        let mut spares = match before {
            Predecessor::Gone(_) => Vec::new(),
            Predecessor::MayGoOn => spare_segments(&region, &*pool)?,
        };
        let in_time = region.fabric().keeps(Guard::ClaimBeforeCopy);
        if in_time {
            claim_term(&region, area, term);
        }
        let PredecessorState { begun, from, contested } = copy_predecessor(&region, area);
        region.geometry().topics().for_each(|topic| repair_torn_topic(&region, area, topic));
        region.geometry().sessions().for_each(|slot| repair_torn_session(&region, area, slot));
        let topics = (0..region.geometry().max_topics).map(|_| None).collect();
        let sessions = (0..region.geometry().max_sessions).map(|_| None).collect();
        let pulses = vec![0; region.geometry().max_brokers as usize];
        let commits = Vec::with_capacity(GROUP_BATCHES as usize + SESSION_WINDOW as usize);
        let stats = SequencerStats::default();
        let configs = (0..region.geometry().max_topics).map(|_| None).collect();
        let stalls = pulses.clone();
        let mirror = mirror.map(|mirror| Mirror::take_over(mirror, area, term)).transpose()?;
        let mut sequencer = Self {
            region,
            pool,
            mirror,
            area,
            term,
            leases,
            commands,
            topics,
            sessions,
            pulses,
            backlog: true,
            first: area.0.index(),
            held: 0,
            starved: false,
            closing: Vec::new(),
            configs,
            stalls,
            commits,
            stats,
        };
        for config in live_topics_at(&sequencer.region, area) {
            sequencer.open_topic(config);
        }
        // Another may have led after the caller looked, and before the claim_term, or may be about to.
        if contested || before != Predecessor::Gone(from.map_or(Term::NONE, |(_, led)| led)) {
            for topic in sequencer.topics.iter_mut().flatten() {
                topic.index.replace_last(&mut spares)?;
            }
        }
        for spare in spares {
            let _ = sequencer.pool.release(spare);
        }
        sequencer.follow_mirror()?;
        sequencer.recover_sessions(&begun, now_us);
        if sequencer.region.fabric().keeps(Guard::RetakeUndecided) {
            for slot in 0..sequencer.topics.len() {
                sequencer.retake_undecided(slot, now_us);
            }
        }
        sequencer.resume_closing();
        if !in_time {
            claim_term(&sequencer.region, area, term);
        }
        activate_term(&sequencer.region, area, term);
        Ok(sequencer)
    }

    /// False once another took over: then nothing that this one does counts, and it should end.
    #[must_use]
    pub fn leads(&self) -> bool {
        still_leads(&self.region, self.term)
    }

    /// Takes again what an earlier leader took from the Batchlogs and may have held for a gap to close: its memory is gone,
    /// but a ring keeps its entries until they are overwritten. What did commit is a duplicate now.
    fn retake_undecided(&mut self, slot: usize, now_us: u64) {
        let Some(mut topic) = self.topics.get_mut(slot).and_then(Option::take) else { return };
        let before = topic.index.next();
        let slots = u64::from(self.region.geometry().batchlog_slots);
        for broker in self.region.geometry().brokers() {
            let Some(state) = topic.brokers.get(broker.index()) else { break };
            let taken = state.consumed.consumed_through;
            for index in state.consumed.decided_through.max(taken.saturating_sub(slots))..taken {
                let entry = peek_entry(&self.region, topic.config.id, broker, index);
                let intact =
                    entry.lap == lap_of(index, slots) && entry.session_slot.0 < self.region.geometry().max_sessions;
                if !intact
                    || read_commit_at(&self.region, self.area, entry.session_slot, entry.sequence) != Commit::Unknown
                    || topic.make_room().is_err()
                {
                    continue;
                }
                self.order(&mut topic, Arrival { entry, broker, index }, now_us);
            }
        }
        if topic.index.next() > before {
            self.publish(&mut topic, before);
        }
        if let Some(place) = self.topics.get_mut(slot) {
            *place = Some(topic);
        }
    }

    /// Goes on with the deletions that an earlier leader began.
    fn resume_closing(&mut self) {
        for id in self.region.geometry().topics() {
            let deleting = |topic: &TopicConfig| topic.state == TopicState::Deleting;
            let Some(config) = read_topic_at(&self.region, self.area, id).filter(deleting) else { continue };
            self.open_topic(config.clone());
            let order = self.topics.get_mut(id.index()).and_then(Option::take);
            if let Some(place) = self.configs.get_mut(id.index()) {
                *place = None;
            }
            // Whoever asked for it is gone.
            let (reply, _) = bounded(1);
            self.closing.push(Closing { config, order, reply });
        }
    }

    /// Figures since the start.
    pub fn stats(&self) -> SequencerStats {
        self.stats
    }

    /// Topics with sessions that wait until their batches are durable, a bit each.
    pub fn awaited_topics(&self) -> u32 {
        let durable =
            self.sessions.iter().flatten().map(|order| &order.session).filter(|session| session.ack_level > 1);
        durable.fold(0, |mask, session| mask | 1 << session.topic.0)
    }

    fn open_topic(&mut self, config: TopicConfig) {
        if let Some(place) = self.configs.get_mut(config.id.index()) {
            *place = Some(config.clone());
        }
        if !config.order.is_global() {
            return;
        }
        let region = &self.region;
        let options = IndexOptions {
            id: StreamId { topic: config.id, stream: Stream::GLOBAL },
            incarnation: config.incarnation,
            writer: self.area,
            term: self.term,
        };
        let index = OrderIndexWriter::open(region.clone(), options, Arc::clone(&self.pool));
        let brokers = region
            .geometry()
            .brokers()
            .map(|broker| {
                let consumed = ConsumedWriter::recover(region.clone(), self.area, config.id, broker);
                let reader = BatchlogReader::new(region.clone(), config.id, broker, consumed.consumed_through);
                BrokerOrder { reader, consumed, dirty: false }
            })
            .collect();
        let last_ordered_us = index.next().checked_sub(1).and_then(|at| index.entry(at)).map_or(0, |e| e.ordered_us);
        let slot = config.id.index();
        if let Some(place) = self.topics.get_mut(slot) {
            *place = Some(TopicOrder { config, index, mirror: None, brokers, last_ordered_us });
        }
        self.backlog = true;
    }

    /// Sessions as the table shows them, brought up to the index: an earlier leader may have published a group in the
    /// index and died before it told the sessions. Where each index stood before the sessions were read is in `begun`.
    fn recover_sessions(&mut self, begun: &[u64], now_us: u64) {
        for slot in self.region.geometry().sessions() {
            let progress = read_progress_at(&self.region, self.area, slot);
            let Some(session) = read_session_at(&self.region, self.area, slot) else { continue };
            if session.state != SessionState::Open {
                continue;
            }
            let Some(Some(config)) = self.configs.get(session.topic.index()) else { continue };
            if config.incarnation == session.topic_incarnation {
                let order = SessionOrder::new(session, config.order, progress, now_us);
                self.sessions[slot.index()] = Some(order);
            }
        }
        if !self.region.fabric().keeps(Guard::RecoverBeforeAccept) {
            return;
        }
        let mut missing = Vec::new();
        for topic in self.topics.iter().flatten() {
            let begun = begun.get(topic.config.id.index()).copied().unwrap_or(0);
            // The leader before may have trimmed, but not given back, what it ordered since then.
            for at in begun.saturating_sub(GROUP_BATCHES + SESSION_WINDOW)..topic.index.next() {
                if let Some(entry) = topic.index.entry_or_trimmed(at) {
                    missing.push((topic.config.id, at, entry));
                }
            }
        }
        for (topic, position, entry) in missing {
            let owner = self.sessions.iter_mut().flatten().find(|order| {
                let session = &order.session;
                (session.client_id, session.epoch, session.topic) == (entry.client_id, entry.session_epoch, topic)
            });
            let Some(order) = owner else { continue };
            if entry.sequence >= order.expected() {
                order.committed(entry.sequence, now_us);
            } else if read_commit_at(&self.region, self.area, order.session.slot, entry.sequence) != Commit::Unknown {
                continue;
            }
            let record = CommitRecord {
                first_offset: entry.first_offset,
                position,
                broker: entry.broker.into(),
                session_epoch: entry.session_epoch,
                tag: entry.sequence + 1,
            };
            self.commits.push(SessionCommit { slot: order.session.slot, record, expected: order.expected() });
        }
        self.show_commits();
        self.region.fabric().fence(Site::RecordFlush);
    }

    /// Orders what is there, at most `budget` batches, and answers commands. Returns how many batches it took: none,
    /// once it leads no more.
    pub fn poll(&mut self, now_us: u64, budget: u64) -> u64 {
        if !self.leads() {
            return 0;
        }
        while let Ok(command) = self.commands.try_recv() {
            self.execute(command, now_us);
        }
        let mut news = self.backlog;
        for broker in self.region.geometry().brokers() {
            let (_, published) = read_pulse(&self.region, broker);
            if let Some(seen) = self.pulses.get_mut(broker.index())
                && *seen != published
            {
                *seen = published;
                news = true;
            }
        }
        if !news {
            return 0;
        }
        self.backlog = false;
        let mut taken = 0;
        for slot in 0..self.topics.len() {
            taken += self.order_topic(slot, now_us, budget.min(GROUP_BATCHES));
        }
        self.first = (self.first + 1) % self.pulses.len();
        taken
    }

    fn order_topic(&mut self, slot: usize, now_us: u64, budget: u64) -> u64 {
        let Some(place) = self.topics.get_mut(slot) else { return 0 };
        let Some(mut topic) = place.take() else { return 0 };
        topic.last_ordered_us = topic.last_ordered_us.max(now_us);
        let mut taken = 0;
        let before = topic.index.next();
        if self.starved {
            self.starved = false;
            for session in 0..self.sessions.len() {
                self.drain_held(&mut topic, session, now_us);
            }
        }
        for broker in (self.first..topic.brokers.len()).chain(0..self.first) {
            let Some(state) = topic.brokers.get_mut(broker) else { break };
            let available = state.reader.available(budget - taken);
            for _ in 0..available {
                // One entry can release a whole window of held ones, which `order` checks room for itself.
                if topic.make_room().is_err() {
                    self.backlog = true;
                    break;
                }
                let Some(state) = topic.brokers.get_mut(broker) else { break };
                let index = state.reader.next();
                let entry = state.reader.take();
                state.dirty = true;
                taken += 1;
                self.order(&mut topic, Arrival { entry, broker: BrokerId(broker as u32), index }, now_us);
            }
        }
        if taken > 0 || topic.index.next() > before {
            self.backlog = true;
            self.publish(&mut topic, before);
        }
        if let Some(place) = self.topics.get_mut(slot) {
            *place = Some(topic);
        }
        taken
    }

    #[inline]
    fn order(&mut self, topic: &mut TopicOrder<F>, arrival: Arrival, now_us: u64) {
        let entry = &arrival.entry;
        let Some(Some(order)) = self.sessions.get_mut(entry.session_slot.index()) else {
            self.stats.rejected += 1;
            return;
        };
        let session = &order.session;
        if session.client_id != entry.client_id
            || session.epoch != entry.session_epoch
            || session.topic != topic.config.id
            || session.topic_incarnation != entry.topic_incarnation
        {
            self.stats.rejected += 1;
            return;
        }
        match order.judge(&arrival, now_us) {
            Verdict::Commit => {}
            Verdict::Held => {
                self.held += 1;
                return;
            }
            Verdict::Duplicate if !self.region.fabric().keeps(Guard::DedupCompare) => {}
            Verdict::Duplicate => {
                self.stats.duplicates += 1;
                return;
            }
            Verdict::OutOfWindow => {
                self.stats.rejected += 1;
                return;
            }
        }
        Self::commit(&mut self.commits, &mut self.stats, self.term, topic, order, &arrival, now_us);
        if self.held > 0 {
            self.drain_held(topic, entry.session_slot.index(), now_us);
        }
    }

    /// Commits what waited in a session of this topic and now has its turn.
    fn drain_held(&mut self, topic: &mut TopicOrder<F>, slot: usize, now_us: u64) {
        let Some(Some(order)) = self.sessions.get_mut(slot) else { return };
        if order.session.topic != topic.config.id {
            return;
        }
        while let Some(held) = order.next_held() {
            if topic.make_room().is_err() {
                order.hold_again(held);
                self.starved = true;
                self.backlog = true;
                return;
            }
            self.held -= 1;
            Self::commit(&mut self.commits, &mut self.stats, self.term, topic, order, &held, now_us);
        }
    }

    #[inline]
    fn commit(
        commits: &mut Vec<SessionCommit>,
        stats: &mut SequencerStats,
        term: Term,
        topic: &mut TopicOrder<F>,
        order: &mut SessionOrder,
        arrival: &Arrival,
        now_us: u64,
    ) {
        let entry = &arrival.entry;
        let position = topic.index.next();
        let first_offset = topic.append(IndexEntry {
            location: entry.location,
            client_id: entry.client_id,
            sequence: entry.sequence,
            ordered_us: topic.last_ordered_us,
            bytes: entry.bytes,
            message_count: entry.message_count,
            session_epoch: entry.session_epoch,
            term: term.0 as u32,
            broker: arrival.broker.byte(),
            replicas: 1,
            ..IndexEntry::zeroed()
        });
        if let Some(state) = topic.brokers.get_mut(arrival.broker.index()) {
            state.consumed.ordered += 1;
            state.consumed.ordered_offset = first_offset + u64::from(entry.message_count);
            state.dirty = true;
        }
        order.committed(entry.sequence, now_us);
        stats.ordered += 1;
        let record = CommitRecord {
            first_offset,
            position,
            broker: arrival.broker,
            session_epoch: entry.session_epoch,
            tag: entry.sequence + 1,
        };
        commits.push(SessionCommit { slot: order.session.slot, record, expected: order.expected() });
    }

    /// Shows a group: first its index entries, then the tail, then the sessions and what brokers may reuse. An
    /// acknowledgement is therefore never seen before the batch is.
    fn publish(&mut self, topic: &mut TopicOrder<F>, before: u64) {
        if topic.index.next() > before {
            topic.publish(self.term);
        }
        self.show_commits();
        for broker in 0..topic.brokers.len() {
            let Some(state) = topic.brokers.get_mut(broker) else { break };
            if !state.dirty {
                continue;
            }
            state.dirty = false;
            let next = state.reader.next();
            state.consumed.consumed_through = next;
            if self.held == 0 {
                state.consumed.decided_through = next;
            }
            state.consumed.store();
        }
        self.region.fabric().fence(Site::ConsumedFlush);
    }

    fn show_commits(&mut self) {
        if let Some(mirror) = &self.mirror {
            mirror.commit(&self.commits);
        }
        publish_commits(&self.region, self.area, &self.commits);
        self.commits.clear();
    }

    /// Does what is asked. Only what a successor will know of is answered.
    fn execute(&mut self, command: Command, now_us: u64) {
        match command {
            Command::OpenTopic(config, reply) => {
                // The index is there before anyone can see the topic.
                self.open_topic(config.clone());
                self.show_topic(&config);
                if self.leads() {
                    let _ = reply.send(());
                }
            }
            Command::CloseTopic(id, reply) => self.close_topic(id, reply),
            Command::OpenSession { topic, client_id, ack_level, reply } => {
                let opened = self.open_session(topic, client_id, ack_level, now_us);
                if self.leads() {
                    let _ = reply.send(opened);
                }
            }
            Command::CloseSession { slot, client_id, epoch, reply } => {
                let open = self.sessions.get(slot.index()).and_then(Option::as_ref);
                if open.is_some_and(|order| order.session.client_id == client_id && order.session.epoch == epoch) {
                    self.end_session(slot, SessionState::Closed);
                }
                if self.leads() {
                    let _ = reply.send(());
                }
            }
        }
    }

    /// In the mirror first: what is answered is there.
    fn show_topic(&mut self, config: &TopicConfig) {
        if let Some(mirror) = &self.mirror {
            mirror.topic(config);
            if config.state == TopicState::Live
                && let Some(Some(topic)) = self.topics.get_mut(config.id.index())
            {
                topic.mirror = Some(mirror.open(config));
            }
        }
        publish_topic(&self.region, self.area, config);
    }

    fn show_session(&self, session: &Session) {
        if let Some(mirror) = &self.mirror {
            mirror.session(session);
        }
        publish_session(&self.region, self.area, session);
    }

    /// Brings the mirror up to what is in the region.
    fn follow_mirror(&mut self) -> Result<(), PoolError> {
        let Some(mirror) = &mut self.mirror else { return Ok(()) };
        for config in self.configs.iter().flatten() {
            mirror.topic(config);
        }
        for topic in self.topics.iter_mut().flatten() {
            topic.mirror = Some(mirror.follow(&topic.config, &topic.index)?);
        }
        mirror.follow_sessions(&self.region);
        Ok(())
    }

    fn open_session(
        &mut self,
        topic: TopicId,
        client_id: ClientId,
        ack_level: u8,
        now_us: u64,
    ) -> Result<Session, SessionError> {
        let config = self.configs.get(topic.index()).and_then(Clone::clone).ok_or(SessionError::UnknownTopic(topic))?;
        let slot = self.row_for(topic, config.incarnation, client_id, now_us)?;
        self.end_session(slot, SessionState::Fenced);
        let committed = read_progress_at(&self.region, self.area, slot);
        let before = read_session_at(&self.region, self.area, slot).map(|session| session.epoch);
        let epoch = before.unwrap_or_default().next();
        let session = Session {
            slot,
            client_id,
            epoch,
            state: SessionState::Open,
            topic,
            topic_incarnation: config.incarnation,
            committed,
            ack_level,
        };
        self.show_session(&session);
        if let Some(place) = self.sessions.get_mut(slot.index()) {
            *place = Some(SessionOrder::new(session, config.order, committed, now_us));
        }
        Ok(session)
    }

    /// The row that this client had, else a free one, else that of the session which has been idle longest.
    fn row_for(
        &self,
        topic: TopicId,
        incarnation: Incarnation,
        client_id: ClientId,
        now_us: u64,
    ) -> Result<SessionSlot, SessionError> {
        let mut free = None;
        let mut idle: Option<(u64, SessionSlot)> = None;
        for slot in self.region.geometry().sessions() {
            let row = read_session_at(&self.region, self.area, slot);
            match row {
                Some(row) if (row.topic, row.topic_incarnation, row.client_id) == (topic, incarnation, client_id) => {
                    return Ok(slot);
                }
                Some(row) if row.state == SessionState::Open => {
                    let active = self.sessions.get(slot.index()).and_then(Option::as_ref).map_or(0, |s| s.active_us);
                    if now_us.saturating_sub(active) > self.leases.idle_us && idle.is_none_or(|(than, _)| active < than)
                    {
                        idle = Some((active, slot));
                    }
                }
                // A fenced client comes back for its row: give it time.
                Some(row) if row.state == SessionState::Fenced => idle = idle.or(Some((u64::MAX, slot))),
                _ => free = free.or(Some(slot)),
            }
        }
        free.or(idle.map(|(_, slot)| slot)).ok_or(SessionError::TableFull(self.region.geometry().max_sessions))
    }

    /// Ends a session: what is not committed now never will be, under this epoch.
    fn end_session(&mut self, slot: SessionSlot, state: SessionState) {
        let Some(order) = self.sessions.get_mut(slot.index()).and_then(Option::take) else { return };
        self.held -= order.held_count();
        if state == SessionState::Fenced {
            self.stats.fenced += 1;
        }
        let ended = Session { state, committed: order.expected(), ..order.session };
        self.show_session(&ended);
    }

    fn close_topic(&mut self, id: TopicId, reply: Sender<()>) {
        let Some(config) = self.configs.get_mut(id.index()).and_then(Option::take) else {
            let _ = reply.send(());
            return;
        };
        self.show_topic(&TopicConfig { state: TopicState::Deleting, ..config.clone() });
        for slot in self.region.geometry().sessions() {
            let here = self.sessions.get(slot.index()).and_then(Option::as_ref);
            if here.is_some_and(|order| order.session.topic == id) {
                self.end_session(slot, SessionState::Closed);
            }
        }
        let order = self.topics.get_mut(id.index()).and_then(Option::take);
        self.closing.push(Closing { config, order, reply });
    }

    /// Leases, retention, reclaim and deletion. Every few milliseconds.
    pub fn maintain(&mut self, now_us: u64) {
        let live = read_leader_at(&self.region, self.area).map_or(u64::MAX, |leader| leader.pinning_mask);
        let brokers: Vec<BrokerId> = self.region.geometry().brokers().filter(|id| live & (1 << id.0) != 0).collect();
        self.expire_gaps(now_us);
        let awaited = self.awaited_topics();
        for slot in 0..self.topics.len() {
            let Some(Some(topic)) = self.topics.get_mut(slot) else { continue };
            let config = &topic.config;
            // All brokers' lines say the same of the global stream. Who waits is known here first.
            let awaited = awaited & 1 << config.id.0 != 0;
            let completion =
                Completion { awaited, ..read_completion_at(&self.region, self.area, config.id, BrokerId(0)) };
            topic.index.enforce_retention(Retention {
                bytes: config.retention_bytes,
                since_us: since(config.retention_ms, now_us),
                limit: trimmable(&self.region, config, completion),
            });
            // What a successor would still give to readers is not given back.
            if !still_leads(&self.region, self.term) {
                return;
            }
            topic.index.reclaim(lowest_pin(&self.region, config.id, brokers.iter().copied()));
            if let Some(mirror) = &mut topic.mirror {
                mirror.trim_below(topic.index.earliest_offset());
                mirror.reclaim(u64::MAX);
            }
        }
        self.publish_decided();
        self.finish_closing(&brokers);
    }

    fn expire_gaps(&mut self, now_us: u64) {
        // A broker that has no room leaves batches unread, perhaps the one that is missing: nobody's lease runs.
        let mut stalled = self.starved || free_segments(&self.region) == 0;
        for (broker, seen) in self.region.geometry().brokers().zip(&mut self.stalls) {
            let stalls = read_stalls(&self.region, broker);
            stalled |= *seen != stalls;
            *seen = stalls;
        }
        if self.held == 0 {
            return;
        }
        let mut dead = Vec::new();
        for (slot, order) in self.region.geometry().sessions().zip(&mut self.sessions) {
            let Some(order) = order else { continue };
            if !order.has_gap() {
                continue;
            }
            if stalled {
                order.excuse_gap(now_us);
            } else if now_us.saturating_sub(order.gap_since_us()) > self.leases.gap_us {
                dead.push(slot);
            }
        }
        for slot in dead {
            self.end_session(slot, SessionState::Fenced);
        }
    }

    /// While batches are held, tells brokers which of theirs are.
    fn publish_decided(&mut self) {
        let mut changed = false;
        for topic in self.topics.iter_mut().flatten() {
            for (broker, state) in self.region.geometry().brokers().zip(&mut topic.brokers) {
                let next = state.reader.next();
                if state.consumed.decided_through == next {
                    continue;
                }
                let held = self.sessions.iter().flatten().filter(|order| order.session.topic == topic.config.id);
                let decided = held.filter_map(|order| order.lowest_held(broker)).min().unwrap_or(next);
                if decided != state.consumed.decided_through {
                    state.consumed.decided_through = decided;
                    state.consumed.store();
                    changed = true;
                }
            }
        }
        if changed {
            self.region.fabric().fence(Site::ConsumedFlush);
        }
    }

    fn finish_closing(&mut self, brokers: &[BrokerId]) {
        let (region, area, term, mirror) = (&self.region, self.area, self.term, &self.mirror);
        self.closing.retain_mut(|closing| {
            let Closing { config, order, reply } = closing;
            if brokers.iter().any(|broker| read_released(region, config.id, *broker) < config.incarnation) {
                return true;
            }
            if let Some(order) = order {
                order.index.abandon();
                order.mirror.iter_mut().for_each(OrderIndexWriter::abandon);
            }
            let gone = TopicConfig { state: TopicState::Free, ..config.clone() };
            mirror.iter().for_each(|mirror| mirror.topic(&gone));
            publish_topic(region, area, &gone);
            if still_leads(region, term) {
                let _ = reply.send(());
            }
            false
        });
    }
}
