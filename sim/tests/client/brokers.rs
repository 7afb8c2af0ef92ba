//! Brokers that do what a test says. They keep one log per stream, commit each session's batches in turn, and serve
//! subscribers.

mod control;

use super::host::{BATCH_BYTES, Host};
pub(crate) use control::TOPIC;
use embarcadero_client::ControlCode;
use embarcadero_cxl::{Fabric, RegionOffset};
use embarcadero_sim::transport::SimulatedConnection;
use embarcadero_sim::{Simulated, SimulatedEndpoint, SimulatedTransport, Turbulence, World};
use embarcadero_transport::{
    Connection, Endpoint, Landing, Outbox, Outgoing, Placement, Received, TransportError, WindowPlacement,
};
use embarcadero_wire::batch::{BatchView, check_body};
use embarcadero_wire::{
    Ack, BatchHeader, BrokerId, ClientId, Deliver, Epoch, ErrorCode, FRAME_BYTES, Fenced, Frame, OpenPublish, Order,
    Position, PublishReady, StartKind, Stream, Subscribe, SubscribeReady, encode_error,
};
use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};

/// Number of batches that a session may have in flight.
const WINDOW: u32 = 16;
/// Messages that a connection carries at a time in each direction.
const ROOM: usize = 8;
/// Most frames or batches that a broker takes from a connection in a turn.
const BUDGET: usize = 4;

/// Returns the number that a message holds.
pub(crate) fn number_of(message: &[u8]) -> u64 {
    u64::from_le_bytes(*message.first_chunk().unwrap())
}

/// Batch in a log.
pub(crate) struct Entry {
    pub(crate) first_offset: u64,
    pub(crate) header: BatchHeader,
    /// Header and body.
    pub(crate) bytes: Vec<u8>,
    pub(crate) broker: BrokerId,
}

impl Entry {
    fn end(&self) -> u64 {
        self.first_offset + u64::from(self.header.message_count)
    }

    /// Returns the numbers that the messages hold.
    pub(crate) fn numbers(&self) -> Vec<u64> {
        let view = BatchView::parse(&self.header, &self.bytes[FRAME_BYTES..]).unwrap();
        view.messages().map(number_of).collect()
    }
}

/// Session as the brokers know it.
pub(crate) struct Session {
    pub(crate) epoch: Epoch,
    /// True until the epoch ends.
    pub(crate) open: bool,
    ack_level: u32,
    /// Sequence that commits next.
    pub(crate) next: u64,
    /// Batches that wait for those before them.
    held: BTreeMap<u64, (BatchHeader, Vec<u8>, BrokerId)>,
    /// First offset of each batch that is committed.
    pub(crate) committed: BTreeMap<u64, u64>,
}

/// Role of a connection, which its first frame tells.
enum Role {
    New,
    Publisher {
        client: ClientId,
        epoch: Epoch,
        /// Sequences that are not acknowledged on this connection, in the order in which they came.
        waiting: VecDeque<u64>,
    },
    Subscriber {
        stream: Stream,
        /// Index of the next entry to deliver.
        next: usize,
    },
    /// Refused: what is left to send is sent.
    Refused,
}

pub(crate) struct Link {
    connection: SimulatedConnection,
    outbox: Outbox,
    role: Role,
}

/// One broker.
pub(crate) struct Broker {
    pub(crate) id: BrokerId,
    address: SocketAddr,
    endpoint: SimulatedEndpoint<Simulated>,
    links: Vec<Link>,
    /// True while it does nothing, and its connections stay.
    pub(crate) mute: bool,
    /// Number of connections that were made to it.
    pub(crate) accepted: u64,
}

/// Answers of the control plane.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answers {
    True,
    /// Calls wait.
    None,
    /// Calls are refused.
    Refusal(ControlCode),
}

/// All brokers, and what they share.
pub(crate) struct Brokers {
    pub(crate) order: Order,
    memory: Simulated,
    network: SimulatedTransport<Simulated>,
    pub(crate) all: Vec<Broker>,
    pub(crate) sessions: BTreeMap<ClientId, Session>,
    pub(crate) logs: BTreeMap<Stream, Vec<Entry>>,
    pub(crate) answers: Answers,
    /// True while batches are committed and no ack is sent.
    pub(crate) withholds_acks: bool,
    /// First offset of each batch that is damaged, and the number of deliveries for which it stays so.
    pub(crate) damaged: BTreeMap<u64, u32>,
    /// Number of times that a session was asked for.
    pub(crate) asked_to_open: u64,
    /// Sessions that were closed.
    pub(crate) closed: Vec<ClientId>,
}

