//! State that a client shares with its publishers and subscribers.

use crate::config::ClientConfig;
use crate::control::GrpcControl;
use crate::environment::{Control, Environment};
use crate::error::ClientError;
use crate::nic;
use crate::views::ClusterView;
use embarcadero_os::SystemClock;
use embarcadero_transport::rdma::RdmaClient;
use embarcadero_transport::tcp::SocketOptions;
use embarcadero_transport::{LinkOptions, Sockets, TransportKind};
use std::sync::{Arc, Mutex, PoisonError};

/// Configuration, control plane and RDMA device of a client.
pub(crate) struct Context {
    config: ClientConfig,
    control: GrpcControl,
    device: Mutex<Option<Arc<RdmaClient>>>,
}

impl Context {
    pub(crate) fn new(config: ClientConfig) -> Result<Self, ClientError> {
        let control = GrpcControl::new(&config)?;
        Ok(Self { config, control, device: Mutex::new(None) })
    }

    fn sockets(&self) -> SocketOptions {
        let bytes = self.config.socket_buffer_bytes;
        SocketOptions { send_buffer_bytes: bytes, receive_buffer_bytes: bytes }
    }

    /// RDMA device in use. Opens another one if the port of the last went down.
    fn device(&self) -> Result<Arc<RdmaClient>, ClientError> {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        match device.as_ref().filter(|device| device.is_usable()) {
            Some(device) => Ok(Arc::clone(device)),
            None => Ok(Arc::clone(device.insert(nic::open(&self.config)?))),
        }
    }

    /// Asks for the state of the cluster. Blocks until a broker has answered.
    pub(crate) fn cluster(&self) -> Result<ClusterView, ClientError> {
        ClusterView::from_proto(self.control.cluster().join()?)
    }
}

impl Environment for Context {
    type Transport = Sockets;
    type Control = GrpcControl;
    type Clock = SystemClock;

    fn config(&self) -> &ClientConfig {
        &self.config
    }

    fn transport(&self) -> &Sockets {
        &Sockets
    }

    fn link_options(&self) -> Result<LinkOptions, ClientError> {
        Ok(LinkOptions {
            timeout: self.config.connect_timeout(),
            sockets: self.sockets(),
            batch_bytes: self.config.batch_bytes().1,
            acknowledged: self.config.ack_level > 0,
            ring_bytes: self.config.rdma.ring_bytes,
            device: (self.config.transport != TransportKind::Tcp).then(|| self.device()).transpose()?,
        })
    }

    fn control(&self) -> &GrpcControl {
        &self.control
    }

    #[inline]
    fn clock(&self) -> &SystemClock {
        &SystemClock
    }

    fn random(&self) -> u64 {
        rand::random()
    }
}
