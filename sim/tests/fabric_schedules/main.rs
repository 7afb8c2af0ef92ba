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

mod checks;
mod disk;
mod host;
mod recorded;
mod switches;

use bytemuck::Zeroable;
use checks::{check_acks, check_end, check_pool, check_tables};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use disk::replicator;
use embarcadero_broker::delegation::{Delegation, FlushGroup, Landed, Origin};
use embarcadero_broker::replica::completion::CompletionStage;
use embarcadero_broker::replica::format::{Identity, parse_group};
use embarcadero_broker::replica::medium::{Medium, MediumFile};
use embarcadero_broker::replica::replicator::{ReplicaOptions, Replicator};
use embarcadero_broker::replica::store::StoreOptions;
use embarcadero_broker::sequencer::{
    Command, Memory, Predecessor, Sequencer, SequencerLimits, SessionRequest, Takeover,
};
use embarcadero_broker::topics::{Topic, TopicTable};
use embarcadero_cxl::broker_table::{BrokerInfo, last_incarnation, publish_broker, read_broker};
use embarcadero_cxl::layout::{AllocatorKind, BrokerLine, Geometry, Layout, LeaderArea, SESSION_WINDOW, SessionState};
use embarcadero_cxl::leadership::{LeaderInfo, latest_claim, latest_claimant, publish_leader, read_leader};
use embarcadero_cxl::order_index::{Extent, OrderIndexReader, ReadError, StreamId, read_extent};
use embarcadero_cxl::owner::{SegmentUse, publish_owner, read_owner};
use embarcadero_cxl::replication::read_completion;
use embarcadero_cxl::segment::{PartitionAllocator, free_segments};
use embarcadero_cxl::session_table::{Commit, Session, read_commit, read_progress, read_session};
use embarcadero_cxl::topic_table::{TopicConfig, publish_topic, read_topic};
use embarcadero_cxl::{Fabric, Guard, LINE_BYTES, Region, RegionOffset, Row, Site, Versioned};
use embarcadero_os::buffer::Buffer;
use embarcadero_sim::testbed::{opening, topic};
use embarcadero_sim::{Mutation, Simulated, Turbulence, World, on_all_cores};
use embarcadero_wire::batch::{BatchBuilder, BatchOrigin};
use embarcadero_wire::{
    BatchHeader, BrokerId, ClientId, Epoch, Incarnation, Order, SessionSlot, Stream, Term, TopicId,
};
use host::{Host, HostThread};
use recorded::{recorded, recorded_guard};
use shuttle::scheduler::RandomScheduler;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use switches::{CHANGE_OF_LEADER, ChangeOfLeader, ORDERING, doze, interleave, pause};
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
/// Number of segments: eleven for each broker. Batches leave two of the eleven for the index. The rest is for batches that are
/// held, kept, or half reclaimed.
const SEGMENTS: u32 = 33;
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

/// Leases never end: the schedule decides how long anything takes. Groups are small, so that some are full.
const LIMITS: SequencerLimits = SequencerLimits { group_batches: 4, ..SequencerLimits::LASTING };
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
        ack_level: 1 + u8::from(replication == Replication::Awaited),
        replication_factor: 1 + u8::from(replication != Replication::None),
        retention_bytes: BATCH_BYTES * RETAINED,
        ..topic((TOPIC, FIRST), Order::Strong)
    }
}

/// Order as readers saw it: position to (client, sequence, offset).
type Log = Arc<Mutex<BTreeMap<u64, (ClientId, u64, u64)>>>;

/// Batches that were acknowledged: position to (client, sequence).
type Acknowledged = Arc<Mutex<BTreeMap<u64, (ClientId, u64)>>>;

/// Batches that are durable on some disk: position to (client, sequence).
type Durable = Arc<Mutex<BTreeMap<u64, (ClientId, u64)>>>;

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
        let ack_level = config(replication).ack_level;
        let request = SessionRequest { ack_level, ..opening(TOPIC, client_id) };
        commands.send(Command::OpenSession { request, reply }).unwrap();
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
            &BrokerInfo {
                id,
                incarnation,
                data: address(1),
                control: address(2),
                process_id: 3,
                running: true,
                lock_node: 1,
            },
        );
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

/// Finds a seed whose schedule fails when something is left out. Begins with the recorded one.
fn noticed_with(removed: Mutation, recorded: u64, budget: u64) -> Option<u64> {
    let visits = Arc::default();
    let fails = |seed: &u64| catch_unwind(AssertUnwindSafe(|| runner(*seed, 1, Some(removed), &visits))).is_err();
    std::iter::once(recorded).chain(1..=budget).find(fails)
}

/// Checks that each of these is noticed when it is left out. Searches on all cores, and prints the seeds to record.
fn must_be_noticed<T: Copy + std::fmt::Debug + Send + Sync>(all: &[(T, u64)], mutation: fn(T) -> Mutation) {
    let budget = environment("EMBARCADERO_SIM_MUTATION_BUDGET", 10_000);
    std::panic::set_hook(Box::new(|_| {}));
    let survivors = Mutex::new(Vec::new());
    on_all_cores(all.len() as u64, |index| {
        let (left_out, recorded) = all[index as usize];
        match noticed_with(mutation(left_out), recorded, budget) {
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
    let sites: Vec<_> = Site::ALL.iter().map(|site| (*site, recorded(*site))).collect();
    must_be_noticed(&sites, Mutation::Site);
}

/// Some schedule fails when one of the checks is left out. `sim/tests/protocol/full_fences.rs` has the full fences.
#[test]
fn every_guard_is_needed() {
    let guards: Vec<_> = Guard::ALL.iter().filter_map(|guard| Some((*guard, recorded_guard(*guard)?))).collect();
    must_be_noticed(&guards, Mutation::Guard);
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
