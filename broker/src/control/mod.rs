//! Control plane: topics, metadata, sessions and the leader allocator, over gRPC.

mod topic;

use crate::archive::{self, Catalog};
use crate::caller::Caller;
use crate::lending::{Lending, LendingError};
use crate::membership::LiveBrokers;
use crate::membership::etcd::Etcd;
use crate::replica::replicator::running_replicas;
use crate::sequencer::{Command, SessionError, SessionRequest};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use embarcadero_control::v1::control_server::Control;
use embarcadero_control::v1::{self as proto};
use embarcadero_cxl::broker_table::read_broker;
use embarcadero_cxl::layout::{AllocatorKind, SESSION_WINDOW, TopicState};
use embarcadero_cxl::leadership::{LeaderInfo, NoLeader, UnknownLeader, read_leader, with_leader};
use embarcadero_cxl::order_index::{StreamId, read_extent};
use embarcadero_cxl::segment::{PoolError, free_segments};
use embarcadero_cxl::topic_table::{TopicConfig, TopicRows, check_topic_name, read_topic};
use embarcadero_cxl::{Damage, Native, Region, Row};
use embarcadero_wire::{BrokerId, ClientId, Epoch, Incarnation, SessionSlot, SessionToken, Stream, TopicId};
use rand::TryRngCore;
use rand::rngs::OsRng;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tonic::{Code, Request, Response, Status};
use topic::requested_topic;
pub use topic::topic_to_proto;

/// Longest time that the sequencer may take to answer, and brokers to let go of a topic.
const ANSWER: Duration = Duration::from_secs(30);

/// Longest time that a call waits while the region has no leader.
const LEADER_WAIT: Duration = Duration::from_secs(2);
/// Time between two looks for a leader.
const LEADER_POLL: Duration = Duration::from_millis(5);

/// Part of the control service that works only at the leader.
pub(crate) struct LeaderControl {
    /// Channel to the sequencer.
    pub(crate) commands: Sender<Command>,
    /// Lock that admits one change of the topic table at a time.
    pub(crate) topics: tokio::sync::Mutex<()>,
    /// Segments lent to other brokers, if the region has the leader allocator.
    pub(crate) lending: Option<Arc<Lending>>,
}

/// The leader's part of the control service; `None` while this broker does not lead.
pub(crate) type CurrentLeader = RwLock<Option<Arc<LeaderControl>>>;

/// Control service of one broker.
pub(crate) struct ControlService {
    /// Region.
    pub(crate) region: Region<Native>,
    /// Bytes of the largest batch.
    pub(crate) max_batch_bytes: u64,
    /// The leader's part, while this broker leads.
    pub(crate) leader: Arc<CurrentLeader>,
    /// Batches on this broker's disk.
    pub(crate) catalog: Arc<Catalog>,
    /// Membership by etcd, if etcd elects the leader.
    pub(crate) etcd: Option<Etcd>,
}

impl ControlService {
    /// Describes who elects the leader, and whether that works.
    fn membership(&self) -> String {
        if let Some(etcd) = &self.etcd {
            return match etcd.lost() {
                None => "etcd".to_owned(),
                Some((time, error)) => {
                    format!("etcd, lost {} s ago: topics go on, no leader can be elected ({error})", time.as_secs())
                }
            };
        }
        "embedded".to_owned()
    }

    /// Returns the leader's part of the service.
    #[allow(clippy::result_large_err)] // tonic's own error type
    fn leader(&self) -> Result<Arc<LeaderControl>, Status> {
        let leader = self.leader.read().unwrap_or_else(PoisonError::into_inner).clone();
        leader.ok_or_else(|| {
            let address = |leader: LeaderInfo| match read_broker(&self.region, leader.broker) {
                Row::Used(info) => format!("the leader is at {}", info.control),
                Row::Unused | Row::Unsettled => "the leader has not written its address yet".to_owned(),
                Row::Damaged(damage) => format!("the leader's address cannot be read: {damage}"),
            };
            let known = read_leader(&self.region).map_or_else(|error| error.to_string(), address);
            Status::failed_precondition(format!("this broker is not the leader; {known}"))
        })
    }

