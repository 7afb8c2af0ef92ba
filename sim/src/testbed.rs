//! A region in private memory with a sequencer in one thread, for benchmarks and tests of what ordering costs.

use crossbeam_channel::{RecvError, bounded, unbounded};
use embarcadero_broker::sequencer::{
    Command, GROUP_BATCHES, Memory, Predecessor, Sequencer, SequencerLimits, SessionError, SessionRequest, Takeover,
    TakeoverError,
};
use embarcadero_cxl::batchlog::{BatchlogWriter, Written};
use embarcadero_cxl::broker_table::Pulse;
use embarcadero_cxl::cache::{FlushMethod, UnsupportedFlush};
use embarcadero_cxl::layout::{AllocatorKind, BatchEntry, Geometry, Layout, LeaderArea, SESSION_WINDOW, TopicState};
use embarcadero_cxl::segment::{PartitionAllocator, SegmentAllocator};
use embarcadero_cxl::session_table::Session;
use embarcadero_cxl::topic_table::TopicConfig;
use embarcadero_cxl::{Fabric, Mapping, Native, Region, RegionError};
use embarcadero_wire::{BrokerId, ClientId, Incarnation, Order, SessionToken, Term, TopicId};
use std::sync::Arc;
use uuid::Uuid;

/// Number of brokers in the region that [`region`] makes, each with a Batchlog.
const BROKERS: u32 = 4;
/// Topic of the testbed, and its incarnation.
pub const TOPIC: (TopicId, Incarnation) = (TopicId(0), Incarnation(1));
/// Area of the leader, which is broker 0.
const LEADER: LeaderArea = LeaderArea(BrokerId(0));
/// Number of segments that each broker has.
const SEGMENTS: u32 = 16;
/// Bytes of all segments together.
const SEGMENTS_BYTES: u64 = 1 << 30;
/// Number of entries that are published together, as brokers do by default.
const GROUP: u64 = 8;

