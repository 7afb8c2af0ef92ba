//! Region as a whole: making one, opening one, and refusing everything else.

mod error;
mod file;
mod superblock;

pub use error::RegionError;
pub use file::{BrokerLock, Creation, Flushed, RegionFile};

use crate::fabric::Fabric;
use crate::layout::{Geometry, Layout, RegionRole};
use crate::leader_cache::LeaderCache;
use crate::native::Native;
use std::path::PathBuf;
use std::sync::Arc;
use superblock::Identity;
use uuid::Uuid;

/// Region that is mapped and has passed every check. A clone is cheap, and shares the memory.
#[derive(Clone, Debug)]
pub struct Region<F> {
    fabric: F,
    layout: Layout,
    identity: Identity,
    leader_cache: Arc<LeaderCache>,
}

impl std::fmt::Debug for Native {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Native({} bytes, flush {})", self.bytes(), self.method())
    }
}

impl<F: Fabric> Region<F> {
    /// Writes an empty region into memory whose tables are zero.
    ///
    /// # Errors
    /// [`RegionError::Geometry`] when the geometry is impossible, [`RegionError::Truncated`] when it does not fit.
    pub fn format(fabric: F, geometry: &Geometry, uuid: Uuid, created_ms: u64) -> Result<Self, RegionError> {
        geometry.validate()?;
        let identity = Identity { geometry: *geometry, uuid, created_ms };
        let layout = Layout::new(geometry);
        if layout.region_bytes > fabric.bytes() {
            return Err(RegionError::Truncated { found: fabric.bytes(), expected: layout.region_bytes });
        }
        superblock::write(&fabric, &identity);
        Ok(Self { fabric, layout, identity, leader_cache: Arc::default() })
    }

    /// Checks the superblock and adopts its geometry.
    ///
    /// # Errors
    /// [`RegionError`], with a variant per defect.
    pub fn open(fabric: F) -> Result<Self, RegionError> {
        let identity = superblock::read(&fabric)?;
        let layout = Layout::new(&identity.geometry);
        if fabric.bytes() < layout.region_bytes {
            return Err(RegionError::Truncated { found: fabric.bytes(), expected: layout.region_bytes });
        }
        Ok(Self { fabric, layout, identity, leader_cache: Arc::default() })
    }

    /// Access to the memory.
    #[inline]
    pub fn fabric(&self) -> &F {
        &self.fabric
    }

    /// Numbers with which the region was made.
    #[inline]
    pub fn geometry(&self) -> &Geometry {
        &self.identity.geometry
    }

    /// Positions of everything in the region.
    #[inline]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Leader that this process saw last.
    #[inline]
    pub(crate) fn leader_cache(&self) -> &LeaderCache {
        &self.leader_cache
    }

    /// UUID of the region.
    pub fn uuid(&self) -> Uuid {
        self.identity.uuid
    }

    /// Time of creation, milliseconds since 1970.
    pub fn created_ms(&self) -> u64 {
        self.identity.created_ms
    }

    /// Checks that this is the region that the configuration names.
    ///
    /// # Errors
    /// [`RegionError::Uuid`] naming both.
    pub fn require_uuid(&self, expected: Uuid) -> Result<(), RegionError> {
        let found = self.uuid();
        if found == expected { Ok(()) } else { Err(RegionError::Uuid { found, expected }) }
    }

    /// Checks that the region has the role in which it is used.
    ///
    /// # Errors
    /// [`RegionError::Role`] naming both.
    pub fn require_role(&self, expected: RegionRole) -> Result<(), RegionError> {
        let found = self.geometry().role;
        if found == expected { Ok(()) } else { Err(RegionError::Role { found, expected }) }
    }

    /// Checks that the region has the segment size that the configuration asks for.
    ///
    /// # Errors
    /// [`RegionError::GeometryMismatch`] naming both.
    pub fn require_segment_bytes(&self, expected: u64) -> Result<(), RegionError> {
        if self.geometry().segment_bytes == expected {
            return Ok(());
        }
        Err(RegionError::GeometryMismatch {
            field: "segment_bytes",
            found: self.geometry().segment_bytes.to_string(),
            expected: expected.to_string(),
        })
    }
}

impl Region<Native> {
    /// Checks that the region's pages are on the NUMA node that the configuration asks for.
    ///
    /// # Errors
    /// [`RegionError::Strayed`], or the error of the system.
    pub fn require_node(&self, node: u32) -> Result<(), RegionError> {
        let io = |source| RegionError::Io { action: "find the pages of", path: PathBuf::from("the region"), source };
        let nodes = self.fabric.mapping().nodes().map_err(io)?;
        let looked = nodes.iter().flatten().count();
        let strayed = nodes.iter().flatten().filter(|at| **at != node).count();
        if strayed == 0 { Ok(()) } else { Err(RegionError::Strayed { node, looked, strayed }) }
    }
}
