//! State that a client shares with its publishers and subscribers.

use crate::config::ClientConfig;
use crate::control::Control;
use crate::error::{ClientError, ControlCode};
use crate::nic;
use crate::views::{ClusterView, TopicView};
use embarcadero_transport::rdma::RdmaClient;
use embarcadero_transport::tcp::SocketOptions;
use embarcadero_transport::{LinkError, LinkOptions, Sockets, Transport, TransportKind};
use embarcadero_wire::{OpenPublish, Subscribe};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Publisher's end of a connection, of the transport that [`Context::publish`] names.
pub(crate) type PublisherEnd = <Sockets as Transport>::Publisher;
/// Subscriber's end of a connection, of the transport that [`Context::subscribe`] names.
pub(crate) type SubscriberEnd = <Sockets as Transport>::Subscriber;

/// Returns the error of a data connection that was not made.
fn not_connected(error: io::Error) -> ClientError {
    error.downcast::<LinkError>().map_or_else(ClientError::io("connect to a broker"), ClientError::from)
}

/// Configuration, control plane and RDMA device of a client.
pub(crate) struct Context {
    pub(crate) config: ClientConfig,
    control: Mutex<Control>,
    device: Mutex<Option<Arc<RdmaClient>>>,
}

impl Context {
    pub(crate) fn new(config: ClientConfig) -> Result<Self, ClientError> {
        let control = Mutex::new(Control::new(&config)?);
        Ok(Self { config, control, device: Mutex::new(None) })
    }

    fn sockets(&self) -> SocketOptions {
        let bytes = self.config.socket_buffer_bytes;
        SocketOptions { send_buffer_bytes: bytes, receive_buffer_bytes: bytes }
    }

    /// Connects a publisher to a broker. Blocks for as long as connecting does.
    pub(crate) fn publish(&self, broker: SocketAddr, open: &OpenPublish) -> Result<PublisherEnd, ClientError> {
        let publisher = Sockets.publish(broker, &self.link_options()?, open);
        publisher.map_err(not_connected)
    }

    /// Connects a subscriber to a broker. Blocks for as long as connecting does.
    pub(crate) fn subscribe(&self, broker: SocketAddr, request: &Subscribe) -> Result<SubscriberEnd, ClientError> {
        let subscriber = Sockets.subscribe(broker, &self.link_options()?, request);
        subscriber.map_err(not_connected)
    }

    /// Options of data connections.
    pub(crate) fn link_options(&self) -> Result<LinkOptions, ClientError> {
        Ok(LinkOptions {
            timeout: self.config.connect_timeout(),
            sockets: self.sockets(),
            batch_bytes: self.config.batch_bytes().1,
            acknowledged: self.config.ack_level > 0,
            ring_bytes: self.config.rdma.ring_bytes,
            device: (self.config.transport != TransportKind::Tcp).then(|| self.device()).transpose()?,
        })
    }

    /// RDMA device in use. Opens another one if the port of the last went down.
    fn device(&self) -> Result<Arc<RdmaClient>, ClientError> {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        match device.as_ref().filter(|device| device.is_usable()) {
            Some(device) => Ok(Arc::clone(device)),
            None => Ok(Arc::clone(device.insert(nic::open(&self.config)?))),
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
        let topic = topic.ok_or_else(|| {
            let (code, message) = if cluster.damaged_topics.is_empty() {
                (ControlCode::NotFound, format!("topic {name:?} does not exist"))
            } else {
                let damaged = cluster.damaged_topics.join("; ");
                (ControlCode::DataLoss, format!("topic {name:?} is not among the topics that can be read: {damaged}"))
            };
            ClientError::Control { code, message, source: None }
        })?;
        Ok((topic, cluster))
    }
}
