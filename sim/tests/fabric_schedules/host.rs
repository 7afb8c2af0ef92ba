//! Host of a schedule: a broker that receives, acknowledges, replicates, leads and reads.

use super::*;

pub(super) struct Host {
    pub(super) id: BrokerId,
    pub(super) region: Region<Simulated>,
    pub(super) topics: Arc<TopicTable<Simulated>>,
    pub(super) delegation: Delegation<Simulated>,
    pub(super) replicator: Option<Replicator<Simulated>>,
    /// Batches that all disks hold, if sessions wait for that.
    pub(super) durable: Option<Durable>,
    pub(super) replication: Replication,
    pub(super) landed: Sender<Landed<Simulated>>,
    /// Batches that clients will send to this host: (session, sequence).
    pub(super) inbox: Vec<(usize, u64)>,
    /// Batches that were received and wait for their commit: (session, sequence).
    pub(super) unacknowledged: Vec<(usize, u64)>,
    pub(super) acknowledged: Acknowledged,
    pub(super) reader: Reader,
    pub(super) last_segment: Option<u32>,
}

pub(super) struct Reader {
    pub(super) index: OrderIndexReader<Simulated>,
    pub(super) pin: Option<usize>,
    pub(super) cursor: u64,
    pub(super) naps: bool,
    pub(super) log: Log,
}

pub(super) fn check_payload(region: &Region<Simulated>, location: u64, expected: (ClientId, u64)) {
    let fabric = region.fabric();
    let last = location + BATCH_BYTES - 64;
    for at in [location, last] {
        fabric.invalidate(RegionOffset(at), 64, Site::PayloadRead);
        let found = (ClientId(fabric.load(RegionOffset(at))), fabric.load(RegionOffset(at + 8)));
        assert_eq!(found, expected, "the payload at {at:#x} is not the batch's");
    }
}

impl Reader {
    /// Reads an earlier entry again: it must be as it was.
    pub(super) fn read_again(&mut self, topic: &Topic<Simulated>, pin: usize) {
        let back = shuttle::rand::Rng::gen_range(&mut shuttle::rand::thread_rng(), 1..=RETAINED);
        let Some(position) = self.cursor.checked_sub(back) else { return };
        let Ok(trimmed) = topic.pins.set(pin, position) else { return };
        if trimmed > position {
            return;
        }
        let Ok(entry) = self.index.read(position) else { return };
        let seen = (entry.client_id, entry.sequence, entry.first_offset);
        let before = self.log.lock().unwrap().get(&position).copied();
        assert!(before.is_none_or(|before| before == seen), "position {position} was {before:?} and now is {seen:?}");
    }

    /// Reads at most `budget` batches, and holds each for a moment.
    pub(super) fn poll(&mut self, region: &Region<Simulated>, topic: &Topic<Simulated>, budget: usize) {
        let pin = *self.pin.get_or_insert_with(|| topic.pins.register());
        let committed = self.index.poll();
        if self.naps && self.cursor < committed {
            // The host stops for a while, between seeing that there is something and pinning it.
            (0..NAP).for_each(|_| shuttle::thread::yield_now());
        }
        self.read_again(topic, pin);
        for _ in 0..budget {
            if self.cursor >= committed {
                break;
            }
            let Ok(trimmed) = topic.pins.set(pin, self.cursor) else { break };
            if trimmed > self.cursor {
                self.cursor = trimmed.min(committed);
                continue;
            }
            let entry = match self.index.read(self.cursor) {
                Ok(entry) => entry,
                Err(ReadError::NoLeader(_)) => break,
                Err(error) => panic!("a pinned entry is not readable: {error}"),
            };
            let batch = (entry.client_id, entry.sequence);
            check_payload(region, entry.location, batch);
            if self.naps && shuttle::rand::Rng::gen_ratio(&mut shuttle::rand::thread_rng(), 1, 8) {
                (0..NAP).for_each(|_| shuttle::thread::yield_now());
            }
            check_payload(region, entry.location, batch);
            let seen = (entry.client_id, entry.sequence, entry.first_offset);
            let agreed = *self.log.lock().unwrap().entry(self.cursor).or_insert(seen);
            assert_eq!(agreed, seen, "readers disagree at position {}", self.cursor);
            self.cursor += 1;
        }
        topic.pins.clear(pin);
    }
}

