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

pub mod batching;
mod client;
mod config;
mod control;
mod error;
mod link;
mod publisher;
mod subscriber;
mod verbs;

pub use client::{BrokerView, Client, ClusterView, StreamView, TopicOptions, TopicView};
pub use config::{ClientConfig, RdmaConfig};
pub use embarcadero_datapath::cxl::tables::Order;
pub use embarcadero_datapath::transport::Transport;
pub use error::ClientError;
pub use publisher::{MessageId, Publisher, PublisherStats, Status};
pub use subscriber::{Batch, Message, Start, Subscriber};
