//! Topics in requests and answers of the control service.

use embarcadero_control::v1 as proto;
use embarcadero_cxl::layout::TopicState;
use embarcadero_cxl::topic_table::{TopicConfig, check_new_topic_name};
use embarcadero_os::{Clock, SystemClock};
use embarcadero_wire::{Incarnation, MAX_ACK_LEVEL, Order, TopicId};
use tonic::Status;

/// Least time for which a topic with retention by time keeps messages, milliseconds.
const LEAST_RETENTION_MS: u64 = 10;

fn order_to_proto(order: Order) -> proto::Order {
    match order {
        Order::None => proto::Order::None,
        Order::Broker => proto::Order::Broker,
        Order::Total => proto::Order::Total,
        Order::Strong => proto::Order::Strong,
    }
}

/// Describes a topic to clients.
pub fn topic_to_proto(topic: &TopicConfig) -> proto::Topic {
    proto::Topic {
        id: topic.id.0,
        incarnation: topic.incarnation.0,
        name: topic.name.clone(),
        order: order_to_proto(topic.order).into(),
        ack_level: topic.ack_level.into(),
        replication_factor: topic.replication_factor.into(),
        retention_bytes: topic.retention_bytes,
        retention_ms: topic.retention_ms,
    }
}

#[allow(clippy::result_large_err)] // tonic's own error type
fn order_from_proto(order: i32) -> Result<Order, Status> {
    Ok(match proto::Order::try_from(order) {
        Ok(proto::Order::None) => Order::None,
        Ok(proto::Order::Broker) => Order::Broker,
        Ok(proto::Order::Total) => Order::Total,
        Ok(proto::Order::Strong) => Order::Strong,
        Ok(proto::Order::Unspecified) => return Err(Status::invalid_argument("order is missing; it must be 1 to 4")),
        Err(_) => return Err(Status::invalid_argument(format!("order is {order}; it must be 1 to 4"))),
    })
}

/// Checks how much a topic is to keep. Less than a segment, or than brokers look at in a turn, is a mistake: acknowledged
/// messages would be gone before anyone could read them.
#[allow(clippy::result_large_err)] // tonic's own error type
fn check_retention(request: &proto::CreateTopicRequest, segment_bytes: u64) -> Result<(), Status> {
    let proto::CreateTopicRequest { retention_bytes: bytes, retention_ms: ms, .. } = *request;
    if (1..segment_bytes).contains(&bytes) {
        let text = format!("retention_bytes is {bytes}; it must be 0, or at least a segment, {segment_bytes}");
        return Err(Status::invalid_argument(text));
    }
    if (1..LEAST_RETENTION_MS).contains(&ms) {
        let text = format!("retention_ms is {ms}; it must be 0, or at least {LEAST_RETENTION_MS}");
        return Err(Status::invalid_argument(text));
    }
    Ok(())
}

/// Checks a request for a topic in a region with segments of `segment_bytes`, and returns its configuration. The slot is
/// not chosen yet.
///
/// # Errors
/// Invalid argument, which names the field and its bound.
#[allow(clippy::result_large_err)] // tonic's own error type
pub(super) fn requested_topic(request: &proto::CreateTopicRequest, segment_bytes: u64) -> Result<TopicConfig, Status> {
    check_new_topic_name(&request.name).map_err(Status::invalid_argument)?;
    let order = order_from_proto(request.order)?;
    check_retention(request, segment_bytes)?;
    let replicas = request.replication_factor;
    if !(1..=32).contains(&replicas) {
        return Err(Status::invalid_argument(format!("replication_factor is {replicas}; it must be 1 to 32")));
    }
    if request.ack_level > MAX_ACK_LEVEL.into() {
        return Err(Status::invalid_argument(format!("ack_level is {}; it must be 0, 1 or 2", request.ack_level)));
    }
    if request.ack_level == 2 && replicas < 2 {
        return Err(Status::invalid_argument("ack_level 2 needs replication_factor >= 2"));
    }
    Ok(TopicConfig {
        id: TopicId::default(),
        incarnation: Incarnation::NONE,
        state: TopicState::Live,
        name: request.name.clone(),
        order,
        ack_level: request.ack_level as u8,
        replication_factor: replicas as u8,
        retention_bytes: request.retention_bytes,
        retention_ms: request.retention_ms,
        created_ms: SystemClock.now().wall_us / 1000,
    })
}