impl Host {
    pub(super) fn new(
        id: BrokerId,
        region: Region<Simulated>,
        log: &Log,
        (replication, durable): (Replication, Option<&Durable>),
        acknowledged: &Acknowledged,
    ) -> Self {
        let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), id));
        let topics = Arc::new(TopicTable::new(region.clone(), id, pool));
        let (landed, queue) = unbounded();
        let (acks, _) = bounded(1);
        let group = FlushGroup { batches: 3, bytes: u64::MAX };
        let delegation = Delegation::new(Arc::clone(&topics), queue, vec![acks], group);
        let replicator = durable.filter(|_| id.0 > 0).map(|durable| replicator(&topics, durable));
        let durable = durable.filter(|_| replication == Replication::Awaited).cloned();
        let index = OrderIndexReader::new(region.clone(), GLOBAL);
        let reader = Reader { index, pin: None, cursor: 0, naps: id == FAR, log: Arc::clone(log) };
        let (inbox, unacknowledged) = (Vec::new(), Vec::new());
        let last_segment = None;
        Self {
            id,
            region,
            topics,
            delegation,
            replicator,
            durable,
            replication,
            landed,
            inbox,
            unacknowledged,
            acknowledged: Arc::clone(acknowledged),
            reader,
            last_segment,
        }
    }

    /// Takes over under the next term. `None` if it cannot.
    pub(super) fn take_over(&self, before: Predecessor, commands: Receiver<Command>, now_us: u64) -> Option<Stages> {
        let (broker, term) = (self.id, latest_claim(&self.region).next());
        let (broker_mask, pinning_mask) = ((1 << HOSTS) - 1, self.replication.pinning_mask());
        let line = LeaderInfo { term, broker, incarnation: Incarnation(1), broker_mask, pinning_mask };
        publish_leader(&self.region, &line);
        let (region, pool, area) = (self.region.clone(), Arc::clone(self.topics.pool()), LeaderArea(broker));
        let memory = Memory { region: region.clone(), pool, mirror: None };
        let takeover = Takeover { memory, area, term, before, limits: LIMITS, commands };
        let sequencer = Sequencer::recover(takeover, now_us).ok()?;
        Some((sequencer, CompletionStage::new(region, area)))
    }

    /// Receives the next batch, if there is one and there is room.
    pub(super) fn receive(&mut self, topic: &Arc<Topic<Simulated>>, sessions: &[Session]) {
        let Some((session, sequence)) = self.inbox.first().copied() else { return };
        let identity = sessions[session];
        if !self.landed.is_empty()
            || !matches!(read_session(&self.region, identity.slot), Ok(Row::Used(s)) if s.state == SessionState::Open)
        {
            return;
        }
        let Some(progress) = read_progress(&self.region, identity.slot).ok().and_then(|at| at.of(&identity)) else {
            return;
        };
        if sequence >= progress + CLIENT_WINDOW {
            return;
        }
        if sequence < progress && sequence % 4 != 0 {
            // The client knows that this one is committed; it resends only some of those.
            self.inbox.remove(0);
            return;
        }
        let Ok(at) = topic.blog.reserve(BATCH_BYTES) else { return };
        self.inbox.remove(0);
        self.last_segment = Some(topic.blog.segment_of(at));
        let fabric = self.region.fabric();
        for place in [at.0, at.0 + BATCH_BYTES - 64] {
            fabric.store(RegionOffset(place), identity.client_id.0);
            fabric.store(RegionOffset(place + 8), sequence);
        }
        let header = BatchHeader {
            client_id: identity.client_id,
            sequence,
            session_epoch: identity.epoch,
            session_slot: identity.slot,
            topic: TOPIC,
            topic_incarnation: FIRST,
            // 4 bytes of table and 64 of header: what `batch_bytes` adds up to.
            payload_bytes: (BATCH_BYTES - 68) as u32,
            message_count: 1,
            ..BatchHeader::zeroed()
        };
        assert_eq!(header.batch_bytes(), BATCH_BYTES);
        let origin = Origin { worker: 0, token: 0 };
        self.landed.send(Landed { topic: Arc::clone(topic), header, at, in_memory: false, origin }).unwrap();
        self.unacknowledged.push((session, sequence));
    }

    /// Acknowledges the batches received here that are committed. Each of them must be visible in the index.
    pub(super) fn acknowledge(&mut self, sessions: &[Session]) {
        let Self { region, acknowledged, .. } = self;
        self.unacknowledged.retain(|(session, sequence)| {
            match read_commit(region, sessions[*session].slot, *sequence).expect("no record is damaged") {
                Commit::Unknown => true,
                Commit::Forgotten(_) => false,
                Commit::At(record) => {
                    if let Some(durable) = &self.durable {
                        let completion = read_completion(region, TOPIC, self.id);
                        if completion.map_or(true, |completion| completion.durable_through <= record.position) {
                            return true;
                        }
                        let batch = durable.lock().unwrap().get(&record.position).copied();
                        assert_eq!(
                            batch,
                            Some((sessions[*session].client_id, *sequence)),
                            "position {} is acknowledged and on no disk",
                            record.position
                        );
                    }
                    let Ok(Extent { next_offset: reach, .. }) = read_extent(region, GLOBAL) else { return true };
                    assert!(
                        record.first_offset < reach,
                        "acknowledged offset {} is beyond {reach}",
                        record.first_offset
                    );
                    let batch = (sessions[*session].client_id, *sequence);
                    let told = *acknowledged.lock().unwrap().entry(record.position).or_insert(batch);
                    assert_eq!(told, batch, "position {} is acknowledged twice", record.position);
                    false
                }
            }
        });
    }

    pub(super) fn round(&mut self, now_us: u64, sessions: &[Session]) {
        self.delegation.maintain(now_us);
        let Ok(Some(topic)) = self.topics.get(TOPIC, FIRST) else { return };
        self.receive(&topic, sessions);
        self.receive(&topic, sessions);
        self.delegation.poll(now_us, 2);
        if let Some(replicator) = &mut self.replicator {
            replicator.maintain(now_us);
            replicator.poll();
        }
        self.acknowledge(sessions);
        // The far reader is slow, so that retention overtakes it.
        // Nor does it read what is not kept for it.
        let slow = self.id == FAR && !now_us.is_multiple_of(8) && now_us < ROUNDS as u64;
        if !slow && (self.id != FAR || self.replication != Replication::Unpinned) {
            self.reader.poll(&self.region, &topic, 3);
        }
    }
}

