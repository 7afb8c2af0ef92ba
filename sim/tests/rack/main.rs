//! A rack in one process, deterministic from one seed, that drives the production stages of brokers.
//!
//! It has hosts without coherence among them, their disks, a network, NICs (the production engine of RoCEv2), clients that
//! retry, and clocks that are wrong. The following goes wrong:
//!
//! - Hosts crash in the middle of anything, stand still, come late and leave. In half of the seeds only their processes die,
//!   and what these had in their caches is written back later.
//! - Disks fail, are slow, and tear writes.
//! - The network loses, repeats, reorders and damages.
//! - Clients crash.
//!
//! A history of its own judges the outcome:
//!
//! - There is one order, and all readers agree on it.
//! - Every batch that was acknowledged is in it once, and each client's batches are in order.
//! - At level 2, each is on as many disks as were promised, and everything can be rebuilt from the disks.
//! - Everything comes to its end once faults stop.
//!
//! `sim/tests/fabric_schedules/main.rs` has fewer hosts, and more that happens to memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

mod client;
mod disk;
mod environment;
mod fate;
mod history;
mod host;
mod link;
mod network;
mod nic;
mod reader;

use client::Client;
use embarcadero_broker::archive::Catalog;
use embarcadero_broker::replica::medium::Medium;
use embarcadero_broker::replica::restore::{Plan, TopicPlan};
use embarcadero_broker::sequencer::{GROUP_BATCHES, SequencerLimits};
use embarcadero_cxl::layout::{AllocatorKind, Geometry, Layout, RegionRole};
use embarcadero_cxl::order_index::StreamId;
use embarcadero_cxl::topic_table::TopicConfig;
use embarcadero_cxl::{Guard, Region};
use embarcadero_sim::testbed::topic;
use embarcadero_sim::{Mutation, Simulated, SimulatedTransport, Turbulence, Weather, World, on_all_cores};
use embarcadero_wire::{BrokerId, Incarnation, Order, Stream, Term, TopicId};
use fate::{one_in, random, tick};
use history::{History, Tally};
use host::Machine;
use link::RackTransport;
use network::Network;
use reader::Reader;
use shuttle::scheduler::RandomScheduler;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use uuid::Uuid;

/// Number of hosts, each with a broker.
pub const HOSTS: usize = 5;
/// Number of hosts that may be the leader, the first ones.
pub const LEADERS: usize = 3;
/// Number of disks that have each batch, if the topic is replicated.
pub const COPIES: usize = 2;
/// Topic that all clients publish to, and its incarnation.
pub const TOPIC: (TopicId, Incarnation) = (TopicId(0), Incarnation(1));
/// Global order of the topic.
pub const GLOBAL: StreamId = StreamId { topic: TOPIC.0, stream: Stream::GLOBAL };
/// Number of applications that publish.
pub const CLIENTS: usize = 3;
/// Number of subscribers.
const READERS: usize = 2;
/// Number of messages that each client publishes.
const MESSAGES: u64 = 60;
/// Bytes of a batch's buffer, which has room for some messages.
pub const BATCH_BYTES: usize = 1024;
/// Name of the topic.
pub const TOPIC_NAME: &str = "testbed";
/// Rounds of each host and client while faults happen.
const ROUNDS: usize = 120;
/// Rounds without faults after which everything must be done.
const CALM_ROUNDS: usize = 4000;

/// Parts that the hosts and clients of a schedule share, as real ones do.
pub struct Rack {
    /// Control calls and packets that are under way.
    pub network: Arc<Network>,
    /// Connections between clients and hosts.
    pub(crate) transport: RackTransport,
    /// Record of what happened, which judges.
    pub history: Arc<History>,
    /// True when the topic is replicated, and clients ask for level 2.
    pub replicated: bool,
    /// True when clients and hosts have NICs, which carry batches by the RoCEv2 engine.
    pub has_nics: bool,
    /// True when hosts do not crash, only their processes. The host's caches live on, and the next process has them.
    pub hosts_live_on: bool,
    /// Order of the topic.
    pub order: Order,
    /// Bytes of batches that the topic keeps; 0 for all.
    pub retention_bytes: u64,
    /// Milliseconds for which the topic keeps batches; 0 for ever.
    pub retention_ms: u64,
    /// Bounds by which leaders go.
    pub limits: SequencerLimits,
    world: Arc<Mutex<World>>,
    /// Memory of the mirror.
    mirror: Arc<Mutex<World>>,
    /// Batches on the disk of each host whose process runs.
    catalogs: Mutex<[Option<Arc<Catalog>>; HOSTS]>,
    /// Term of the candidate that was elected last; stands for etcd.
    elected: Mutex<Term>,
}

