//! The client library of Embarcadero: publish to a topic, and read it in its order.
//!
//! A [`Client`] knows one cluster. It creates topics, [`Publisher`]s and [`Subscriber`]s. No call is asynchronous: calls
//! move bytes themselves, and those that wait have a time-out.
//!
//! # Publish
//!
//! ```
//! use embarcadero_client::{Client, ClientConfig, Order, Status, TopicOptions};
//! # let broker = embarcadero_sim::LocalBroker::start()?;
//! # let endpoint = broker.control();
//! let client = Client::connect(ClientConfig::at(endpoint))?;
//! client.create_topic("events", TopicOptions { order: Order::Strong, ..TopicOptions::default() })?;
//! let publisher = client.publisher("events")?;
//! let id = publisher.publish(b"hello")?;
//! publisher.flush()?;
//! assert_eq!(publisher.poll(id)?, Status::Acknowledged(Some(0)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Read
//!
//! ```
//! use embarcadero_client::{Client, ClientConfig, Start, TopicOptions};
//! use std::time::Duration;
//! # let broker = embarcadero_sim::LocalBroker::start()?;
//! # let client = Client::connect(ClientConfig::at(broker.control()))?;
//! # client.create_topic("events", TopicOptions::default())?;
//! # let publisher = client.publisher("events")?;
//! # for text in ["one", "two", "three"] { publisher.publish(text.as_bytes())?; }
//! # publisher.flush()?;
//! let mut subscriber = client.subscriber("events", Start::Earliest)?;
//! // One message at a time ..
//! let first = subscriber.next(Duration::from_secs(60))?.expect("three were published");
//! assert_eq!((first.offset, first.payload), (0, &b"one"[..]));
//! // .. or all that is there.
//! assert_eq!(subscriber.drain(|message| println!("{} {:?}", message.offset, message.payload))?, 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Whole batches, without a copy
//!
//! ```
//! # use embarcadero_client::{Client, ClientConfig, Start, TopicOptions};
//! # use std::time::Duration;
//! # let broker = embarcadero_sim::LocalBroker::start()?;
//! # let client = Client::connect(ClientConfig::at(broker.control()))?;
//! # client.create_topic("events", TopicOptions::default())?;
//! let publisher = client.publisher("events")?;
//! publisher.publish_with(8, |message| message.copy_from_slice(&7u64.to_le_bytes()))?;
//! publisher.flush()?;
//! let mut subscriber = client.subscriber("events", Start::Offset(0))?;
//! let batch = subscriber.next_batch(Duration::from_secs(60))?.expect("a batch was published");
//! let sum: u64 = batch.messages().map(|message| u64::from(message.payload[0])).sum();
//! assert_eq!((batch.first_offset, sum), (0, 7));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod background;
mod batching;
mod call;
mod client;
mod config;
mod context;
mod control;
mod environment;
mod error;
mod nic;
mod publisher;
mod silence;
mod subscriber;
mod views;

/// Publishers and subscribers as values that are polled, for simulators. They are the ones that [`Publisher`] and
/// [`Subscriber`] drive. No promise is made about their interface.
#[doc(hidden)]
pub mod polled {
    pub use crate::call::{Call, Reply};
    pub use crate::environment::{Control, Environment};
    pub use crate::publisher::{Flush, PolledPublisher, Progress, PublisherOpening};
    pub use crate::subscriber::{Drain, Drained, PolledSubscriber};
}

/// Compiles the programs of the README.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;

/// Compiles the programs of the first pages.
#[cfg(doctest)]
#[doc = include_str!("../../docs/start/first-program.md")]
struct FirstProgram;

pub use client::Client;
pub use config::{ClientConfig, RdmaConfig};
pub use embarcadero_transport::TransportKind;
pub use embarcadero_wire::{BrokerId, ClientId, Incarnation, Order, OutOfBounds, TopicId};
pub use error::{Cause, ClientError, ControlCode, UnreadableBatch};
pub use publisher::{MessageId, Publisher, PublisherStats, Status};
pub use subscriber::{Batch, Message, Start, Subscriber};
pub use views::{BrokerView, ClusterView, StreamView, TopicOptions, TopicView};
