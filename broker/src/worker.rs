//! A polling thread: moves bytes for its connections and runs the ordering stages that it was given.

use crate::archive::Archive;
use crate::delegation::{Delegation, Landed, OrderedLocally, Origin};
use crate::delivery::SubscriberSession;
use crate::ingest::{IngestLimits, Place, PublisherSession};
use crate::replica::completion::CompletionStage;
use crate::sequencer::{GROUP_BATCHES, Sequencer};
use crate::topics::TopicTable;
use crossbeam_channel::{Receiver, Sender};
use embarcadero_datapath::cxl::Native;
use embarcadero_datapath::poll::{Idle, Step};
use embarcadero_datapath::transport::tcp::{SocketOptions, TcpConnection};
use embarcadero_datapath::transport::verbs::{VerbsEnd, VerbsHost, VerbsQueue};
use embarcadero_datapath::transport::{
    Channel, Connection, Outbox, Outgoing, Poller, Ready, Received, TransportError, prepare_polling_thread,
};
use embarcadero_datapath::wire::{ErrorCode, Frame, VerbsConnect};
use std::collections::HashMap;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Batches that one connection may receive before others have their turn.
const RECEIVE_BATCHES: usize = 8;
/// Batches that the delegation takes at a time.
const DELEGATION_BATCHES: usize = 256;
/// How long an error may take to reach its client before the connection is cut.
const FAREWELL: Duration = Duration::from_secs(2);
/// After what silence a publisher's landing windows are taken back when their segments could be reclaimed otherwise.
const WINDOW_IDLE: Duration = Duration::from_secs(2);
/// Time between two looks at what rarely changes: whether sessions still stand and topics still live.
const IDLE_CHECK: Duration = Duration::from_millis(10);

enum Role {
    /// Nothing was said yet.
    New,
    Publisher(Box<PublisherSession>),
    Subscriber(Box<SubscriberSession>),
    /// The error is on its way; then the connection closes.
    Leaving(Instant),
}

struct Client {
    // First, so that it is dropped first: then nothing reads or writes the memory that the role lets go.
    link: Channel,
    role: Role,
    outbox: Outbox,
    /// A batch waits for room: the socket is not watched.
    waiting: bool,
    /// Room in the socket is watched for.
    watches_room: bool,
    generation: u32,
}

/// What all workers of a broker share.
#[derive(Clone)]
pub struct Shared {
    /// Topics.
    pub topics: Arc<TopicTable<Native>>,
    /// To the delegation.
    pub landed: Sender<Landed<Native>>,
    /// Bounds for publishers.
    pub limits: IngestLimits,
    /// How long a subscriber may hold what retention wants.
    pub delivery_patience: Duration,
    /// Where to ask for what the region no longer holds.
    pub archive: Archive,
    /// Kernel buffers.
    pub sockets: SocketOptions,
    /// The RDMA device, if the broker offers verbs.
    pub verbs: Option<Arc<VerbsHost>>,
    /// Set when the broker is about to leave: clients go to others.
    pub draining: Arc<AtomicBool>,
    /// Connections of all workers.
    pub connections: Arc<AtomicUsize>,
    /// Set when the broker stops.
    pub stop: Arc<AtomicBool>,
    /// Set when a later process has this broker's place.
    pub superseded: Arc<AtomicBool>,
    /// After what silence the head no longer minds what this broker reads.
    pub lease: Duration,
}

/// What the thread's queue pairs complete.
struct Completions {
    queue: VerbsQueue,
    /// Number of a queue pair, and the slot of its connection.
    slots: HashMap<u32, usize>,
}

/// Token of the completion queue's descriptor.
const COMPLETIONS: u64 = u64::MAX;

/// One polling thread.
pub struct Worker {
    index: usize,
    shared: Shared,
    memory: Native,
    poller: Poller,
    verbs: Option<Completions>,
    ready: Vec<Ready>,
    clients: Vec<Option<Client>>,
    generation: u32,
    free: Vec<usize>,
    accepted: Receiver<TcpStream>,
    ordered: Receiver<OrderedLocally>,
    idle: Idle,
    core: Option<usize>,
    /// Stages that run to completion in this loop.
    delegation: Option<Delegation<Native>>,
    head: Option<HeadStages>,
    /// Where the head's stages come from, when this broker becomes the head.
    promoted: Option<Receiver<HeadStages>>,
    maintained: Instant,
    heartbeat: Duration,
}

