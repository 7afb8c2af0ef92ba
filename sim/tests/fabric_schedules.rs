//! The production code of brokers, sequencer and readers on the simulated fabric, under thousands of seeded schedules.
//!
//! Three hosts share a region without coherence. The scheduler may switch hosts at every operation on the fabric.
//!
//! - Host 0 is the leader: it receives, orders and maintains.
//! - Host 1 receives and acknowledges. It may crash, or take over from the leader. That one is not dead, and finds out in
//!   the middle of something.
//! - Host 2 reads, as a broker that delivers.
//! - In some schedules the topic is replicated: hosts 1 and 2 have disks.
//!
//! Checked all along:
//!
//! - A batch that is read is the batch that was written, and all readers agree on one order.
//! - Each session's batches appear once and in the order of their submission.
//! - An acknowledged batch is visible and stays where it is. In a replicated topic it is on a disk.
//! - Nothing is stuck once caches do only what the code asks for.
//!
//! The mutation tests remove one flush, fence, invalidate or check at a time, and demand that some schedule fails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

use bytemuck::Zeroable;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use embarcadero_broker::delegation::{Delegation, FlushGroup, Landed, Origin};
use embarcadero_broker::replica::completion::CompletionStage;
use embarcadero_broker::replica::format::{Identity, parse_group};
use embarcadero_broker::replica::medium::{Medium, MediumFile};
use embarcadero_broker::replica::replicator::{ReplicaOptions, Replicator};
use embarcadero_broker::replica::store::StoreOptions;
use embarcadero_broker::sequencer::{Command, Leases, Memory, Predecessor, Sequencer, Takeover};
use embarcadero_broker::topics::{Topic, TopicTable};
use embarcadero_cxl::broker_table::{BrokerInfo, last_incarnation, publish_broker, read_broker};
use embarcadero_cxl::layout::{
    AllocatorKind, BrokerLine, Geometry, Layout, LeaderArea, SESSION_WINDOW, SessionState, TopicState,
};
use embarcadero_cxl::leadership::{LeaderInfo, latest_claim, latest_claimant, publish_leader, read_leader};
use embarcadero_cxl::order_index::{Extent, OrderIndexReader, ReadError, StreamId, read_extent};
use embarcadero_cxl::owner::{SegmentUse, publish_owner, read_owner};
use embarcadero_cxl::replication::read_completion;
use embarcadero_cxl::segment::{PartitionAllocator, free_segments};
use embarcadero_cxl::session_table::{Commit, Session, read_commit, read_progress, read_session};
use embarcadero_cxl::topic_table::{TopicConfig, publish_topic, read_topic};
use embarcadero_cxl::{Fabric, Guard, LINE_BYTES, Region, RegionOffset, Row, Site, Versioned};
use embarcadero_os::buffer::Buffer;
use embarcadero_sim::{Mutation, Simulated, Turbulence, World, on_all_cores};
use embarcadero_wire::batch::{BatchBuilder, BatchOrigin};
use embarcadero_wire::{
    BatchHeader, BrokerId, ClientId, Epoch, Incarnation, Order, SessionSlot, Stream, Term, TopicId,
};
use shuttle::scheduler::RandomScheduler;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use uuid::Uuid;

/// Number of hosts; each has the broker of its number.
const HOSTS: u32 = 3;
/// Number of batches of each of the two sessions.
const BATCHES: u64 = 40;
/// Bytes that a batch claims. Three fill a segment, so that segments are reused all the time.
const BATCH_BYTES: u64 = 340 << 10;
/// Number of batches that retention keeps.
const RETAINED: u64 = 6;
/// Most batches of a session that its client has under way. They must fit into one broker's segments.
const CLIENT_WINDOW: u64 = 5;
/// Number of segments: nine for each broker. One or two of the nine are for the index, the rest for batches that are held,
/// kept, or half reclaimed.
const SEGMENTS: u32 = 27;
/// Rounds of each host in turbulence.
const ROUNDS: usize = 60;
/// Switches between hosts for which the first leader stands still, now and then.
const PAUSE: usize = 2000;
/// Rounds for which a successor waits for the leader to stand still. Afterwards it takes over all the same.
const PATIENCE: usize = 8;
/// Switches between hosts for which host 2 stands still.
const NAP: usize = 300;
/// Rounds without turbulence after which everything must be done.
const CALM_ROUNDS: usize = 3000;

/// Leases that never expire: the schedule decides how long anything takes.
const LEASES: Leases = Leases { gap_us: u64::MAX / 2, idle_us: u64::MAX / 2 };
/// Broker of the host that only reads.
const FAR: BrokerId = BrokerId(2);
const LEADER: LeaderArea = LeaderArea(BrokerId(0));
const TOPIC: TopicId = TopicId(0);
/// Incarnation of the topic.
const FIRST: Incarnation = Incarnation(1);
const GLOBAL: StreamId = StreamId { topic: TOPIC, stream: Stream::GLOBAL };

