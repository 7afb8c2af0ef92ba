//! Leadership of a process on a host of the rack.

use super::super::fate::random;
use super::super::network::{Answer, Call, Outcome, Request};
use super::super::{BATCH_BYTES, LEADERS, TOPIC};
use super::Process;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use embarcadero_broker::control::topic_to_proto;
use embarcadero_broker::membership::{LiveBrokers, Liveness};
use embarcadero_broker::replica::completion::CompletionStage;
use embarcadero_broker::sequencer::{
    Command, Memory, Predecessor, Sequencer, SessionError, SessionRequest, Takeover, TakeoverError,
};
use embarcadero_broker::worker::LeaderStages;
use embarcadero_control::v1 as proto;
use embarcadero_cxl::broker_table::{BrokerInfo, read_pulse};
use embarcadero_cxl::layout::{LeaderArea, SESSION_WINDOW, TopicState};
use embarcadero_cxl::leadership::{
    LeaderInfo, last_active, latest_claim, latest_claimant, publish_leader, read_leader_at, with_leader,
};
use embarcadero_cxl::session_table::Session;
use embarcadero_cxl::topic_table::{TopicRows, read_topic_at};
use embarcadero_os::Clock;
use embarcadero_wire::{ClientId, Epoch, SessionSlot, SessionToken, Term};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Looks at a leader that does not move, after which another broker campaigns.
const LEADER_PATIENCE: u64 = 12;
/// Silence after which the leader takes a broker for dead, by the leader's clock.
pub(super) const BROKER_LEASE: Duration = Duration::from_millis(40);

/// State of a process that leads.
pub(super) struct Leader {
    /// Token of its stages, which hold the other end while they run.
    stages: Weak<()>,
    liveness: Liveness,
    term: Term,
    shown: u64,
    commands: Sender<Command>,
    asked: Vec<Asked>,
}

/// Client that asked for a session, the number of its call, and the channel of the answer.
type Asked = (usize, u64, Receiver<Result<Session, SessionError>>);

impl Process {
    /// Takes a call to the control service.
    pub(super) fn take_call(&mut self, Request { client, number, call }: Request) {
        match (call, &mut self.leader) {
            (Call::Cluster, _) => {
                if let Some(cluster) = self.cluster() {
                    self.rack.network.answer(client, Answer { number, outcome: Outcome::Cluster(cluster) });
                }
            }
            (Call::Open(request), Some(leader)) => {
                let (reply, answer) = bounded(1);
                let request = SessionRequest {
                    topic: TOPIC.0,
                    client_id: ClientId(request.client_id),
                    ack_level: request.ack_level as u8,
                    resume: request.resume,
                    token: SessionToken(request.token),
                    new_token: SessionToken(random(1..u64::MAX)),
                };
                leader.commands.send(Command::OpenSession { request, reply }).expect("the sequencer is there");
                leader.asked.push((client, number, answer));
            }
            (Call::Close(request), Some(leader)) => {
                let (reply, _) = bounded(1);
                let command = Command::CloseSession {
                    slot: SessionSlot(request.slot),
                    client_id: ClientId(request.client_id),
                    epoch: Epoch(request.epoch),
                    token: SessionToken(request.token),
                    reply,
                };
                leader.commands.send(command).expect("the sequencer is there");
                self.rack.network.answer(client, Answer { number, outcome: Outcome::Closed });
            }
            // The leader has the call, too.
            (Call::Open(_) | Call::Close(_), None) => {}
        }
    }

    /// Returns what this broker says of the cluster, once the topic exists and somebody leads.
    fn cluster(&self) -> Option<proto::MetadataResponse> {
        let LiveBrokers { brokers, leader, .. } = LiveBrokers::read(&self.region);
        let topics = with_leader(&self.region, |area| TopicRows::read(&self.region, area)).ok()?.live;
        let brokers = brokers.into_iter().map(|broker| proto::Broker {
            id: broker.id.0,
            incarnation: broker.incarnation.0,
            data_endpoint: broker.data.to_string(),
            control_endpoint: broker.control.to_string(),
            leader: Some(broker.id) == leader,
        });
        let topics = topics.iter().map(topic_to_proto);
        let (brokers, topics) = (brokers.collect::<Vec<_>>(), topics.collect::<Vec<_>>());
        let is_ready = !brokers.is_empty() && !topics.is_empty();
        is_ready.then(|| proto::MetadataResponse { brokers, topics, ..proto::MetadataResponse::default() })
    }

