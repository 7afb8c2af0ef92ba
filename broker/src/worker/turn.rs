//! Turn of a connection in the loop: acknowledge, deliver, send, disconnect.

use super::connections::{Client, Role};
use super::{CLOSE_LINGER, Shared, Worker};
use crate::ack::SessionStatus;
use crate::ingest::PublisherSession;
use embarcadero_cxl::Fabric;
use embarcadero_os::{Clock, Now};
use embarcadero_transport::{Connection, Endpoint, Outbox, Outgoing, TransportError};
use embarcadero_wire::ErrorCode;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

impl<F: Fabric, E: Endpoint<F>, C: Clock> Worker<F, E, C> {
    /// Acknowledges batches that the delegation put into the broker's own order. Returns true when there were any.
    pub(super) fn local_acks(&mut self) -> bool {
        let mut any = false;
        while let Ok(ordered) = self.ordered.try_recv() {
            any = true;
            let Some(slot) = self.connections.slot_of(ordered.token) else { continue };
            if let Some(Client { role: Role::Publisher(session), outbox, .. }) = self.connections.get(slot)
                && session.wants_acks()
                && let Some(ack) = session.acks.local(&ordered)
            {
                outbox.push(Outgoing::frame(ack.encode()));
            }
        }
        any
    }

    /// Acknowledges, delivers and sends on one connection. Returns true when anything moved.
    ///
    /// `check` also looks whether the session is still open and the topic still live.
    pub(super) fn turn(&mut self, slot: usize, check: bool, now: Now) -> bool {
        let Some(client) = self.connections.get(slot) else { return false };
        let served = serve(&self.shared, client, check, now);
        let sends_memory = self.shared.lease < Duration::MAX && client.reads_region();
        if sends_memory && self.stood_still_since() {
            return true;
        }
        let mut moved = match served.and_then(|moved| Ok(moved | self.flush(slot)?)) {
            Ok(moved) => moved,
            Err(error) => {
                self.disconnect(slot, &error, now);
                return true;
            }
        };
        if self.shared.draining.load(Ordering::Relaxed) && self.is_drained(slot) {
            let text = "this broker is leaving; go to another";
            self.disconnect(slot, &TransportError::refused(ErrorCode::Unavailable, text), now);
            return true;
        }
        if self.connections.get(slot).is_some_and(|client| client.is_due()) {
            moved |= self.receive(slot, now);
        }
        moved | self.refuse_overdue(slot, now)
    }

    /// Looks at the clock again, right before memory of the region is sent. Disconnects all subscribers if this thread stood
    /// still since their batches were pinned. The leader may have ignored the pins, and given the memory to others.
    fn stood_still_since(&mut self) -> bool {
        let now = self.clock.now();
        let stood_still = self.has_stood_still(now);
        if stood_still {
            self.stood_still(now);
        }
        stood_still
    }

    /// Refuses a connection without an opening frame once its time is over. Returns true if it did, or the frame was
    /// there after all: this thread may have stood still.
    fn refuse_overdue(&mut self, slot: usize, now: Now) -> bool {
        if !self.connections.get(slot).is_some_and(|client| client.is_overdue(now.instant)) {
            return false;
        }
        if !self.receive(slot, now) {
            let error = TransportError::refused(ErrorCode::Unavailable, "no opening frame in time");
            self.disconnect(slot, &error, now);
        }
        true
    }

    /// Sends what waits in the outbox, and watches for room if some of it has to wait on. Returns true when anything
    /// was sent.
    fn flush(&mut self, slot: usize) -> Result<bool, TransportError> {
        let Some(client) = self.connections.get(slot).filter(|client| client.has_to_send()) else { return Ok(false) };
        let sent = client.link.send(&self.memory, &mut client.outbox)?;
        self.connections.watch_room(slot)?;
        Ok(sent > 0)
    }

    /// Returns true when the connection can close without loss: every batch is acknowledged and no batch is half sent.
    fn is_drained(&mut self, slot: usize) -> bool {
        let Some(client) = self.connections.get(slot) else { return false };
        match &client.role {
            Role::New(_) => true,
            Role::Publisher(session) => session.acks.is_empty() && client.outbox.is_empty(),
            Role::Subscriber(_) => {
                client.outbox.drop_unsent_batches();
                !client.outbox.is_mid_way()
            }
            Role::Leaving(_) => false,
        }
    }

    /// Ends a connection. The peer is told why if its stream of frames allows that.
    pub(super) fn disconnect(&mut self, slot: usize, error: &TransportError, now: Now) {
        let Some(client) = self.connections.get(slot) else { return };
        if !matches!(client.role, Role::Leaving(_))
            && client.outbox.drop_batches()
            && let Some(frame) = error.frame()
        {
            tracing::debug!(%error, "refusing a connection");
            // The windows close before the role lets go of the memory behind them.
            client.link.close_windows();
            client.outbox.push(Outgoing::bytes(frame));
            client.role = Role::Leaving(now.instant + CLOSE_LINGER);
            self.connections.set_waiting(slot, false);
            return;
        }
        tracing::debug!(%error, "a connection ended");
        self.free(slot, now);
    }

