//! What a polling thread needs of its host: the time ([`clock`]), how to wait ([`idle`]), which sockets are ready ([`poller`]), a core of its own
//! ([`thread`]), memory that stays where it is ([`buffer`]), and durable writes ([`uring`]).

pub mod buffer;
pub mod clock;
pub mod idle;
pub mod poller;
pub mod thread;
pub mod uring;

pub use buffer::Buffer;
pub use clock::{Clock, Now, SystemClock};
pub use poller::{Poller, Ready};
