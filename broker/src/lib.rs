//! The broker: receive, order, acknowledge and deliver batches that lie in CXL memory.
//!
//! The modules follow the path of a batch:
//!
//! - `ingest` receives it from its publisher into the [`blog`].
//! - [`delegation`] appends it to the Batchlog, or to the broker's own order index.
//! - The [`sequencer`] of the leader gives it its place in the global order.
//! - [`ack`] tells the publisher.
//! - `delivery` sends it to subscribers.
//! - `reclaim` returns its segment to the pool once nobody needs it.
//! - A [`replica`] copies it to disk. The `archive` reads it from there once the region no longer holds it.
//!
//! A [`worker`] runs these stages in a polling thread. `control` serves gRPC.
#![forbid(unsafe_code)]

pub mod ack;
#[doc(hidden)] // for simulators, without a promise
pub mod archive;
pub mod blog;
mod broker;
#[doc(hidden)] // for simulators, without a promise
pub mod caller;
pub mod config;
#[doc(hidden)] // for simulators, without a promise
pub mod control;
mod dead_broker;
pub mod delegation;
mod delivery;
mod ingest;
mod leader;
mod lending;
pub mod membership;
pub mod mirror;
mod order_time;
pub mod pins;
mod pool;
mod reclaim;
pub mod replica;
pub mod sequencer;
pub mod session_board;
mod takeover;
pub mod topics;
#[doc(hidden)] // for simulators, without a promise
pub mod worker;

pub use broker::{Broker, BrokerError};
pub use config::BrokerConfig;