impl Rack {
    /// Makes a rack. If it is `crowded`, there are more clients than session slots. If it is `small`, its memory is used again
    /// and again.
    fn new(world: Arc<Mutex<World>>, mirror: Arc<Mutex<World>>, crowded: bool, small: bool) -> Self {
        // Some gaps outlive their lease, some never do.
        let gap_us = [15_000, 60_000, u64::MAX / 2][random(0..3) as usize];
        let (excuse_us, abandoned_us) = (random(0..40_000), random(2000..20_000));
        // A client that crashed may wait until its session is idle.
        let idle_us = if crowded { [5000, 40_000][random(0..2) as usize] } else { 60_000 };
        // Most groups of some racks are full.
        let group_batches = [2, 6, GROUP_BATCHES][random(0..3) as usize];
        let network = Arc::new(Network::new(HOSTS, CLIENTS + READERS));
        let weather: Arc<dyn Weather> = Arc::clone(&network) as _;
        // Some connections hold little.
        let room = [2, 64][random(0..2) as usize];
        Self {
            transport: RackTransport { sockets: SimulatedTransport::in_weather(room, weather), nic: None },
            network,
            history: Arc::default(),
            replicated: one_in(2),
            has_nics: one_in(2),
            hosts_live_on: one_in(2),
            order: if one_in(3) { Order::Total } else { Order::Strong },
            retention_bytes: if small { random(4..16) << 10 } else { 0 },
            retention_ms: if small && one_in(3) { random(10..60) } else { 0 },
            catalogs: Mutex::default(),
            limits: SequencerLimits { group_batches, gap_us, excuse_us, abandoned_us, idle_us },
            world,
            mirror,
            elected: Mutex::new(Term::NONE),
        }
    }

    /// Makes the caches of a host that starts: of the region and of the mirror.
    pub fn join(&self, host: usize) -> [Simulated; 2] {
        [&self.world, &self.mirror].map(|world| Simulated::join(world, fate::STEPS[host]))
    }

    /// Makes another process of a host that has these caches.
    pub fn join_beside(&self, host: usize, caches: &[Simulated; 2]) -> [Simulated; 2] {
        caches.each_ref().map(|cache| cache.beside(fate::STEPS[host]))
    }

    /// Returns the topic that all clients publish to.
    pub fn topic(&self) -> TopicConfig {
        TopicConfig {
            ack_level: 1 + u8::from(self.replicated),
            replication_factor: if self.replicated { COPIES as u8 + 1 } else { 1 },
            retention_bytes: self.retention_bytes,
            retention_ms: self.retention_ms,
            ..topic(TOPIC, self.order)
        }
    }

    /// Sets what a host's process has on its disk; `None` when it ends.
    pub fn set_catalog(&self, host: usize, catalog: Option<Arc<Catalog>>) {
        self.catalogs.lock().unwrap_or_else(PoisonError::into_inner)[host] = catalog;
    }

    /// Reads what a broker has on its disk; `None` when the broker does not answer.
    pub fn catalog(&self, broker: BrokerId) -> Option<Arc<Catalog>> {
        self.catalogs.lock().unwrap_or_else(PoisonError::into_inner)[broker.0 as usize].clone()
    }

    /// Returns the term of the candidate that was elected last.
    pub fn elected(&self) -> Term {
        *self.elected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Campaigns for the next term. Returns it, unless somebody was elected after `before`.
    pub fn campaign(&self, before: Term) -> Option<Term> {
        let mut elected = self.elected.lock().unwrap_or_else(PoisonError::into_inner);
        if *elected != before {
            return None;
        }
        *elected = elected.next();
        Some(*elected)
    }
}

fn geometry(crowded: bool, small: bool) -> Geometry {
    let (segment_bytes, segments) = if small { (4096, random(7..11) as u32) } else { (1 << 20, 12) };
    Geometry {
        max_brokers: HOSTS as u32,
        max_leaders: LEADERS as u32,
        max_topics: 1,
        max_sessions: if crowded { CLIENTS as u32 - 1 } else { CLIENTS as u32 + 1 },
        batchlog_slots: 256,
        segment_count: HOSTS as u32 * segments,
        role: RegionRole::Mirrored,
        ..Geometry::with_segments_of(segment_bytes, AllocatorKind::Partitioned)
    }
}

thread_local! {
    /// Counts of what happened in the last schedule.
    static OUTCOME: Cell<Option<Tally>> = const { Cell::new(None) };
}

/// All that runs in a rack.
struct Parts {
    machines: Vec<Machine>,
    clients: Vec<Client>,
    readers: Vec<Reader>,
}

/// Runs one schedule. Panics when a promise breaks.
fn schedule(removed: Option<Mutation>) {
    fate::reset();
    let crowded = one_in(2);
    let small = one_in(2);
    let geometry = geometry(crowded, small);
    let of_mirror = geometry.of_mirror(64 << 20).unwrap();
    let [world, mirror] = [&geometry, &of_mirror].map(|geometry| {
        World::new(Layout::new(geometry).region_bytes, random(0..u64::MAX), Turbulence::ROUGH, removed)
    });
    let rack = Arc::new(Rack::new(Arc::clone(&world), Arc::clone(&mirror), crowded, small));
    for (fabric, geometry) in rack.join(0).into_iter().zip([&geometry, &of_mirror]) {
        Region::format(fabric, geometry, Uuid::from_u128(7), 0).unwrap();
    }
    let mut parts = Parts::run_with_faults(&rack);
    for world in [world, mirror] {
        world.lock().unwrap_or_else(PoisonError::into_inner).set_turbulence(Turbulence::CALM);
    }
    rack.network.calm();
    parts.run_to_the_end(&rack);
    OUTCOME.set(Some(parts.judge(&rack)));
}

/// Runs rounds of a part in a thread of its own.
fn spawn<P: Send + 'static>(mut part: P, round: impl Fn(&mut P) + Send + 'static) -> shuttle::thread::JoinHandle<P> {
    shuttle::thread::spawn(move || {
        for _ in 0..ROUNDS {
            tick();
            round(&mut part);
        }
        part
    })
}

