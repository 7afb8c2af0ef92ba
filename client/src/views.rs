//! Cluster, brokers, topics and streams as clients see them.

use crate::error::{ClientError, ControlCode};
use embarcadero_control::v1 as proto;
use embarcadero_wire::{BrokerId, Incarnation, Order, TopicId};
use serde::Serialize;
use std::net::SocketAddr;

/// Options of a new topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopicOptions {
    /// Order that the topic promises.
    pub order: Order,
    /// Highest acknowledgement level that publishers may ask for.
    pub ack_level: u8,
    /// Number of copies of each batch, the one in CXL memory included.
    pub replication_factor: u8,
    /// Bytes that are kept, at least a segment of the region; 0 keeps everything until the pool is full.
    pub retention_bytes: u64,
    /// Age to which messages are kept, milliseconds, at least 10; 0 keeps everything.
    pub retention_ms: u64,
}

impl Default for TopicOptions {
    fn default() -> Self {
        Self { order: Order::Strong, ack_level: 1, replication_factor: 1, retention_bytes: 0, retention_ms: 0 }
    }
}

/// Broker as clients see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct BrokerView {
    /// Id of the broker.
    pub id: BrokerId,
    /// Number of the process under that id.
    pub incarnation: Incarnation,
    /// Address of the data plane.
    pub data: SocketAddr,
    /// Endpoint of the control service, `host:port`.
    pub control: String,
    /// True for the leader, the broker that orders.
    pub leader: bool,
}

/// Topic as clients see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct TopicView {
    /// Slot of the topic in the region's table.
    pub id: TopicId,
    /// Incarnation of the slot.
    pub incarnation: Incarnation,
    /// Name of the topic.
    pub name: String,
    /// Order that the topic promises.
    pub order: Order,
    /// Highest acknowledgement level that publishers may ask for.
    pub ack_level: u32,
    /// Number of copies of each batch, the one in CXL memory included.
    pub replication_factor: u32,
    /// Bytes that are kept; 0 keeps everything until the pool is full.
    pub retention_bytes: u64,
    /// Age to which messages are kept, milliseconds; 0 keeps everything.
    pub retention_ms: u64,
}

#[cfg(test)]
impl TopicView {
    /// Topic for tests: the first of its slot, at acknowledgement level 1.
    pub(crate) fn of_order(order: Order) -> Self {
        Self {
            id: TopicId(0),
            incarnation: Incarnation(1),
            name: "t".to_owned(),
            order,
            ack_level: 1,
            replication_factor: 1,
            retention_bytes: 0,
            retention_ms: 0,
        }
    }
}

/// Stream of a topic as clients see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct StreamView {
    /// Broker whose order it is; `None` for the global one.
    pub broker: Option<BrokerId>,
    /// First offset that is kept.
    pub earliest_offset: u64,
    /// Offset after the last message.
    pub next_offset: u64,
    /// Number of batches that are kept.
    pub batches: u64,
}

/// Cluster as clients see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ClusterView {
    /// UUID of the region.
    pub region_uuid: String,
    /// Brokers that are alive.
    pub brokers: Vec<BrokerView>,
    /// Topics of the cluster.
    pub topics: Vec<TopicView>,
    /// Size of a segment, bytes.
    pub segment_bytes: u64,
    /// Number of segments in the pool.
    pub segments_total: u64,
    /// Number of segments in the pool that are free.
    pub segments_free: u64,
    /// Means by which the leader is elected, and whether it works now, in words.
    pub membership: String,
    /// Rows of the topic table that cannot be read, in words. Each may be that of a topic.
    pub damaged_topics: Vec<String>,
    /// Rows that tell which brokers are alive, and where, and cannot be read, in words.
    pub damaged_brokers: Vec<String>,
}

impl TopicView {
    pub(crate) fn from_proto(topic: proto::Topic) -> Result<Self, ClientError> {
        let order = match topic.order() {
            proto::Order::None => Order::None,
            proto::Order::Broker => Order::Broker,
            proto::Order::Total => Order::Total,
            proto::Order::Strong => Order::Strong,
            proto::Order::Unspecified => {
                return Err(ClientError::Incompatible(format!(
                    "topic {} has an order unknown to this client",
                    topic.name
                )));
            }
        };
        Ok(Self {
            id: TopicId(topic.id),
            incarnation: Incarnation(topic.incarnation),
            name: topic.name,
            order,
            ack_level: topic.ack_level,
            replication_factor: topic.replication_factor,
            retention_bytes: topic.retention_bytes,
            retention_ms: topic.retention_ms,
        })
    }
}

impl ClusterView {
    /// Topic of a name.
    ///
    /// # Errors
    /// No topic has the name, or none with it can be read.
    pub(crate) fn topic(&self, name: &str) -> Result<TopicView, ClientError> {
        let topic = self.topics.iter().find(|topic| topic.name == name).cloned();
        topic.ok_or_else(|| {
            let (code, message) = if self.damaged_topics.is_empty() {
                (ControlCode::NotFound, format!("topic {name:?} does not exist"))
            } else {
                let damaged = self.damaged_topics.join("; ");
                (ControlCode::DataLoss, format!("topic {name:?} is not among the topics that can be read: {damaged}"))
            };
            ClientError::Control { code, message, source: None }
        })
    }

    pub(crate) fn from_proto(answer: proto::MetadataResponse) -> Result<Self, ClientError> {
        let brokers = answer.brokers.into_iter().map(|broker| {
            let data = broker.data_endpoint.parse().map_err(|error| {
                let (id, endpoint) = (broker.id, &broker.data_endpoint);
                ClientError::Incompatible(format!("broker {id} has data endpoint {endpoint:?}: {error}"))
            })?;
            let proto::Broker { id, incarnation, control_endpoint: control, leader, .. } = broker;
            Ok(BrokerView { id: BrokerId(id), incarnation: Incarnation(incarnation), data, control, leader })
        });
        Ok(Self {
            region_uuid: answer.region_uuid,
            brokers: brokers.collect::<Result<_, ClientError>>()?,
            topics: answer.topics.into_iter().map(TopicView::from_proto).collect::<Result<_, _>>()?,
            segment_bytes: answer.segment_bytes,
            segments_total: answer.segments_total,
            segments_free: answer.segments_free,
            membership: answer.membership,
            damaged_topics: answer.damaged_topics,
            damaged_brokers: answer.damaged_brokers,
        })
    }
}
