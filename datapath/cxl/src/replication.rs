//! Replication: the progress of every replica, and the completion vector that the leader derives from it.
//!
//! Each replica writes its progress to a word of its own. A batch is durable once enough replicas have it.

// [[DEVIATION_010]] The paper passes a token along a chain of replicas, whose tail advances the vector.

use crate::fabric::{Fabric, LINE_BYTES};
use crate::layout::{CompletionLine, LeaderArea};
use crate::leadership::{NoLeader, with_leader};
use crate::region::Region;
use crate::site::Site;
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

/// Records that a replica has the batches of a source on disk: all at positions below `position` of their order index.
/// Only that replica may. The position falls only when its broker starts.
pub fn publish_replicated<F: Fabric>(region: &Region<F>, of: Replication, position: u64) {
    let at = region.layout().replicated(of);
    let fabric = region.fabric();
    fabric.store(at, position);
    fabric.flush(at, 8, Site::ReplicationFlush);
    fabric.fence(Site::ReplicationFlush);
}

/// Reads the position below which a replica has the batches of a source on disk.
pub fn read_replicated<F: Fabric>(region: &Region<F>, of: Replication) -> u64 {
    region.fabric().observe(region.layout().replicated(of), Site::ReplicationRead)
}

/// Replication of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// Entries below this position are durable, unless they are lost.
    pub durable_through: u64,
    /// First entry that was not durable when retention trimmed it.
    pub lost_from: u64,
    /// Entries from `lost_from` on and below this position may be on no disk. All that were trimmed before they were durable
    /// are among them, and so is what became durable between two such losses.
    pub lost_through: u64,
    /// True while sessions wait for batches to be durable.
    pub awaited: bool,
}

impl Completion {
    /// Returns true if the entry at a position may be on no disk, because retention took it.
    #[inline]
    #[must_use]
    pub fn is_lost(&self, position: u64) -> bool {
        (self.lost_from..self.lost_through).contains(&position)
    }
}

const DURABLE: u64 = offset_of!(CompletionLine, durable_through) as u64;
const LOST: u64 = offset_of!(CompletionLine, lost_through) as u64;
const LOST_FROM: u64 = offset_of!(CompletionLine, lost_from) as u64;
const AWAITED: u64 = offset_of!(CompletionLine, awaited) as u64;

/// Writes a line of the completion vector. Only the leader may; positions only grow.
pub fn publish_completion<F: Fabric>(
    region: &Region<F>,
    area: LeaderArea,
    topic: TopicId,
    broker: BrokerId,
    completion: Completion,
) {
    let at = region.layout().completion(area, topic, broker);
    let fabric = region.fabric();
    // SYNC: what is lost is stored before the position that passes it; pairs with `read_completion_at`.
    fabric.store(at.add(AWAITED), completion.awaited.into());
    fabric.store(at.add(LOST_FROM), completion.lost_from);
    fabric.store(at.add(LOST), completion.lost_through);
    fabric.store(at.add(DURABLE), completion.durable_through);
    fabric.flush(at, LINE_BYTES, Site::CompletionFlush);
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

/// Reads a line of the completion vector from one leader's area.
#[inline]
pub fn read_completion_at<F: Fabric>(
    region: &Region<F>,
    area: LeaderArea,
    topic: TopicId,
    broker: BrokerId,
) -> Completion {
    let at = region.layout().completion(area, topic, broker);
    // SYNC: the durable word is loaded first; pairs with `publish_completion`.
    let fabric = region.fabric();
    let durable_through = fabric.observe(at.add(DURABLE), Site::CompletionRead);
    let lost_through = fabric.load(at.add(LOST));
    let lost_from = fabric.load(at.add(LOST_FROM));
    // A damaged bound must not make a lost batch a durable one.
    let lost_from = if lost_from > lost_through { 0 } else { lost_from };
    Completion { durable_through, lost_from, lost_through, awaited: fabric.load(at.add(AWAITED)) != 0 }
}