/// Landing for one batch, which is taken out of the region at once.
#[derive(Default)]
struct Tray(Option<BatchHeader>);

impl Landing for Tray {
    fn place(&mut self, header: &BatchHeader) -> Placement {
        assert!(header.batch_bytes() <= BATCH_BYTES as u64, "{header:?} is larger than a batch may be");
        Placement::At(RegionOffset(0))
    }

    fn grant_window(&mut self, _: u64, _: bool) -> WindowPlacement {
        unreachable!("the simulated transport has no windows")
    }

    fn admit(&mut self, _: &BatchHeader, _: RegionOffset) -> Placement {
        unreachable!("the simulated transport has no windows")
    }

    fn complete(&mut self, header: BatchHeader, _: RegionOffset, _: bool) -> Result<(), TransportError> {
        self.0 = Some(header);
        Ok(())
    }
}

impl Link {
    fn refuse(&mut self, code: ErrorCode, text: &str, detail: u64) {
        self.outbox.push(Outgoing::bytes(encode_error(code, text, detail)));
        self.role = Role::Refused;
    }

    fn push(&mut self, frame: [u8; FRAME_BYTES]) {
        self.outbox.push(Outgoing::frame(frame));
    }
}

impl Brokers {
    pub(crate) fn new(count: u32, order: Order) -> Self {
        let memory = Simulated::join(&World::new(64 << 10, 1, Turbulence::CALM, None), || {});
        let mut brokers = Self {
            order,
            memory,
            network: SimulatedTransport::new(ROOM),
            all: Vec::new(),
            sessions: BTreeMap::new(),
            logs: BTreeMap::new(),
            answers: Answers::True,
            withholds_acks: false,
            damaged: BTreeMap::new(),
            asked_to_open: 0,
            closed: Vec::new(),
        };
        (0..count).for_each(|_| brokers.start());
        brokers
    }

    pub(crate) fn network(&self) -> SimulatedTransport<Simulated> {
        self.network.clone()
    }