    /// Closes the connection in a slot at once, and frees what it holds.
    pub(super) fn free(&mut self, slot: usize, now: Now) {
        let Some(client) = self.connections.remove(slot) else { return };
        drop(client);
        // Its queue pair is gone, so that no completion is added under its number, which another queue pair may get.
        while self.complete(now) {}
        self.endpoint.forget(slot);
    }
}

/// Acknowledges or delivers, as the role of the peer asks for. Returns true when anything moved.
fn serve<F: Fabric, L: Connection<F>>(
    shared: &Shared<F>,
    client: &mut Client<F, L>,
    check: bool,
    now: Now,
) -> Result<bool, TransportError> {
    let Client { link, role, outbox, .. } = client;
    match role {
        Role::New(_) => Ok(false),
        Role::Publisher(session) => {
            let moved = acknowledge(shared, session, outbox)?;
            if check {
                check_session(shared, session, link, outbox, now.instant)?;
            }
            Ok(moved)
        }
        Role::Subscriber(session) => {
            session.poll(outbox, &shared.archive, shared.delivery_patience, now.instant).map(|queued| queued > 0)
        }
        Role::Leaving(until) => {
            if outbox.is_empty() && !link.has_to_send() {
                link.finish();
            }
            if link.discard() || now.instant > *until { Err(TransportError::Closed) } else { Ok(false) }
        }
    }
}

/// Queues the acks of batches that are committed, and durable if they have to be. Returns true when there were any.
fn acknowledge<F: Fabric>(
    shared: &Shared<F>,
    session: &mut PublisherSession<F>,
    outbox: &mut Outbox,
) -> Result<bool, TransportError> {
    if session.acks.is_empty() {
        return Ok(false);
    }
    let (region, broker) = (shared.topics.region(), shared.topics.broker());
    let sent = session.acks.poll(region, broker, |ack| outbox.push(Outgoing::frame(ack.encode())));
    let sent = sent.map_err(|error| TransportError::refused(error.code(), error.to_string()))?;
    Ok(sent > 0)
}

