//! A host of the rack: a machine that crashes, stands still and comes back, and the broker process on it. The process is made
//! of the production stages.

mod leader;

use super::disk::Disk;
use super::fate::{Clock, doom, halt, one_in, or_crash, random, spare};
use super::network::{Answer, Batch, Request, client_of};
use super::nic::{Nic, WINDOW_BYTES};
use super::{COPIES, GLOBAL, HOSTS, LEADERS, Rack, TOPIC};
use bytemuck::Zeroable;
use crossbeam_channel::{Sender, bounded, unbounded};
use embarcadero_broker::ack::{AckQueue, SessionStatus};
use embarcadero_broker::delegation::{Delegation, FlushGroup, Landed, Origin};
use embarcadero_broker::mirror;
use embarcadero_broker::replica::format::Identity;
use embarcadero_broker::replica::medium::Medium;
use embarcadero_broker::replica::replicator::{ReplicaOptions, Replicator, disclaim};
use embarcadero_broker::replica::store::StoreOptions;
use embarcadero_broker::topics::{Topic, TopicTable};
use embarcadero_cxl::broker_table::{BrokerInfo, last_incarnation, publish_broker};
use embarcadero_cxl::layout::{IndexEntry, SessionState};
use embarcadero_cxl::order_index::{OrderIndexReader, ReadError};
use embarcadero_cxl::segment::PartitionAllocator;
use embarcadero_cxl::session_table::{Session, read_session};
use embarcadero_cxl::{Fabric, Region, RegionOffset, Site};
use embarcadero_roce::psn::Psn;
use embarcadero_sim::Simulated;
use embarcadero_wire::{BatchHeader, BrokerId, ClientId, Term};
use leader::Leader;
use std::sync::Arc;

/// Bytes that a batch claims: 64 for its header, 4 for its length table, and the rest for one message.
pub(crate) const BATCH_BYTES: u64 = 256;
/// Most requests that a broker takes in a round.
const REQUESTS: usize = 4;

/// Connection of a client that publishes.
struct Connection {
    session: Session,
    acks: AckQueue,
}

/// Broker process.
struct Process {
    host: usize,
    rack: Arc<Rack>,
    clock: Clock,
    region: Region<Simulated>,
    mirror: Region<Simulated>,
    info: BrokerInfo,
    topics: Arc<TopicTable<Simulated>>,
    landed: Sender<Landed<Simulated>>,
    delegation: Delegation<Simulated>,
    replicator: Option<Replicator<Simulated>>,
    connections: Vec<Connection>,
    nic: Nic,
    reader: OrderIndexReader<Simulated>,
    pin: Option<usize>,
    cursor: u64,
    leader: Option<Leader>,
    /// Leader and its heartbeat as last seen, and the number of looks since then that found no change.
    watched: ((Option<(BrokerId, Term)>, u64), u64),
    draining: bool,
}

/// Host of the rack.
pub(crate) struct Machine {
    host: usize,
    rack: Arc<Rack>,
    clock: Clock,
    disk: Disk,
    /// Caches of the region and of the mirror.
    fabrics: [Simulated; 2],
    process: Option<Process>,
    /// Rounds until its process starts again; `None` once it has left for good.
    down_for: Option<u64>,
}

/// Reads the content of a batch from its payload. Both of its ends name the client and the batch's number, and must agree.
pub(crate) fn content_of(region: &Region<Simulated>, entry: &IndexEntry) -> (usize, u64) {
    let fabric = region.fabric();
    let read = |at: u64| {
        fabric.invalidate(RegionOffset(at), 16, Site::PayloadRead);
        (fabric.load(RegionOffset(at)), fabric.load(RegionOffset(at + 8)))
    };
    let (first, last) = (read(entry.location), read(entry.location + BATCH_BYTES - 64));
    assert_eq!(first, last, "the payload of {entry:?} is not one batch");
    assert_eq!(ClientId(first.0), entry.client_id, "the payload of {entry:?} is another client's");
    (client_of(ClientId(first.0)), first.1)
}

impl Machine {
    /// Makes a host whose process starts after `down_for` rounds.
    pub(crate) fn new(host: usize, rack: &Arc<Rack>, down_for: u64) -> Self {
        Self {
            host,
            rack: Arc::clone(rack),
            clock: Clock::drifting(),
            disk: Disk::new(host as u32, &rack.history),
            fabrics: rack.join(host),
            process: None,
            down_for: Some(down_for),
        }
    }

