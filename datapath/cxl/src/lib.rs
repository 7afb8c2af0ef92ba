//! Shared memory that hosts may cache without snooping each other, and the structures that live in it.
//!
//! Three laws hold everywhere (see `docs/memory-layout.md`): one writing host a line, shared values only grow, and
//! *flush to publish, invalidate to observe*. Every structure is reached through [`Fabric`], so that the same code
//! runs on [`Native`] memory and on the [`Simulated`] fabric that shows a forgotten flush.

pub mod batchlog;
pub mod cache;
mod fabric;
pub mod layout;
mod leader_cache;
pub mod leadership;
mod native;
mod numa;
pub mod order_index;
pub mod region;
pub mod replication;
pub mod segment;
pub mod session_table;
pub mod tables;
pub mod takeover;

pub use fabric::{CoherentFabric, Fabric, Guard, LINE_BYTES, Line, RegionOffset, Site};
pub use native::{Mapping, Native};
pub use region::{Region, RegionError};
