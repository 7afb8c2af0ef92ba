//! RDMA: the NIC writes batches straight into the region.
//!
//! A connection is a TCP connection with a queue pair beside it. The socket carries the opening frames, the errors with
//! their text, and the news that the peer is gone. The queue pair carries all the rest.
//!
//! A publisher WRITEs batches back to back into landing windows. The immediate data of each WRITE names the window. The
//! broker answers with inline SENDs of frames, and grants each window after the first before the publisher needs it.
//!
//! The broker WRITEs deliveries into a subscriber's ring. The subscriber gives room back with WRITEs of no bytes.
//! `docs/reference/protocol.md` has the details.

mod arrivals;
mod chain;
mod client;
mod connection;
mod device;
mod publisher;
mod ring;
mod subscriber;
mod windows;

pub use client::RdmaClient;
pub(crate) use connection::RdmaConnection;
pub use device::RdmaDevice;
pub(crate) use device::RdmaQueue;
pub(crate) use publisher::RdmaPublisher;
pub(crate) use subscriber::RdmaSubscriber;
pub use windows::WindowBounds;

use embarcadero_verbs::PeerAddress;
use embarcadero_wire::{RdmaAccept, RdmaConnect};

/// Flag in the immediate data of a publisher that has a batch and no window for it. The other bits are the number of
/// the first window that the publisher has not left.
pub const WANTS_WINDOW: u32 = 1 << 31;
/// Most windows that a publisher holds at a time: one to write into, and the next.
const WINDOWS_PER_PUBLISHER: usize = 2;
/// Number of work requests that a connection may have under way.
const SEND_DEPTH: u64 = 128;
/// Number of work requests of which one asks for a completion.
const SIGNAL_EVERY: u64 = 16;

/// Address of the peer, from its request; `None` when its LID has more than 16 bits.
fn connecting_peer(request: &RdmaConnect) -> Option<PeerAddress> {
    let RdmaConnect { gid, lid, queue_pair, first_psn, mtu, .. } = *request;
    Some(PeerAddress { gid, lid: lid.try_into().ok()?, queue_pair, first_psn, mtu })
}

/// Address of the broker, from its answer; `None` when its LID has more than 16 bits.
fn accepting_peer(accept: &RdmaAccept) -> Option<PeerAddress> {
    let RdmaAccept { gid, lid, queue_pair, first_psn, mtu, .. } = *accept;
    Some(PeerAddress { gid, lid: lid.try_into().ok()?, queue_pair, first_psn, mtu })
}
