//! A host of the rack: a machine that crashes, stands still and comes back, and the broker process on it. The process is made
//! of the production worker and the stages that it runs.

mod leader;

use super::disk::Disk;
use super::fate::{Clock, doom, halt, one_in, or_crash, random, spare};
use super::history::{Content, Instance};
use super::link::{RackEndpoint, SharedNic, address};
use super::nic::{Nic, Port};
use super::{GLOBAL, HOSTS, LEADERS, Rack};
use crossbeam_channel::{Sender, bounded};
use embarcadero_broker::archive::{Archive, ArchiveReader, Catalog};
use embarcadero_broker::caller::Caller;
use embarcadero_broker::delegation::{Delegation, FlushGroup, Landed};
use embarcadero_broker::mirror;
use embarcadero_broker::replica::format::Identity;
use embarcadero_broker::replica::medium::Medium;
use embarcadero_broker::replica::replicator::{ReplicaOptions, Replicator, disclaim};
use embarcadero_broker::replica::store::StoreOptions;
use embarcadero_broker::topics::TopicTable;
use embarcadero_broker::worker::{IngestLimits, LeaderStages, Shared, Stages, Worker, WorkerSetup};
use embarcadero_cxl::broker_table::{BrokerInfo, last_incarnation, publish_broker};
use embarcadero_cxl::layout::{IndexEntry, SESSION_WINDOW};
use embarcadero_cxl::order_index::{OrderIndexReader, read_extent};
use embarcadero_cxl::owner::read_owner;
use embarcadero_cxl::segment::PartitionAllocator;
use embarcadero_cxl::{Fabric, Region, RegionOffset, Site, refresh_own_lines};
use embarcadero_os::idle::{Idle, PollBounds, PollPolicy};
use embarcadero_sim::{Power, Simulated};
use embarcadero_wire::batch::BatchView;
use embarcadero_wire::{BrokerId, Frame, Term};
use leader::Leader;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bytes of a message.
const MESSAGE_BYTES: usize = 128;
/// Most calls to the control service that a broker takes in a round.
const REQUESTS: usize = 4;
/// Most turns of the worker's loop in a round.
const TURNS: u64 = 4;
/// Number of batches that wait between the worker and the delegation.
const LANDED_BATCHES: usize = 256;
/// Silence after which a broker gives up what it reads. The clock of the leader, which takes the broker for dead after
/// [`leader::BROKER_LEASE`], may run twice as fast.
const OWN_LEASE: Duration = Duration::from_millis(18);

/// Broker process.
struct Process {
    host: usize,
    rack: Arc<Rack>,
    clock: Clock,
    region: Region<Simulated>,
    mirror: Region<Simulated>,
    info: BrokerInfo,
    topics: Arc<TopicTable<Simulated>>,
    worker: Worker<Simulated, RackEndpoint, Clock>,
    shared: Shared<Simulated>,
    nic: Option<SharedNic>,
    replicator: Option<Replicator<Simulated>>,
    archive: ArchiveReader<Simulated>,
    /// Channel by which the worker gets the leader's stages.
    promote: Sender<LeaderStages<Simulated>>,
    leader: Option<Leader>,
    /// Leader and its heartbeat as last seen, and the number of looks since then that found no change.
    watched: ((Option<(BrokerId, Term)>, u64), u64),
}

/// Host of the rack.
pub(crate) struct Machine {
    host: usize,
    rack: Arc<Rack>,
    clock: Clock,
    disk: Disk,
    power: Power,
    /// Caches of the region and of the mirror.
    fabrics: [Simulated; 2],
    process: Option<Process>,
    /// NIC of a process that is gone, which does not know it yet.
    orphan: Option<Nic>,
    /// Rounds until its process starts again; `None` once it has left for good.
    down_for: Option<u64>,
}

/// Returns a message. Both of its ends name its content.
pub(crate) fn message(instance: Instance, content: u64) -> [u8; MESSAGE_BYTES] {
    let mut message = [0; MESSAGE_BYTES];
    for at in [0, MESSAGE_BYTES - 16] {
        message[at..at + 8].copy_from_slice(&instance.0.to_le_bytes());
        message[at + 8..at + 16].copy_from_slice(&content.to_le_bytes());
    }
    message
}