    /// Leads, or watches the leader and takes over from it.
    pub(super) fn lead(&mut self, now_us: u64) {
        let Some(leader) = &mut self.leader else { return self.follow(now_us) };
        if leader.stages.strong_count() == 0 {
            self.leader = None;
            return;
        }
        let topic = topic_to_proto(&self.rack.topic());
        leader.asked.retain(|(client, number, answer)| match answer.try_recv() {
            Ok(opened) => {
                let outcome = match opened {
                    Ok(session) => Outcome::Opened(proto::OpenSessionResponse {
                        topic: Some(topic.clone()),
                        slot: session.slot.0,
                        epoch: session.epoch.0,
                        next_sequence: session.committed,
                        window_batches: SESSION_WINDOW as u32,
                        max_batch_bytes: BATCH_BYTES as u64,
                        token: session.token.0,
                    }),
                    Err(SessionError::Gone(_)) => {
                        Outcome::Opened(proto::OpenSessionResponse { topic: Some(topic.clone()), ..Default::default() })
                    }
                    Err(SessionError::InUse(_)) => Outcome::InUse,
                    // The client asks again.
                    Err(SessionError::TableFull(_)) => return false,
                    Err(error) => panic!("{error}"),
                };
                self.rack.network.answer(*client, Answer { number: *number, outcome });
                false
            }
            Err(error) => error.is_empty(),
        });
        let live = leader.liveness.poll(&self.region, self.clock.now().instant) | 1 << self.info.id.0;
        if live != leader.shown {
            leader.shown = live;
            let (term, BrokerInfo { id: broker, incarnation, .. }) = (leader.term, &self.info);
            let (broker, incarnation) = (*broker, *incarnation);
            let line = LeaderInfo { term, broker, incarnation, broker_mask: live, pinning_mask: live };
            publish_leader(&self.region, &line);
        }
    }

    fn follow(&mut self, now_us: u64) {
        if self.host >= LEADERS || self.is_draining() {
            return;
        }
        let elected = self.rack.elected();
        let claimant = latest_claimant(&self.region);
        let seen = (claimant, claimant.map_or(0, |(broker, _)| read_pulse(&self.region, broker).0));
        self.watched = if self.watched.0 == seen { (seen, self.watched.1 + 1) } else { (seen, 0) };
        // Its own past self is gone.
        let gone = claimant.is_none_or(|(broker, _)| broker == self.info.id);
        if !gone && self.watched.1 < LEADER_PATIENCE {
            return;
        }
        self.watched.1 = 0;
        let Some(term) = self.rack.campaign(elected) else { return };
        if term > latest_claim(&self.region) {
            self.take_over(term, now_us);
        }
    }

    /// Takes over under `term`, as a real broker does once it is elected.
    fn take_over(&mut self, term: Term, now_us: u64) {
        let region = &self.region;
        let led = last_active(region);
        let before = led.and_then(|(area, _)| read_leader_at(region, area).used());
        let predecessor = match led {
            None => Predecessor::Gone(Term::NONE),
            // Its own past self.
            Some((area, led)) if area.0 == self.info.id => Predecessor::Gone(led),
            Some(_) => Predecessor::MayGoOn,
        };
        // After a predecessor whose statement cannot be read, any broker may be alive and pin what it reads.
        let all = region.geometry().broker_mask();
        let unknown = if led.is_some() { all } else { 0 };
        let live = before.map_or(unknown, |before| before.broker_mask) | 1 << self.info.id.0;
        let BrokerInfo { id: broker, incarnation, .. } = self.info;
        let line = LeaderInfo { term, broker, incarnation, broker_mask: live, pinning_mask: live };
        publish_leader(region, &line);
        let (commands, queue) = unbounded();
        let (area, pool) = (LeaderArea(broker), Arc::clone(self.topics.pool()));
        let memory = Memory { region: region.clone(), pool, mirror: Some(self.mirror.clone()) };
        let limits = self.rack.limits;
        let takeover = Takeover { memory, area, term, before: predecessor, limits, commands: queue };
        let sequencer = match Sequencer::recover(takeover, now_us) {
            Ok(sequencer) => sequencer,
            Err(TakeoverError::Damaged(damage)) => panic!("{damage}"),
            Err(TakeoverError::Pool(_) | TakeoverError::Superseded) => return,
        };
        if read_topic_at(region, area, TOPIC.0).used().is_none_or(|topic| topic.state == TopicState::Free) {
            // The first leader, or one whose predecessor did not come to it, or died on the way.
            let (reply, _) = bounded(1);
            commands.send(Command::OpenTopic(self.rack.topic(), reply)).expect("the sequencer is there");
        }
        self.rack.history.count(|tally| &mut tally.takeovers);
        let in_use = Arc::new(());
        let stages = Arc::downgrade(&in_use);
        let completion = CompletionStage::new(region.clone(), area);
        self.promote.try_send(LeaderStages { sequencer, completion, in_use }).expect("it led no more");
        let liveness = Liveness::new(region, BROKER_LEASE, live, self.clock.now().instant);
        self.leader = Some(Leader { stages, liveness, term, shown: live, commands, asked: Vec::new() });
    }
}
