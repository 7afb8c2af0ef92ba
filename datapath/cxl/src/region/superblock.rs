//! Superblock: the two lines that say what a region is.

use super::RegionError;
use crate::fabric::{Fabric, LINE_BYTES, Line, RegionOffset, check_reserved};
use crate::layout::{
    AllocatorKind, Geometry, LAYOUT_HASH, LAYOUT_VERSION, Layout, MAGIC, RegionRole, Superblock, SuperblockGeometry,
    SuperblockHead,
};
use crate::site::Site;
use bytemuck::Zeroable;
use embarcadero_wire::{OutOfBounds, crc32c};
use std::mem::{offset_of, size_of};
use uuid::Uuid;

/// Bytes of the superblock.
pub(super) const BYTES: u64 = size_of::<Superblock>() as u64;
const HEAD: RegionOffset = RegionOffset(offset_of!(Superblock, head) as u64);
const GEOMETRY: RegionOffset = RegionOffset(offset_of!(Superblock, geometry) as u64);
const MAGIC_AT: RegionOffset = HEAD.add(offset_of!(SuperblockHead, magic) as u64);
const CHECKSUM_AT: usize = offset_of!(SuperblockGeometry, checksum);

/// Numbers that a region has from its creation on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) geometry: Geometry,
    pub(super) uuid: Uuid,
    pub(super) created_ms: u64,
}

/// Reads the first word of a region.
pub(super) fn magic<F: Fabric>(fabric: &F) -> u64 {
    fabric.observe(MAGIC_AT, Site::SuperblockRead)
}

/// Removes the magic: there is no region any more.
pub(super) fn erase<F: Fabric>(fabric: &F) {
    store_magic(fabric, 0);
}

fn store_magic<F: Fabric>(fabric: &F, magic: u64) {
    fabric.store(MAGIC_AT, magic);
    fabric.flush(MAGIC_AT, 8, Site::SuperblockFlush);
    fabric.fence(Site::SuperblockFlush);
}

/// Writes the superblock.
pub(super) fn write<F: Fabric>(fabric: &F, identity: &Identity) {
    let Identity { geometry, uuid, created_ms } = identity;
    let head = SuperblockHead {
        magic: MAGIC,
        layout_version: LAYOUT_VERSION,
        superblock_bytes: BYTES as u32,
        layout_hash: LAYOUT_HASH,
        region_bytes: Layout::new(geometry).region_bytes,
        uuid: *uuid.as_bytes(),
        created_ms: *created_ms,
        reserved: 0,
    };
    let mut body = SuperblockGeometry {
        max_brokers: geometry.max_brokers,
        max_topics: geometry.max_topics,
        max_sessions: geometry.max_sessions,
        batchlog_slots: geometry.batchlog_slots,
        segment_bytes: geometry.segment_bytes,
        segment_count: geometry.segment_count,
        allocator: geometry.allocator.code(),
        max_leaders: geometry.max_leaders,
        role: geometry.role.code(),
        ..SuperblockGeometry::zeroed()
    };
    body.checksum = checksum(&head, &body);
    fabric.store_line(GEOMETRY, &body);
    fabric.store_line(HEAD, &SuperblockHead { magic: 0, ..head });
    fabric.flush(HEAD, 2 * LINE_BYTES, Site::SuperblockFlush);
    // SYNC: everything is in memory before the magic; pairs with `read`.
    fabric.fence(Site::SuperblockFlush);
    store_magic(fabric, MAGIC);
}

/// Reads and checks the superblock.
pub(super) fn read<F: Fabric>(fabric: &F) -> Result<Identity, RegionError> {
    if fabric.bytes() < BYTES {
        return Err(RegionError::Truncated { found: fabric.bytes(), expected: BYTES });
    }
    let found = magic(fabric);
    if found != MAGIC {
        return Err(RegionError::NotARegion { found });
    }
    // Another version may give a meaning to bytes that are reserved in this one: they come after the version.
    let head: SuperblockHead = observe_unchecked(fabric, HEAD);
    if head.layout_version != LAYOUT_VERSION {
        return Err(RegionError::Version { found: head.layout_version });
    }
    let body: SuperblockGeometry = observe_unchecked(fabric, GEOMETRY);
    let expected = checksum(&head, &body);
    if body.checksum != expected {
        return Err(RegionError::CorruptSuperblock { found: body.checksum, expected });
    }
    check_reserved(HEAD, &head)?;
    check_reserved(GEOMETRY, &body)?;
    if head.layout_hash != LAYOUT_HASH {
        return Err(RegionError::LayoutHash { found: head.layout_hash });
    }
    let allocator = AllocatorKind::from_code(body.allocator)
        .ok_or_else(|| OutOfBounds::new("allocator", body.allocator, "1 to 3"))?;
    let role = RegionRole::from_code(body.role).ok_or_else(|| OutOfBounds::new("role", body.role, "0 to 2"))?;
    let geometry = Geometry {
        max_brokers: body.max_brokers,
        max_leaders: body.max_leaders,
        max_topics: body.max_topics,
        max_sessions: body.max_sessions,
        batchlog_slots: body.batchlog_slots,
        segment_bytes: body.segment_bytes,
        segment_count: body.segment_count,
        allocator,
        role,
    };
    geometry.validate()?;
    let region_bytes = Layout::new(&geometry).region_bytes;
    if head.region_bytes != region_bytes {
        return Err(RegionError::GeometryMismatch {
            field: "region_bytes",
            found: head.region_bytes.to_string(),
            expected: region_bytes.to_string(),
        });
    }
    Ok(Identity { geometry, uuid: Uuid::from_bytes(head.uuid), created_ms: head.created_ms })
}

/// Reads a line from memory, and leaves the check of its reserved bytes to the caller.
fn observe_unchecked<F: Fabric, T: Line>(fabric: &F, at: RegionOffset) -> T {
    fabric.invalidate(at, LINE_BYTES, Site::SuperblockRead);
    bytemuck::cast(fabric.load_words(at))
}

fn checksum(head: &SuperblockHead, body: &SuperblockGeometry) -> u32 {
    crc32c(&[bytemuck::bytes_of(head), &bytemuck::bytes_of(body)[..CHECKSUM_AT]].concat())
}
