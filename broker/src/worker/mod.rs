//! Polling thread, which moves bytes for its connections and runs the ordering stages that it was given.

mod connections;
mod stages;
mod turn;

pub use crate::ingest::IngestLimits;
pub use stages::{LeaderStages, Stages};

use crate::archive::Archive;
use crate::delegation::{Landed, OrderedLocally, Origin};
use crate::delivery::SubscriberSession;
use crate::ingest::{PublisherLanding, PublisherSession};
use crate::topics::TopicTable;
use connections::{Connections, Role};
use crossbeam_channel::{Receiver, Sender};
use embarcadero_cxl::Fabric;
use embarcadero_os::idle::{Idle, Step};
use embarcadero_os::thread::prepare_polling_thread;
use embarcadero_os::{Clock, Now, Ready};
use embarcadero_transport::{Connection, Endpoint, Outgoing, Received, TransportError};
use embarcadero_wire::{ErrorCode, Frame, OpenPublish};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Largest number of batches that one connection receives before others have their turn.
const RECEIVE_BATCHES: usize = 8;
/// Time that an error may take to reach its client before the connection is cut.
const CLOSE_LINGER: Duration = Duration::from_secs(10);
/// Time between two looks at what rarely changes: sessions, topics and the RDMA device.
const IDLE_CHECK: Duration = Duration::from_millis(10);
/// Token of the endpoint's descriptor.
const COMPLETIONS: u64 = u64::MAX;

/// Data that all workers of a broker share.
#[derive(Clone)]
pub struct Shared<F: Fabric> {
    /// Topics of the broker.
    pub topics: Arc<TopicTable<F>>,
    /// Channel to the delegation.
    pub landed: Sender<Landed<F>>,
    /// Limits of publishers.
    pub limits: IngestLimits,
    /// Time for which batches that a NIC is sending may keep memory that retention wants.
    pub delivery_patience: Duration,
    /// Time in which a connection must have sent its opening frame.
    pub opening: Duration,
    /// Silence after which a publisher loses landing windows that keep memory from being reused.
    pub window_idle: Duration,
    /// Archive to ask for batches that the region no longer holds.
    pub archive: Archive,
    /// Set when the broker is about to stop: clients are sent to other brokers.
    pub draining: Arc<AtomicBool>,
    /// Number of connections of all workers.
    pub connections: Arc<AtomicUsize>,
    /// Set when the broker stops.
    pub stop: Arc<AtomicBool>,
    /// Set when a later process has this broker's id.
    pub superseded: Arc<AtomicBool>,
    /// Silence after which the leader ignores this broker's pins; [`Duration::MAX`] where it never does.
    pub lease: Duration,
    /// Time between heartbeats.
    pub heartbeat: Duration,
}

/// Settings of a single worker.
pub struct WorkerSetup<F: Fabric, E> {
    /// Index among the broker's workers.
    pub index: usize,
    /// Source of the connections to serve.
    pub endpoint: E,
    /// Channel of the batches that the delegation ordered, for their acks.
    pub ordered: Receiver<OrderedLocally>,
    /// Way to wait when there is nothing to do.
    pub idle: Idle,
    /// Core to run on; `None` leaves it to the kernel.
    pub core: Option<usize>,
    /// Ordering stages that this thread runs.
    pub stages: Stages<F>,
}

/// Polling thread of a broker.
pub struct Worker<F: Fabric, E: Endpoint<F>, C> {
    index: usize,
    shared: Shared<F>,
    memory: F,
    clock: C,
    connections: Connections<F, E::Connection>,
    endpoint: E,
    ready: Vec<Ready>,
    ordered: Receiver<OrderedLocally>,
    idle: Idle,
    core: Option<usize>,
    stages: Stages<F>,
    /// Time of the last heartbeat and maintenance.
    maintained: Instant,
    /// Time of the last look at what rarely changes.
    checked: Instant,
}

impl<F: Fabric, E: Endpoint<F>, C: Clock> Worker<F, E, C> {
    /// Returns a worker that has no connections yet.
    ///
    /// # Errors
    /// [`io::Error`] when sockets cannot be polled.
    pub fn new(shared: Shared<F>, setup: WorkerSetup<F, E>, clock: C) -> io::Result<Self> {
        let WorkerSetup { index, endpoint, ordered, idle, core, stages } = setup;
        let connections = Connections::new(Arc::clone(&shared.connections))?;
        if let Some(descriptor) = endpoint.descriptor() {
            connections.watch_other(descriptor, COMPLETIONS)?;
        }
        let now = clock.now().instant;
        Ok(Self {
            index,
            memory: shared.topics.region().fabric().clone(),
            shared,
            clock,
            connections,
            endpoint,
            ready: Vec::with_capacity(64),
            ordered,
            idle,
            core,
            stages,
            maintained: now,
            checked: now,
        })
    }

