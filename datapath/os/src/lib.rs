//! Services of the host for polling threads.
//!
//! | module | service |
//! |---|---|
//! | [`clock`] | the time |
//! | [`idle`] | waiting: spin, yield, sleep |
//! | [`poller`] | which sockets are ready |
//! | [`thread`] | exact timers, and a core of its own |
//! | [`buffer`] | memory that stays where it is |
//! | [`uring`] | durable writes |

pub mod buffer;
pub mod clock;
pub mod idle;
pub mod poller;
pub mod thread;
pub mod uring;

pub use buffer::Buffer;
pub use clock::{Clock, Now, SystemClock, Times};
pub use poller::{Interest, Poller, Ready};