/// Checks that a session is still open, that its topic is still live, and that the publisher keeps no memory in vain.
fn check_session<F: Fabric, L: Connection<F>>(
    shared: &Shared<F>,
    session: &mut PublisherSession<F>,
    link: &L,
    outbox: &mut Outbox,
    now: Instant,
) -> Result<(), TransportError> {
    session.topic().check()?;
    if session.is_idle_holding(link.windows(), shared.window_idle, now) {
        let text = "landing windows of an idle session are taken back; connect again to get others";
        return Err(TransportError::refused(ErrorCode::Unavailable, text));
    }
    if session.is_late(link.arriving(), now) {
        let text = "the batch did not come in time; connect again and send it again";
        return Err(TransportError::refused(ErrorCode::Unavailable, text));
    }
    match session.acks.status(shared.topics.region()) {
        SessionStatus::Open => Ok(()),
        SessionStatus::Fenced(fenced) => {
            shared.topics.check_live(session.topic())?;
            outbox.push(Outgoing::frame(fenced.encode()));
            let text = format!("session epoch {} is fenced", fenced.session_epoch);
            Err(TransportError::refused(ErrorCode::UnknownSession, text))
        }
        SessionStatus::Damaged(damage) => Err(TransportError::refused(ErrorCode::Corrupt, damage.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Stages, WorkerSetup};
    use super::*;
    use crate::archive::{Archive, Catalog};
    use crate::caller::Caller;
    use crate::ingest::IngestLimits;
    use crate::topics::TopicTable;
    use crate::topics::tests::{region, topic};
    use bytemuck::Zeroable;
    use crossbeam_channel::unbounded;
    use embarcadero_cxl::layout::{IndexEntry, LeaderArea};
    use embarcadero_cxl::leadership::{activate_term, claim_term};
    use embarcadero_cxl::order_index::{IndexOptions, OrderIndexWriter, StreamId};
    use embarcadero_cxl::segment::PartitionAllocator;
    use embarcadero_cxl::topic_table::publish_topic;
    use embarcadero_cxl::{Native, Region};
    use embarcadero_os::idle::{Idle, PollBounds, PollPolicy};
    use embarcadero_transport::SocketEndpoint;
    use embarcadero_transport::tcp::SocketOptions;
    use embarcadero_wire::{BrokerId, FRAME_BYTES, Frame, Incarnation, Stream, Subscribe, Term, TopicId};
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    const LEADER: LeaderArea = LeaderArea(BrokerId(0));
    const HOUR: Duration = Duration::from_secs(3600);
    const BATCH_BYTES: u32 = 128;

    /// Clock that stands until it was read some times, and then jumps ahead by an hour.
    struct Jumping {
        begun: Instant,
        reads_left: Arc<AtomicU32>,
    }

    impl Clock for Jumping {
        fn now(&self) -> Now {
            let left = self.reads_left.load(Ordering::Relaxed);
            self.reads_left.store(left.saturating_sub(1), Ordering::Relaxed);
            Now { instant: if left > 0 { self.begun } else { self.begun + HOUR }, steady_us: 0, wall_us: 0 }
        }
    }

    /// Worker of a broker whose leader writes one order, and a way to connect to the worker.
    struct Bench {
        worker: Worker<Native, SocketEndpoint, Jumping>,
        index: OrderIndexWriter<Native>,
        region: Region<Native>,
        listener: TcpListener,
        reads_left: Arc<AtomicU32>,
    }

    impl Bench {
        fn new() -> Self {
            let region = region();
            claim_term(&region, LEADER, Term(1));
            publish_topic(&region, LEADER, &topic(0));
            activate_term(&region, LEADER, Term(1));
            let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BrokerId(0)));
            let id = StreamId { topic: TopicId(0), stream: Stream::GLOBAL };
            let options = IndexOptions { id, incarnation: Incarnation(1), writer: LEADER, term: Term(1) };
            let mut index = OrderIndexWriter::open(region.clone(), options, pool.clone()).unwrap();
            index.publish_tail(Term(1));
            let caller = Caller { broker: BrokerId(0), call_key: 1 };
            let shared = Shared {
                topics: Arc::new(TopicTable::new(region.clone(), BrokerId(0), pool)),
                landed: unbounded().0,
                limits: IngestLimits {
                    max_batch_bytes: 4096,
                    exhausted_wait: HOUR,
                    receive_patience: HOUR,
                    verify_body: false,
                },
                delivery_patience: HOUR,
                opening: HOUR * 2,
                window_idle: HOUR,
                archive: Archive::new(region.clone(), caller, Arc::new(Catalog::new(false))).0,
                draining: Arc::default(),
                connections: Arc::default(),
                stop: Arc::default(),
                superseded: Arc::default(),
                lease: HOUR,
                heartbeat: HOUR,
            };
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let accepting = listener.try_clone().unwrap();
            accepting.set_nonblocking(true).unwrap();
            let accepted = move || accepting.accept().ok().map(|(stream, _)| stream);
            let setup = WorkerSetup {
                index: 0,
                endpoint: SocketEndpoint::new(accepted, SocketOptions::default(), None).unwrap(),
                ordered: unbounded().1,
                idle: Idle::new(PollPolicy::Yield, PollBounds::for_host(1, 1)),
                core: None,
                stages: Stages::none(),
            };
            let reads_left = Arc::new(AtomicU32::new(u32::MAX));
            let clock = Jumping { begun: Instant::now(), reads_left: Arc::clone(&reads_left) };
            let worker = Worker::new(shared, setup, clock).unwrap();
            Self { worker, index, region, listener, reads_left }
        }

        /// One turn of the worker's loop.
        fn step(&mut self) {
            self.worker.connections.wait(Duration::ZERO, &mut self.worker.ready).unwrap();
            self.worker.poll();
        }

        /// Lets the worker run until the next frame is there. `None` once the broker has closed the connection.
        fn next_frame(&mut self, stream: &mut TcpStream) -> Option<Frame> {
            let mut bytes = [0; FRAME_BYTES];
            stream.set_nonblocking(true).unwrap();
            loop {
                match stream.peek(&mut bytes) {
                    Ok(0) => return None,
                    Ok(FRAME_BYTES) => break,
                    Ok(_) => {}
                    Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
                }
                self.step();
            }
            stream.read_exact(&mut bytes).unwrap();
            Some(Frame::decode(&bytes).unwrap())
        }

        /// Connects a subscriber, which has what is there and waits for more.
        fn subscribe(&mut self) -> TcpStream {
            let mut stream = TcpStream::connect(self.listener.local_addr().unwrap()).unwrap();
            let request = Subscribe { topic_incarnation: Incarnation(1), stream: Stream::GLOBAL, ..Subscribe::blank() };
            stream.write_all(&request.encode()).unwrap();
            assert!(matches!(self.next_frame(&mut stream), Some(Frame::SubscribeReady(_))));
            stream
        }

        /// Puts a batch into the order.
        fn order(&mut self) {
            self.index.make_room().unwrap();
            let location = self.region.layout().segment(1).0;
            self.index.append(IndexEntry { location, bytes: BATCH_BYTES, message_count: 1, ..IndexEntry::zeroed() });
            self.index.write_back_entries();
            self.index.publish_tail(Term(1));
        }
    }

    #[test]
    fn a_batch_is_not_sent_after_a_pause_that_began_when_it_was_pinned() {
        let mut bench = Bench::new();
        let mut subscribers = [bench.subscribe(), bench.subscribe()];
        bench.order();
        // The clock is read when the turn begins, and before the batch is sent.
        bench.reads_left.store(1, Ordering::Relaxed);
        for subscriber in &mut subscribers {
            assert_eq!(bench.next_frame(subscriber), None, "memory was sent that others may have");
        }
        // Whoever connects after the pause gets it.
        let mut again = bench.subscribe();
        assert!(matches!(bench.next_frame(&mut again), Some(Frame::Deliver(_))));
    }
}
