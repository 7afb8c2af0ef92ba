//! Shared memory that hosts may cache without snooping each other, and the structures that live in it.
//!
//! Three rules hold everywhere.
//!
//! - A line has one writing host at a time.
//! - Shared values only grow.
//! - Writers *flush to publish*, readers *invalidate to observe*.
//!
//! Every structure is reached through [`Fabric`]. So the same code runs on [`Native`] memory and on the simulated
//! fabric of the tests, which shows a forgotten flush. Start with [`layout`].

pub mod batchlog;
pub mod broker_table;
pub mod cache;
mod fabric;
pub mod layout;
mod leader_cache;
pub mod leadership;
mod native;
mod numa;
mod offset;
pub mod order_index;
mod own_lines;
pub mod owner;
pub mod region;
pub mod replication;
mod reserved;
mod row;
pub mod segment;
pub mod sequencer_half;
pub mod session_connections;
pub mod session_table;
mod site;
pub mod takeover;
pub mod topic_table;

pub use fabric::{CoherentFabric, Fabric, LINE_BYTES, Line, RegionOffset, Versioned};
pub use native::{Mapping, Native};
pub use own_lines::refresh_own_lines;
pub use region::{Region, RegionError};
pub use reserved::damaged_lines;
pub use row::{Damage, Row};
pub use site::{Guard, Site};
