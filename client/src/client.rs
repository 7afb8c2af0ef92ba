//! A client of one cluster.

use crate::config::ClientConfig;
use crate::control::Control;
use crate::error::ClientError;
use crate::link::LinkOptions;
use crate::publisher::{Publisher, PublisherCore};
use crate::subscriber::{Start, Subscriber};
use crate::verbs::VerbsDevice;
use embarcadero_control::v1 as proto;
use embarcadero_datapath::cxl::tables::Order;
use embarcadero_datapath::transport::Transport;
use embarcadero_datapath::transport::tcp::SocketOptions;
use serde::Serialize;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

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
    pub id: u32,
    /// Process under that id.
    pub incarnation: u32,
    /// Data plane.
    pub data: SocketAddr,
    /// Control service.
    pub control: String,
    /// True for the broker that orders.
    pub head: bool,
}

/// A topic as clients see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TopicView {
    /// Slot.
    pub id: u32,
    /// Incarnation of the slot.
    pub incarnation: u32,
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
    pub broker: Option<u32>,
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
    /// Who elects the head, and whether it can, in words.
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
                return Err(ClientError::Unreachable(format!(
                    "topic {} has an order this client does not know",
                    topic.name
                )));
            }
        };
        Ok(Self {
            id: topic.id,
            incarnation: topic.incarnation,
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
    fn from_proto(answer: proto::MetadataResponse) -> Result<Self, ClientError> {
        let brokers = answer.brokers.into_iter().map(|broker| {
            let data = broker.data_endpoint.parse().map_err(|_| {
                ClientError::Unreachable(format!("broker {} has data endpoint {:?}", broker.id, broker.data_endpoint))
            })?;
            let proto::Broker { id, incarnation, control_endpoint: control, head, .. } = broker;
            Ok(BrokerView { id, incarnation, data, control, head })
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

pub(crate) struct Inner {
    pub(crate) config: ClientConfig,
    control: Mutex<Control>,
    publishers: Mutex<Vec<Weak<PublisherCore>>>,
    device: Mutex<Option<Arc<VerbsDevice>>>,
    stop: AtomicBool,
}

impl Inner {
    fn sockets(&self) -> SocketOptions {
        let bytes = self.config.socket_buffer_bytes;
        SocketOptions { send_buffer_bytes: bytes, receive_buffer_bytes: bytes }
    }

    /// What connections are made with.
    pub(crate) fn link_options(&self) -> Result<LinkOptions, ClientError> {
        Ok(LinkOptions {
            timeout: self.config.connect_timeout(),
            sockets: self.sockets(),
            batch_bytes: self.config.batch_bytes().1,
            acknowledged: self.config.ack_level > 0,
            device: (self.config.transport != Transport::Tcp).then(|| self.device()).transpose()?,
        })
    }

    /// The RDMA device in use; another one, if its port went down.
    fn device(&self) -> Result<Arc<VerbsDevice>, ClientError> {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        match device.as_ref().filter(|device| device.is_usable()) {
            Some(device) => Ok(Arc::clone(device)),
            None => Ok(Arc::clone(device.insert(VerbsDevice::open(&self.config)?))),
        }
    }

    pub(crate) fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn cluster(&self) -> Result<ClusterView, ClientError> {
        let answer = self.control().metadata()?;
        ClusterView::from_proto(answer)
    }

    pub(crate) fn topic(&self, name: &str) -> Result<(TopicView, ClusterView), ClientError> {
        let cluster = self.cluster()?;
        let topic = cluster.topics.iter().find(|topic| topic.name == name).cloned();
        let topic = topic.ok_or_else(|| ClientError::Control {
            code: "NotFound".to_owned(),
            message: format!("topic {name:?} does not exist"),
        })?;
        Ok((topic, cluster))
    }
}

/// A client. Its publishers share a background thread, which acknowledges, reconnects and resubmits while the
/// application is busy elsewhere. They may outlive it.
pub struct Client {
    inner: Arc<Inner>,
    background: Arc<Background>,
}

/// The thread that looks after publishers; it ends with the last that holds this.
pub(crate) struct Background {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    fn start(inner: &Arc<Inner>) -> Result<Self, ClientError> {
        let shared = Arc::clone(inner);
        let thread = std::thread::Builder::new()
            .name("embarcadero-client".to_owned())
            .spawn(move || run_background(&shared))
            .map_err(ClientError::io("start the client's thread"))?;
        Ok(Self { inner: Arc::clone(inner), thread: Some(thread) })
    }

    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::Relaxed);
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Client {
    /// Connects to a cluster.
    ///
    /// # Errors
    /// The configuration is not valid or no broker answers.
    pub fn connect(config: ClientConfig) -> Result<Self, ClientError> {
        config.validate()?;
        let control = Mutex::new(Control::new(&config)?);
        let inner = Arc::new(Inner {
            config,
            control,
            publishers: Mutex::new(Vec::new()),
            device: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        inner.link_options()?;
        inner.cluster()?;
        let background = Arc::new(Background::start(&inner)?);
        Ok(Self { inner, background })
    }

    /// Brokers, topics and memory.
    ///
    /// # Errors
    /// No broker answers.
    pub fn cluster(&self) -> Result<ClusterView, ClientError> {
        self.inner.cluster()
    }

    /// Makes a topic.
    ///
    /// # Errors
    /// It exists already, the options do not fit together, or the table is full.
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
        let topic = self.inner.control().head(async |client| client.create_topic(request.clone()).await)?;
        TopicView::from_proto(topic)
    }

    /// Deletes a topic and everything in it.
    ///
    /// # Errors
    /// It does not exist, or brokers do not let go of it.
    pub fn delete_topic(&self, name: &str) -> Result<(), ClientError> {
        let request = proto::DeleteTopicRequest { name: name.to_owned() };
        self.inner.control().head(async |client| client.delete_topic(request.clone()).await).map(drop)
    }

    /// What a topic is and how far its streams reach.
    ///
    /// # Errors
    /// It does not exist.
    pub fn describe_topic(&self, name: &str) -> Result<(TopicView, Vec<StreamView>), ClientError> {
        let request = proto::DescribeTopicRequest { name: name.to_owned() };
        let answer = self.inner.control().head(async |client| client.describe_topic(request.clone()).await)?;
        let topic = answer.topic.ok_or_else(|| ClientError::Unreachable("the answer names no topic".to_owned()))?;
        let streams = answer.streams.into_iter().map(|stream| StreamView {
            broker: (stream.broker != u32::MAX).then_some(stream.broker),
            earliest_offset: stream.earliest_offset,
            next_offset: stream.next_offset,
            batches: stream.batches,
        });
        Ok((TopicView::from_proto(topic)?, streams.collect()))
    }

    /// Opens a session on a topic and connects to its brokers.
    ///
    /// # Errors
    /// The topic does not exist, the session is refused, or no broker can be reached.
    pub fn publisher(&self, topic: &str) -> Result<Publisher, ClientError> {
        let core = PublisherCore::open(Arc::clone(&self.inner), topic)?;
        let mut publishers = self.inner.publishers.lock().unwrap_or_else(PoisonError::into_inner);
        publishers.push(Arc::downgrade(&core));
        drop(publishers);
        self.background.wake();
        Ok(Publisher::new(core, Arc::clone(&self.background)))
    }

    /// Reads a topic from `start` on.
    ///
    /// # Errors
    /// The topic does not exist, or no broker can be reached.
    pub fn subscriber(&self, topic: &str, start: Start) -> Result<Subscriber, ClientError> {
        Subscriber::open(Arc::clone(&self.inner), topic, start)
    }
}

/// Looks after publishers whose application does not call right now.
fn run_background(inner: &Inner) {
    while !inner.stop.load(Ordering::Relaxed) {
        let cores: Vec<Arc<PublisherCore>> = {
            let mut publishers = inner.publishers.lock().unwrap_or_else(PoisonError::into_inner);
            publishers.retain(|publisher| publisher.strong_count() > 0);
            publishers.iter().filter_map(Weak::upgrade).collect()
        };
        let mut busy = false;
        for core in &cores {
            busy |= core.attend();
        }
        drop(cores);
        std::thread::park_timeout(if busy { Duration::from_millis(1) } else { Duration::from_millis(5) });
    }
}