    /// Reads from the leader's area. Waits for a leader if there is none.
    async fn with_leader<R, E: Into<UnknownLeader>>(
        &self,
        read: impl Fn(&Region<Native>) -> Result<R, E>,
    ) -> Result<R, Status> {
        let deadline = Instant::now() + LEADER_WAIT;
        loop {
            match read(&self.region).map_err(E::into) {
                Ok(result) => return Ok(result),
                Err(error @ UnknownLeader::Damaged(_)) => return Err(Status::data_loss(error.to_string())),
                Err(error) if Instant::now() >= deadline => {
                    return Err(Status::unavailable(format!("{error} (membership: {})", self.membership())));
                }
                Err(UnknownLeader::NoLeader(NoLeader) | UnknownLeader::Unsettled) => {
                    tokio::time::sleep(LEADER_POLL).await;
                }
            }
        }
    }

    /// Reads the topic table.
    async fn topic_rows(&self) -> Result<TopicRows, Status> {
        self.with_leader(|region| with_leader(region, |area| TopicRows::read(region, area))).await
    }

    /// Returns the configuration of the topic `name`.
    async fn topic(&self, name: &str) -> Result<TopicConfig, Status> {
        check_topic_name(name).map_err(Status::invalid_argument)?;
        let TopicRows { live, damaged } = self.topic_rows().await?;
        match (live.into_iter().find(|topic| topic.name == name), damaged.first()) {
            (Some(topic), _) => Ok(topic),
            (None, None) => Err(Status::not_found(format!("topic {name:?} does not exist"))),
            (None, Some((slot, damage))) => Err(Status::data_loss(format!(
                "topic {name:?} is not among the topics that can be read; slot {slot} cannot: {damage}"
            ))),
        }
    }

    /// Checks that a topic is live and has the stream `stream`, as far as its row can be read.
    async fn check_stream(&self, id: TopicId, incarnation: Incarnation, stream: Stream) -> Result<(), Status> {
        let config = match self.with_leader(|region| read_topic(region, id)).await? {
            Row::Used(config) if config.state == TopicState::Live && config.incarnation == incarnation => config,
            Row::Used(_) | Row::Unused => {
                return Err(Status::not_found(format!("topic slot {id} incarnation {incarnation} is not live")));
            }
            Row::Unsettled => return Err(Status::unavailable(format!("topic slot {id} is being changed"))),
            // Disks have batches of it all the same.
            Row::Damaged(_) => return Ok(()),
        };
        let brokers = self.region.geometry().max_brokers;
        match stream.broker() {
            None if config.order.is_global() => Ok(()),
            Some(broker) if !config.order.is_global() && broker.0 < brokers => Ok(()),
            _ => Err(Status::invalid_argument(format!("topic {:?} has no stream {:#x}", config.name, stream.0))),
        }
    }

    /// Returns who lends segments, for a call about them by `caller`.
    #[allow(clippy::result_large_err)] // tonic's own error type
    fn lender(&self, caller: Caller) -> Result<(Arc<Lending>, BrokerId), Status> {
        let broker = caller.check(&self.region)?;
        // Not a failed precondition: callers take that for the answer of a broker that does not lead.
        let none = "no leader of this region gives out segments; its allocator is another";
        if self.region.geometry().allocator != AllocatorKind::Leader {
            return Err(Status::unimplemented(none));
        }
        let lending = self.leader()?.lending.clone();
        Ok((lending.ok_or_else(|| Status::unimplemented(none))?, broker))
    }

