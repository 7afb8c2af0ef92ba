//! Reasons why a region cannot be made or used.

use crate::cache::UnsupportedFlush;
use crate::layout::{LAYOUT_HASH, LAYOUT_VERSION, MAGIC, RegionRole};
use crate::row::Damage;
use embarcadero_wire::{BrokerId, OutOfBounds};
use std::io;
use std::path::PathBuf;
use uuid::Uuid;

/// Reason why a region cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The region is a mirror where none should be, or no mirror where one should be.
    #[error("the region's role is {found:?}, expected {expected:?}: see cxl.path and cxl.mirror")]
    Role {
        /// Role that the region was made with.
        found: RegionRole,
        /// Role in which it is used.
        expected: RegionRole,
    },
    /// The file or device cannot be opened, sized or mapped.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// Action that failed.
        action: &'static str,
        /// File or device.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// Creation would overwrite something.
    #[error("{} exists already; destroy it first or choose another path", .0.display())]
    AlreadyExists(PathBuf),
    /// The memory or the mount has too little space for the region's pages.
    #[error("cannot reserve {bytes} bytes for {}: {source}; free memory, enlarge the mount, or create a smaller region", path.display())]
    NoSpace {
        /// File.
        path: PathBuf,
        /// Bytes of the region.
        bytes: u64,
        /// Error of the system.
        source: io::Error,
    },
    /// The file or device holds no region, or its creation was cut short.
    #[error("no region here: the magic is {found:#018x}, expected {MAGIC:#018x}")]
    NotARegion {
        /// First eight bytes.
        found: u64,
    },
    /// The file is shorter than its region.
    #[error("the region is truncated: it has {found} bytes, its superblock says {expected}")]
    Truncated {
        /// Bytes that are there.
        found: u64,
        /// Bytes that should be.
        expected: u64,
    },
    /// The superblock's checksum does not match.
    #[error("the superblock is corrupt: its checksum is {found:#010x}, its contents give {expected:#010x}")]
    CorruptSuperblock {
        /// Checksum in the superblock.
        found: u32,
        /// Checksum of the superblock's contents.
        expected: u32,
    },
    /// The superblock has contents that no build writes.
    #[error(transparent)]
    Damage(#[from] Damage),
    /// The region has another layout version.
    #[error(
        "the region has layout version {found}, this build reads version {LAYOUT_VERSION}; recreate the region or use a matching build"
    )]
    Version {
        /// Version of the region.
        found: u32,
    },
    /// The region has the same layout version and another layout: one build is a development build.
    #[error("the region's layout hash is {found:#018x}, this build's is {LAYOUT_HASH:#018x}; recreate the region")]
    LayoutHash {
        /// Hash of the region's layout.
        found: u64,
    },
    /// The geometry is not possible, or not the one that was asked for.
    #[error("region geometry: {0}")]
    Geometry(#[from] OutOfBounds),
    /// The configuration expects other numbers than the region has.
    #[error("the region has {field} = {found}, the configuration asks for {expected}")]
    GeometryMismatch {
        /// Name of the number.
        field: &'static str,
        /// Number of the region.
        found: String,
        /// Number of the configuration.
        expected: String,
    },
    /// The region is not the one that was asked for.
    #[error("the region's UUID is {found}, expected {expected}")]
    Uuid {
        /// UUID of the region.
        found: Uuid,
        /// UUID that was asked for.
        expected: Uuid,
    },
    /// Another process uses the broker id.
    #[error("broker id {broker} is taken: another live process holds it in this region")]
    BrokerIdTaken {
        /// Broker id.
        broker: BrokerId,
    },
    /// Brokers are using the region.
    #[error("the region is in use by broker {broker}; stop it first or pass --force")]
    InUse {
        /// Broker that uses the region.
        broker: BrokerId,
    },
    /// Pages are on another NUMA node than the configuration asks for.
    #[error(
        "of {looked} pages looked at, {strayed} are not on NUMA node {node}: create the region with --numa-node {node}; if the kernel moved them as they were pinned, bring the node's memory online with daxctl reconfigure-device -m system-ram --no-movable"
    )]
    Strayed {
        /// Node that the configuration names.
        node: u32,
        /// Pages that were looked at and are in memory.
        looked: usize,
        /// Pages that are on another node, among those.
        strayed: usize,
    },
    /// A NIC cannot use the file's pages.
    #[error(
        "{} is a file on fsdax, whose pages the kernel does not pin for a NIC; put the region on a device-dax node, tmpfs or hugetlbfs", .0.display()
    )]
    FsDax(PathBuf),
    /// The CPU can flush no line.
    #[error("this CPU has neither clflushopt nor clflush: it cannot flush its caches")]
    NoFlush,
    /// The flush method is not available.
    #[error(transparent)]
    Flush(#[from] UnsupportedFlush),
    /// The region's allocator needs a coherent platform.
    #[error(
        "the region's allocator is `bitmap`, which needs hardware coherence; cxl.coherence is `none`: create the region with --allocator partitioned or leader"
    )]
    AllocatorNeedsCoherence,
}