/// Returns the content that a message names. Both of its ends must agree.
pub(crate) fn content_in(message: &[u8]) -> Content {
    assert_eq!(message.len(), MESSAGE_BYTES, "nobody published that");
    let word = |at: usize| u64::from_le_bytes(*message[at..].first_chunk().expect("the message is long enough"));
    let (first, last) = ((word(0), word(8)), (word(MESSAGE_BYTES - 16), word(MESSAGE_BYTES - 8)));
    assert_eq!(first, last, "the message is not one");
    (Instance(first.0), first.1)
}

/// Reads the contents of a batch that is in the order.
fn contents_of(region: &Region<Simulated>, entry: &IndexEntry) -> Vec<Content> {
    let (fabric, mut batch) = (region.fabric(), vec![0; entry.bytes as usize]);
    fabric.invalidate(RegionOffset(entry.location), entry.bytes.into(), Site::PayloadRead);
    fabric.read_bytes(RegionOffset(entry.location), &mut batch);
    let (header, body) = batch.split_first_chunk().expect("a batch has a header");
    let Ok(Frame::BatchHeader(header)) = Frame::decode(header) else { panic!("{entry:?} is no batch") };
    assert_eq!((header.client_id, header.sequence), (entry.client_id, entry.sequence), "{entry:?} is another batch");
    let view = BatchView::parse(&header, body).expect("the body fits its header");
    view.messages().map(content_in).collect()
}

impl Machine {
    /// Makes a host whose process starts after `down_for` rounds.
    pub(crate) fn new(host: usize, rack: &Arc<Rack>, down_for: u64) -> Self {
        Self {
            host,
            rack: Arc::clone(rack),
            clock: Clock::drifting(),
            disk: Disk::new(host as u32, &rack.history),
            power: Power::default(),
            fabrics: rack.join(host),
            process: None,
            orphan: None,
            down_for: Some(down_for),
        }
    }

    /// Describes what this host is doing, for a report.
    pub(crate) fn state(&self) -> String {
        match &self.process {
            None => format!("host {}: down for {:?}", self.host, self.down_for),
            Some(process) => format!(
                "host {}: incarnation {}, {} connections, {} landed, replica failed {:?}, leader {:?}",
                self.host,
                process.info.incarnation,
                process.shared.connections.load(Ordering::Relaxed),
                process.shared.landed.len(),
                process.replicator.as_ref().map(Replicator::has_failed),
                process.worker.stages().sequencer().map(|sequencer| sequencer.stats()),
            ),
        }
    }

    /// Returns the host's disk.
    pub(crate) fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Runs a round in which faults may happen.
    pub(crate) fn rough_round(&mut self) {
        match random(0..400) {
            0..2 => doom(self.host),
            2..4 => {
                self.rack.history.count(|tally| &mut tally.pauses);
                halt(self.host);
            }
            4 => {
                self.rack.history.count(|tally| &mut tally.disk_failures);
                self.disk.fail();
            }
            5 if self.host >= LEADERS => self.process.iter().for_each(Process::drain),
            _ => {}
        }
        self.round();
    }

    /// Ends all faults and repairs what is broken. The host comes back, and a process whose disk failed is started again.
    pub(crate) fn repair(&mut self) {
        spare(self.host);
        self.disk.repair();
        self.down_for = self.down_for.map(|_| 0);
        if self.process.as_ref().and_then(|process| process.replicator.as_ref()).is_some_and(Replicator::has_failed) {
            self.crash();
            self.down_for = Some(0);
        }
    }

    pub(crate) fn round(&mut self) {
        let Some(process) = &mut self.process else {
            match &mut self.orphan {
                Some(nic) => {
                    nic.drive(self.clock.now_us());
                    self.orphan.take_if(|_| one_in(8));
                }
                None => self.rack.network.cut(self.host),
            }
            match &mut self.down_for {
                Some(0) => self.start(),
                Some(rounds) => *rounds -= 1,
                None => {}
            }
            return;
        };
        match or_crash(self.host, || process.round()) {
            Some(true) => {}
            Some(false) => {
                self.rack.history.count(|tally| &mut tally.departures);
                let leaving = self.process.take();
                self.rack.set_catalog(self.host, None);
                // It lets go of what it pinned, and may crash in the middle of that too.
                match or_crash(self.host, || drop(leaving)) {
                    Some(()) => self.down_for = one_in(2).then(|| random(1..40)),
                    None => self.crash(),
                }
            }
            None => self.crash(),
        }
    }