/// Lets others run for a while.
fn pause() {
    (0..random(0..200)).for_each(|_| shuttle::thread::yield_now());
}

impl Parts {
    /// Runs everything while faults happen.
    fn run_with_faults(rack: &Arc<Rack>) -> Self {
        // The last host joins later.
        let late = |host: usize| if host + 1 == HOSTS { random(1..ROUNDS as u64) } else { 0 };
        let machines: Vec<Machine> = (0..HOSTS).map(|host| Machine::new(host, rack, late(host))).collect();
        let clients: Vec<Client> = (0..CLIENTS).map(|id| Client::new(id, rack, MESSAGES)).collect();
        let readers: Vec<Reader> = (0..READERS).map(|number| Reader::new(number, rack)).collect();
        let machines: Vec<_> = machines.into_iter().map(|machine| spawn(machine, Machine::rough_round)).collect();
        let client_round = |client: &mut Client| {
            client.round();
            if one_in(200) {
                client.crash();
            }
            pause();
        };
        let clients: Vec<_> = clients.into_iter().map(|client| spawn(client, client_round)).collect();
        let reader_round = |reader: &mut Reader| {
            reader.round();
            if one_in(100) {
                reader.crash();
            }
            pause();
        };
        let readers: Vec<_> = readers.into_iter().map(|reader| spawn(reader, reader_round)).collect();
        Self {
            machines: machines.into_iter().map(|thread| thread.join().unwrap()).collect(),
            clients: clients.into_iter().map(|thread| thread.join().unwrap()).collect(),
            readers: readers.into_iter().map(|thread| thread.join().unwrap()).collect(),
        }
    }

    /// Returns true once everything is published, acknowledged and read.
    fn are_done(&self, rack: &Rack) -> bool {
        self.clients.iter().all(Client::is_done) && {
            let (trimmed, order) = host::read_all(rack);
            let end = trimmed + order.len() as u64;
            self.readers.iter().all(|reader| reader.next() == end)
        }
    }

    /// Runs without faults until everything is done.
    fn run_to_the_end(&mut self, rack: &Rack) {
        self.machines.iter_mut().for_each(Machine::repair);
        for _ in 0..CALM_ROUNDS {
            if self.are_done(rack) {
                return;
            }
            tick();
            self.machines.iter_mut().for_each(Machine::round);
            self.clients.iter_mut().for_each(Client::round);
            self.readers.iter_mut().for_each(Reader::round);
        }
        let hosts: Vec<_> = self.machines.iter().map(Machine::state).collect();
        let clients: Vec<_> = self.clients.iter().map(Client::state).collect();
        let readers: Vec<_> = self.readers.iter().map(Reader::next).collect();
        let memory = host::describe_memory(rack);
        panic!("stuck:\n{}\n{}\nreaders at {readers:?}\n{memory}", hosts.join("\n"), clients.join("\n"));
    }

    /// Judges what came of it. Returns what happened.
    fn judge(&self, rack: &Rack) -> Tally {
        let (trimmed, order) = host::read_all(rack);
        rack.history.judge(trimmed, &order, rack.order);
        let tally = rack.history.tally();
        let mirrored = host::read_mirror(rack);
        let first = mirrored.first().map_or(trimmed, |(offset, _)| *offset);
        let end = mirrored.iter().fold(first, |due, (offset, count)| {
            assert_eq!(*offset, due, "the mirror has a gap");
            due + u64::from(*count)
        });
        assert_eq!(end, trimmed + order.len() as u64, "the mirror does not have all");
        assert!(first <= trimmed, "the mirror begins at {first}, and messages are kept from {trimmed} on");
        if rack.replicated {
            rack.history.must_not_skip_acknowledged();
            must_be_rebuildable(&self.machines, rack, tally.acknowledged);
        }
        tally
    }
}