/// Returns the region's geometry. A Batchlog of 16 slots wraps many times. When another leader takes over, it must not
/// wrap. Batches that the first leader held would be lost with their slots, until their clients sent them again.
fn geometry(superseded: bool) -> Geometry {
    let base = Geometry::with_segments_of(1 << 20, AllocatorKind::Partitioned);
    Geometry {
        max_brokers: HOSTS,
        max_leaders: 2,
        max_topics: 1,
        max_sessions: 2,
        batchlog_slots: if superseded { 256 } else { 16 },
        segment_count: SEGMENTS,
        ..base
    }
}

/// Use of disks in a schedule.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Replication {
    None,
    /// Sessions wait for copies on disks.
    Awaited,
    /// Nobody waits for copies, and the leader has taken host 2 for dead: retention ignores the pins of host 2.
    Unpinned,
}

impl Replication {
    fn of(choice: u64) -> Self {
        match choice % 8 {
            1 => Self::Awaited,
            5 => Self::Unpinned,
            _ => Self::None,
        }
    }

    /// Returns the brokers whose pins count, one bit each.
    fn pinning_mask(self) -> u64 {
        if self == Self::Unpinned { 0b11 } else { 0b111 }
    }
}

fn config(replication: Replication) -> TopicConfig {
    TopicConfig {
        id: TOPIC,
        incarnation: FIRST,
        state: TopicState::Live,
        name: "simulated".to_owned(),
        order: Order::Strong,
        ack_level: 1 + u8::from(replication == Replication::Awaited),
        replication_factor: 1 + u8::from(replication != Replication::None),
        retention_bytes: BATCH_BYTES * RETAINED,
        retention_ms: 0,
        created_ms: 0,
    }
}

/// Order as readers saw it: position to (client, sequence, offset).
type Log = Arc<Mutex<BTreeMap<u64, (ClientId, u64, u64)>>>;

/// Batches that were acknowledged: position to (client, sequence).
type Acknowledged = Arc<Mutex<BTreeMap<u64, (ClientId, u64)>>>;

/// Batches that are durable on some disk: position to (client, sequence).
type Durable = Arc<Mutex<BTreeMap<u64, (ClientId, u64)>>>;

/// Disk that remembers which batches are durable on it. It checks that they are whole as they come.
struct Disk {
    durable: Durable,
    written: Vec<(u64, (ClientId, u64))>,
}

impl Disk {
    fn of(durable: &Durable) -> Box<Self> {
        Box::new(Self { durable: Arc::clone(durable), written: Vec::new() })
    }
}

impl Medium for Disk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn create(&self, _: &str) -> io::Result<Box<dyn MediumFile>> {
        Ok(Self::of(&self.durable))
    }

    fn open(&self, _: &str) -> io::Result<Box<dyn MediumFile>> {
        Ok(Self::of(&self.durable))
    }

    fn remove(&self, _: &str) -> io::Result<()> {
        Ok(())
    }

    fn name(&self) -> String {
        "a disk".to_owned()
    }
}