/// Thread of a host in rough weather.
pub(super) struct HostThread {
    pub(super) case: Case,
    pub(super) host: Host,
    pub(super) fabric: Simulated,
    pub(super) sessions: Arc<Vec<Session>>,
    /// The leader's stages, at the host that leads.
    pub(super) stages: Option<Stages>,
    /// Commands for the leader that this host is to become.
    pub(super) take_over: Option<Receiver<Command>>,
}

impl HostThread {
    pub(super) fn run(mut self) -> (Host, Option<Stages>) {
        let (is_second, event_at) = (self.host.id == BrokerId(1), self.case.event_at());
        for round in 0..ROUNDS {
            if self.case.crash && is_second && event_at == round {
                self.fabric.crash();
                break;
            }
            self.host.round(round as u64, &self.sessions);
            if event_at <= round {
                self.try_take_over(round);
            }
            if let Some((sequencer, completion)) = &mut self.stages {
                ORDERING.set(self.host.id == LEADER.0);
                // Two leaders need not come to the same order.
                let budget = shuttle::rand::Rng::gen_range(&mut shuttle::rand::thread_rng(), 1..=5);
                sequencer.poll(round as u64, budget);
                assert_eq!(sequencer.stats().damaged, 0, "the sequencer found damage");
                ORDERING.set(false);
                sequencer.maintain(round as u64);
                count(completion, sequencer.awaited_topics(), round);
            }
            if self.stages.as_ref().is_some_and(|(sequencer, _)| !sequencer.leads()) {
                self.stages = None;
            }
        }
        if is_second {
            CHANGE_OF_LEADER.set(ChangeOfLeader::None);
        }
        (self.host, self.stages)
    }

    pub(super) fn try_take_over(&mut self, round: usize) {
        let Some(queue) = &self.take_over else { return };
        let event_at = self.case.event_at();
        if round == event_at {
            prefetch_leader_area(&self.host.region);
        }
        let impatient = event_at + PATIENCE <= round || round + 1 == ROUNDS;
        if CHANGE_OF_LEADER.get() != ChangeOfLeader::Due && !impatient {
            CHANGE_OF_LEADER.set(ChangeOfLeader::Awaited);
        } else {
            self.stages = self.host.take_over(Predecessor::MayGoOn, queue.clone(), round as u64);
        }
        if self.stages.is_some() {
            CHANGE_OF_LEADER.set(ChangeOfLeader::None);
            self.take_over = None;
        }
    }
}
