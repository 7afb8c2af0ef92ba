//! The topics, and the broker table.

use crate::fabric::{Fabric, RegionOffset, Site};
use crate::layout::{BrokerLine, LeaderArea, NameLine, PinLine, PulseLine, TOPIC_NAME_BYTES, TopicLine};
use crate::leadership::{NoLeader, with_leader};
use crate::region::Region;
use bytemuck::Zeroable;
use embarcadero_wire::{BrokerId, Incarnation, Order, TopicId};
use serde::Serialize;
use std::mem::offset_of;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Life of a topic slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TopicState {
    /// Never used, or deleted and let go of by everyone.
    Free,
    /// In use.
    Live,
    /// Deleted; brokers are letting go.
    Deleting,
}

/// A topic as its TInode describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TopicConfig {
    /// Slot.
    pub id: TopicId,
    /// Counts the topics that used this slot.
    pub incarnation: Incarnation,
    /// State.
    pub state: TopicState,
    /// Name, 1 to 64 bytes.
    pub name: String,
    /// Order.
    pub order: Order,
    /// Highest acknowledgement level that a session may ask for.
    pub ack_level: u8,
    /// Copies including the one in CXL.
    pub replication_factor: u8,
    /// Bytes kept; 0 keeps everything.
    pub retention_bytes: u64,
    /// Milliseconds kept; 0 keeps everything.
    pub retention_ms: u64,
    /// When it was made.
    pub created_ms: u64,
}

/// Checks a topic name.
///
/// # Errors
/// A sentence that names the bound.
pub fn check_topic_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > TOPIC_NAME_BYTES {
        return Err(format!("topic name has {} bytes; it must have 1 to {TOPIC_NAME_BYTES}", name.len()));
    }
    if name.chars().any(|character| character.is_control() || character.is_whitespace()) {
        return Err(format!("topic name {name:?} must not contain spaces or control characters"));
    }
    Ok(())
}

/// Writes a topic's configuration. Only the leader may.
pub fn publish_topic<F: Fabric>(region: &Region<F>, area: LeaderArea, config: &TopicConfig) {
    let at = region.layout().leader_topic(area, config.id);
    let mut name = NameLine::zeroed();
    let bytes = config.name.as_bytes();
    name.name[..bytes.len().min(TOPIC_NAME_BYTES)].copy_from_slice(&bytes[..bytes.len().min(TOPIC_NAME_BYTES)]);
    let line = TopicLine {
        incarnation: config.incarnation,
        state: config.state as u8,
        order: config.order.code(),
        ack_level: config.ack_level,
        replication_factor: config.replication_factor,
        retention_bytes: config.retention_bytes,
        retention_ms: config.retention_ms,
        created_ms: config.created_ms,
        name_bytes: bytes.len() as u32,
        ..TopicLine::zeroed()
    };
    let fabric = region.fabric();
    fabric.publish_versioned_with(at, &line, Site::TopicFlush, || {
        fabric.store_line(at.add(64), &name);
        fabric.flush(at.add(64), 64, Site::TopicFlush);
    });
}

/// Has a topic go whose line an earlier leader was changing when it died: either it was being made, and nobody was told, or it
/// was to be deleted. Only the leader may, before it leads.
pub fn repair_torn_topic<F: Fabric>(region: &Region<F>, area: LeaderArea, topic: TopicId) {
    let (fabric, at) = (region.fabric(), region.layout().leader_topic(area, topic));
    let line: TopicLine = fabric.observe_line(at, Site::TopicRead);
    if line.version & 1 == 1 {
        let state = if line.state == TopicState::Live as u8 { TopicState::Deleting as u8 } else { line.state };
        // Its name may be half of one and half of another.
        fabric.publish_versioned(at, &TopicLine { state, name_bytes: 0, ..line }, Site::TopicFlush);
    }
}

/// Reads a topic slot; `None` when it was never used, is being written, or makes no sense.
///
/// # Errors
/// [`NoLeader`].
pub fn read_topic<F: Fabric>(region: &Region<F>, topic: TopicId) -> Result<Option<TopicConfig>, NoLeader> {
    with_leader(region, |area| read_topic_at(region, area, topic))
}

