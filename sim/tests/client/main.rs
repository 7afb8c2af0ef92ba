//! The production client over the simulated transport, from one seed, with brokers that do what a test says.
//!
//! The publisher and the subscriber are the polled values that `Publisher` and `Subscriber` of the client's crate drive.
//! Time is a number that a test counts up, a millisecond at a time. There is no other thread and no socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

mod brokers;
mod host;
mod publisher;
mod rig;
mod storm;
mod subscriber;