/// The stages that only the head has.
pub struct HeadStages {
    /// Global order.
    pub sequencer: Sequencer<Native>,
    /// The count of what is durable.
    pub completion: CompletionStage<Native>,
    /// Dropped when the stages end.
    pub in_use: Arc<()>,
}

/// What makes one worker differ from another.
pub struct WorkerSetup {
    /// Number among the workers.
    pub index: usize,
    /// Connections to serve.
    pub accepted: Receiver<TcpStream>,
    /// Acks of batches that the delegation ordered.
    pub ordered: Receiver<OrderedLocally>,
    /// How to wait.
    pub idle: Idle,
    /// Core to run on.
    pub core: Option<usize>,
    /// Local order, if this thread runs it.
    pub delegation: Option<Delegation<Native>>,
    /// Where global order and the count of what is durable come from, if this thread runs them.
    pub promoted: Option<Receiver<HeadStages>>,
    /// Time between heartbeats.
    pub heartbeat: Duration,
}

/// Microseconds since 1970.
#[must_use]
pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

impl Worker {
    /// A worker that has no connections yet.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn new(shared: Shared, setup: WorkerSetup) -> io::Result<Self> {
        let memory = shared.topics.region().fabric().clone();
        let WorkerSetup { index, accepted, ordered, idle, core, delegation, promoted, heartbeat } = setup;
        let poller = Poller::new()?;
        let verbs = match &shared.verbs {
            None => None,
            Some(host) => {
                let queue = VerbsQueue::new(host).map_err(io::Error::other)?;
                poller.add(queue.descriptor(), COMPLETIONS, false)?;
                Some(Completions { queue, slots: HashMap::new() })
            }
        };
        Ok(Self {
            index,
            shared,
            memory,
            poller,
            verbs,
            ready: Vec::with_capacity(64),
            clients: Vec::new(),
            generation: 0,
            free: Vec::new(),
            accepted,
            ordered,
            idle,
            core,
            delegation,
            head: None,
            promoted,
            maintained: Instant::now(),
            heartbeat,
        })
    }

    /// Runs until the broker stops.
    pub fn run(mut self) {
        if let Err(error) = prepare_polling_thread(self.core) {
            tracing::error!(worker = self.index, %error, "the thread could not be pinned");
        }
        let mut timeout = Duration::ZERO;
        let mut looked = Instant::now();
        while !self.shared.stop.load(Ordering::Relaxed) {
            if !timeout.is_zero() && self.has_completions() {
                timeout = Duration::ZERO;
            }
            if let Err(error) = self.poller.wait(timeout, &mut self.ready) {
                tracing::error!(worker = self.index, %error, "waiting for sockets failed");
                return;
            }
            if self.work(&mut looked) {
                self.idle.worked();
                timeout = Duration::ZERO;
            } else {
                timeout = match self.idle.wait() {
                    Step::Again => Duration::ZERO,
                    Step::Sleep(time) => time,
                };
            }
        }
    }

    /// Before the thread sleeps: has the device wake it, and looks a last time. True when there is something to do.
    fn has_completions(&mut self) -> bool {
        if let Some(verbs) = &mut self.verbs {
            if let Err(error) = verbs.queue.arm() {
                tracing::error!(worker = self.index, %error, "the RDMA device cannot be waited for");
            }
            return self.complete();
        }
        false
    }

    /// Hands completions to their connections. True when there were any.
    fn complete(&mut self) -> bool {
        let Some(Completions { queue, slots }) = &mut self.verbs else { return false };
        let clients = &mut self.clients;
        let polled = queue.poll(|completion| {
            // Completions of queue pairs that are gone are of no interest.
            let slot = slots.get(&completion.queue_pair).copied();
            if let Some(Some(client)) = slot.and_then(|slot| clients.get_mut(slot))
                && let Some(verbs) = client.link.verbs()
            {
                verbs.completed(completion);
            }
        });
        match polled {
            Ok(count) => count > 0,
            Err(error) => {
                self.lose_device(&error);
                true
            }
        }
    }

    /// Ends the connections of a device that can no longer be used.
    fn lose_device(&mut self, error: &io::Error) {
        let Some(verbs) = self.verbs.take() else { return };
        tracing::error!(worker = self.index, %error, "the RDMA device is lost; its connections close");
        for slot in verbs.slots.values() {
            self.part(*slot, &TransportError::Closed);
        }
    }

    /// Takes what the device announces.
    fn heed_device(&mut self) {
        let (Some(host), Some(_)) = (&self.shared.verbs, &self.verbs) else { return };
        while let Some(event) = host.take_event() {
            tracing::warn!(device = host.device(), event, "the RDMA device announces");
        }
        if !host.is_present() {
            self.lose_device(&io::Error::other("it was removed, or broke down"));
        }
    }

    /// Makes a queue pair for a connection that asks for one.
    fn upgrade(&mut self, slot: usize, request: &VerbsConnect) -> Result<(), TransportError> {
        let (Some(host), Some(Completions { queue, slots })) = (&self.shared.verbs, &mut self.verbs) else {
            return Err(no_verbs());
        };
        let Some(Some(client)) = self.clients.get_mut(slot) else { return Ok(()) };
        let verbs = VerbsEnd::connect(host, queue, request)?;
        slots.insert(verbs.number(), slot);
        client.link.upgrade(verbs);
        Ok(())
    }

    /// Frees a slot, and what its connection holds.
    fn free(&mut self, slot: usize) {
        if let Some(Some(client)) = self.clients.get_mut(slot)
            && let Some(number) = client.link.verbs().map(|verbs| verbs.number())
        {
            self.clients[slot] = None;
            // Once the queue pair is gone nothing more is added under its number, which another may get.
            while self.complete() {}
            if let Some(verbs) = &mut self.verbs {
                verbs.slots.remove(&number);
            }
        }
        self.clients[slot] = None;
        self.shared.connections.fetch_sub(1, Ordering::Relaxed);
        self.free.push(slot);
    }

    /// One turn of the loop: receive, order, acknowledge, deliver. True when anything moved.
    fn work(&mut self, looked: &mut Instant) -> bool {
        if self.maintained.elapsed() >= self.shared.lease {
            self.stood_still();
        }
        let mut moved = self.accept();
        moved |= self.complete();
        let ready = std::mem::take(&mut self.ready);
        for ready in &ready {
            moved |= self.serve(*ready);
        }
        self.ready = ready;
        let now_us = now_us();
        if let Some(delegation) = &mut self.delegation {
            moved |= delegation.poll(now_us, DELEGATION_BATCHES) > 0;
        }
        if let Some(HeadStages { sequencer, completion, .. }) = &mut self.head {
            moved |= sequencer.poll(now_us, GROUP_BATCHES) > 0;
            moved |= completion.poll(now_us) > 0;
        }
        moved |= self.local_acks();
        let check = looked.elapsed() >= IDLE_CHECK;
        if check {
            *looked = Instant::now();
            self.heed_device();
        }
        for slot in 0..self.clients.len() {
            moved |= self.turn(slot, check);
        }
        if self.maintained.elapsed() >= self.heartbeat {
            self.maintained = Instant::now();
            self.maintain(now_us);
        }
        moved
    }

    /// This host stood still for so long that the head may have given back memory which subscribers were about to read:
    /// they begin anew.
    fn stood_still(&mut self) {
        tracing::warn!(worker = self.index, "stood still beyond broker_lease_ms: subscribers have to connect again");
        let reading = |client: &Client| matches!(client.role, Role::Subscriber(_));
        let slots = 0..self.clients.len();
        for slot in slots.filter(|slot| self.clients[*slot].as_ref().is_some_and(reading)).collect::<Vec<_>>() {
            self.free(slot);
        }
        self.maintained = Instant::now();
    }

    fn maintain(&mut self, now_us: u64) {
        if self.delegation.as_ref().is_some_and(Delegation::is_superseded) {
            tracing::error!("another process has this broker's id: it was taken for dead, and stops");
            self.shared.superseded.store(true, Ordering::Relaxed);
            self.shared.stop.store(true, Ordering::Relaxed);
            return;
        }
        let waiting = self.clients.iter().flatten().any(|client| client.waiting);
        if let Some(delegation) = &mut self.delegation {
            delegation.beat();
            if waiting {
                delegation.stalled();
            }
            delegation.maintain(now_us);
        }
        if self.head.as_ref().is_some_and(|head| !head.sequencer.leads()) {
            self.head = None;
        }
        if self.head.is_none() {
            self.head = self.promoted.as_ref().and_then(|promoted| promoted.try_recv().ok());
        }
        if let Some(HeadStages { sequencer, completion, .. }) = &mut self.head {
            sequencer.maintain(now_us);
            completion.maintain(sequencer.awaited_topics());
        }
    }

    fn accept(&mut self) -> bool {
        let mut any = false;
        while let Ok(stream) = self.accepted.try_recv() {
            any = true;
            if self.shared.draining.load(Ordering::Relaxed) {
                continue;
            }
            let link = match TcpConnection::new(stream, self.shared.sockets) {
                Ok(link) => Channel::new(link),
                Err(error) => {
                    tracing::debug!(%error, "a connection died before it was served");
                    continue;
                }
            };
            let slot = self.free.pop().unwrap_or_else(|| {
                self.clients.push(None);
                self.clients.len() - 1
            });
            self.generation = self.generation.wrapping_add(1);
            let token = token(slot, self.generation);
            if let Err(error) = self.poller.add(link.descriptor(), token, false) {
                tracing::error!(%error, "a connection cannot be watched");
                self.free.push(slot);
                continue;
            }
            self.shared.connections.fetch_add(1, Ordering::Relaxed);
            self.clients[slot] = Some(Client {
                link,
                role: Role::New,
                outbox: Outbox::default(),
                waiting: false,
                watches_room: false,
                generation: self.generation,
            });
        }
        any
    }

    fn serve(&mut self, ready: Ready) -> bool {
        let slot = (ready.token >> 32) as usize;
        let Some(Some(client)) = self.clients.get_mut(slot) else { return false };
        if client.generation != ready.token as u32 || !ready.readable || client.waiting {
            return false;
        }
        self.receive(slot)
    }

    /// Receives what a connection has, within its share.
    fn receive(&mut self, slot: usize) -> bool {
        let mut moved = false;
        let draining = self.shared.draining.load(Ordering::Relaxed);
        for _ in 0..RECEIVE_BATCHES {
            let Some(Some(client)) = self.clients.get_mut(slot) else { return moved };
            if draining && !matches!(client.role, Role::Leaving(_)) {
                return moved;
            }
            let session = match &mut client.role {
                Role::Publisher(session) => Some(&mut **session),
                // `turn` reads and discards what still comes.
                Role::Leaving(_) => return moved,
                _ => None,
            };
            let mut place = Place { topics: &self.shared.topics, session };
            let outcome = match client.link.receive(&self.memory, &mut place) {
                Ok(Received::Nothing) => {
                    Self::watch(&self.poller, client, slot, false);
                    return moved;
                }
                Ok(Received::Waiting) => {
                    Self::watch(&self.poller, client, slot, true);
                    return moved;
                }
                Ok(Received::Batch(header, at)) => {
                    let origin = Origin { worker: self.index, token: token(slot, client.generation) };
                    let in_memory = client.link.writes_past_caches();
                    match &mut client.role {
                        Role::Publisher(session) => session.complete(&self.memory, header, at, in_memory, origin),
                        _ => Err(TransportError::refused(ErrorCode::BadFrame, "unexpected batch")),
                    }
                }
                Ok(Received::Frame(Frame::VerbsConnect(request))) if matches!(client.role, Role::New) => {
                    self.upgrade(slot, &request)
                }
                Ok(Received::Frame(frame)) => Self::control(&self.shared, client, frame),
                Err(error) => Err(error),
            };
            moved = true;
            if let Err(error) = outcome {
                self.part(slot, &error);
                return true;
            }
        }
        moved
    }

    /// Stops or resumes watching the socket of a connection that waits for room.
    fn watch(poller: &Poller, client: &mut Client, slot: usize, waiting: bool) {
        if client.waiting == waiting {
            return;
        }
        client.waiting = waiting;
        let result = if waiting {
            poller.remove(client.link.descriptor())
        } else {
            poller.add(client.link.descriptor(), token(slot, client.generation), client.watches_room)
        };
        if let Err(error) = result {
            tracing::error!(%error, "a socket cannot be watched");
        }
    }

    fn control(shared: &Shared, client: &mut Client, frame: Frame) -> Result<(), TransportError> {
        match (&mut client.role, frame) {
            (Role::New, Frame::OpenPublish(open)) => {
                let (mut session, ready) =
                    PublisherSession::open(&shared.topics, open, shared.limits, shared.landed.clone())?;
                client.outbox.push(Outgoing::frame(ready.encode()));
                if session.wants_acks() && session.topic().config.order.is_global() {
                    let outbox = &mut client.outbox;
                    let replayed = session.acks.replay(shared.topics.region(), session.resume_from(), |ack| {
                        outbox.push(Outgoing::frame(ack.encode()));
                    });
                    replayed.map_err(|error| TransportError::refused(ErrorCode::Unavailable, error.to_string()))?;
                }
                client.role = Role::Publisher(Box::new(session));
                Ok(())
            }
            (Role::New, Frame::Subscribe(request)) => {
                client.role = Role::Subscriber(Box::new(SubscriberSession::open(&shared.topics, request)?));
                Ok(())
            }
            (Role::Subscriber(session), Frame::Position(_)) => session.position(&mut client.outbox),
            (_, frame) => {
                let text = format!("unexpected frame {frame:?}");
                Err(TransportError::refused(ErrorCode::BadFrame, text.chars().take(200).collect::<String>()))
            }
        }
    }

    /// Passes on the acks of batches that this broker ordered by itself.
    fn local_acks(&mut self) -> bool {
        let mut any = false;
        while let Ok(ordered) = self.ordered.try_recv() {
            any = true;
            let slot = (ordered.token >> 32) as usize;
            let Some(Some(client)) = self.clients.get_mut(slot) else { continue };
            if client.generation != ordered.token as u32 {
                continue;
            }
            if let Role::Publisher(session) = &mut client.role
                && session.wants_acks()
                && let Some(ack) = session.acks.local(&ordered)
            {
                client.outbox.push(Outgoing::frame(ack.encode()));
            }
        }
        any
    }

    /// Acknowledges, delivers and sends on one connection. `check` also looks at what rarely changes.
    fn turn(&mut self, slot: usize, check: bool) -> bool {
        let Some(Some(client)) = self.clients.get_mut(slot) else { return false };
        let mut moved = false;
        let region = self.shared.topics.region();
        let outcome = match &mut client.role {
            Role::New => Ok(()),
            Role::Publisher(session) => {
                let outbox = &mut client.outbox;
                let broker = self.shared.topics.broker();
                let acknowledged = if session.acks.is_empty() {
                    Ok(0)
                } else {
                    session.acks.poll(region, broker, |ack| outbox.push(Outgoing::frame(ack.encode())))
                };
                acknowledged
                    .map(|sent| moved |= sent > 0)
                    .map_err(|lost| TransportError::refused(ErrorCode::NotReplicated, lost.to_string()))
                    .and_then(|()| if check { Self::check_standing(region, session, outbox) } else { Ok(()) })
            }
            Role::Subscriber(session) => {
                let polled = session.poll(&mut client.outbox, &self.shared.archive, self.shared.delivery_patience);
                polled.map(|queued| moved |= queued > 0)
            }
            Role::Leaving(until) => {
                if client.outbox.is_empty() && !client.link.has_to_send() {
                    client.link.finish();
                }
                if client.link.discard() || Instant::now() > *until { Err(TransportError::Closed) } else { Ok(()) }
            }
        };
        let outcome = outcome.and_then(|()| self.flush(slot));
        match outcome {
            Ok(sent) => moved |= sent,
            Err(error) => {
                self.part(slot, &error);
                return true;
            }
        }
        if self.shared.draining.load(Ordering::Relaxed) && self.is_drained(slot) {
            let text = "this broker is leaving; go to another";
            self.part(slot, &TransportError::refused(ErrorCode::Unavailable, text));
            return true;
        }
        let due = |client: &Client| {
            let open = matches!(client.role, Role::Publisher(_) | Role::Subscriber(_));
            client.waiting || (open && client.link.has_work())
        };
        if matches!(self.clients.get(slot), Some(Some(client)) if due(client)) {
            moved |= self.receive(slot);
        }
        moved
    }

    /// True when a connection owes its client nothing that another broker could not give. Nothing more is received.
    fn is_drained(&mut self, slot: usize) -> bool {
        let Some(Some(client)) = self.clients.get_mut(slot) else { return false };
        match &client.role {
            Role::New => true,
            Role::Publisher(session) => session.acks.is_empty() && client.outbox.is_empty(),
            Role::Subscriber(_) => {
                client.outbox.drop_unsent_batches();
                !client.outbox.is_mid_way()
            }
            Role::Leaving(_) => false,
        }
    }

    fn check_standing(
        region: &embarcadero_datapath::cxl::Region<Native>,
        session: &PublisherSession,
        outbox: &mut Outbox,
    ) -> Result<(), TransportError> {
        if session.topic().is_deleted() {
            let text = format!("topic {} is deleted", session.topic().config.name);
            return Err(TransportError::refused(ErrorCode::TopicDeleted, text));
        }
        if session.hoards(WINDOW_IDLE) {
            let text = "landing windows of an idle session are taken back; connect again to get others";
            return Err(TransportError::refused(ErrorCode::Unavailable, text));
        }
        match session.acks.standing(region) {
            crate::ack::Standing::Open => Ok(()),
            crate::ack::Standing::Fenced(fenced) => {
                outbox.push(Outgoing::frame(fenced.encode()));
                let text = format!("session epoch {} is fenced", fenced.session_epoch);
                Err(TransportError::refused(ErrorCode::UnknownSession, text))
            }
        }
    }

    /// Sends what waits; watches for room when not all of it went.
    fn flush(&mut self, slot: usize) -> Result<bool, TransportError> {
        let Some(Some(client)) = self.clients.get_mut(slot) else { return Ok(false) };
        if client.outbox.is_empty() && !client.watches_room && !client.link.has_to_send() {
            return Ok(false);
        }
        let sent = client.link.send(&self.memory, &mut client.outbox)?;
        let watch = client.link.waits_for_socket(&client.outbox);
        if watch != client.watches_room {
            client.watches_room = watch;
            if !client.waiting {
                self.poller.modify(client.link.descriptor(), token(slot, client.generation), watch)?;
            }
        }
        Ok(sent > 0)
    }

    /// Ends a connection, telling the peer why if that is possible.
    fn part(&mut self, slot: usize, error: &TransportError) {
        let Some(Some(client)) = self.clients.get_mut(slot) else { return };
        if !matches!(client.role, Role::Leaving(_))
            && client.outbox.drop_batches()
            && let Some(frame) = error.frame()
        {
            tracing::debug!(%error, "refusing a connection");
            // Before the role lets go of the memory behind them.
            client.link.close_windows();
            client.outbox.push(Outgoing::bytes(frame));
            client.role = Role::Leaving(Instant::now() + FAREWELL);
            if client.waiting {
                Self::watch(&self.poller, client, slot, false);
            }
            return;
        }
        tracing::debug!(%error, "a connection ended");
        if !client.waiting {
            let _ = self.poller.remove(client.link.descriptor());
        }
        self.free(slot);
    }
}

fn no_verbs() -> TransportError {
    let text = "this broker does not offer RDMA: start it with transport: verbs, roce or dpdk (its log says if it has lost its device)";
    TransportError::refused(ErrorCode::NoTransport, text)
}

const fn token(slot: usize, generation: u32) -> u64 {
    (slot as u64) << 32 | generation as u64
}
