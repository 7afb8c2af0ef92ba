//! Promises of single stages and structures, on simulated hosts and disks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

mod batchlog;
mod full_fences;
mod gaps;
mod index_reserve;
mod moved_ids;
mod own_streams;
mod reclaim;
mod replica_store;
mod retention;
mod session_slots;
mod sessions;
mod shared_caches;
mod superseded;
mod takeover;
mod torn_rows;