    /// Describes what this host is doing, for a report.
    pub(crate) fn state(&self) -> String {
        match &self.process {
            None => format!("host {}: down for {:?}", self.host, self.down_for),
            Some(process) => format!(
                "host {}: incarnation {}, read {} of {}, {} landed, acks {:?}, replica failed {:?}, leader {:?}",
                self.host,
                process.info.incarnation,
                process.cursor,
                process.reader.committed(),
                process.landed.len(),
                process.connections.iter().map(|at| &at.acks).collect::<Vec<_>>(),
                process.replicator.as_ref().map(Replicator::has_failed),
                process.leader.as_ref().map(|leader| (leader.term, leader.sequencer.stats())),
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
            5 if self.host >= LEADERS => self.process.iter_mut().for_each(|process| process.draining = true),
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
            self.rack.network.cut(self.host);
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
        let (host, rack, clock, disk, fabrics) = (self.host, &self.rack, self.clock, &self.disk, &self.fabrics);
        match or_crash(host, || Process::start(host, rack, clock, disk, fabrics)) {
            Some(process) => self.process = Some(process),
            None => self.crash(),
        }
    }

    fn crash(&mut self) {
        self.rack.history.count(|tally| &mut tally.crashes);
        self.fabrics.iter().for_each(Simulated::crash);
        self.process = None;
        self.disk.restart();
        self.rack.network.cut(self.host);
        self.fabrics = self.rack.join(self.host);
        self.down_for = Some(random(0..30));
    }
}

impl Process {
    fn start(host: usize, rack: &Arc<Rack>, clock: Clock, disk: &Disk, fabrics: &[Simulated; 2]) -> Self {
        let id = BrokerId(host as u32);
        let [region, mirror] = fabrics.clone().map(|fabric| Region::open(fabric).expect("the superblock is visible"));
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
        let (landed, queue) = unbounded();
        let (acks, _) = bounded(1);
        let group = FlushGroup { batches: 3, bytes: u64::MAX };
        let mut delegation = Delegation::new(Arc::clone(&topics), queue, vec![acks], group).of_incarnation(incarnation);
        if host < LEADERS {
            delegation.reclaim_mirror(mirror.clone());
        }
        let address = |port| std::net::SocketAddr::from(([10, 0, 0, host as u8], port));
        let info = BrokerInfo {
            id,
            incarnation,
            data: address(1),
            control: address(2),
            process_id: 3,
            running: true,
            lock_node: 1,
        };
        publish_broker(&region, &info);
        let reader = OrderIndexReader::new(region.clone(), GLOBAL);
        Self {
            host,
            rack: Arc::clone(rack),
            clock,
            region,
            mirror,
            info,
            topics,
            landed,
            delegation,
            replicator,
            connections: Vec::new(),
            nic: Nic::default(),
            reader,
            pin: None,
            cursor: 0,
            leader: None,
            watched: ((None, 0), 0),
            draining: false,
        }
    }

    /// Runs one turn of everything that a broker does. Returns false once it has left.
    fn round(&mut self) -> bool {
        let now_us = self.clock.now_us();
        self.delegation.beat();
        self.delegation.maintain(now_us);
        for _ in 0..REQUESTS {
            match self.rack.network.take_request(self.host) {
                Some(Request::Publish(batch)) => self.receive(&batch, None),
                Some(Request::Connect { client, psn }) => self.connect(client, psn),
                Some(Request::OpenSession { id, resume, attempt }) => self.ask(id, resume, attempt),
                None => break,
            }
        }
        for (at, batch) in self.nic.drive(self.host, now_us, self.region.fabric(), &self.rack.network) {
            self.receive(&batch, Some(at));
        }
        self.delegation.poll(now_us, 8);
        if let Some(replicator) = &mut self.replicator {
            replicator.maintain(now_us);
            replicator.poll();
        }
        self.acknowledge();
        self.deliver();
        self.lead(now_us);
        if self.draining && self.connections.iter().all(|at| at.acks.is_empty()) && self.landed.is_empty() {
            publish_broker(&self.region, &BrokerInfo { running: false, ..self.info.clone() });
            return false;
        }
        true
    }

    /// Opens a window that a client's NIC may write to.
    fn connect(&mut self, client: usize, psn: Psn) {
        let Ok(Some(topic)) = self.topics.get(TOPIC.0, TOPIC.1) else { return };
        if self.draining {
            return;
        }
        let Ok(place) = topic.blog.reserve(WINDOW_BYTES) else { return };
        let (window, before) = self.nic.accept(self.host, client, psn, place);
        if let Some(before) = before {
            topic.blog.settle(before);
        }
        self.rack.history.count(|tally| &mut tally.links);
        self.rack.network.answer(client, Answer::Connected { host: self.host, window });
    }

    /// Receives a batch on the connection of its session, as a worker does. The first batch opens the connection. `written`
    /// is the place where a NIC wrote the batch, if one did.
    fn receive(&mut self, batch: &Batch, written: Option<RegionOffset>) {
        let Ok(Some(topic)) = self.topics.get(TOPIC.0, TOPIC.1) else { return };
        let session = batch.session;
        let same = |at: &Connection| (at.session.client_id, at.session.epoch) == (session.client_id, session.epoch);
        let at = match self.connections.iter().position(same) {
            Some(at) => at,
            None if self.draining => return,
            None => match self.accept(&session, batch.resume_from) {
                Some(at) => at,
                None => return,
            },
        };
        if self.connections[at].acks.is_full() {
            return;
        }
        let place = match written {
            Some(at) => {
                topic.blog.share(at);
                at
            }
            None => {
                let Ok(place) = topic.blog.reserve(BATCH_BYTES) else { return };
                self.region.fabric().write_bytes(place, &batch.encode());
                place
            }
        };
        let header = BatchHeader {
            client_id: session.client_id,
            sequence: batch.sequence,
            session_epoch: session.epoch,
            session_slot: session.slot,
            topic: TOPIC.0,
            topic_incarnation: TOPIC.1,
            payload_bytes: (BATCH_BYTES - 68) as u32,
            message_count: 1,
            ..BatchHeader::zeroed()
        };
        self.connections[at].acks.expect(batch.sequence);
        let landed =
            Landed { topic, header, at: place, in_memory: written.is_some(), origin: Origin { worker: 0, token: 0 } };
        self.landed.send(landed).expect("the delegation is there");
    }

    fn accept(&mut self, session: &Session, resume_from: u64) -> Option<usize> {
        let found = read_session(&self.region, session.slot).ok()?;
        let client = client_of(session.client_id);
        let standing = found.used().filter(|found| {
            (found.client_id, found.epoch, found.state) == (session.client_id, session.epoch, SessionState::Open)
        });
        let Some(standing) = standing else {
            self.rack.network.answer(client, Answer::Fenced(session.client_id, session.epoch));
            return None;
        };
        let mut acks = AckQueue::new(standing, GLOBAL);
        let network = &self.rack.network;
        let answer = |ack| network.answer(client, Answer::Ack(session.client_id, ack));
        acks.replay(&self.region, resume_from, answer).ok()?;
        self.connections.push(Connection { session: *session, acks });
        Some(self.connections.len() - 1)
    }

    fn acknowledge(&mut self) {
        let Self { rack, region, connections, info, .. } = self;
        connections.retain_mut(|at| {
            let id = at.session.client_id;
            let client = client_of(id);
            let polled = at.acks.poll(region, info.id, |ack| {
                if rack.replicated {
                    rack.history.must_be_durable(ack.first_offset, COPIES);
                }
                rack.network.answer(client, Answer::Ack(id, ack));
            });
            polled.expect("nothing is lost by retention");
            match at.acks.status(region) {
                SessionStatus::Open => true,
                SessionStatus::Fenced(fenced) => {
                    rack.network.answer(client, Answer::Fenced(id, fenced.session_epoch));
                    false
                }
                SessionStatus::Damaged(damage) => panic!("{damage}"),
            }
        });
    }

    /// Reads on in the order, as the stage that delivers does.
    fn deliver(&mut self) {
        let Ok(Some(topic)) = self.topics.get(TOPIC.0, TOPIC.1) else { return };
        let pin = *self.pin.get_or_insert_with(|| topic.pins.register());
        let committed = self.reader.poll();
        for _ in 0..4 {
            if self.cursor >= committed || !self.deliver_one(&topic, pin) {
                break;
            }
        }
        topic.pins.clear(pin);
    }

    fn deliver_one(&mut self, topic: &Topic<Simulated>, pin: usize) -> bool {
        if topic.pins.set(pin, self.cursor).is_err() {
            return false;
        }
        let entry = match self.reader.read(self.cursor) {
            Ok(entry) => entry,
            Err(ReadError::NoLeader(_)) => return false,
            Err(error) => panic!("a pinned entry is not readable: {error}"),
        };
        self.rack.history.read(self.cursor, (content_of(&self.region, &entry), entry.first_offset));
        self.cursor += 1;
        true
    }
}

/// Reads the whole order on a host with empty caches.
pub(crate) fn read_all(rack: &Rack) -> Vec<((usize, u64), u64)> {
    let [fabric, _] = rack.join(HOSTS - 1);
    let region = Region::open(fabric).expect("the superblock is visible");
    let mut reader = OrderIndexReader::new(region.clone(), GLOBAL);
    let committed = reader.poll();
    (0..committed)
        .map(|position| {
            let entry = reader.read(position).expect("nothing was trimmed");
            (content_of(&region, &entry), entry.first_offset)
        })
        .collect()
}

/// Reads the offset and the number of messages of each batch from the mirror.
pub(crate) fn read_mirror(rack: &Rack) -> Vec<(u64, u32)> {
    let [_, fabric] = rack.join(HOSTS - 1);
    let region = Region::open(fabric).expect("the superblock is visible");
    let topics = mirror::read(&region).expect("the mirror is whole");
    topics.into_iter().next().map_or_else(Vec::new, |topic| topic.batches)
}
