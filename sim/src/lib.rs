//! Simulated worlds for tests and measurements.
//!
//! - [`fabric`]: hosts whose caches do not see each other's stores.
//! - [`disk`]: disks that fail.
//! - [`transport`]: a transport in memory.
//! - [`testbed`]: a sequencer in one thread.
//! - [`local`]: a broker in this process.
//! - [`parallel`]: work on all cores, for searches over seeds.
//!
//! No product crate depends on this one.
#![forbid(unsafe_code)]

pub mod disk;
pub mod fabric;
pub mod local;
pub mod parallel;
pub mod testbed;
pub mod transport;

pub use disk::{Fault, SimulatedMedium};
pub use fabric::{Mutation, Simulated, Turbulence, World};
pub use local::LocalBroker;
pub use parallel::on_all_cores;
pub use transport::{
    Power, SimulatedConnection, SimulatedEndpoint, SimulatedPublisher, SimulatedSubscriber, SimulatedTransport, Weather,
};
