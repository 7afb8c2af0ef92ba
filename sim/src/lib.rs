//! Simulated worlds for tests and measurements: hosts whose caches do not see each other ([`fabric`]), disks that fail
//! ([`disk`]), a transport in memory ([`transport`]), and a sequencer in one thread ([`testbed`]). No product crate depends on this one.

pub mod disk;
pub mod fabric;
pub mod local;
pub mod testbed;
pub mod transport;

pub use disk::{Fault, SimulatedMedium};
pub use fabric::{Mutation, Simulated, Turbulence, World};
pub use local::LocalBroker;
pub use transport::SimulatedTransport;