impl MediumFile for Disk {
    fn bytes(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn write(&mut self, at: u64, from: &Buffer) -> io::Result<()> {
        if at > 0 {
            for record in parse_group(from).expect("a whole group").1 {
                let pair = |at: u64| {
                    let words: [u64; 2] = bytemuck::pod_read_unaligned(&from[at as usize..at as usize + 16]);
                    (ClientId(words[0]), words[1])
                };
                let (first, last) = (pair(record.at), pair(record.at + BATCH_BYTES - 64));
                assert_eq!(first, last, "a replica copied what is not a batch");
                self.written.push((record.position, first));
            }
        }
        Ok(())
    }

    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.durable.lock().unwrap().extend(self.written.drain(..));
        Ok(())
    }

    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn truncate(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

fn replicator(topics: &Arc<TopicTable<Simulated>>, durable: &Durable) -> Replicator<Simulated> {
    let durable = Arc::clone(durable);
    let open = move |_: &Identity| -> Box<dyn Medium> { Disk::of(&durable) };
    let store = StoreOptions { file_bytes: u64::MAX, retention_bytes: 0 };
    // One that stands still is never left: the schedule decides how long anything takes.
    let options = ReplicaOptions { group_bytes: 2 * BATCH_BYTES, patience_us: u64::MAX / 2, store };
    Replicator::new(Arc::clone(topics), Box::new(open), options).unwrap()
}

struct Host {
    id: BrokerId,
    region: Region<Simulated>,
    topics: Arc<TopicTable<Simulated>>,
    delegation: Delegation<Simulated>,
    replicator: Option<Replicator<Simulated>>,
    /// Batches that all disks hold, if sessions wait for that.
    durable: Option<Durable>,
    replication: Replication,
    landed: Sender<Landed<Simulated>>,
    /// Batches that clients will send to this host: (session, sequence).
    inbox: Vec<(usize, u64)>,
    /// Batches that were received and wait for their commit: (session, sequence).
    unacknowledged: Vec<(usize, u64)>,
    acknowledged: Acknowledged,
    reader: Reader,
    last_segment: Option<u32>,
}

struct Reader {
    index: OrderIndexReader<Simulated>,
    pin: Option<usize>,
    cursor: u64,
    naps: bool,
    log: Log,
}

fn check_payload(region: &Region<Simulated>, location: u64, expected: (ClientId, u64)) {
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
    fn read_again(&mut self, topic: &Topic<Simulated>, pin: usize) {
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
    fn poll(&mut self, region: &Region<Simulated>, topic: &Topic<Simulated>, budget: usize) {
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
    fn new(
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
    fn take_over(&self, before: Predecessor, commands: Receiver<Command>, now_us: u64) -> Option<Stages> {
        let (broker, term) = (self.id, latest_claim(&self.region).next());
        let (broker_mask, pinning_mask) = ((1 << HOSTS) - 1, self.replication.pinning_mask());
        let line = LeaderInfo { term, broker, incarnation: Incarnation(1), broker_mask, pinning_mask };
        publish_leader(&self.region, &line);
        let (region, pool, area) = (self.region.clone(), Arc::clone(self.topics.pool()), LeaderArea(broker));
        let memory = Memory { region: region.clone(), pool, mirror: None };
        let takeover = Takeover { memory, area, term, before, leases: LEASES, commands };
        let sequencer = Sequencer::recover(takeover, now_us).ok()?;
        Some((sequencer, CompletionStage::new(region, area)))
    }

    /// Receives the next batch, if there is one and there is room.
    fn receive(&mut self, topic: &Arc<Topic<Simulated>>, sessions: &[Session]) {
        let Some((session, sequence)) = self.inbox.first().copied() else { return };
        let identity = sessions[session];
        if !self.landed.is_empty()
            || !matches!(read_session(&self.region, identity.slot), Ok(Row::Used(s)) if s.state == SessionState::Open)
        {
            return;
        }
        let Ok(progress) = read_progress(&self.region, identity.slot) else { return };
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
    fn acknowledge(&mut self, sessions: &[Session]) {
        let Self { region, acknowledged, .. } = self;
        self.unacknowledged.retain(|(session, sequence)| {
            match read_commit(region, sessions[*session].slot, *sequence).expect("no record is damaged") {
                Commit::Unknown => true,
                Commit::Forgotten => false,
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

    fn round(&mut self, now_us: u64, sessions: &[Session]) {
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

/// Stages that a leader runs.
type Stages = (Sequencer<Simulated>, CompletionStage<Simulated>);

/// Brings the first leader's area into a host's cache, as prefetchers may. A takeover that believes it is stale.
fn prefetch_leader_area(region: &Region<Simulated>) {
    let (area, layout) = (region.layout().leader_area(LEADER), &region.layout().leader);
    for at in (0..layout.directories + LINE_BYTES).step_by(LINE_BYTES as usize) {
        region.fabric().load(area.add(at));
    }
}

/// Runs the leader's count of the disks that have each batch.
fn count(completion: &mut CompletionStage<Simulated>, awaited: u32, round: usize) {
    completion.maintain(awaited);
    completion.poll(round as u64 * 1000);
}

/// Switches hosts at one operation of five. Hosts so run in bursts, and one can finish something while another stands still.
fn interleave() {
    if shuttle::rand::Rng::gen_ratio(&mut shuttle::rand::thread_rng(), 1, 5) {
        shuttle::thread::yield_now();
    }
}

/// Steps host 2 where nobody minds its pins: it often stands still for long, as a broker that is taken for dead does.
fn doze() {
    if shuttle::rand::Rng::gen_ratio(&mut shuttle::rand::thread_rng(), 1, 100) {
        (0..NAP).for_each(|_| shuttle::thread::yield_now());
    }
    interleave();
}

thread_local! {
    /// State of the change from host 0 to its successor. All hosts of a schedule run on one thread of the system.
    static CHANGE_OF_LEADER: Cell<ChangeOfLeader> = const { Cell::new(ChangeOfLeader::None) };
    /// True while host 0 gives batches their place.
    static ORDERING: Cell<bool> = const { Cell::new(false) };
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ChangeOfLeader {
    None,
    /// Host 1 waits for host 0 to stand still, and will take over then.
    Awaited,
    /// Host 0 stands still, and host 1 takes over.
    Due,
}

/// Steps host 0, the first leader. Now and then it stands still for a long time in the middle of whatever it does. When its
/// successor waits for that, it does so in the middle of ordering.
fn pause() {
    let (awaited, ordering) = (CHANGE_OF_LEADER.get() == ChangeOfLeader::Awaited, ORDERING.get());
    let mut random = shuttle::rand::thread_rng();
    if awaited && ordering && shuttle::rand::Rng::gen_ratio(&mut random, 1, 32) {
        CHANGE_OF_LEADER.set(ChangeOfLeader::Due);
        while CHANGE_OF_LEADER.get() == ChangeOfLeader::Due {
            shuttle::thread::yield_now();
        }
        let more = shuttle::rand::Rng::gen_range(&mut random, 0..PAUSE);
        (0..more).for_each(|_| shuttle::thread::yield_now());
    } else if shuttle::rand::Rng::gen_ratio(&mut random, 1, 2000) {
        (0..PAUSE).for_each(|_| shuttle::thread::yield_now());
    }
    interleave();
}

/// Course of a schedule, as its first random number chooses it.
#[derive(Clone, Copy)]
struct Case {
    choice: u64,
    /// Broker 1 crashes.
    crash: bool,
    /// Broker 1 takes over from a leader that goes on.
    superseded: bool,
    replication: Replication,
}

impl Case {
    fn draw() -> Self {
        let choice: u64 = shuttle::rand::Rng::r#gen(&mut shuttle::rand::thread_rng());
        let (crash, superseded) = (choice.is_multiple_of(3), choice % 3 == 1);
        Self { choice, crash, superseded, replication: Replication::of(choice) }
    }

    /// Round of the crash or the takeover.
    fn event_at(self) -> usize {
        (self.choice >> 8) as usize % ROUNDS
    }

    /// Hook of a host's fabric, which lets others run.
    fn hook(self, host: u32) -> fn() {
        match (host, self.replication) {
            (0, _) => pause,
            (2, Replication::Unpinned) => doze,
            _ => interleave,
        }
    }

    /// Puts batches before the brokers that receive. Clients stripe them over both; some they send twice, some clients
    /// old ones again and again.
    fn send(self, hosts: &mut [Host]) {
        let flood = !self.crash && !self.superseded && self.choice % 7 == 3;
        for sequence in 0..BATCHES {
            for session in 0..2 {
                let to = (sequence as usize + session) % 2;
                hosts[to].inbox.push((session, sequence));
                if (self.choice >> (sequence % 64)) & 7 == 0 {
                    hosts[1 - to].inbox.push((session, sequence));
                }
                if flood && sequence >= CLIENT_WINDOW + 4 {
                    hosts[1].inbox.extend([(session, (sequence - CLIENT_WINDOW) & !3); 4]);
                }
            }
        }
    }
}

/// Loads the metadata into a host's cache, before anyone has written there.
fn cache_metadata(fabric: &Simulated, geometry: &Geometry) {
    let layout = Layout::new(geometry);
    let lines = [
        0,
        64,
        layout.terms(LEADER).0,
        layout.control_line(LEADER).0,
        layout.broker(BrokerId(0)).0,
        layout.broker(BrokerId(1)).0,
        layout.topic(LEADER, TOPIC).0,
        layout.topic_name(LEADER, TOPIC).0,
        layout.leader_area(LEADER).0 + layout.leader.directories,
    ];
    let owners = (0..SEGMENTS).map(|segment| layout.owner(segment).0);
    let bitmaps = (0..HOSTS).map(|broker| layout.bitmap + u64::from(broker) * 64);
    let sessions = geometry.sessions().map(|slot| layout.session(LEADER, slot).0);
    for at in lines.into_iter().chain(owners).chain(bitmaps).chain(sessions) {
        fabric.load(RegionOffset(at));
    }
}

/// Makes the leader open the topic and a session per client.
fn open_sessions(
    sequencer: &mut Sequencer<Simulated>,
    commands: &Sender<Command>,
    replication: Replication,
) -> Vec<Session> {
    let (reply, _opened) = bounded(1);
    commands.send(Command::OpenTopic(config(replication), reply)).unwrap();
    let answers = [ClientId(11), ClientId(22)].map(|client_id| {
        let (reply, answer) = bounded(1);
        commands
            .send(Command::OpenSession { topic: TOPIC, client_id, ack_level: config(replication).ack_level, reply })
            .unwrap();
        answer
    });
    sequencer.poll(1, 1);
    answers.iter().map(|answer| answer.recv().unwrap().unwrap()).collect()
}

/// Announces the brokers that receive, and the one that replicates.
fn announce_brokers(regions: &[Region<Simulated>], replication: Replication) {
    let running = if replication == Replication::None { 2 } else { 3 };
    for (id, region) in (0..running).map(BrokerId).zip(regions) {
        let address = |port| std::net::SocketAddr::from(([127, 0, 0, 1], port));
        let incarnation = Incarnation(7);
        publish_broker(
            region,
            &BrokerInfo { id, incarnation, data: address(1), control: address(2), process_id: 3, running: true },
        );
    }
}

/// Thread of a host in rough weather.
struct HostThread {
    case: Case,
    host: Host,
    fabric: Simulated,
    sessions: Arc<Vec<Session>>,
    /// The leader's stages, at the host that leads.
    stages: Option<Stages>,
    /// Commands for the leader that this host is to become.
    take_over: Option<Receiver<Command>>,
}

impl HostThread {
    fn run(mut self) -> (Host, Option<Stages>) {
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

    fn try_take_over(&mut self, round: usize) {
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

/// Takes broker 1 out after its crash. Its clients go to the leader.
fn lose_second(hosts: &mut Vec<Host>, replication: Replication) {
    let pinning_mask = 0b101 & replication.pinning_mask();
    let incarnation = Incarnation(1);
    let line = LeaderInfo { term: Term(1), broker: LEADER.0, incarnation, broker_mask: 0b101, pinning_mask };
    publish_leader(&hosts[0].region, &line);
    let lost = hosts.remove(1);
    // Clients resend to the leader whatever they have no ack for: all of it, here.
    hosts[0].inbox.extend(lost.inbox);
    hosts[0].inbox.extend(lost.unacknowledged);
    hosts[0].inbox.sort_by_key(|(session, sequence)| (*sequence, *session));
}

/// Runs the hosts in turn, in calm weather, until everything has come to its end.
fn come_to_the_end(
    case: Case,
    hosts: &mut [Host],
    sessions: &[Session],
    leading: &Region<Simulated>,
    (sequencer, completion): &mut Stages,
) {
    let total = 2 * BATCHES;
    for rounds in 0..CALM_ROUNDS {
        let now = (ROUNDS + rounds) as u64;
        for host in &mut *hosts {
            host.round(now, sessions);
        }
        sequencer.poll(now, 64);
        assert_eq!(sequencer.stats().damaged, 0, "the sequencer found damage");
        sequencer.maintain(now);
        count(completion, sequencer.awaited_topics(), now as usize);
        let ordered = read_extent(leading, GLOBAL).unwrap().next_offset;
        assert!(ordered <= total, "{ordered} batches ordered of {total}: something was ordered twice");
        let reads = |host: &Host| host.id != FAR || case.replication != Replication::Unpinned;
        let reached = |host: &Host| !reads(host) || host.reader.cursor == host.reader.index.committed();
        let idle = |host: &Host| host.inbox.is_empty() && host.unacknowledged.is_empty() && host.landed.is_empty();
        if ordered == total && hosts.iter().all(|host| reached(host) && idle(host)) {
            return;
        }
    }
    for Host { id, inbox, unacknowledged, landed, reader, .. } in hosts {
        println!(
            "host {id}: {} to receive from {:?}, without ack {:?}, {} landed, read {} of {}",
            inbox.len(),
            inbox.first(),
            unacknowledged.first(),
            landed.len(),
            reader.cursor,
            reader.index.committed()
        );
    }
    let Case { crash, superseded, .. } = case;
    let (extent, free) = (read_extent(leading, GLOBAL), free_segments(leading));
    panic!(
        "stuck (crash {crash}, superseded {superseded}): {extent:?} of {total}; {free} segments free; {:?}",
        sequencer.stats()
    );
}

/// Runs one schedule. Panics when a promise breaks.
fn schedule(removed: Option<Mutation>, visits: &Mutex<BTreeMap<u8, u64>>) {
    let case = Case::draw();
    let Case { choice, crash, superseded, replication } = case;
    CHANGE_OF_LEADER.set(ChangeOfLeader::None);
    let geometry = geometry(superseded);
    let world = World::new(Layout::new(&geometry).region_bytes, choice, Turbulence::ROUGH, removed);
    let fabrics: Vec<Simulated> = (0..HOSTS).map(|host| Simulated::join(&world, case.hook(host))).collect();
    // Everyone has looked at everything before: what lies in caches is stale.
    for fabric in &fabrics[1..] {
        assert!(Region::open(fabric.clone()).is_err());
        cache_metadata(fabric, &geometry);
    }
    let leader_region = Region::format(fabrics[0].clone(), &geometry, Uuid::nil(), 0).unwrap();
    let others = fabrics[1..].iter().map(|fabric| Region::open(fabric.clone()).expect("the superblock is visible"));
    let regions: Vec<Region<Simulated>> = std::iter::once(leader_region).chain(others).collect();
    let log: Log = Arc::default();
    let durable: Option<Durable> = (replication != Replication::None).then(Arc::default);
    let acknowledged = Acknowledged::default();
    let mut hosts: Vec<Host> = geometry
        .brokers()
        .zip(&regions)
        .map(|(id, region)| Host::new(id, region.clone(), &log, (replication, durable.as_ref()), &acknowledged))
        .collect();

    let (mut commands, queue) = unbounded();
    let mut stages = hosts[0].take_over(Predecessor::Gone(Term::NONE), queue, 0);
    let (sequencer, _) = stages.as_mut().expect("there is room");
    let sessions = Arc::new(open_sessions(sequencer, &commands, replication));
    announce_brokers(&regions, replication);
    case.send(&mut hosts);

    // Rough weather: hosts run interleaved.
    world.lock().unwrap().set_turbulence(Turbulence::ROUGHEST);
    let (next_commands, next_queue) = unbounded();
    let threads: Vec<_> = hosts
        .into_iter()
        .map(|host| {
            let take_over = (superseded && host.id == BrokerId(1)).then(|| next_queue.clone());
            let stages = if host.id == LEADER.0 { stages.take() } else { None };
            let (fabric, sessions) = (fabrics[host.id.index()].clone(), Arc::clone(&sessions));
            let thread = HostThread { case, host, fabric, sessions, stages, take_over };
            shuttle::thread::spawn(move || thread.run())
        })
        .collect();
    let mut hosts = Vec::new();
    for thread in threads {
        let (host, with) = thread.join().unwrap();
        hosts.push(host);
        stages = with.or(stages);
    }
    let mut stages = stages.filter(|(sequencer, _)| sequencer.leads()).expect("someone leads");
    let leader = latest_claimant(&regions[2]).unwrap().0.index();
    if leader == 1 {
        commands = next_commands;
    }

    // Calm weather: everything must come to its end.
    world.lock().unwrap().set_turbulence(Turbulence::CALM);
    hosts.iter_mut().for_each(|host| host.reader.naps = false);
    if crash {
        lose_second(&mut hosts, replication);
    }
    come_to_the_end(case, &mut hosts, &sessions, &regions[leader], &mut stages);
    // What an earlier leader left is given back.
    hosts.iter_mut().for_each(|host| host.round(u64::MAX >> 1, &sessions));
    let index = |owner: &Row<SegmentUse>| matches!(owner, Row::Used(SegmentUse::Index { .. }));
    let indexes = (0..SEGMENTS).map(|segment| read_owner(&regions[2], segment)).filter(index).count();
    assert_eq!(indexes, 1, "index segments");
    check_tables(&regions, leader, &mut stages.0, &commands, &sessions);
    check_pool(&regions, &hosts[0]);
    check_end(&regions, &hosts, &log, durable.as_ref());
    check_acks(&acknowledged, &log);
    let world = world.lock().unwrap();
    let mut visits = visits.lock().unwrap();
    for site in Site::ALL {
        *visits.entry(*site as u8).or_default() += world.visits(*site);
    }
}

/// Checks that each position was acknowledged to the client whose batch was read there.
fn check_acks(acknowledged: &Acknowledged, log: &Log) {
    for (position, batch) in acknowledged.lock().unwrap().iter() {
        let read = log.lock().unwrap().get(position).map(|(client, sequence, _)| (*client, *sequence));
        assert!(
            read.is_none_or(|read| read == *batch),
            "position {position} was acknowledged as {batch:?} and read as {read:?}"
        );
    }
}

/// Checks that host 2 sees at once what the leader and a broker write, without turbulence, although it had read the tables
/// before.
fn check_tables(
    regions: &[Region<Simulated>],
    leader: usize,
    sequencer: &mut Sequencer<Simulated>,
    commands: &Sender<Command>,
    sessions: &[Session],
) {
    let far = &regions[2];
    let look = || {
        let broker = read_broker(far, BrokerId(1)).used().map(|info| info.incarnation);
        let session = read_session(far, sessions[1].slot).unwrap().used().map(|session| session.state);
        let retention = read_topic(far, TOPIC).unwrap().used().map(|topic| topic.retention_ms);
        (read_leader(far).map(|leader| leader.broker_mask), retention, broker, session)
    };
    look();
    let mut info = read_broker(far, BrokerId(0)).used().expect("the broker slot is visible");
    info.incarnation = Incarnation(8);
    publish_broker(&regions[0], &info);
    let (broker, incarnation) = (BrokerId(leader as u32), Incarnation(1));
    let term = latest_claim(far);
    publish_leader(&regions[leader], &LeaderInfo { term, broker, incarnation, broker_mask: 9, pinning_mask: 9 });
    publish_topic(&regions[leader], LeaderArea(broker), &TopicConfig { retention_ms: 77, ..config(Replication::None) });
    let (reply, answer) = bounded(1);
    let Session { slot, client_id, epoch, .. } = sessions[1];
    commands.send(Command::CloseSession { slot, client_id, epoch, reply }).unwrap();
    sequencer.poll(1 << 40, 1);
    answer.recv().unwrap();
    let (mask, retention, _, session) = look();
    assert_eq!((mask, retention, session), (Some(9), Some(77), Some(SessionState::Closed)), "tables are stale");
    assert_eq!(
        read_broker(far, BrokerId(0)).used().map(|info| info.incarnation),
        Some(Incarnation(8)),
        "the broker slot is stale"
    );
    // A broker that dies while it shows itself anew is still known to have been there.
    let (fabric, version) = (regions[0].fabric(), regions[0].layout().broker(BrokerId(0)).add(BrokerLine::VERSION_AT));
    fabric.store(version, fabric.load(version) | 1);
    fabric.flush(version, 8, Site::BrokerSlotFlush);
    fabric.fence(Site::BrokerSlotFlush);
    assert_eq!(
        (read_broker(far, BrokerId(0)), last_incarnation(far, BrokerId(0))),
        (Row::Unsettled, Incarnation(8)),
        "a broker is forgotten"
    );
}

/// Checks that host 2 sees at once which segment the leader takes, and for what, although it had looked before.
fn check_pool(regions: &[Region<Simulated>], leader: &Host) {
    let far = &regions[2];
    let look = || (free_segments(far), (0..SEGMENTS).map(|segment| read_owner(far, segment)).collect::<Vec<_>>());
    let (free, _) = look();
    let Ok(segment) = leader.topics.pool().allocate() else { return };
    let (topic, stream) = (TOPIC, Stream::GLOBAL);
    let owner = SegmentUse::Index { topic, incarnation: FIRST, stream, ordinal: 99, holder: LEADER.0 };
    publish_owner(&regions[0], segment, owner);
    let (now_free, owners) = look();
    assert_eq!(now_free, free - 1, "the bitmap is stale");
    assert_eq!(owners[segment as usize], Row::Used(owner), "the owner is stale");
}

/// Checks what must hold when everything has come to its end, as host 2 sees it.
fn check_end(regions: &[Region<Simulated>], hosts: &[Host], log: &Log, durable: Option<&Durable>) {
    let far = &regions[2];
    let taken = |owner: &Row<SegmentUse>| !matches!(owner, Row::Unused | Row::Used(SegmentUse::Free));
    let held = (0..SEGMENTS).map(|segment| read_owner(far, segment)).filter(taken).count();
    assert_eq!(free_segments(far) as usize, SEGMENTS as usize - held, "bitmap and owners disagree");
    for host in hosts {
        if let Some(segment) = host.last_segment {
            let owner = read_owner(far, segment);
            assert!(
                matches!(owner, Row::Used(SegmentUse::Blog { broker, .. }) if broker == host.id),
                "segment {segment}: {owner:?}"
            );
        }
    }
    // One order: positions are contiguous where they were read, offsets follow, sessions are in sequence.
    let log = log.lock().unwrap();
    let mut due: BTreeMap<ClientId, u64> = BTreeMap::new();
    for (client, sequence, _) in log.values() {
        let due = due.entry(*client).or_insert(*sequence);
        assert!(*sequence >= *due, "client {client}: sequence {sequence} after {due}");
        *due = sequence + 1;
    }
    for (position, batch) in durable.iter().flat_map(|durable| durable.lock().unwrap().clone()) {
        let read = log.get(&position).map(|(client, sequence, _)| (*client, *sequence));
        assert!(
            read.is_none_or(|read| read == batch),
            "position {position} was read as {read:?} and copied as {batch:?}"
        );
    }
    for (a, b) in log.iter().zip(log.iter().skip(1)) {
        assert_eq!(b.0 - a.0, b.1.2 - a.1.2, "offsets do not follow positions");
    }
    const { assert!(SESSION_WINDOW > BATCHES, "commit records must last for the run") };
}

fn runner(seed: u64, schedules: usize, removed: Option<Mutation>, visits: &Arc<Mutex<BTreeMap<u8, u64>>>) {
    let mut config = shuttle::Config::new();
    config.failure_persistence = shuttle::FailurePersistence::None;
    config.max_steps = shuttle::MaxSteps::None;
    config.stack_size = 256 << 10;
    let visits = Arc::clone(visits);
    shuttle::Runner::new(RandomScheduler::new_from_seed(seed, schedules), config)
        .run(move || schedule(removed, &visits));
}

fn environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// 1,000 schedules, as in a small run; `EMBARCADERO_SIM_SEED` replays a failing block, `EMBARCADERO_SIM_SCHEDULES` runs more.
#[test]
fn no_schedule_breaks_a_promise() {
    let schedules = environment("EMBARCADERO_SIM_SCHEDULES", 1000);
    let first = environment("EMBARCADERO_SIM_SEED", 1);
    let visits = Arc::default();
    let begun = Instant::now();
    let failed = Mutex::new(Vec::new());
    on_all_cores(schedules.div_ceil(100), |block| {
        let seed = first + block;
        if catch_unwind(AssertUnwindSafe(|| runner(seed, 100, None, &visits))).is_err() {
            failed.lock().unwrap().push(seed);
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(
        failed.is_empty(),
        "schedules of seeds {failed:?} failed; replay with EMBARCADERO_SIM_SEED=.. EMBARCADERO_SIM_SCHEDULES=100"
    );
    println!("{schedules} schedules in {:.1} s", begun.elapsed().as_secs_f64());
    let visits = visits.lock().unwrap();
    for site in Site::ALL {
        assert!(visits[&(*site as u8)] > 0, "{site:?} is never passed");
    }
}

/// Returns a seed under which some schedule fails without `site`. It is found anew when the code that schedules drive changes.
const fn recorded(site: Site) -> u64 {
    match site {
        Site::SuperblockFlush => 1,
        Site::SuperblockRead => 1,
        Site::ControlFlush => 1,
        Site::ControlRead => 1,
        Site::TermFlush => 1,
        Site::TermRead => 1,
        Site::TakeoverFlush => 1,
        Site::TakeoverRead => 5,
        Site::BrokerSlotFlush => 1,
        Site::BrokerSlotRead => 1,
        Site::PulseFlush => 1,
        Site::PulseRead => 1,
        Site::TopicFlush => 1,
        Site::TopicRead => 1,
        Site::PayloadFlush => 1,
        Site::PayloadRead => 1,
        Site::BatchEntryFlush => 1,
        Site::BatchEntryFence => 572,
        Site::BatchEntryRead => 8,
        Site::BatchlogHeadFlush => 1,
        Site::BatchlogHeadRead => 1,
        Site::IndexEntryFlush => 1,
        Site::IndexEntryFence => 1232,
        Site::IndexEntryRead => 4,
        Site::DirectoryFlush => 1,
        Site::DirectoryRead => 1,
        Site::TailFlush => 1,
        Site::TailRead => 1,
        Site::TrimFlush => 1,
        Site::TrimRead => 20,
        Site::SessionFlush => 1,
        Site::SessionRead => 1,
        Site::RecordFlush => 1,
        Site::RecordRead => 1,
        Site::ConsumedFlush => 1,
        Site::ConsumedRead => 1,
        Site::PinFlush => 1,
        Site::PinRead => 28,
        Site::ReplicationFlush => 3,
        Site::ReplicationRead => 3,
        Site::CompletionFlush => 2,
        Site::CompletionRead => 3,
        Site::OwnerFlush => 1,
        Site::OwnerRead => 1,
        Site::BitmapFlush => 1,
        Site::BitmapRead => 1,
    }
}

/// Returns a seed under which some schedule fails without `guard`.
const fn recorded_guard(guard: Guard) -> u64 {
    match guard {
        Guard::TermAfterRead => 82,
        Guard::ClaimBeforeCopy => 1356,
        Guard::OwnSegment => 67,
        Guard::SegmentOfLeader => 1,
        Guard::RecoverBeforeAccept => 120,
        Guard::RetakeUndecided => 20,
        Guard::DedupCompare => 1,
        Guard::SlotReuse => 58,
        Guard::DecidedBeforeReuse => 1,
        Guard::PinBeforeReuse => 279,
        Guard::DiskBeforeAck => 3,
        Guard::TrimAfterCopy => 633,
    }
}

/// Finds a seed whose schedule fails when something is left out. Begins with the recorded one.
fn noticed_with(removed: Mutation, recorded: u64, budget: u64) -> Option<u64> {
    let visits = Arc::default();
    let fails = |seed: &u64| catch_unwind(AssertUnwindSafe(|| runner(*seed, 1, Some(removed), &visits))).is_err();
    std::iter::once(recorded).chain(1..=budget).find(fails)
}

/// Checks that each of these is noticed when it is left out. Searches on all cores, and prints the seeds to record.
fn must_be_noticed<T: Copy + std::fmt::Debug + Send + Sync>(
    all: &[T],
    recorded: fn(T) -> u64,
    mutation: fn(T) -> Mutation,
) {
    let budget = environment("EMBARCADERO_SIM_MUTATION_BUDGET", 10_000);
    std::panic::set_hook(Box::new(|_| {}));
    let survivors = Mutex::new(Vec::new());
    on_all_cores(all.len() as u64, |index| {
        let left_out = all[index as usize];
        match noticed_with(mutation(left_out), recorded(left_out), budget) {
            Some(seed) => println!("{left_out:?} => {seed},"),
            None => survivors.lock().unwrap().push(left_out),
        }
    });
    let _ = std::panic::take_hook();
    let survivors = survivors.into_inner().unwrap();
    assert!(survivors.is_empty(), "that these are left out is not noticed in {budget} schedules: {survivors:?}");
}

/// Some schedule fails when one of the flushes, fences or invalidates is left out.
#[test]
fn every_flush_fence_and_invalidate_is_needed() {
    must_be_noticed(Site::ALL, recorded, Mutation::Site);
}

/// Some schedule fails when one of the checks is left out. `sim/tests/protocol/full_fences.rs` has the full fences.
#[test]
fn every_guard_is_needed() {
    must_be_noticed(Guard::ALL, recorded_guard, Mutation::Guard);
}

/// Ties the size of the simulated batches to that of real ones. Other tests cover the real format.
#[test]
fn a_simulated_header_describes_a_real_batch() {
    let mut builder = BatchBuilder::new(1 << 20);
    builder.push(&vec![0; (BATCH_BYTES - 68) as usize]);
    let origin = BatchOrigin {
        client_id: ClientId(1),
        session_epoch: Epoch(1),
        session_slot: SessionSlot(0),
        topic: TOPIC,
        topic_incarnation: FIRST,
    };
    assert_eq!(builder.seal(&origin, 0, false).batch_bytes(), BATCH_BYTES);
}
