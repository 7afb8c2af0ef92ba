//! Client of one cluster.

use crate::background::Background;
use crate::config::ClientConfig;
use crate::context::Context;
use crate::environment::Environment;
use crate::error::ClientError;
use crate::publisher::Publisher;
use crate::subscriber::{Start, Subscriber};
use crate::views::{ClusterView, StreamView, TopicOptions, TopicView};
use embarcadero_control::v1 as proto;
use embarcadero_wire::{Order, Stream};
use std::sync::Arc;

/// Client of one cluster.
///
/// The client's publishers share one background thread, which takes acknowledgements, reconnects and resubmits while the
/// application is busy elsewhere. Publishers and subscribers may outlive the client.
pub struct Client {
    context: Arc<Context>,
    background: Arc<Background>,
}

impl Client {
    /// Connects to a cluster.
    ///
    /// # Errors
    /// The configuration is not valid or no broker answers.
    pub fn connect(config: ClientConfig) -> Result<Self, ClientError> {
        config.validate()?;
        let context = Arc::new(Context::new(config)?);
        context.link_options()?;
        context.cluster()?;
        let background = Arc::new(Background::start()?);
        Ok(Self { context, background })
    }

    /// Asks the cluster for its brokers, its topics and its memory.
    ///
    /// # Errors
    /// No broker answers.
    pub fn cluster(&self) -> Result<ClusterView, ClientError> {
        self.context.cluster()
    }

    /// Creates a topic.
    ///
    /// # Errors
    /// The topic exists already, the options contradict each other, or the table of topics is full.
    pub fn create_topic(&self, name: &str, options: TopicOptions) -> Result<TopicView, ClientError> {
        let order = match options.order {
            Order::None => proto::Order::None,
            Order::Broker => proto::Order::Broker,
            Order::Total => proto::Order::Total,
            Order::Strong => proto::Order::Strong,
        };
        let request = proto::CreateTopicRequest {
            name: name.to_owned(),
            order: order.into(),
            ack_level: options.ack_level.into(),
            replication_factor: options.replication_factor.into(),
            retention_bytes: options.retention_bytes,
            retention_ms: options.retention_ms,
        };
        let topic = self.context.control().leader(move |mut client| {
            let request = request.clone();
            async move { client.create_topic(request).await }
        });
        TopicView::from_proto(topic.join()?)
    }

    /// Deletes a topic and everything in it.
    ///
    /// # Errors
    /// The topic does not exist, or brokers do not release it.
    pub fn delete_topic(&self, name: &str) -> Result<(), ClientError> {
        let request = proto::DeleteTopicRequest { name: name.to_owned() };
        let deleted = self.context.control().leader(move |mut client| {
            let request = request.clone();
            async move { client.delete_topic(request).await }
        });
        deleted.join().map(drop)
    }

    /// Asks for a topic's properties and for the bounds of its streams.
    ///
    /// # Errors
    /// The topic does not exist.
    pub fn describe_topic(&self, name: &str) -> Result<(TopicView, Vec<StreamView>), ClientError> {
        let request = proto::DescribeTopicRequest { name: name.to_owned() };
        let answer = self.context.control().leader(move |mut client| {
            let request = request.clone();
            async move { client.describe_topic(request).await }
        });
        let answer = answer.join()?;
        let topic = answer.topic.ok_or_else(|| ClientError::Incompatible("the answer names no topic".to_owned()))?;
        let streams = answer.streams.into_iter().map(|stream| StreamView {
            broker: Stream(stream.broker).broker(),
            earliest_offset: stream.earliest_offset,
            next_offset: stream.next_offset,
            batches: stream.batches,
        });
        Ok((TopicView::from_proto(topic)?, streams.collect()))
    }

    /// Opens a session on a topic and connects to the brokers.
    ///
    /// # Errors
    /// The topic does not exist, the session is refused, or no broker can be reached.
    pub fn publisher(&self, topic: &str) -> Result<Publisher, ClientError> {
        Publisher::open(Arc::clone(&self.context), topic, Arc::clone(&self.background))
    }

    /// Subscribes to a topic, from `start` on.
    ///
    /// # Errors
    /// The topic does not exist, or no broker can be reached.
    pub fn subscriber(&self, topic: &str, start: Start) -> Result<Subscriber, ClientError> {
        Subscriber::open(Arc::clone(&self.context), topic, start)
    }
}
