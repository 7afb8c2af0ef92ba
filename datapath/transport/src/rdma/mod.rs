//! RDMA: the NIC writes batches straight into the region.
//!
//! A connection is a TCP connection with a queue pair beside it. The socket carries the opening frames, and what ends a
//! connection: errors with their text, and the peer's death, which it shows at once. The queue pair carries all the rest. A
//! publisher WRITEs batches back to back into landing windows that the broker grants it, from the first on ahead of need,
//! each with immediate data that names the window; the broker answers with inline SENDs of frames. A subscriber has
//! deliveries WRITTEN into its ring and gives room back with WRITEs of no bytes. `docs/reference/protocol.md` has the details.

mod chain;
mod client;
mod connection;
mod device;
mod publisher;
mod ring;
mod subscriber;

pub use client::RdmaClient;
pub use connection::RdmaConnection;
pub use device::{RdmaDevice, RdmaQueue};
pub(crate) use publisher::RdmaPublisher;
pub(crate) use subscriber::RdmaSubscriber;

use embarcadero_verbs::PeerAddress;
use embarcadero_wire::{RdmaAccept, RdmaConnect};

/// Immediate data of a publisher that has a batch and no window to put it in; or-ed with the number of the first window
/// that it has not given up.
pub const WANTS_WINDOW: u32 = 1 << 31;
/// Windows that a publisher holds at a time: one to write into, and the next.
pub const WINDOWS_PER_PUBLISHER: usize = 2;
/// Work requests that a connection may have under way.
pub const SEND_DEPTH: u64 = 128;
/// Work requests after which one asks for a completion.
pub const SIGNAL_EVERY: u64 = 16;

/// The other end, as a connecting peer tells it.
fn connecting_peer(request: &RdmaConnect) -> PeerAddress {
    let RdmaConnect { gid, lid, queue_pair, first_psn, mtu, .. } = *request;
    PeerAddress { gid, lid: lid as u16, queue_pair, first_psn, mtu }
}

/// The other end, as it answers a connecting peer.
fn accepting_peer(accept: &RdmaAccept) -> PeerAddress {
    let RdmaAccept { gid, lid, queue_pair, first_psn, mtu, .. } = *accept;
    PeerAddress { gid, lid: lid as u16, queue_pair, first_psn, mtu }
}