    /// Returns the ordering stages.
    #[must_use]
    pub fn stages(&self) -> &Stages<F> {
        &self.stages
    }

    /// Runs until the broker stops, and waits in between as its settings say.
    pub(crate) fn run(mut self) {
        if let Err(error) = prepare_polling_thread(self.core) {
            tracing::error!(worker = self.index, %error, "the thread could not be pinned");
        }
        let mut timeout = Duration::ZERO;
        while !self.shared.stop.load(Ordering::Relaxed) {
            if !timeout.is_zero() && self.has_completions() {
                timeout = Duration::ZERO;
            }
            if let Err(error) = self.connections.wait(timeout, &mut self.ready) {
                tracing::error!(worker = self.index, %error, "waiting for sockets failed");
                return;
            }
            if self.poll() {
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

    /// Makes the device wake the thread, which is about to sleep, and looks a last time. Returns true when there is
    /// something to do.
    fn has_completions(&mut self) -> bool {
        if let Err(error) = self.endpoint.arm() {
            tracing::error!(worker = self.index, %error, "the RDMA device cannot be waited for");
        }
        let now = self.clock.now();
        self.complete(now)
    }

    /// Runs one turn of the loop: receive, order, acknowledge, deliver. Returns true when anything moved.
    pub fn poll(&mut self) -> bool {
        let now = self.clock.now();
        if self.has_stood_still(now) {
            self.stood_still(now);
        }
        let mut moved = self.accept(now);
        moved |= self.complete(now);
        let ready = std::mem::take(&mut self.ready);
        for ready in ready.iter().filter(|ready| ready.readable) {
            moved |= self.on_readable(*ready, now);
        }
        self.ready = ready;
        moved |= self.stages.poll(now.times());
        moved |= self.local_acks();
        let check = now.instant.saturating_duration_since(self.checked) >= IDLE_CHECK;
        if check {
            self.checked = now.instant;
            self.check_device(now);
        }
        for slot in self.connections.slots() {
            moved |= self.turn(slot, check, now);
        }
        if now.instant.saturating_duration_since(self.maintained) >= self.shared.heartbeat {
            self.maintained = now.instant;
            self.maintain(now);
        }
        moved
    }

    /// Receives from a connection that has something, or ends one that is not listened to and whose peer is gone.
    /// Returns true when anything came, or the connection ended.
    fn on_readable(&mut self, ready: Ready, now: Now) -> bool {
        let Some(slot) = self.connections.slot_of(ready.token) else { return false };
        if self.connections.get(slot).is_some_and(|client| !client.waiting) {
            return self.receive(slot, now);
        }
        if ready.hung_up {
            self.disconnect(slot, &TransportError::Closed, now);
        }
        ready.hung_up
    }

    /// Returns true if this thread has not shown for a lease that it runs.
    fn has_stood_still(&self, now: Now) -> bool {
        now.instant.saturating_duration_since(self.maintained) >= self.shared.lease
    }

    /// Disconnects all subscribers after this thread stood still for a lease.
    ///
    /// The leader may have given back memory meanwhile that they were about to read.
    fn stood_still(&mut self, now: Now) {
        tracing::warn!(worker = self.index, "stood still beyond broker_lease_ms: subscribers have to connect again");
        for slot in self.connections.slots() {
            if self.connections.get(slot).is_some_and(|client| matches!(client.role, Role::Subscriber(_))) {
                self.free(slot, now);
            }
        }
        self.maintained = now.instant;
    }

    /// Shows who waits, runs the stages' maintenance, and stops the broker once a later process has its id.
    fn maintain(&mut self, now: Now) {
        self.connections.show_waits();
        if self.stages.maintain(now.times()).is_err() {
            tracing::error!("another process has this broker's id: it was taken for dead, and stops");
            self.shared.superseded.store(true, Ordering::Relaxed);
            self.shared.stop.store(true, Ordering::Relaxed);
        }
    }

    /// Hands completions to their connections. Returns true when there were any.
    fn complete(&mut self, now: Now) -> bool {
        match self.endpoint.complete(&mut self.connections) {
            Ok(count) => count > 0,
            Err(error) => {
                self.on_device_error(&error, now);
                true
            }
        }
    }

    /// Ends the connections of a device that can no longer be used.
    fn on_device_error(&mut self, error: &io::Error, now: Now) {
        tracing::error!(worker = self.index, %error, "the RDMA device is lost; its connections close");
        for slot in self.endpoint.lose_device() {
            self.disconnect(slot, &TransportError::Closed, now);
        }
    }

    /// Looks whether the device is still there.
    fn check_device(&mut self, now: Now) {
        let announce = |device: &str, event: String| tracing::warn!(device, event, "the RDMA device announces");
        if let Err(error) = self.endpoint.take_events(announce) {
            self.on_device_error(&error, now);
        }
    }

    /// Takes in new connections. Returns true when there were any.
    fn accept(&mut self, now: Now) -> bool {
        let mut any = false;
        while let Some(accepted) = self.endpoint.accept() {
            any = true;
            if self.shared.draining.load(Ordering::Relaxed) {
                continue;
            }
            if let Err(error) =
                accepted.and_then(|link| self.connections.insert(link, now.instant + self.shared.opening))
            {
                tracing::warn!(%error, "a connection cannot be served");
            }
        }
        any
    }

    /// Receives what a connection has, within its share. Returns true when anything came.
    fn receive(&mut self, slot: usize, now: Now) -> bool {
        let draining = self.shared.draining.load(Ordering::Relaxed);
        let Some(client) = self.connections.get(slot) else { return false };
        let (token, behind) = (client.token(), client.is_behind());
        let session = match &mut client.role {
            // `turn` reads and discards what still comes.
            Role::Leaving(_) => return false,
            _ if draining => return false,
            // Whatever else it sends has an answer, which would wait for it in memory.
            _ if behind => {
                self.connections.set_waiting(slot, true);
                return false;
            }
            Role::Publisher(session) => Some(&mut **session),
            Role::New(_) | Role::Subscriber(_) => None,
        };
        let origin = Origin { worker: self.index, token };
        let topics = &self.shared.topics;
        let mut landing = PublisherLanding { topics, session, origin, now: now.instant, taken: 0 };
        let received = client.link.receive(&self.memory, &mut landing, RECEIVE_BATCHES);
        let moved = landing.taken > 0;
        let outcome = match received {
            Ok(Received::Nothing) => {
                self.connections.set_waiting(slot, false);
                return moved;
            }
            Ok(Received::Waiting) => {
                self.connections.set_waiting(slot, true);
                return moved;
            }
            Ok(Received::More) => return true,
            Ok(Received::Frame(frame)) => self.take_frame(slot, frame, now),
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            self.disconnect(slot, &error, now);
        }
        true
    }

    /// Takes a control frame.
    fn take_frame(&mut self, slot: usize, frame: Frame, now: Now) -> Result<(), TransportError> {
        let Some(client) = self.connections.get(slot) else { return Ok(()) };
        match (&mut client.role, frame) {
            (Role::New(_), Frame::RdmaConnect(request)) => self.endpoint.upgrade(slot, &mut client.link, &request),
            (Role::New(_), Frame::OpenPublish(open)) => self.open_publisher(slot, open, now),
            (Role::New(_), Frame::Subscribe(request)) => {
                client.role = Role::Subscriber(Box::new(SubscriberSession::open(&self.shared.topics, request)?));
                Ok(())
            }
            (Role::Subscriber(session), Frame::Position(_)) => session.position(&mut client.outbox),
            (_, frame) => {
                let text = format!("unexpected frame of kind {}", frame.kind());
                Err(TransportError::refused(ErrorCode::BadFrame, text))
            }
        }
    }

    /// Opens a publisher's session, and repeats the acks that the publisher may have missed.
    fn open_publisher(&mut self, slot: usize, open: OpenPublish, now: Now) -> Result<(), TransportError> {
        let Self { shared, connections, .. } = self;
        let Some(client) = connections.get(slot) else { return Ok(()) };
        let landed = shared.landed.clone();
        let (mut session, ready) = PublisherSession::open(&shared.topics, open, shared.limits, landed, now.instant)?;
        client.outbox.push(Outgoing::frame(ready.encode()));
        if session.wants_acks() && session.topic().config.order.is_global() {
            let outbox = &mut client.outbox;
            let replayed = session.acks.replay(shared.topics.region(), session.resume_from(), |ack| {
                outbox.push(Outgoing::frame(ack.encode()));
            });
            replayed.map_err(|error| TransportError::refused(error.code(), error.to_string()))?;
        }
        client.role = Role::Publisher(Box::new(session));
        Ok(())
    }
}
