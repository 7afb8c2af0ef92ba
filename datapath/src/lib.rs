//! The data path of Embarcadero: the shared CXL region and the rules for touching it ([`cxl`]), the bytes that
//! travel between clients and brokers ([`wire`]), how they travel ([`transport`], over [`verbs`] where a NIC places them),
//! and how threads wait ([`poll`]). [`uring`] writes files.
//!
//! All `unsafe` code of the project, but for its tests, lives here and in `sys/`.

pub mod buffer;
pub mod cxl;
pub mod poll;
pub mod transport;
pub mod uring;
pub mod verbs;
pub mod wire;
