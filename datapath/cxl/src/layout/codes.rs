//! Enumerations that lie in the region as numbers.

use embarcadero_wire::codes;
use serde::{Deserialize, Serialize};

codes! {
    /// Segment allocator of a region.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum AllocatorKind: u32 {
        /// One bitmap that every broker changes atomically. Needs a coherent fabric.
        Bitmap = 1,
        /// One bitmap per broker, written by that broker.
        Partitioned = 2,
        /// The leader allocates, by RPC.
        Leader = 3,
    }

    /// Role of a region.
    #[derive(Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum RegionRole: u32 {
        /// Only region of its cluster.
        #[default]
        Single = 0,
        /// Region whose leaders keep a copy of what they write in a mirror, on a second unit of memory.
        Mirrored = 1,
        /// Mirror of another region.
        Mirror = 2,
    }

    /// State of a topic slot.
    #[derive(Serialize)]
    #[serde(rename_all = "lowercase")]
    pub enum TopicState: u8 {
        /// The topic was deleted, and no broker holds its memory any more.
        Free = 0,
        /// The topic is in use.
        Live = 1,
        /// The topic was deleted; brokers are giving back its memory.
        Deleting = 2,
    }

    /// State of a session slot.
    #[derive(Serialize)]
    #[serde(rename_all = "lowercase")]
    pub enum SessionState: u32 {
        /// The slot belongs to no client.
        Free = 0,
        /// Batches commit.
        Open = 1,
        /// Nothing commits under this epoch any more.
        Fenced = 2,
        /// The client closed the session.
        Closed = 3,
    }

    /// Use of a segment.
    pub enum SegmentKind: u32 {
        /// The segment is in the pool.
        Free = 0,
        /// The segment holds batches that a broker received.
        Blog = 1,
        /// The segment holds entries of an order index.
        Index = 2,
    }

    /// State of a broker's replica.
    #[derive(Default, Serialize)]
    #[serde(rename_all = "lowercase")]
    pub enum ReplicaState: u64 {
        /// The broker has no disk to replicate to.
        #[default]
        None = 0,
        /// The broker replicates its share.
        Running = 1,
        /// The broker's disk failed, and it replicates no more.
        Failed = 2,
    }
}