    /// Sends a command to the sequencer, and waits for the answer.
    async fn ask<R: Send + 'static>(&self, command: impl FnOnce(Sender<R>) -> Command) -> Result<R, Status> {
        let (reply, answer): (Sender<R>, Receiver<R>) = bounded(1);
        let leader = self.leader()?;
        leader.commands.send(command(reply)).map_err(|_| Status::unavailable("the sequencer has stopped"))?;
        tokio::task::spawn_blocking(move || answer.recv_timeout(ANSWER))
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| match error {
                RecvTimeoutError::Timeout => Status::deadline_exceeded("the sequencer did not answer in time"),
                RecvTimeoutError::Disconnected => Status::unavailable("this broker leads no more"),
            })
    }
}

/// Draws the token of a session that has none, from the system's generator.
#[allow(clippy::result_large_err)] // tonic's own error type
fn draw_token() -> Result<SessionToken, Status> {
    let drawn = OsRng.try_next_u64().map_err(|error| Status::internal(format!("no token can be drawn: {error}")))?;
    Ok(SessionToken(drawn.max(1)))
}

/// Returns the answer to a caller for whom the pool gives no segment, or takes none back.
fn pool_status(error: &PoolError) -> Status {
    let text = error.to_string();
    match error {
        PoolError::Exhausted { .. } => Status::resource_exhausted(text),
        PoolError::NotAllocated { .. } => Status::invalid_argument(text),
        PoolError::Damaged(_) => Status::data_loss(text),
        PoolError::NoLeader(_) | PoolError::UnknownLeader | PoolError::Unreachable(_) => Status::unavailable(text),
        PoolError::Refused(_) | PoolError::NoSuchSegment { .. } => Status::unavailable(text),
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn metadata(&self, _: Request<proto::MetadataRequest>) -> Result<Response<proto::MetadataResponse>, Status> {
        let region = &self.region;
        let TopicRows { live, damaged } = self.topic_rows().await?;
        let LiveBrokers { brokers, leader, damaged: damaged_brokers } = LiveBrokers::read(region);
        Ok(Response::new(proto::MetadataResponse {
            region_uuid: region.uuid().to_string(),
            brokers: brokers
                .into_iter()
                .map(|broker| proto::Broker {
                    id: broker.id.0,
                    incarnation: broker.incarnation.0,
                    data_endpoint: broker.data.to_string(),
                    control_endpoint: broker.control.to_string(),
                    leader: Some(broker.id) == leader,
                })
                .collect(),
            topics: live.iter().map(topic_to_proto).collect(),
            damaged_topics: damaged.iter().map(|(slot, damage)| format!("topic slot {slot}: {damage}")).collect(),
            damaged_brokers: damaged_brokers.iter().map(Damage::to_string).collect(),
            segment_bytes: region.geometry().segment_bytes,
            segments_total: region.geometry().segment_count.into(),
            segments_free: free_segments(region).into(),
            membership: self.membership(),
        }))
    }

    async fn create_topic(
        &self,
        request: Request<proto::CreateTopicRequest>,
    ) -> Result<Response<proto::Topic>, Status> {
        let mut config = requested_topic(request.get_ref(), self.region.geometry().segment_bytes)?;
        let needed = config.replication_factor - 1;
        let running = self.with_leader(running_replicas).await?.count_ones();
        if running < needed.into() {
            return Err(Status::resource_exhausted(format!(
                "replication_factor {} needs {needed} live brokers that replicate (replica.path), and there are {running}",
                config.replication_factor
            )));
        }
        let leader = self.leader()?;
        let _one_at_a_time = leader.topics.lock().await;
        match self.topic(&config.name).await {
            Ok(_) => return Err(Status::already_exists(format!("topic {:?} exists already", config.name))),
            Err(status) if status.code() == Code::NotFound => {}
            Err(status) => return Err(status),
        }
        let slots = self.region.geometry().max_topics;
        let mut free = None;
        for id in self.region.geometry().topics().rev() {
            match self.with_leader(|region| read_topic(region, id)).await? {
                Row::Unused => free = Some((id, Incarnation::NONE.next())),
                Row::Used(old) if old.state == TopicState::Free => free = Some((id, old.incarnation.next())),
                Row::Used(_) | Row::Unsettled => {}
                // Its last incarnation is not known, and must not come again.
                Row::Damaged(damage) => tracing::error!(slot = %id, %damage, "the topic slot stays unused"),
            }
        }
        let Some((id, incarnation)) = free else {
            return Err(Status::resource_exhausted(format!("all {slots} topic slots are in use; delete a topic")));
        };
        (config.id, config.incarnation) = (id, incarnation);
        let answer = topic_to_proto(&config);
        self.ask(|reply| Command::OpenTopic(config, reply))
            .await?
            .map_err(|damage| Status::data_loss(format!("topic {:?} cannot be created: {damage}", answer.name)))?;
        Ok(Response::new(answer))
    }

    async fn delete_topic(
        &self,
        request: Request<proto::DeleteTopicRequest>,
    ) -> Result<Response<proto::DeleteTopicResponse>, Status> {
        let leader = self.leader()?;
        let _one_at_a_time = leader.topics.lock().await;
        let topic = self.topic(&request.get_ref().name).await?;
        self.ask(|reply| Command::CloseTopic(topic.id, reply)).await?.map_err(|damage| {
            let TopicConfig { name, id, .. } = &topic;
            Status::data_loss(format!("topic {name:?} is gone, but its slot {id} cannot be freed: {damage}"))
        })?;
        Ok(Response::new(proto::DeleteTopicResponse {}))
    }

    async fn describe_topic(
        &self,
        request: Request<proto::DescribeTopicRequest>,
    ) -> Result<Response<proto::TopicDescription>, Status> {
        let topic = self.topic(&request.get_ref().name).await?;
        let streams: Vec<Stream> = if topic.order.is_global() {
            vec![Stream::GLOBAL]
        } else {
            self.region.geometry().brokers().map(Stream::of).collect()
        };
        let id = |stream| StreamId { topic: topic.id, stream };
        let read = |region: &_| {
            let extents = streams.iter().map(|stream| Ok((*stream, read_extent(region, id(*stream))?)));
            extents.collect::<Result<Vec<_>, NoLeader>>()
        };
        let streams = self.with_leader(read).await?;
        let streams = streams
            .into_iter()
            .filter_map(|(stream, extent)| Some((stream, extent.of(topic.incarnation).transpose()?)))
            .map(|(stream, extent)| {
                let extent = extent?;
                Ok(proto::Stream {
                    broker: stream.0,
                    earliest_offset: extent.earliest_offset,
                    next_offset: extent.next_offset,
                    batches: extent.batches(&self.region)?,
                })
            })
            .collect::<Result<_, Damage>>()
            .map_err(|damage| Status::data_loss(damage.to_string()))?;
        Ok(Response::new(proto::TopicDescription { topic: Some(topic_to_proto(&topic)), streams }))
    }

    async fn open_session(
        &self,
        request: Request<proto::OpenSessionRequest>,
    ) -> Result<Response<proto::OpenSessionResponse>, Status> {
        let request = request.into_inner();
        self.leader()?;
        let topic = self.topic(&request.topic).await?;
        if request.client_id == 0 {
            return Err(Status::invalid_argument("client_id is 0; it must be at least 1"));
        }
        if request.ack_level > u32::from(topic.ack_level) {
            return Err(Status::invalid_argument(format!(
                "ack_level is {}; topic {:?} offers at most {}",
                request.ack_level, topic.name, topic.ack_level
            )));
        }
        let proto::OpenSessionRequest { client_id, ack_level, resume, token, .. } = request;
        let request = SessionRequest {
            topic: topic.id,
            client_id: ClientId(client_id),
            ack_level: ack_level as u8,
            resume,
            token: SessionToken(token),
            new_token: draw_token()?,
        };
        let opened = self.ask(|reply| Command::OpenSession { request, reply }).await?;
        let session = match opened {
            Ok(session) => session,
            Err(SessionError::Gone(_)) => {
                let topic = Some(topic_to_proto(&topic));
                return Ok(Response::new(proto::OpenSessionResponse { topic, ..Default::default() }));
            }
            Err(error @ SessionError::UnknownTopic(_)) => return Err(Status::not_found(error.to_string())),
            Err(error @ (SessionError::Damaged(..) | SessionError::DamagedSession(..))) => {
                return Err(Status::data_loss(error.to_string()));
            }
            Err(error @ SessionError::TableFull(_)) => return Err(Status::resource_exhausted(error.to_string())),
            Err(error @ SessionError::InUse(_)) => return Err(Status::already_exists(error.to_string())),
            Err(error @ SessionError::NotHolder(_)) => return Err(Status::permission_denied(error.to_string())),
        };
        Ok(Response::new(proto::OpenSessionResponse {
            topic: Some(topic_to_proto(&topic)),
            slot: session.slot.0,
            epoch: session.epoch.0,
            next_sequence: session.committed,
            window_batches: SESSION_WINDOW as u32,
            max_batch_bytes: self.max_batch_bytes.min(self.region.geometry().segment_bytes),
            token: session.token.0,
        }))
    }

    async fn read_replica(
        &self,
        request: Request<proto::ReadReplicaRequest>,
    ) -> Result<Response<proto::ReadReplicaResponse>, Status> {
        let request = request.into_inner();
        let proto::ReadReplicaRequest { topic, incarnation, stream, broker, call_key, .. } = request;
        Caller { broker: BrokerId(broker), call_key }.check(&self.region)?;
        self.check_stream(TopicId(topic), Incarnation(incarnation), Stream(stream)).await?;
        let catalog = Arc::clone(&self.catalog);
        let read = tokio::task::spawn_blocking(move || archive::read_replica(&catalog, request));
        read.await.map_err(|error| Status::internal(error.to_string()))?.map(Response::new)
    }

    async fn close_session(
        &self,
        request: Request<proto::CloseSessionRequest>,
    ) -> Result<Response<proto::CloseSessionResponse>, Status> {
        let proto::CloseSessionRequest { slot, client_id, epoch, token } = request.into_inner();
        let (slot, client_id, epoch) = (SessionSlot(slot), ClientId(client_id), Epoch(epoch));
        let token = SessionToken(token);
        let closed = self.ask(|reply| Command::CloseSession { slot, client_id, epoch, token, reply }).await?;
        closed.map_err(|error| Status::permission_denied(error.to_string()))?;
        Ok(Response::new(proto::CloseSessionResponse {}))
    }

    async fn allocate_segment(
        &self,
        request: Request<proto::AllocateSegmentRequest>,
    ) -> Result<Response<proto::AllocateSegmentResponse>, Status> {
        let proto::AllocateSegmentRequest { broker, call_key } = request.into_inner();
        let (lending, broker) = self.lender(Caller { broker: BrokerId(broker), call_key })?;
        let segment = lending.lend(broker).map_err(|error| pool_status(&error))?;
        Ok(Response::new(proto::AllocateSegmentResponse { segment }))
    }

    async fn release_segment(
        &self,
        request: Request<proto::ReleaseSegmentRequest>,
    ) -> Result<Response<proto::ReleaseSegmentResponse>, Status> {
        let proto::ReleaseSegmentRequest { segment, broker, call_key } = request.into_inner();
        let (lending, broker) = self.lender(Caller { broker: BrokerId(broker), call_key })?;
        lending.take_back(segment, broker).map_err(|error| match error {
            LendingError::Pool(error) => pool_status(&error),
            error => Status::invalid_argument(error.to_string()),
        })?;
        Ok(Response::new(proto::ReleaseSegmentResponse {}))
    }
}