    fn start(&mut self) {
        self.orphan = None;
        let Self { host, rack, clock, disk, power, fabrics, .. } = &*self;
        match or_crash(*host, || Process::start(*host, rack, *clock, disk, power, fabrics)) {
            Some(process) => self.process = Some(process),
            None => self.crash(),
        }
    }

    /// Ends the process in the middle of anything, and the host with it unless hosts live on.
    fn crash(&mut self) {
        let lives_on = self.rack.hosts_live_on;
        if lives_on {
            self.rack.history.count(|tally| &mut tally.kills);
            self.fabrics.iter().for_each(Simulated::kill);
        } else {
            self.rack.history.count(|tally| &mut tally.crashes);
            self.fabrics.iter().for_each(Simulated::crash);
            self.power.fail();
        }
        let nic = self.process.as_ref().and_then(|process| process.nic.as_ref());
        let nic = nic.map(|nic| nic.lock().unwrap_or_else(PoisonError::into_inner).leave());
        self.process = None;
        self.rack.set_catalog(self.host, None);
        self.power = Power::default();
        self.rack.network.cut(self.host);
        if lives_on {
            self.fabrics = self.rack.join_beside(self.host, &self.fabrics);
            self.disk.repair();
            self.orphan = nic.map(|nic| nic.on(&self.fabrics[0]));
        } else {
            self.fabrics = self.rack.join(self.host);
            self.disk.restart();
        }
        self.down_for = Some(random(0..30));
    }
}

impl Process {
    fn start(
        host: usize,
        rack: &Arc<Rack>,
        clock: Clock,
        disk: &Disk,
        power: &Power,
        fabrics: &[Simulated; 2],
    ) -> Self {
        let id = BrokerId(host as u32);
        let [region, mirror] = fabrics.clone().map(|fabric| Region::open(fabric).expect("the superblock is visible"));
        [&region, &mirror].into_iter().for_each(|region| refresh_own_lines(region, id));
        let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), id));
        let topics = Arc::new(TopicTable::new(region.clone(), id, pool));
        let incarnation = last_incarnation(&region, id).next();
        let replicator = if rack.replicated {
            let disk = disk.clone();
            let open = move |_: &Identity| -> Box<dyn Medium> { Box::new(disk.clone()) };
            let store = StoreOptions { file_bytes: 16 << 10, retention_bytes: 0 };
            let options = ReplicaOptions { group_bytes: 8 << 10, patience_us: 60_000, store };
            Some(Replicator::new(Arc::clone(&topics), Box::new(open), options).expect("there is memory"))
        } else {
            disclaim(&region, id);
            None
        };
        let catalog =
            replicator.as_ref().map_or_else(|| Arc::new(Catalog::new(false)), |disk| Arc::clone(disk.catalog()));
        rack.set_catalog(host, Some(Arc::clone(&catalog)));
        let (archive, archive_reader) = Archive::new(region.clone(), Caller::draw(&region, id), catalog);
        let (landed, queue) = bounded(LANDED_BATCHES);
        let (acks, ordered) = bounded(SESSION_WINDOW as usize);
        let group = FlushGroup { batches: 3, bytes: u64::MAX };
        let mut delegation = Delegation::new(Arc::clone(&topics), queue, vec![acks], group).of_incarnation(incarnation);
        if host < LEADERS {
            delegation.reclaim_mirror(mirror.clone());
        }
        let info = BrokerInfo {
            id,
            incarnation,
            data: address(host),
            control: address(host),
            process_id: 3,
            running: true,
            lock_node: 1,
        };
        publish_broker(&region, &info);
        let (promote, promoted) = bounded(1);
        let nic = || Arc::new(Mutex::new(Nic::new(Port::of_host(host), &rack.network, Some(region.fabric().clone()))));
        let nic = rack.has_nics.then(nic);
        let sockets = rack.transport.of_client(power, None).sockets.listen(address(host));
        let endpoint = RackEndpoint { sockets, nic: nic.clone().map(|nic| (nic, clock)) };
        let shared = shared(Arc::clone(&topics), landed, archive);
        let setup = WorkerSetup {
            index: 0,
            endpoint,
            ordered,
            idle: Idle::new(PollPolicy::Busy, PollBounds::for_host(1, 1)),
            core: None,
            stages: Stages::new(delegation, promoted),
        };
        let worker = Worker::new(shared.clone(), setup, clock).expect("there is a descriptor");
        Self {
            host,
            rack: Arc::clone(rack),
            clock,
            region,
            mirror,
            info,
            topics,
            worker,
            shared,
            nic,
            replicator,
            archive: archive_reader,
            promote,
            leader: None,
            watched: ((None, 0), 0),
        }
    }

    /// Begins to leave.
    fn drain(&self) {
        self.shared.draining.store(true, Ordering::Relaxed);
    }

    fn is_draining(&self) -> bool {
        self.shared.draining.load(Ordering::Relaxed)
    }

    /// Runs some turns of everything that a broker does. Returns false once it has left.
    fn round(&mut self) -> bool {
        let now_us = self.clock.now_us();
        for _ in 0..REQUESTS {
            match self.rack.network.take_request(self.host) {
                Some(request) => self.take_call(request),
                None => break,
            }
        }
        for _ in 0..random(1..TURNS) {
            self.worker.poll();
        }
        if let Some(sequencer) = self.worker.stages().sequencer() {
            assert_eq!(sequencer.stats().damaged, 0, "the sequencer found damage");
        }
        if let Some(replicator) = &mut self.replicator {
            replicator.maintain(now_us);
            replicator.poll();
        }
        let rack = &self.rack;
        if !one_in(3) {
            self.archive.poll(|broker| rack.catalog(broker));
        }
        self.lead(now_us);
        if self.shared.superseded.load(Ordering::Relaxed) {
            return false;
        }
        let is_done = self.shared.connections.load(Ordering::Relaxed) == 0 && self.shared.landed.is_empty();
        if self.is_draining() && is_done {
            publish_broker(&self.region, &BrokerInfo { running: false, ..self.info.clone() });
            return false;
        }
        true
    }
}