    /// Starts one more broker.
    pub(crate) fn start(&mut self) {
        let id = BrokerId(self.all.len() as u32);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 7000 + id.0 as u16));
        let endpoint = self.network.listen(address);
        self.all.push(Broker { id, address, endpoint, links: Vec::new(), mute: false, accepted: 0 });
    }

    /// Stops a broker: its connections break, and others are refused.
    pub(crate) fn stop(&mut self, index: usize) {
        self.network.close(self.all[index].address);
        self.all[index].links.clear();
    }

    /// Moves a broker to another address, where it starts again.
    pub(crate) fn restart_elsewhere(&mut self, index: usize) {
        self.stop(index);
        let broker = &mut self.all[index];
        broker.address.set_port(broker.address.port() + 100);
        broker.endpoint = self.network.listen(broker.address);
    }

    /// Number of connections of a broker.
    pub(crate) fn links(&self, index: usize) -> usize {
        self.all[index].links.len()
    }

    /// Breaks a connection of a broker. What it has not read is lost, and what it has sent may come.
    pub(crate) fn cut(&mut self, index: usize, link: usize) {
        self.all[index].links.swap_remove(link);
    }

    /// Log of the global stream.
    pub(crate) fn log(&self) -> &[Entry] {
        self.logs.get(&Stream::GLOBAL).map_or(&[], Vec::as_slice)
    }

    /// Refuses a connection of a broker.
    pub(crate) fn refuse(&mut self, index: usize, link: usize, code: ErrorCode) {
        self.all[index].links[link].refuse(code, "as the test says", 0);
    }

    /// Sends a frame on every connection of a client that publishes.
    pub(crate) fn tell(&mut self, client: ClientId, frame: [u8; FRAME_BYTES]) {
        for link in self.all.iter_mut().flat_map(|broker| &mut broker.links) {
            if matches!(link.role, Role::Publisher { client: of, .. } if of == client) {
                link.push(frame);
            }
        }
    }

    /// Ends the epoch of a session. Batches that wait are forgotten.
    pub(crate) fn fence(&mut self, client: ClientId) {
        let session = self.sessions.get_mut(&client).unwrap();
        session.open = false;
        session.held.clear();
        let fenced = Fenced { committed: session.next, session_epoch: session.epoch, ..Fenced::blank() };
        self.tell(client, fenced.encode());
    }

    /// Does a turn of every broker, and answers calls.
    pub(crate) fn turn(&mut self, host: &Host) {
        for index in 0..self.all.len() {
            if !self.all[index].mute {
                self.serve(index);
            }
        }
        while self.answers != Answers::None
            && let Some(request) = host.control.take()
        {
            self.answer(request);
        }
    }

    fn serve(&mut self, index: usize) {
        let broker = &mut self.all[index];
        while let Some(connection) = broker.endpoint.accept() {
            let connection = connection.unwrap();
            broker.links.push(Link { connection, outbox: Outbox::default(), role: Role::New });
            broker.accepted += 1;
        }
        let mut links = std::mem::take(&mut broker.links);
        links.retain_mut(|link| self.serve_link(index, link));
        self.all[index].links = links;
    }

    /// Serves a connection. Returns false once it is over.
    fn serve_link(&mut self, index: usize, link: &mut Link) -> bool {
        let mut gone = false;
        for _ in 0..BUDGET {
            if matches!(link.role, Role::Refused) {
                break;
            }
            let mut tray = Tray::default();
            match link.connection.receive(&self.memory, &mut tray, 1) {
                Ok(Received::Frame(frame)) => self.take_frame(index, link, &frame),
                Ok(Received::More) => self.take_batch(index, link, tray.0.unwrap()),
                Ok(Received::Nothing) => break,
                Ok(Received::Waiting) => unreachable!("the tray has room"),
                Err(error) => {
                    assert!(matches!(error, TransportError::Closed), "{error}");
                    gone = true;
                    break;
                }
            }
        }
        self.acknowledge(link);
        self.deliver(link);
        let sent = link.connection.send(&self.memory, &mut link.outbox);
        let over = matches!(link.role, Role::Refused) && link.outbox.is_empty();
        !gone && sent.is_ok() && !over
    }

    fn take_frame(&mut self, index: usize, link: &mut Link, frame: &Frame) {
        match (&link.role, frame) {
            (Role::New, Frame::OpenPublish(open)) => self.open_publish(index, link, open),
            (Role::New, Frame::Subscribe(request)) => self.subscribe(index, link, request),
            (Role::Subscriber { stream, .. }, Frame::Position(_)) => {
                let next_offset = self.end_of(*stream);
                link.push(Position { next_offset, ..Position::blank() }.encode());
            }
            (_, frame) => panic!("{frame:?} is not due"),
        }
    }

    fn open_publish(&mut self, index: usize, link: &mut Link, open: &OpenPublish) {
        let session = self.sessions.get(&open.client_id);
        let Some(session) = session.filter(|session| session.open && session.epoch == open.session_epoch) else {
            return link.refuse(ErrorCode::UnknownSession, "no such session", 0);
        };
        let (committed, broker) = (session.next, self.all[index].id);
        let ready = PublishReady {
            committed,
            max_batch_bytes: BATCH_BYTES as u64,
            window_batches: WINDOW,
            broker,
            ..PublishReady::blank()
        };
        link.push(ready.encode());
        let waiting = (open.resume_from..committed).collect();
        link.role = Role::Publisher { client: open.client_id, epoch: open.session_epoch, waiting };
    }

    fn take_batch(&mut self, index: usize, link: &mut Link, header: BatchHeader) {
        let mut bytes = vec![0; header.batch_bytes() as usize];
        self.memory.read_bytes(RegionOffset(0), &mut bytes);
        check_body(&header, &bytes[FRAME_BYTES..]).unwrap();
        let Role::Publisher { client, epoch, waiting } = &mut link.role else { panic!("{header:?} is not due") };
        assert_eq!((header.client_id, header.session_epoch), (*client, *epoch), "of another session");
        let session = self.sessions.get_mut(client);
        let Some(session) = session.filter(|session| session.open && session.epoch == *epoch) else {
            return link.refuse(ErrorCode::UnknownSession, "the epoch has ended", 0);
        };
        let is_global = self.order.is_global();
        // Who is sent no acks does not know where the window begins.
        let has_window = is_global && session.ack_level > 0;
        assert!(!has_window || header.sequence < session.next + u64::from(WINDOW), "{header:?} is beyond the window");
        waiting.push_back(header.sequence);
        let broker = self.all[index].id;
        if !is_global {
            let (sequence, stream) = (header.sequence, Stream::of(broker));
            let first_offset = self.append(stream, header, bytes, broker);
            self.sessions.get_mut(&header.client_id).unwrap().committed.insert(sequence, first_offset);
            return;
        }
        if header.sequence >= session.next {
            session.held.insert(header.sequence, (header, bytes, broker));
        }
        self.commit(header.client_id);
    }

    /// Commits the batches of a session that are due.
    fn commit(&mut self, client: ClientId) {
        loop {
            let session = self.sessions.get_mut(&client).unwrap();
            let sequence = session.next;
            let Some((header, bytes, broker)) = session.held.remove(&sequence) else { return };
            session.next += 1;
            let first_offset = self.append(Stream::GLOBAL, header, bytes, broker);
            self.sessions.get_mut(&client).unwrap().committed.insert(sequence, first_offset);
        }
    }

    fn append(&mut self, stream: Stream, header: BatchHeader, bytes: Vec<u8>, broker: BrokerId) -> u64 {
        let first_offset = self.end_of(stream);
        self.logs.entry(stream).or_default().push(Entry { first_offset, header, bytes, broker });
        first_offset
    }

    fn end_of(&self, stream: Stream) -> u64 {
        self.logs.get(&stream).and_then(|log| log.last()).map_or(0, Entry::end)
    }

    /// Acknowledges what is committed, in the order in which it came.
    fn acknowledge(&mut self, link: &mut Link) {
        let Role::Publisher { client, epoch, waiting } = &mut link.role else { return };
        let Some(session) = self.sessions.get(client) else { return };
        if self.withholds_acks || session.ack_level == 0 {
            return;
        }
        while let Some(sequence) = waiting.front().copied()
            && let Some(first_offset) = session.committed.get(&sequence).copied()
        {
            waiting.pop_front();
            let committed = if self.order.is_global() { session.next } else { 0 };
            let ack = Ack { sequence, first_offset, committed, session_epoch: *epoch, ..Ack::blank() };
            link.outbox.push(Outgoing::frame(ack.encode()));
        }
    }

    fn subscribe(&mut self, index: usize, link: &mut Link, request: &Subscribe) {
        let end = self.end_of(request.stream);
        if request.stream.broker().is_some_and(|own| own != self.all[index].id) {
            return link.refuse(ErrorCode::UnknownTopic, "the stream is another broker's", 0);
        }
        let log = self.logs.get(&request.stream).map_or(&[][..], Vec::as_slice);
        let start = match request.start_kind {
            kind if kind == StartKind::Offset.code() => request.start,
            kind if kind == StartKind::Earliest.code() => 0,
            kind if kind == StartKind::Latest.code() => end,
            // Nothing was ordered at a time of its own: everything is older than the subscription.
            _ => 0,
        };
        let next = log.iter().position(|entry| entry.end() > start).unwrap_or(log.len());
        let ready = SubscribeReady { start_offset: start, next_offset: end, ..SubscribeReady::blank() };
        link.push(ready.encode());
        link.role = Role::Subscriber { stream: request.stream, next };
    }

    /// Delivers what is there.
    fn deliver(&mut self, link: &mut Link) {
        let Role::Subscriber { stream, next } = &mut link.role else { return };
        let log = self.logs.get(stream).map_or(&[][..], Vec::as_slice);
        while link.outbox.len() < 2
            && let Some(entry) = log.get(*next)
        {
            *next += 1;
            let deliver = Deliver {
                first_offset: entry.first_offset,
                batch_bytes: entry.bytes.len() as u32,
                message_count: entry.header.message_count,
                broker: entry.broker,
                stream: *stream,
                client_id: entry.header.client_id,
                sequence: entry.header.sequence,
                ..Deliver::blank()
            };
            let mut bytes = entry.bytes.clone();
            if let Some(times @ 1..) = self.damaged.get_mut(&entry.first_offset) {
                *times -= 1;
                bytes[FRAME_BYTES] ^= 1;
            }
            link.outbox.push(Outgoing::copied(&deliver.encode(), &bytes).unwrap());
        }
    }
}