/// As [`read_topic`], as a certain leader has it.
pub fn read_topic_at<F: Fabric>(region: &Region<F>, area: LeaderArea, topic: TopicId) -> Option<TopicConfig> {
    if topic.0 >= region.geometry().max_topics {
        return None;
    }
    let at = region.layout().leader_topic(area, topic);
    let fabric = region.fabric();
    let (line, name): (TopicLine, NameLine) =
        fabric.observe_versioned(at, Site::TopicRead, |_| fabric.observe_line(at.add(64), Site::TopicRead))?;
    let state = match line.state {
        0 => TopicState::Free,
        1 => TopicState::Live,
        2 => TopicState::Deleting,
        _ => return None,
    };
    let name = name.name.get(..line.name_bytes as usize)?;
    Some(TopicConfig {
        id: topic,
        incarnation: line.incarnation,
        state,
        name: std::str::from_utf8(name).ok()?.to_owned(),
        order: Order::from_code(line.order)?,
        ack_level: line.ack_level,
        replication_factor: line.replication_factor,
        retention_bytes: line.retention_bytes,
        retention_ms: line.retention_ms,
        created_ms: line.created_ms,
    })
}

/// The topics that are in use.
///
/// # Errors
/// [`NoLeader`].
pub fn live_topics<F: Fabric>(region: &Region<F>) -> Result<Vec<TopicConfig>, NoLeader> {
    with_leader(region, |area| live_topics_at(region, area))
}

/// As [`live_topics`], as a certain leader has it.
pub fn live_topics_at<F: Fabric>(region: &Region<F>, area: LeaderArea) -> Vec<TopicConfig> {
    region
        .geometry()
        .topics()
        .filter_map(|topic| read_topic_at(region, area, topic))
        .filter(|topic| topic.state == TopicState::Live)
        .collect()
}

/// Says that this broker holds nothing of the topic's incarnations up to `incarnation`.
pub fn publish_released<F: Fabric>(region: &Region<F>, topic: TopicId, broker: BrokerId, incarnation: Incarnation) {
    let at = region.layout().pin(topic, broker).add(offset_of!(PinLine, released) as u64);
    let fabric = region.fabric();
    fabric.store(at, incarnation.word());
    fabric.flush(at, 8, Site::PinFlush);
    fabric.fence(Site::PinFlush);
}

/// The highest incarnation that the broker let go of.
pub fn read_released<F: Fabric>(region: &Region<F>, topic: TopicId, broker: BrokerId) -> Incarnation {
    let at = region.layout().pin(topic, broker).add(offset_of!(PinLine, released) as u64);
    Incarnation::from_word(region.fabric().observe(at, Site::PinRead))
}

/// A broker as the table shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BrokerInfo {
    /// Slot.
    pub id: BrokerId,
    /// Counts the processes that ran under this id.
    pub incarnation: Incarnation,
    /// Where publishers and subscribers connect.
    pub data: SocketAddr,
    /// Where the control service listens.
    pub control: SocketAddr,
    /// Process id on its own host.
    pub process_id: u32,
    /// False once it left in order.
    pub running: bool,
}

/// Writes this broker's slot.
pub fn publish_broker<F: Fabric>(region: &Region<F>, info: &BrokerInfo) {
    let line = BrokerLine {
        data_address: octets(info.data.ip()),
        control_address: octets(info.control.ip()),
        data_port: info.data.port(),
        control_port: info.control.port(),
        incarnation: info.incarnation,
        process_id: info.process_id,
        state: u32::from(info.running),
        ..BrokerLine::zeroed()
    };
    region.fabric().publish_versioned(region.layout().broker(info.id), &line, Site::BrokerSlotFlush);
}

/// The incarnation that the last process of a broker had, or was about to show when it died; 0 before the first. Also
/// readable while [`read_broker`] finds a row that its writer left half written.
pub fn last_incarnation<F: Fabric>(region: &Region<F>, broker: BrokerId) -> Incarnation {
    region.fabric().observe_line::<BrokerLine>(region.layout().broker(broker), Site::BrokerSlotRead).incarnation
}

