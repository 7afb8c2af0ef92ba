//! Brokers, topics and streams as clients see them.

use crate::error::ClientError;
use embarcadero_control::v1 as proto;
use embarcadero_wire::{BrokerId, Incarnation, Order, TopicId};
use serde::Serialize;
use std::net::SocketAddr;

/// How a topic is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopicOptions {
    /// Order that it promises.
    pub order: Order,
    /// Highest acknowledgement level that publishers may ask for.
    pub ack_level: u8,
    /// Copies including the one in CXL.
    pub replication_factor: u8,
    /// Bytes kept; 0 keeps everything until the pool is full.
    pub retention_bytes: u64,
    /// Milliseconds kept; 0 keeps everything.
    pub retention_ms: u64,
}

impl Default for TopicOptions {
    fn default() -> Self {
        Self { order: Order::Strong, ack_level: 1, replication_factor: 1, retention_bytes: 0, retention_ms: 0 }
    }
}

/// A broker as clients see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BrokerView {
    /// Id.
    pub id: BrokerId,
    /// Process under that id.
    pub incarnation: Incarnation,
    /// Data plane.
    pub data: SocketAddr,
    /// Control service.
    pub control: String,
    /// True for the broker that orders.
    pub leader: bool,
}

/// A topic as clients see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TopicView {
    /// Slot.
    pub id: TopicId,
    /// Incarnation of the slot.
    pub incarnation: Incarnation,
    /// Name.
    pub name: String,
    /// Order.
    pub order: Order,
    /// Highest acknowledgement level.
    pub ack_level: u32,
    /// Copies.
    pub replication_factor: u32,
    /// Bytes kept.
    pub retention_bytes: u64,
    /// Milliseconds kept.
    pub retention_ms: u64,
}

/// A stream of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StreamView {
    /// Broker whose order it is; `None` for the global one.
    pub broker: Option<BrokerId>,
    /// First offset kept.
    pub earliest_offset: u64,
    /// Offset after the last.
    pub next_offset: u64,
    /// Batches kept.
    pub batches: u64,
}

/// The cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ClusterView {
    /// Region.
    pub region_uuid: String,
    /// Live brokers.
    pub brokers: Vec<BrokerView>,
    /// Topics.
    pub topics: Vec<TopicView>,
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Segments of the pool.
    pub segments_total: u64,
    /// Of them, free.
    pub segments_free: u64,
    /// Who elects the leader, and whether it can, in words.
    pub membership: String,
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
    pub(crate) fn from_proto(answer: proto::MetadataResponse) -> Result<Self, ClientError> {
        let brokers = answer.brokers.into_iter().map(|broker| {
            let data = broker.data_endpoint.parse().map_err(|_| {
                ClientError::Incompatible(format!("broker {} has data endpoint {:?}", broker.id, broker.data_endpoint))
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
        })
    }
}
