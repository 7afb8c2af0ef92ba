//! Transports: both ends of the connections between clients and brokers.
//!
//! A transport implements [`Transport`] with three ends: the broker's ([`Connection`]), a publisher's
//! ([`PublisherLink`]) and a subscriber's ([`SubscriberLink`]). Every end is polled, and every call returns at once.
//!
//! - A broker's and a publisher's call moves as many batches and frames as there are.
//! - A subscriber's call hands out one item, because a batch is read in place and its room is given back by the next call.
//!   See [`SubscriberLink::take`].
//! - A publisher's batches are placed whole where the broker's [`Landing`] says.
//!
//! `sim/tests/transport/main.rs` is the conformance suite that every transport passes.

mod channel;
mod config;
mod connection;
mod endpoint;
mod link;
mod options;
mod outbox;
pub mod rdma;
mod send_buffer;
pub mod tcp;
mod window;

pub use channel::{Channel, PublisherChannel, SubscriberChannel};
pub use config::{Isolation, TransportKind};
pub use connection::{Connection, Landing, Placement, Received, TransportError, WindowPlacement};
pub use endpoint::{Endpoint, Slots, SocketEndpoint};
pub use link::{Item, LinkError, PublisherLink, SubscriberLink};
pub use options::LinkOptions;
pub use outbox::{Outbox, Outgoing};
pub use send_buffer::SendBuffer;
pub use window::Window;

use embarcadero_cxl::{Fabric, Native};
use embarcadero_wire::{OpenPublish, Subscribe};
use std::io;
use std::net::SocketAddr;

/// Carrier of batches and frames between clients and brokers.
pub trait Transport {
    /// Region memory as a broker maps it.
    type Memory: Fabric;
    /// Broker's end of a connection.
    type Connection: Connection<Self::Memory>;
    /// Broker's half, one per polling thread.
    type Endpoint: Endpoint<Self::Memory, Connection = Self::Connection>;
    /// Publisher's end of a connection.
    type Publisher: PublisherLink;
    /// Subscriber's end of a connection.
    type Subscriber: SubscriberLink;

    /// Connects a publisher and sends its opening frame. The answer comes through [`PublisherLink::poll`]. May block for
    /// [`LinkOptions::timeout`].
    ///
    /// # Errors
    /// The broker cannot be reached, or refuses the transport: then the error's inner error is a [`LinkError`].
    fn publish(&self, broker: SocketAddr, options: &LinkOptions, open: &OpenPublish) -> io::Result<Self::Publisher>;

    /// Connects a subscriber and sends its request. The answer comes through [`SubscriberLink::take`]. May block for
    /// [`LinkOptions::timeout`].
    ///
    /// # Errors
    /// The broker cannot be reached, or refuses the transport: then the error's inner error is a [`LinkError`].
    fn subscribe(&self, broker: SocketAddr, options: &LinkOptions, request: &Subscribe)
    -> io::Result<Self::Subscriber>;
}

/// Transport of real hosts: TCP, with a queue pair beside the socket for clients that have an RDMA device.
pub struct Sockets;

impl Transport for Sockets {
    type Memory = Native;
    type Connection = Channel;
    type Endpoint = SocketEndpoint;
    type Publisher = PublisherChannel;
    type Subscriber = SubscriberChannel;

    fn publish(&self, broker: SocketAddr, options: &LinkOptions, open: &OpenPublish) -> io::Result<PublisherChannel> {
        PublisherChannel::connect(broker, options, open)
    }

    fn subscribe(
        &self,
        broker: SocketAddr,
        options: &LinkOptions,
        request: &Subscribe,
    ) -> io::Result<SubscriberChannel> {
        SubscriberChannel::connect(broker, options, request)
    }
}