/// Reason why no testbed was made.
#[derive(Debug, thiserror::Error)]
pub enum TestbedError {
    /// Memory cannot be mapped.
    #[error("cannot map memory: {0}")]
    Memory(#[from] std::io::Error),
    /// This CPU has no such flush instruction.
    #[error(transparent)]
    Flush(#[from] UnsupportedFlush),
    /// The region cannot be made.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The sequencer does not start.
    #[error(transparent)]
    Recover(#[from] TakeoverError),
    /// A session cannot be opened.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The sequencer does not answer.
    #[error("the sequencer does not answer: {0}")]
    Silent(#[from] RecvError),
}

/// Returns the request of a client that opens a session at level 1, and whose sessions have one token.
#[must_use]
pub fn opening(topic: TopicId, client_id: ClientId) -> SessionRequest {
    let token = SessionToken(client_id.0);
    SessionRequest { topic, client_id, ack_level: 1, resume: false, token, new_token: token }
}

/// Makes a region for one topic and four brokers, with 64 segments of 16 MiB. `wrap` makes the fabric from its memory.
///
/// # Errors
/// [`TestbedError`].
pub fn region<F: Fabric>(
    allocator: AllocatorKind,
    method: FlushMethod,
    wrap: impl FnOnce(Native) -> F,
) -> Result<Region<F>, TestbedError> {
    region_of(BROKERS, allocator, method, wrap)
}

/// Returns the configuration of a live topic at acknowledgement level 1, without copies, that keeps everything.
#[must_use]
pub fn topic((id, incarnation): (TopicId, Incarnation), order: Order) -> TopicConfig {
    TopicConfig {
        id,
        incarnation,
        state: TopicState::Live,
        name: "testbed".to_owned(),
        order,
        ack_level: 1,
        replication_factor: 1,
        retention_bytes: 0,
        retention_ms: 0,
        created_ms: 0,
    }
}

/// Makes a region as [`region`] does, for 1 to 32 brokers. Segments are smaller the more brokers there are.
///
/// # Errors
/// [`TestbedError`].
pub fn region_of<F: Fabric>(
    brokers: u32,
    allocator: AllocatorKind,
    method: FlushMethod,
    wrap: impl FnOnce(Native) -> F,
) -> Result<Region<F>, TestbedError> {
    let segment_bytes = SEGMENTS_BYTES / u64::from(SEGMENTS * brokers.next_power_of_two());
    let tables = Geometry::with_segments_of(segment_bytes, allocator);
    let segment_count = SEGMENTS * brokers;
    let geometry =
        Geometry { max_brokers: brokers, max_leaders: brokers.min(2), max_topics: 1, segment_count, ..tables };
    let mapping = Mapping::anonymous(Layout::new(&geometry).region_bytes)?;
    mapping.prefault()?;
    Ok(Region::format(wrap(Native::new(mapping, method)?), &geometry, Uuid::new_v4(), 0)?)
}

/// Sequencer of a topic in strong order, sessions that publish to the topic, and the brokers' Batchlogs.
pub struct Testbed<F: Fabric> {
    region: Region<F>,
    sequencer: Sequencer<F>,
    logs: Vec<(BatchlogWriter<F>, Pulse<F>)>,
    sessions: Vec<Session>,
    /// Next sequence of each session.
    sequences: Vec<u64>,
}

impl<F: Fabric> Testbed<F> {
    /// Opens the topic and as many sessions as `sessions` says.
    ///
    /// # Errors
    /// [`TestbedError`].
    pub fn new(region: Region<F>, sessions: u32) -> Result<Self, TestbedError> {
        Self::keeping(region, sessions, 0)
    }

    /// Does what [`Testbed::new`] does, with a topic that keeps its batches for `retention_ms`; 0 keeps them.
    ///
    /// # Errors
    /// [`TestbedError`].
    pub fn keeping(region: Region<F>, sessions: u32, retention_ms: u64) -> Result<Self, TestbedError> {
        let pool: Arc<dyn SegmentAllocator> = Arc::new(PartitionAllocator::of_broker(region.clone(), LEADER.0));
        let (commands, queue) = unbounded();
        let limits = SequencerLimits::LASTING;
        let memory = Memory { region: region.clone(), pool, mirror: None };
        let before = Predecessor::Gone(Term::NONE);
        let takeover = Takeover { memory, area: LEADER, term: Term(1), before, limits, commands: queue };
        let mut sequencer = Sequencer::recover(takeover, 0)?;
        let id = TOPIC.0;
        let topic = TopicConfig {
            // Entries are of one byte, and this many keep at most half of the leader's segments in use.
            retention_bytes: u64::from(SEGMENTS) * region.geometry().segment_bytes / 256,
            retention_ms,
            ..topic(TOPIC, Order::Strong)
        };
        let (reply, _opened) = bounded(1);
        // The queue is there as long as the sequencer is.
        let _ = commands.send(Command::OpenTopic(topic, reply));
        let mut opened = Vec::new();
        for client_id in (1..=u64::from(sessions)).map(ClientId) {
            let (reply, answer) = bounded(1);
            let request = opening(id, client_id);
            let _ = commands.send(Command::OpenSession { request, reply });
            sequencer.poll(0, 1);
            opened.push(answer.recv()??);
        }
        let brokers = region.geometry().brokers();
        let logs = brokers
            .map(|broker| (BatchlogWriter::new(region.clone(), id, broker), Pulse::new(region.clone(), broker)))
            .collect();
        Ok(Self { region, sequencer, logs, sequences: vec![0; opened.len()], sessions: opened })
    }

    /// Returns the region.
    pub fn region(&self) -> &Region<F> {
        &self.region
    }

    /// Returns the sequencer.
    pub fn sequencer(&mut self) -> &mut Sequencer<F> {
        &mut self.sequencer
    }

    /// Returns the sessions.
    pub fn sessions(&self) -> &[Session] {
        &self.sessions
    }

    /// Appends up to 64 batches of every session, striped over the brokers, and publishes them in groups. Returns how many
    /// it appended.
    pub fn append(&mut self) -> u64 {
        let mut appended = 0;
        let location = self.region.layout().segments;
        for (session, next) in self.sessions.iter().zip(&mut self.sequences) {
            for _ in 0..(SESSION_WINDOW - 1).min(64) {
                let broker = (*next % self.logs.len() as u64) as usize;
                let log = &mut self.logs[broker].0;
                if log.has_room() != Ok(true) {
                    break;
                }
                let index = log.append(BatchEntry {
                    location,
                    client_id: session.client_id,
                    sequence: *next,
                    session_epoch: session.epoch,
                    session_slot: session.slot,
                    topic_incarnation: TOPIC.1,
                    bytes: 1,
                    message_count: 1,
                    ..bytemuck::Zeroable::zeroed()
                });
                *next += 1;
                appended += 1;
                if (index + 1).is_multiple_of(GROUP) {
                    log.publish(Written::default());
                }
            }
        }
        for (log, pulse) in &mut self.logs {
            log.publish(Written::default());
            pulse.announce(1);
        }
        appended
    }

    /// Runs the sequencer until it has taken `batches` batches.
    pub fn order(&mut self, batches: u64) {
        let mut taken = 0;
        while taken < batches {
            taken += self.sequencer.poll(1, GROUP_BATCHES);
        }
    }
}
