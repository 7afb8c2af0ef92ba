//! The broker: receive, order, acknowledge and deliver batches that lie in CXL memory.
//!
//! Modules follow the path of a batch: [`ingest`] receives it into the [`blog`], [`delegation`] puts it into the
//! Batchlog, the [`sequencer`] gives it its place in the global order, [`ack`] tells its client, [`delivery`] sends it
//! to subscribers. A [`replica`] copies it to disk, from where the `archive` reads what the region no
//! longer holds. [`worker`] runs these stages; [`control`] is the gRPC side.
#![forbid(unsafe_code)]

pub mod ack;
mod archive;
pub mod blog;
mod broker;
pub mod config;
pub mod control;
mod dead_broker;
pub mod delegation;
pub mod delivery;
pub mod ingest;
mod leader;
pub mod membership;
pub mod mirror;
pub mod pool;
pub mod reclaim;
pub mod replica;
pub mod sequencer;
mod spares;
pub mod topics;
pub mod worker;

pub use broker::{Broker, BrokerError};
pub use config::BrokerConfig;
