//! Replication: batches of topics with a replication factor above one are copied from CXL memory to brokers' disks.
//!
//! [`assign`] says whose batches a broker copies, the [`replicator`] copies them into a [`store`] of files in the
//! [`mod@format`] of `docs/reference/replica-files.md` on a [`medium`], and at the leader [`completion`] counts the disks. [`restore`]
//! rebuilds topics from the files alone.

pub mod assign;
pub mod completion;
pub mod format;
pub mod medium;
pub mod replicator;
pub mod restore;
pub mod store;
