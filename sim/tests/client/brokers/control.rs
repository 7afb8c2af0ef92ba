//! Control plane of the brokers.

use super::super::host::{BATCH_BYTES, Request};
use super::{Answers, Brokers, Session, WINDOW};
use embarcadero_client::ClientError;
use embarcadero_control::v1 as proto;
use embarcadero_wire::{ClientId, Epoch, Order};
use std::collections::BTreeMap;

/// Name of the topic.
pub(crate) const TOPIC: &str = "events";
/// First sequence of every session, which need not be 0.
const FIRST_SEQUENCE: u64 = 1000;

impl Brokers {
    /// Answers a call.
    pub(super) fn answer(&mut self, request: Request) {
        let refusal = match self.answers {
            Answers::Refusal(code) => Some(ClientError::Control { code, message: format!("{code:?}"), source: None }),
            Answers::True | Answers::None => None,
        };
        match request {
            Request::Cluster(reply) => reply.send(refusal.map_or_else(|| Ok(self.metadata()), Err)),
            Request::Open(request, reply) => {
                self.asked_to_open += 1;
                reply.send(match refusal {
                    Some(refusal) => Err(refusal),
                    None => Ok(self.open_session(&request)),
                });
            }
            Request::Close(request, reply) => {
                self.closed.push(ClientId(request.client_id));
                reply.send(refusal.map_or(Ok(proto::CloseSessionResponse {}), Err));
            }
        }
    }

    /// Answer to a question for the brokers and topics.
    pub(crate) fn metadata(&self) -> proto::MetadataResponse {
        let order = match self.order {
            Order::None => proto::Order::None,
            Order::Broker => proto::Order::Broker,
            Order::Total => proto::Order::Total,
            Order::Strong => proto::Order::Strong,
        };
        let topic = proto::Topic {
            incarnation: 1,
            name: TOPIC.to_owned(),
            order: order.into(),
            ack_level: 1,
            replication_factor: 1,
            ..proto::Topic::default()
        };
        let brokers = self.all.iter().map(|broker| proto::Broker {
            id: broker.id.0,
            incarnation: 1,
            data_endpoint: broker.address.to_string(),
            control_endpoint: String::new(),
            leader: broker.id.0 == 0,
        });
        proto::MetadataResponse {
            brokers: brokers.collect(),
            topics: vec![topic],
            ..proto::MetadataResponse::default()
        }
    }

    fn open_session(&mut self, request: &proto::OpenSessionRequest) -> proto::OpenSessionResponse {
        let client = ClientId(request.client_id);
        if request.resume && !self.sessions.contains_key(&client) {
            return proto::OpenSessionResponse::default();
        }
        let session = self.sessions.entry(client).or_insert_with(|| Session {
            epoch: Epoch(0),
            open: true,
            ack_level: request.ack_level,
            next: FIRST_SEQUENCE,
            held: BTreeMap::new(),
            committed: BTreeMap::new(),
        });
        session.epoch.0 += 1;
        session.open = true;
        session.held.clear();
        proto::OpenSessionResponse {
            epoch: session.epoch.0,
            next_sequence: session.next,
            window_batches: WINDOW,
            max_batch_bytes: BATCH_BYTES as u64,
            ..proto::OpenSessionResponse::default()
        }
    }
}
