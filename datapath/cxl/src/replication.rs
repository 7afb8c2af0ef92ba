//! How far batches are replicated: what replicas say of themselves, and the completion vector that follows from it.
//!
//! `[[DEVIATION_010]]` The paper passes a token along a chain of replicas, whose tail advances the vector. Here every
//! replica says in a word of its own how far it is, and the leader takes for durable what enough of them have.

use crate::fabric::{Fabric, Site};
use crate::layout::{CompletionLine, LeaderArea};
use crate::leadership::{NoLeader, with_leader};
use crate::region::Region;
use embarcadero_wire::{BrokerId, TopicId};
use std::mem::offset_of;

/// Replica of the batches that one broker received in a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Replication {
    /// Topic slot.
    pub topic: TopicId,
    /// Broker that copies them to its disk.
    pub replica: BrokerId,
    /// Broker that received them.
    pub source: BrokerId,
}

/// Says that the batches of a source at positions below `position` of their order index are durable at a replica, from
/// the position on at which it began. Only that replica may; it falls only when its broker starts.
pub fn publish_replicated<F: Fabric>(region: &Region<F>, of: Replication, position: u64) {
    let at = region.layout().replication_done(of);
    let fabric = region.fabric();
    fabric.store(at, position);
    fabric.flush(at, 8, Site::ReplicationFlush);
    fabric.fence(Site::ReplicationFlush);
}

/// How far a replica says that it is with the batches of a source.
pub fn read_replicated<F: Fabric>(region: &Region<F>, of: Replication) -> u64 {
    region.fabric().observe(region.layout().replication_done(of), Site::ReplicationRead)
}

/// How far a stream is replicated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// Entries below this are durable, unless they are lost.
    pub durable_through: u64,
    /// Entries below this that were not durable by then are on no disk: retention took them.
    pub lost_through: u64,
    /// Sessions wait for batches to be durable.
    pub awaited: bool,
}

const DURABLE: u64 = offset_of!(CompletionLine, durable_through) as u64;
const LOST: u64 = offset_of!(CompletionLine, lost_through) as u64;
const AWAITED: u64 = offset_of!(CompletionLine, awaited) as u64;

/// Writes a line of the completion vector. Only the leader may; positions only grow.
pub fn publish_completion<F: Fabric>(
    region: &Region<F>,
    area: LeaderArea,
    topic: TopicId,
    broker: BrokerId,
    completion: Completion,
) {
    let at = region.layout().completion(region.geometry(), area, topic, broker);
    let fabric = region.fabric();
    // SYNC: what is lost is told before it is passed over; pairs with `read_completion`.
    fabric.store(at.add(AWAITED), completion.awaited.into());
    fabric.store(at.add(LOST), completion.lost_through);
    fabric.store(at.add(DURABLE), completion.durable_through);
    fabric.flush(at, 24, Site::CompletionFlush);
    fabric.fence(Site::CompletionFlush);
}

/// Reads a line of the completion vector.
///
/// # Errors
/// [`NoLeader`].
#[inline]
pub fn read_completion<F: Fabric>(
    region: &Region<F>,
    topic: TopicId,
    broker: BrokerId,
) -> Result<Completion, NoLeader> {
    with_leader(region, |area| read_completion_at(region, area, topic, broker))
}

/// As [`read_completion`], as a certain leader has it.
#[inline]
pub fn read_completion_at<F: Fabric>(
    region: &Region<F>,
    area: LeaderArea,
    topic: TopicId,
    broker: BrokerId,
) -> Completion {
    let at = region.layout().completion(region.geometry(), area, topic, broker);
    // SYNC: the durable word first; pairs with `publish_completion`.
    let fabric = region.fabric();
    let durable_through = fabric.observe(at.add(DURABLE), Site::CompletionRead);
    Completion { durable_through, lost_through: fabric.load(at.add(LOST)), awaited: fabric.load(at.add(AWAITED)) != 0 }
}
