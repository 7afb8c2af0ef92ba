//! Replication: batches of topics with a replication factor above one are copied from CXL memory to brokers' disks.
//!
//! - `assign` says whose batches a broker copies.
//! - The [`replicator`] copies them into a [`store`]: files of the [`mod@format`] of `docs/reference/replica-files.md`,
//!   on a [`medium`].
//! - [`completion`] counts the disks, at the leader.
//! - [`restore`] rebuilds topics from the files alone.

mod assign;
pub mod completion;
pub mod format;
pub mod medium;
pub mod replicator;
pub mod restore;
pub mod store;