/// Reads a broker slot; `None` when it was never used, or is being written.
pub fn read_broker<F: Fabric>(region: &Region<F>, broker: BrokerId) -> Option<BrokerInfo> {
    if broker.0 >= region.geometry().max_brokers {
        return None;
    }
    let (line, ()) = region.fabric().observe_versioned::<BrokerLine, ()>(
        region.layout().broker(broker),
        Site::BrokerSlotRead,
        |_| (),
    )?;
    Some(BrokerInfo {
        id: broker,
        incarnation: line.incarnation,
        data: SocketAddr::new(address(line.data_address), line.data_port),
        control: SocketAddr::new(address(line.control_address), line.control_port),
        process_id: line.process_id,
        running: line.state == 1,
    })
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(four) => four.to_ipv6_mapped().octets(),
        IpAddr::V6(six) => six.octets(),
    }
}

fn address(octets: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(octets).to_canonical()
}

/// What a broker's replica does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplicaState {
    /// It has no disk to replicate to.
    #[default]
    None,
    /// It replicates what falls to it.
    Running,
    /// Its disk failed: it takes no more.
    Failed,
}

/// Says what this broker's replica does.
pub fn publish_replica_state<F: Fabric>(region: &Region<F>, broker: BrokerId, state: ReplicaState) {
    let at = region.layout().broker(broker).add(64 + offset_of!(PulseLine, replica) as u64);
    let fabric = region.fabric();
    fabric.store(at, state as u64);
    fabric.flush(at, 8, Site::PulseFlush);
    fabric.fence(Site::PulseFlush);
}

/// What a broker's replica does, as it says.
pub fn read_replica_state<F: Fabric>(region: &Region<F>, broker: BrokerId) -> ReplicaState {
    let at = region.layout().broker(broker).add(64 + offset_of!(PulseLine, replica) as u64);
    match region.fabric().observe(at, Site::PulseRead) {
        1 => ReplicaState::Running,
        2 => ReplicaState::Failed,
        _ => ReplicaState::None,
    }
}

/// This broker's counters, through which others see that it lives and that there is something to order.
pub struct Pulse<F> {
    region: Region<F>,
    at: RegionOffset,
    heartbeat: u64,
    published: u64,
    stalls: u64,
}

impl<F: Fabric> Pulse<F> {
    /// Goes on from what the slot says, so that the counters never shrink.
    pub fn new(region: Region<F>, broker: BrokerId) -> Self {
        let at = region.layout().broker(broker).add(64);
        let heartbeat = region.fabric().observe(at, Site::PulseRead);
        let published = region.fabric().load(at.add(8));
        let stalls = region.fabric().load(at.add(16));
        Self { region, at, heartbeat, published, stalls }
    }

    /// Says "alive".
    pub fn beat(&mut self) {
        self.heartbeat += 1;
        self.region.fabric().store(self.at, self.heartbeat);
        self.write_back();
    }

    /// Says "there are `batches` more to order".
    #[inline]
    pub fn announce(&mut self, batches: u64) {
        self.published += batches;
        self.region.fabric().store(self.at.add(8), self.published);
        self.write_back();
    }

    /// Says "batches lie unread for want of room".
    pub fn stall(&mut self) {
        self.stalls += 1;
        self.region.fabric().store(self.at.add(16), self.stalls);
        self.write_back();
    }

    #[inline]
    fn write_back(&self) {
        self.region.fabric().flush(self.at, 24, Site::PulseFlush);
        self.region.fabric().fence(Site::PulseFlush);
    }
}

/// A broker's counters as another host sees them: (heartbeat, batches published).
#[inline]
pub fn read_pulse<F: Fabric>(region: &Region<F>, broker: BrokerId) -> (u64, u64) {
    let at = region.layout().broker(broker).add(64);
    let heartbeat = region.fabric().observe(at, Site::PulseRead);
    (heartbeat, region.fabric().load(at.add(8)))
}

/// A broker's count of stalls as another host sees it.
pub fn read_stalls<F: Fabric>(region: &Region<F>, broker: BrokerId) -> u64 {
    region.fabric().observe(region.layout().broker(broker).add(64 + 16), Site::PulseRead)
}
