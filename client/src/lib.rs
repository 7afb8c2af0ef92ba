//! Publish to and subscribe from an Embarcadero cluster.
//!
//! ```no_run
//! use embarcadero_client::{Client, ClientConfig, Order, Start, TopicOptions};
//! # fn main() -> Result<(), embarcadero_client::ClientError> {
//! let client = Client::connect(ClientConfig::at("127.0.0.1:7000"))?;
//! client.create_topic("events", TopicOptions { order: Order::Strong, ..TopicOptions::default() })?;
//! let publisher = client.publisher("events")?;
//! let id = publisher.publish(b"hello")?;
//! publisher.flush()?;
//! println!("offset {:?}", publisher.poll(id)?);
//! let mut subscriber = client.subscriber("events", Start::Earliest)?;
//! subscriber.drain(|message| println!("{} {:?}", message.offset, message.payload))?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod background;
mod batching;
mod client;
mod config;
mod context;
mod control;
mod error;
mod nic;
mod publisher;
mod subscriber;
mod views;

pub use batching::{BatchSizer, BufferState, SealStats};
pub use client::Client;
pub use config::{ClientConfig, RdmaConfig};
pub use embarcadero_transport::TransportKind;
pub use embarcadero_wire::{BrokerId, ClientId, Incarnation, Order, OutOfBounds, TopicId};
pub use error::ClientError;
pub use publisher::{MessageId, Publisher, PublisherStats, Status};
pub use subscriber::{Batch, Message, Start, Subscriber};
pub use views::{BrokerView, ClusterView, StreamView, TopicOptions, TopicView};
