//! A client, which publishes in one session. It resends batches that it hears nothing of, and opens the next epoch when its
//! session is fenced. Sometimes it crashes, and forgets everything but its id.

use super::fate::{Clock, one_in, random};
use super::host::message;
use super::link::{RackPublisher, RackTransport, address};
use super::network::{Answer, Request, id_of};
use super::nic::{Nic, Port};
use super::{COPIES, HOSTS, Rack, TOPIC};
use embarcadero_cxl::session_table::Session;
use embarcadero_sim::Power;
use embarcadero_transport::{LinkError, PublisherLink, SendBuffer, Transport};
use embarcadero_wire::batch::{BatchBuilder, BatchOrigin};
use embarcadero_wire::{ClientId, Epoch, ErrorCode, Frame, OpenPublish, SessionToken, UNKNOWN_OFFSET};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

/// Bytes of a batch's buffer.
const BUFFER_BYTES: usize = 1024;
/// Most batches that a client has under way.
const WINDOW: usize = 8;
/// Time for which a client waits for an answer, in microseconds of its own clock.
const PATIENCE_US: u64 = 8000;

/// Connection to a broker, and the batches that are to be sent on it.
struct Connection {
    link: RackPublisher,
    session: (ClientId, Epoch),
    due: VecDeque<u64>,
}

pub(crate) struct Client {
    id: usize,
    rack: Arc<Rack>,
    clock: Clock,
    power: Power,
    transport: RackTransport,
    session: Option<Session>,
    /// Token of its last session.
    token: SessionToken,
    /// Number of sessions that hosts have forgotten.
    lost: u64,
    /// True if it may have batches in the last session.
    resume: bool,
    attempt: u64,
    /// Host that it publishes to.
    broker: usize,
    connections: [Option<Connection>; HOSTS],
    heard_us: u64,
    next_sequence: u64,
    /// Batches that are not acknowledged: sequence to content.
    under_way: BTreeMap<u64, u64>,
    /// Content of the next batch.
    next: u64,
    /// Content after that of the last batch.
    end: u64,
}

/// Makes a client's power supply, and its view of the network.
fn plug_in(id: usize, rack: &Arc<Rack>, clock: Clock) -> (Power, RackTransport) {
    let power = Power::default();
    let nic = || (Arc::new(Mutex::new(Nic::new(Port::of_client(id), &rack.network, None))), clock);
    let transport = rack.transport.of_client(&power, rack.has_nics.then(nic));
    (power, transport)
}

impl Client {
    pub(crate) fn new(id: usize, rack: &Arc<Rack>, batches: u64) -> Self {
        let clock = Clock::drifting();
        let (power, transport) = plug_in(id, rack, clock);
        Self {
            id,
            rack: Arc::clone(rack),
            clock,
            power,
            transport,
            session: None,
            token: SessionToken::NONE,
            lost: 0,
            resume: false,
            attempt: 0,
            broker: 0,
            connections: Default::default(),
            heard_us: 0,
            next_sequence: 0,
            under_way: BTreeMap::new(),
            next: 0,
            end: batches,
        }
    }

    /// Returns true when it has published everything, and all of it is acknowledged.
    pub(crate) fn is_done(&self) -> bool {
        self.next == self.end && self.under_way.is_empty()
    }

    /// Describes what it waits for, for a report.
    pub(crate) fn state(&self) -> String {
        format!(
            "client {}: {:?} under way, next {} of {}, {:?}",
            self.id, self.under_way, self.next, self.end, self.session
        )
    }

    /// Crashes and starts again. It no longer knows of batches that were under way.
    pub(crate) fn crash(&mut self) {
        self.rack.history.count(|tally| &mut tally.client_crashes);
        self.give_up();
    }

    /// Forgets everything but its id and what it is to publish next.
    fn give_up(&mut self) {
        if one_in(2) {
            self.power.fail();
        }
        self.connections = Default::default();
        (self.power, self.transport) = plug_in(self.id, &self.rack, self.clock);
        self.session = None;
        (self.resume, self.token) = (false, SessionToken::NONE);
        self.under_way.clear();
        self.attempt += 1;
    }

    pub(crate) fn round(&mut self) {
        while let Some(answer) = self.rack.network.take_answer(self.id) {
            self.heed(answer);
        }
        for host in 0..HOSTS {
            self.drive(host);
        }
        let late = self.clock.now_us().saturating_sub(self.heard_us) > PATIENCE_US;
        if self.session.is_none() {
            if late {
                self.ask_for_session();
            }
            return;
        }
        if late && !self.under_way.is_empty() {
            self.heard_us = self.clock.now_us();
            self.connections[self.broker] = None;
            self.broker = random(0..HOSTS as u64) as usize;
            self.send_again();
        }
        while self.under_way.len() < WINDOW && self.next < self.end {
            self.under_way.insert(self.next_sequence, self.next);
            self.send(self.next_sequence);
            (self.next_sequence, self.next) = (self.next_sequence + 1, self.next + 1);
            if one_in(4) {
                // Striped over brokers.
                self.broker = random(0..HOSTS as u64) as usize;
            }
        }
    }

    fn ask_for_session(&mut self) {
        self.heard_us = self.clock.now_us();
        self.attempt += 1;
        // The leader is one of them.
        for host in 0..HOSTS {
            let Self { resume, token, attempt, .. } = *self;
            let id = id_of(self.id, self.lost);
            self.rack.network.request(host, Request::OpenSession { id, resume, token, attempt });
        }
    }