/// Checks that the disks alone hold everything that was acknowledged.
fn must_be_rebuildable(machines: &[Machine], rack: &Rack, acknowledged: usize) {
    let media = machines.iter().map(|machine| {
        let disk = machine.disk();
        disk.restart();
        Box::new(disk.clone()) as Box<dyn Medium>
    });
    let plan = Plan::read(media.collect(), None::<&Region<Simulated>>, None).expect("the disks can be read");
    // Retention may be ahead of the disks. What was acknowledged is there all the same.
    if rack.retention_bytes == 0 {
        assert_eq!(plan.losses(), None);
    }
    let messages: u64 = plan.topics.iter().map(TopicPlan::messages).sum();
    assert!(messages >= acknowledged as u64, "{acknowledged} messages were acknowledged, {messages} are on disks");
}

fn run(seed: u64, schedules: usize, removed: Option<Mutation>) {
    let mut config = shuttle::Config::new();
    config.failure_persistence = shuttle::FailurePersistence::None;
    config.max_steps = shuttle::MaxSteps::None;
    config.stack_size = 512 << 10;
    shuttle::Runner::new(RandomScheduler::new_from_seed(seed, schedules), config).run(move || schedule(removed));
}

fn environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// 100 seeds, as in a small run; `EMBARCADERO_RACK_SEED` begins elsewhere, `EMBARCADERO_RACK_SEEDS` runs more.
#[test]
fn no_seed_breaks_a_promise() {
    let seeds = environment("EMBARCADERO_RACK_SEEDS", 100);
    let first = environment("EMBARCADERO_RACK_SEED", 1);
    let begun = Instant::now();
    let (total, failed) = (Mutex::new(Tally::default()), Mutex::new(Vec::new()));
    on_all_cores(seeds, |number| {
        let seed = first + number;
        if catch_unwind(AssertUnwindSafe(|| run(seed, 1, None))).is_ok() {
            total.lock().unwrap().add(OUTCOME.take().expect("the schedule came to its end"));
        } else {
            failed.lock().unwrap().push(seed);
        }
    });
    let (total, failed) = (total.into_inner().unwrap(), failed.into_inner().unwrap());
    assert!(
        failed.is_empty(),
        "seeds {failed:?} failed; replay with EMBARCADERO_RACK_SEED=.. EMBARCADERO_RACK_SEEDS=1"
    );
    println!("{seeds} seeds in {:.1} s: {total:?}", begun.elapsed().as_secs_f64());
    assert!(seeds < 100 || total.is_complete(), "something never happened");
}

/// A seed determines everything that happens in a run.
#[test]
fn a_seed_replays() {
    let outcomes = || -> Vec<_> {
        let one = |seed| {
            run(seed, 1, None);
            OUTCOME.take()
        };
        (1..20).map(one).collect()
    };
    assert_eq!(outcomes(), outcomes());
}

/// Checks without which some seed must fail, each with such a seed. It is found anew when the code that the rack drives
/// changes. Tests of `sim/tests/protocol` and `sim/tests/fabric_schedules` leave out the others.
const NOTICED: [(Guard, u64); 7] = [
    (Guard::ClaimBeforeCopy, 5),
    (Guard::OwnSegment, 790),
    (Guard::SegmentOfLeader, 1),
    (Guard::RecoverBeforeAccept, 18),
    (Guard::DedupCompare, 1),
    (Guard::DecidedBeforeReuse, 205),
    (Guard::DiskBeforeAck, 3),
];

/// Some seed fails when one of the checks is left out. Prints the seeds to record.
#[test]
fn missing_guards_are_noticed() {
    let budget = environment("EMBARCADERO_RACK_MUTATION_BUDGET", 10_000);
    std::panic::set_hook(Box::new(|_| {}));
    let missed = Mutex::new(Vec::new());
    on_all_cores(NOTICED.len() as u64, |index| {
        let (guard, recorded) = NOTICED[index as usize];
        let removed = Some(Mutation::Guard(guard));
        let fails = |seed: &u64| catch_unwind(AssertUnwindSafe(|| run(*seed, 1, removed))).is_err();
        match std::iter::once(recorded).chain(1..=budget).find(fails) {
            Some(seed) => println!("(Guard::{guard:?}, {seed}),"),
            None => missed.lock().unwrap().push(guard),
        }
    });
    let _ = std::panic::take_hook();
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "that these are missing is not noticed in {budget} seeds: {missed:?}");
}
