//! Whole-system tests through public interfaces: real processes, real sockets, real SIGKILL. Each module has one promise.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

mod support;

mod bad_input;
mod chaos;
mod cluster;
mod doctor;
mod documents;
#[cfg(feature = "dpdk")]
mod dpdk;
mod elastic;
mod failover;
mod faults;
mod flush;
mod interop;
mod lab;
mod limits;
mod membership;
mod mirror;
mod order;
mod replication;
mod roce;
mod rooms;
mod verbs;