    /// Sends a batch on the connection to the broker, and connects first if there is none.
    fn send(&mut self, sequence: u64) {
        let Some(session) = self.session else { return };
        let name = (session.client_id, session.epoch);
        let place = &mut self.connections[self.broker];
        if place.as_ref().is_none_or(|connection| connection.session != name) {
            let open = OpenPublish {
                client_id: session.client_id,
                resume_from: self.under_way.keys().next().copied().unwrap_or(sequence),
                session_epoch: session.epoch,
                session_slot: session.slot,
                topic: TOPIC.0,
                topic_incarnation: TOPIC.1,
                ack_level: session.ack_level.into(),
                token: session.token,
                ..OpenPublish::blank()
            };
            let link = self.transport.publish(address(self.broker), &super::options(), &open).ok();
            self.rack.history.count(|tally| &mut tally.links);
            *place = link.map(|link| Connection { link, session: name, due: VecDeque::new() });
        }
        if let Some(connection) = place {
            connection.due.push_back(sequence);
        }
    }

    fn send_again(&mut self) {
        let resend: Vec<_> = self.under_way.keys().copied().collect();
        resend.into_iter().for_each(|sequence| self.send(sequence));
    }

    /// Sends what is due on the connection to a host, and takes what came.
    fn drive(&mut self, host: usize) {
        let Some(mut connection) = self.connections[host].take() else { return };
        let mut frames = Vec::new();
        let polled = connection.link.poll(&mut frames);
        for frame in frames {
            self.take_frame(frame, connection.session);
        }
        if let Err(LinkError::Refused { code: Some(ErrorCode::UnknownSession), .. }) = polled
            && self.is_own(connection.session)
        {
            self.end_session();
        }
        if let Err(LinkError::Refused { code: Some(ErrorCode::NotReplicated), .. }) = polled {
            self.give_up();
            return;
        }
        if polled.is_err() || self.send_due(&mut connection).is_err() {
            self.rack.history.count(|tally| &mut tally.broken_links);
            return;
        }
        self.connections[host] = Some(connection);
    }

    /// Hands batches that are due to the transport, as far as it has room.
    fn send_due(&self, connection: &mut Connection) -> std::io::Result<()> {
        let Some(session) = self.session.filter(|own| (own.client_id, own.epoch) == connection.session) else {
            return Ok(());
        };
        while let Some(sequence) = connection.due.front() {
            if let Some(content) = self.under_way.get(sequence) {
                let origin = BatchOrigin {
                    client_id: session.client_id,
                    session_epoch: session.epoch,
                    session_slot: session.slot,
                    topic: TOPIC.0,
                    topic_incarnation: TOPIC.1,
                };
                let mut batch = BatchBuilder::in_buffer(SendBuffer::new(BUFFER_BYTES)?);
                batch.push(&message(session.client_id, *content));
                batch.seal(&origin, *sequence, true);
                if connection.link.write(&mut batch, 0)? == 0 {
                    break;
                }
            }
            connection.due.pop_front();
        }
        connection.link.flush()
    }

    fn is_own(&self, of: (ClientId, Epoch)) -> bool {
        self.session.is_some_and(|own| (own.client_id, own.epoch) == of)
    }

    /// Lets go of a session under which nothing commits any more.
    fn end_session(&mut self) {
        self.session = None;
        self.heard_us = 0;
    }

    fn take_frame(&mut self, frame: Frame, of: (ClientId, Epoch)) {
        let is_own = self.is_own(of);
        match frame {
            Frame::Ack(ack) if is_own && ack.session_epoch == of.1 => {
                self.heard_us = self.clock.now_us();
                if let Some(content) = self.under_way.remove(&ack.sequence) {
                    if self.rack.replicated && ack.first_offset != UNKNOWN_OFFSET {
                        self.rack.history.must_be_durable(ack.first_offset, COPIES);
                    }
                    self.rack.history.acknowledged(of.0, content, ack.first_offset);
                }
            }
            Frame::Fenced(fenced) if is_own && fenced.session_epoch == of.1 => {
                self.end_session();
            }
            Frame::PublishReady(_) | Frame::Ack(_) | Frame::Fenced(_) => {}
            frame => panic!("{frame:?} came to a publisher"),
        }
    }

    /// Forgets its id. It asks for a session under another at once.
    fn go_on_as_another(&mut self) {
        (self.lost, self.resume, self.token, self.heard_us) = (self.lost + 1, false, SessionToken::NONE, 0);
        self.attempt += 1;
    }

    fn heed(&mut self, answer: Answer) {
        match answer {
            Answer::Opened { attempt, session: None } if attempt == self.attempt => {
                // Nobody knows what became of the batches under way. An application would be told.
                self.rack.history.count(|tally| &mut tally.lost_sessions);
                self.under_way.clear();
                self.go_on_as_another();
            }
            // Its own session before a crash, or one whose answer was lost. It asks again until that is idle, or gives up.
            Answer::InUse { attempt } if attempt == self.attempt && !self.resume && one_in(2) => {
                self.rack.history.count(|tally| &mut tally.ids_in_use);
                self.go_on_as_another();
            }
            Answer::Opened { attempt, session: Some(session) } if attempt == self.attempt && self.session.is_none() => {
                self.heard_us = self.clock.now_us();
                (self.session, self.token) = (Some(session), session.token);
                // What else comes of this attempt is old.
                self.attempt += 1;
                self.rack.history.count(|tally| &mut tally.epochs);
                // Sequences name the same batches for ever: what is below `committed` is in the order, what is not is
                // sent again under the new epoch.
                let first = self.under_way.keys().next().copied();
                if self.resume {
                    let sent = first.unwrap_or(self.next_sequence)..=self.next_sequence;
                    assert!(sent.contains(&session.committed), "{sent:?} are this client's: {session:?}");
                } else {
                    self.next_sequence = session.committed;
                }
                self.resume = true;
                self.send_again();
            }
            _ => {}
        }
    }
}