/// Returns what the worker of a broker works with.
fn shared(
    topics: Arc<TopicTable<Simulated>>,
    landed: Sender<Landed<Simulated>>,
    archive: Archive,
) -> Shared<Simulated> {
    Shared {
        topics,
        landed,
        limits: IngestLimits {
            max_batch_bytes: 1 << 16,
            exhausted_wait: Duration::from_millis(50),
            receive_patience: Duration::from_millis(50),
            verify_body: one_in(2),
        },
        delivery_patience: Duration::from_millis(20),
        opening: Duration::from_millis(100),
        window_idle: Duration::from_millis(100),
        archive,
        draining: Arc::default(),
        connections: Arc::default(),
        stop: Arc::default(),
        superseded: Arc::default(),
        lease: OWN_LEASE,
        heartbeat: Duration::ZERO,
    }
}

/// Reads all of the order that is kept, on a host with empty caches. Returns it with the offset of its first message.
pub(crate) fn read_all(rack: &Rack) -> (u64, Vec<Content>) {
    let [fabric, _] = rack.join(HOSTS - 1);
    let region = Region::open(fabric).expect("the superblock is visible");
    let mut reader = OrderIndexReader::new(region.clone(), GLOBAL);
    let committed = reader.poll();
    let extent = read_extent(&region, GLOBAL).expect("there is a leader");
    let mut messages = Vec::new();
    for position in extent.trimmed..committed {
        let entry = reader.read(position).expect("it was not trimmed");
        let contents = contents_of(&region, &entry);
        assert_eq!(contents.len(), entry.message_count as usize);
        assert_eq!(entry.first_offset, extent.earliest_offset + messages.len() as u64, "offsets are not in line");
        messages.extend(contents);
    }
    (extent.earliest_offset, messages)
}

/// Describes who has which segment, for a report.
pub(crate) fn describe_memory(rack: &Rack) -> String {
    let [fabric, _] = rack.join(HOSTS - 1);
    let region = Region::open(fabric).expect("the superblock is visible");
    let owners =
        (0..region.geometry().segment_count).map(|segment| format!("{segment}: {:?}", read_owner(&region, segment)));
    let extent = read_extent(&region, GLOBAL);
    format!("{}, {extent:?}", owners.collect::<Vec<_>>().join(", "))
}

/// Reads the offset and the number of messages of each batch from the mirror.
pub(crate) fn read_mirror(rack: &Rack) -> Vec<(u64, u32)> {
    let [_, fabric] = rack.join(HOSTS - 1);
    let region = Region::open(fabric).expect("the superblock is visible");
    let topics = mirror::read(&region).expect("the mirror is whole");
    topics.into_iter().next().map_or_else(Vec::new, |topic| topic.batches)
}
