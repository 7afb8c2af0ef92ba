//! The region as a whole: making one, opening one, and refusing what is not one.

use crate::cache::{FlushMethod, UnsupportedFlush};
use crate::fabric::{Fabric, RegionOffset, Site};
use crate::layout::{
    AllocatorKind, Geometry, LAYOUT_HASH, LAYOUT_VERSION, Layout, MAGIC, RegionRole, SUPERBLOCK_BYTES,
    SuperblockGeometry, SuperblockHead,
};
use crate::leader_cache::LeaderCache;
use crate::native::{Mapping, Native};
use bytemuck::Zeroable;
use embarcadero_wire::{BrokerId, OutOfBounds, crc32c};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// Why a region cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// A mirror where the region itself should be, or the other way round.
    #[error("the region's role is {found:?}, expected {expected:?}: see cxl.path and cxl.mirror")]
    Role {
        /// As created.
        found: RegionRole,
        /// As used.
        expected: RegionRole,
    },
    /// The file or device cannot be opened, sized or mapped.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Creation would overwrite something.
    #[error("{} exists already; destroy it first or choose another path", .0.display())]
    AlreadyExists(PathBuf),
    /// There is too little space for the region's pages.
    #[error("cannot reserve {bytes} bytes for {}: {source}; free memory, enlarge the mount, or create a smaller region", path.display())]
    NoSpace {
        /// Where.
        path: PathBuf,
        /// How many were wanted.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Not a region, or one whose creation was cut short.
    #[error("no region here: the magic is {found:#018x}, expected {MAGIC:#018x}")]
    NotARegion {
        /// First eight bytes.
        found: u64,
    },
    /// Bytes are missing at the end.
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
        /// As stored.
        found: u32,
        /// As computed.
        expected: u32,
    },
    /// Another layout version.
    #[error(
        "the region has layout version {found}, this build reads version {LAYOUT_VERSION}; recreate the region or use a matching build"
    )]
    Version {
        /// As stored.
        found: u32,
    },
    /// Same version number but other structures: a development build.
    #[error("the region's layout hash is {found:#018x}, this build's is {LAYOUT_HASH:#018x}; recreate the region")]
    LayoutHash {
        /// As stored.
        found: u64,
    },
    /// The geometry is not possible, or not the one that was asked for.
    #[error("region geometry: {0}")]
    Geometry(#[from] OutOfBounds),
    /// The configuration expects other numbers than the region has.
    #[error("the region has {field} = {found}, the configuration asks for {expected}")]
    GeometryMismatch {
        /// Which number.
        field: &'static str,
        /// The region's.
        found: String,
        /// The configuration's.
        expected: String,
    },
    /// Another region than the one that was asked for.
    #[error("the region's UUID is {found}, expected {expected}")]
    Uuid {
        /// The region's.
        found: Uuid,
        /// The one asked for.
        expected: Uuid,
    },
    /// Another process writes as this broker.
    #[error("broker id {broker} is taken: another live process holds it in this region")]
    BrokerIdTaken {
        /// The id.
        broker: BrokerId,
    },
    /// Brokers are using the region.
    #[error("the region is in use by broker {broker}; stop it first or pass --force")]
    InUse {
        /// One of them.
        broker: BrokerId,
    },
    /// Pages are on another NUMA node than the configuration asks for.
    #[error(
        "of {looked} pages looked at, {strayed} are not on NUMA node {node}: create the region with --numa-node {node}; if the kernel moved them as they were pinned, bring the node's memory online with daxctl reconfigure-device -m system-ram --no-movable"
    )]
    Strayed {
        /// Where they should be.
        node: u32,
        /// Pages that are there, of those looked at.
        looked: usize,
        /// Those of them that are elsewhere.
        strayed: usize,
    },
    /// No NIC can be given the file's pages.
    #[error(
        "{} is a file on fsdax, whose pages the kernel does not pin for a NIC; put the region on a device-dax node, tmpfs or hugetlbfs", .0.display()
    )]
    FsDax(PathBuf),
    /// The flush method is not available.
    #[error(transparent)]
    Flush(#[from] UnsupportedFlush),
    /// The allocator needs what the platform does not give.
    #[error(
        "the region's allocator is `bitmap`, which needs hardware coherence; cxl.coherence is `none`: create the region with --allocator partitioned or leader"
    )]
    AllocatorNeedsCoherence,
}

/// A region that is mapped and has passed every check. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Region<F> {
    fabric: F,
    geometry: Geometry,
    layout: Layout,
    uuid: Uuid,
    created_ms: u64,
    leader_cache: Arc<LeaderCache>,
}

impl std::fmt::Debug for Native {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Native({} bytes, flush {})", self.bytes(), self.method())
    }
}

impl<F: Fabric> Region<F> {
    /// Writes an empty region onto memory whose tables are zero.
    ///
    /// # Errors
    /// [`RegionError::Geometry`] when the geometry is impossible or does not fit.
    pub fn format(fabric: F, geometry: &Geometry, uuid: Uuid, created_ms: u64) -> Result<Self, RegionError> {
        geometry.validate()?;
        let layout = Layout::new(geometry);
        if layout.region_bytes > fabric.bytes() {
            return Err(RegionError::Truncated { found: fabric.bytes(), expected: layout.region_bytes });
        }
        let head = SuperblockHead {
            magic: MAGIC,
            layout_version: LAYOUT_VERSION,
            superblock_bytes: SUPERBLOCK_BYTES as u32,
            layout_hash: LAYOUT_HASH,
            region_bytes: layout.region_bytes,
            uuid: *uuid.as_bytes(),
            created_ms,
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
        fabric.store_line(RegionOffset(64), &body);
        fabric.flush(RegionOffset(64), 64, Site::SuperblockFlush);
        fabric.fence(Site::SuperblockFlush);
        // SYNC: pairs with `open`: the magic appears after everything else.
        let mut unfinished = head;
        unfinished.magic = 0;
        fabric.store_line(RegionOffset(0), &unfinished);
        fabric.flush(RegionOffset(0), 64, Site::SuperblockFlush);
        fabric.fence(Site::SuperblockFlush);
        fabric.store(RegionOffset(0), MAGIC);
        fabric.flush(RegionOffset(0), 64, Site::SuperblockFlush);
        fabric.fence(Site::SuperblockFlush);
        Ok(Self { fabric, geometry: *geometry, layout, uuid, created_ms, leader_cache: Arc::default() })
    }

    /// Checks the superblock and adopts its geometry.
    ///
    /// # Errors
    /// One variant of [`RegionError`] for each thing that can be wrong.
    pub fn open(fabric: F) -> Result<Self, RegionError> {
        if fabric.bytes() < SUPERBLOCK_BYTES {
            return Err(RegionError::Truncated { found: fabric.bytes(), expected: SUPERBLOCK_BYTES });
        }
        let head: SuperblockHead = fabric.observe_line(RegionOffset(0), Site::SuperblockRead);
        let body: SuperblockGeometry = fabric.observe_line(RegionOffset(64), Site::SuperblockRead);
        if head.magic != MAGIC {
            return Err(RegionError::NotARegion { found: head.magic });
        }
        if head.layout_version != LAYOUT_VERSION {
            return Err(RegionError::Version { found: head.layout_version });
        }
        let expected = checksum(&head, &body);
        if body.checksum != expected {
            return Err(RegionError::CorruptSuperblock { found: body.checksum, expected });
        }
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
        let layout = Layout::new(&geometry);
        if head.region_bytes != layout.region_bytes {
            return Err(RegionError::GeometryMismatch {
                field: "region_bytes",
                found: head.region_bytes.to_string(),
                expected: layout.region_bytes.to_string(),
            });
        }
        if fabric.bytes() < layout.region_bytes {
            return Err(RegionError::Truncated { found: fabric.bytes(), expected: layout.region_bytes });
        }
        let uuid = Uuid::from_bytes(head.uuid);
        Ok(Self { fabric, geometry, layout, uuid, created_ms: head.created_ms, leader_cache: Arc::default() })
    }

    /// The door to the memory.
    #[inline]
    pub fn fabric(&self) -> &F {
        &self.fabric
    }

    /// The numbers from the superblock.
    #[inline]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Where things lie.
    #[inline]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The leader that this process last saw in its term.
    #[inline]
    pub(super) fn leader_cache(&self) -> &LeaderCache {
        &self.leader_cache
    }

    /// Identity of the region.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// When it was made, milliseconds since 1970.
    pub fn created_ms(&self) -> u64 {
        self.created_ms
    }

    /// Checks that this is the region which the configuration names.
    ///
    /// # Errors
    /// [`RegionError::Uuid`] naming both.
    pub fn require_uuid(&self, expected: Uuid) -> Result<(), RegionError> {
        if self.uuid == expected { Ok(()) } else { Err(RegionError::Uuid { found: self.uuid, expected }) }
    }

    /// Checks that the region has the role in which it is used.
    ///
    /// # Errors
    /// [`RegionError::Role`] naming both.
    pub fn require_role(&self, expected: RegionRole) -> Result<(), RegionError> {
        let found = self.geometry.role;
        if found == expected { Ok(()) } else { Err(RegionError::Role { found, expected }) }
    }

    /// Checks that the region has the segment size which the configuration asks for.
    ///
    /// # Errors
    /// [`RegionError::GeometryMismatch`] naming both.
    pub fn require_segment_bytes(&self, expected: u64) -> Result<(), RegionError> {
        if self.geometry.segment_bytes == expected {
            return Ok(());
        }
        Err(RegionError::GeometryMismatch {
            field: "segment_bytes",
            found: self.geometry.segment_bytes.to_string(),
            expected: expected.to_string(),
        })
    }
}

impl Region<Native> {
    /// Checks that the region's pages are on the NUMA node that the configuration asks for.
    ///
    /// # Errors
    /// [`RegionError::Strayed`], or what the system reports.
    pub fn require_node(&self, node: u32) -> Result<(), RegionError> {
        let io = |source| RegionError::Io { action: "find the pages of", path: PathBuf::from("the region"), source };
        let nodes = self.fabric.mapping().nodes().map_err(io)?;
        let looked = nodes.iter().flatten().count();
        let strayed = nodes.iter().flatten().filter(|at| **at != node).count();
        if strayed == 0 { Ok(()) } else { Err(RegionError::Strayed { node, looked, strayed }) }
    }
}

fn broker_lock(broker: BrokerId) -> libc::flock {
    // SAFETY: flock is plain data, for which zero is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = LOCK_BASE + i64::from(broker.0);
    lock.l_len = 1;
    lock
}

fn checksum(head: &SuperblockHead, body: &SuperblockGeometry) -> u32 {
    crc32c(&[bytemuck::bytes_of(head), &bytemuck::bytes_of(body)[..60]].concat())
}

/// How to make a region's file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Creation {
    /// Allocate every page now, so that the log cannot run out of memory later.
    pub reserve: bool,
    /// Take the pages from this NUMA node only.
    pub numa_node: Option<u32>,
    /// Overwrite what a dax device holds.
    pub force: bool,
    /// Identity; unset, a new one. A mirror has that of its region.
    pub uuid: Option<Uuid>,
}

/// An open region and the file or device that holds it.
#[derive(Debug)]
pub struct RegionFile {
    file: File,
    path: PathBuf,
    region: Region<Native>,
}

/// A held claim on a broker id; ends with the process, however it ends.
#[derive(Debug)]
pub struct BrokerLock {
    _file: File,
}

/// Byte at which the locks of broker ids start: beyond any region, so they never meet data.
const LOCK_BASE: i64 = 1 << 60;

impl RegionFile {
    /// Makes a region at `path`: a new file (tmpfs or hugetlbfs), or a dax device that holds none yet.
    ///
    /// # Errors
    /// [`RegionError`]; nothing is left behind when it fails.
    pub fn create(
        path: &Path,
        geometry: &Geometry,
        method: FlushMethod,
        creation: Creation,
    ) -> Result<Self, RegionError> {
        geometry.validate()?;
        let io = |action: &'static str| move |source| RegionError::Io { action, path: path.to_owned(), source };
        let device = std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_char_device());
        let file = if device {
            OpenOptions::new().read(true).write(true).open(path).map_err(permission).map_err(io("open"))?
        } else {
            OpenOptions::new().read(true).write(true).create_new(true).open(path).map_err(|source| {
                if source.kind() == io::ErrorKind::AlreadyExists {
                    RegionError::AlreadyExists(path.to_owned())
                } else {
                    io("create")(source)
                }
            })?
        };
        let made = Place { file: &file, path, device }.format(geometry, method, creation);
        if made.is_err() && !device {
            let _ = std::fs::remove_file(path);
        }
        Ok(Self { region: made?, path: path.to_owned(), file })
    }

    /// Opens the region at `path`.
    ///
    /// # Errors
    /// One variant of [`RegionError`] for each thing that can be wrong.
    pub fn open(path: &Path, method: FlushMethod) -> Result<Self, RegionError> {
        let io = |action: &'static str| move |source| RegionError::Io { action, path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(permission).map_err(io("open"))?;
        let meta = file.metadata().map_err(io("size"))?;
        let bytes =
            if meta.file_type().is_char_device() { device_bytes(&file).map_err(io("size"))? } else { meta.len() };
        if bytes < SUPERBLOCK_BYTES {
            return Err(RegionError::Truncated { found: bytes, expected: SUPERBLOCK_BYTES });
        }
        let native = Native::new(Mapping::of_file(&file, bytes).map_err(io("map"))?, method)?;
        let region = Region::open(native)?;
        if region.geometry().allocator == AllocatorKind::Bitmap && method != FlushMethod::None {
            return Err(RegionError::AllocatorNeedsCoherence);
        }
        Ok(Self { file, path: path.to_owned(), region })
    }

    /// Has pages that are not there yet come from `node` only.
    ///
    /// # Errors
    /// [`RegionError::Io`]: for a device, and for a node that is not there.
    pub fn bind(&self, node: u32) -> Result<(), RegionError> {
        let device = self.file.metadata().is_ok_and(|meta| meta.file_type().is_char_device());
        Place { file: &self.file, path: &self.path, device }.bind(self.region.fabric().mapping(), node)
    }

    /// Checks that a NIC can be given the region's pages.
    ///
    /// # Errors
    /// [`RegionError::FsDax`]. Source: `check_vma_flags` in mm/gup.c refuses long-term pins of fsdax.
    pub fn require_registrable(&self) -> Result<(), RegionError> {
        let io = |source| RegionError::Io { action: "look at", path: self.path.clone(), source };
        // SAFETY: statx is plain data, for which zero is valid; the descriptor is open, the path is an empty string.
        let (result, stat) = unsafe {
            let mut stat: libc::statx = std::mem::zeroed();
            (libc::statx(self.file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, 0, &raw mut stat), stat)
        };
        if result != 0 {
            return Err(io(io::Error::last_os_error()));
        }
        // A device-dax node has the attribute too.
        let file = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFREG;
        if file && stat.stx_attributes & libc::STATX_ATTR_DAX as u64 != 0 {
            Err(RegionError::FsDax(self.path.clone()))
        } else {
            Ok(())
        }
    }

    /// The region in it.
    #[must_use]
    pub fn region(&self) -> &Region<Native> {
        &self.region
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Claims a broker id for this process.
    ///
    /// # Errors
    /// [`RegionError::BrokerIdTaken`] when a live process has it.
    pub fn claim_broker(&self, broker: BrokerId) -> Result<BrokerLock, RegionError> {
        // A lock of the open file description (F_OFD_SETLK, fcntl(2)) belongs to this `File` alone and is dropped by
        // the kernel with the process. So each claim opens its own.
        let file =
            OpenOptions::new().read(true).write(true).open(&self.path).map_err(|error| self.lock_error(error))?;
        let mut lock = broker_lock(broker);
        // SAFETY: the descriptor is open and the structure lives across the call.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) };
        if result == 0 {
            return Ok(BrokerLock { _file: file });
        }
        match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                Err(RegionError::BrokerIdTaken { broker })
            }
            error => Err(self.lock_error(error)),
        }
    }

    /// True while a process of this host, running or stopped, has claimed the broker id.
    ///
    /// # Errors
    /// [`RegionError::Io`] when locks do not work on this file.
    pub fn is_claimed(&self, broker: BrokerId) -> Result<bool, RegionError> {
        let mut lock = broker_lock(broker);
        // SAFETY: the descriptor is open and the structure lives across the call, which only writes into it.
        let result = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
        if result == 0 {
            Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
        } else {
            Err(self.lock_error(io::Error::last_os_error()))
        }
    }

    fn lock_error(&self, source: io::Error) -> RegionError {
        RegionError::Io { action: "lock", path: self.path.clone(), source }
    }

    /// Removes the region: the file, or a device's superblock. Refuses while a broker runs, unless `force`.
    ///
    /// # Errors
    /// [`RegionError::InUse`], or what the system reports.
    pub fn destroy(self, force: bool) -> Result<(), RegionError> {
        let mut claims = Vec::new();
        for broker in self.region.geometry().brokers() {
            match self.claim_broker(broker) {
                Ok(claim) => claims.push(claim),
                Err(RegionError::BrokerIdTaken { .. }) if force => {}
                Err(RegionError::BrokerIdTaken { broker }) => return Err(RegionError::InUse { broker }),
                Err(error) => return Err(error),
            }
        }
        let fabric = self.region.fabric();
        fabric.store(RegionOffset(0), 0);
        fabric.flush(RegionOffset(0), 8, Site::SuperblockFlush);
        fabric.fence(Site::SuperblockFlush);
        let device = self.file.metadata().is_ok_and(|meta| meta.file_type().is_char_device());
        if device {
            return Ok(());
        }
        std::fs::remove_file(&self.path).map_err(|source| RegionError::Io {
            action: "remove",
            path: self.path.clone(),
            source,
        })
    }
}

/// File or device in which a region is.
#[derive(Clone, Copy)]
struct Place<'a> {
    file: &'a File,
    path: &'a Path,
    device: bool,
}

impl Place<'_> {
    /// Writes an empty region.
    fn format(
        self,
        geometry: &Geometry,
        method: FlushMethod,
        creation: Creation,
    ) -> Result<Region<Native>, RegionError> {
        let Self { file, path, device } = self;
        let bytes = Layout::new(geometry).region_bytes;
        let io = |action: &'static str| move |source| RegionError::Io { action, path: path.to_owned(), source };
        let available = if device {
            device_bytes(file).map_err(io("size"))?
        } else {
            let page = page_bytes(file).map_err(io("size"))?;
            let rounded = bytes.next_multiple_of(page);
            file.set_len(rounded).map_err(io("size"))?;
            rounded
        };
        if available < bytes {
            return Err(RegionError::Truncated { found: available, expected: bytes });
        }
        let mapping = Mapping::of_file(file, available).map_err(io("map"))?;
        if let Some(node) = creation.numa_node {
            self.bind(&mapping, node)?;
        }
        if creation.reserve && !device {
            mapping.prefault().map_err(|source| RegionError::NoSpace { path: path.to_owned(), bytes, source })?;
        }
        let native = Native::new(mapping, method)?;
        if device {
            let magic = native.load(RegionOffset(0));
            if magic != 0 && !creation.force {
                return Err(RegionError::AlreadyExists(path.to_owned()));
            }
            native.store(RegionOffset(0), 0);
            let zeros = vec![0u8; 1 << 20];
            let tables = Layout::new(geometry).segments;
            for at in (0..tables).step_by(zeros.len()) {
                let len = (tables - at).min(zeros.len() as u64);
                native.write_bytes(RegionOffset(at), &zeros[..len as usize]);
                native.flush(RegionOffset(at), len, Site::SuperblockFlush);
            }
            native.fence(Site::SuperblockFlush);
        }
        let created_ms = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_millis() as u64);
        Region::format(native, geometry, creation.uuid.unwrap_or_else(Uuid::new_v4), created_ms)
    }

    /// Has its pages, which are mapped, come from a NUMA node.
    fn bind(self, mapping: &Mapping, node: u32) -> Result<(), RegionError> {
        let bound = if self.device {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "a device's memory is where it is; leave the node out"))
        } else {
            mapping.bind(node)
        };
        bound.map_err(|source| RegionError::Io { action: "bind to a NUMA node", path: self.path.to_owned(), source })
    }
}

/// Says how to get the permission that is missing.
fn permission(error: io::Error) -> io::Error {
    if error.kind() != io::ErrorKind::PermissionDenied {
        return error;
    }
    let text = format!("{error}; hw-setup/cxl apply --group GROUP opens a dax device to a group's members");
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

/// Bytes of a device-dax node. Source: Documentation/ABI/testing/sysfs-bus-dax, `size`.
fn device_bytes(file: &File) -> io::Result<u64> {
    let device = file.metadata()?.rdev();
    let path = format!("/sys/dev/char/{}:{}/size", libc::major(device), libc::minor(device));
    let text = std::fs::read_to_string(&path)
        .map_err(|error| io::Error::new(error.kind(), format!("{path}: {error} (is this a dax device?)")))?;
    text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("{path}: {text:?}")))
}

/// Bytes of the file system's pages: huge on hugetlbfs, whose files must be a multiple of them.
fn page_bytes(file: &File) -> io::Result<u64> {
    // SAFETY: statfs is plain data, for which zero is valid; the descriptor is open.
    let (result, stat) = unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        (libc::fstatfs(file.as_raw_fd(), &raw mut stat), stat)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(if stat.f_type == libc::HUGETLBFS_MAGIC { stat.f_bsize as u64 } else { 4096 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    fn geometry() -> Geometry {
        Geometry {
            max_brokers: 4,
            max_leaders: 1,
            max_topics: 2,
            max_sessions: 8,
            batchlog_slots: 64,
            segment_bytes: 1 << 20,
            segment_count: 4,
            allocator: AllocatorKind::Bitmap,
            role: RegionRole::Single,
        }
    }

    fn make(dir: &tempfile::TempDir) -> PathBuf {
        let path = dir.path().join("region");
        RegionFile::create(&path, &geometry(), FlushMethod::None, Creation::default()).unwrap();
        path
    }

    fn patch(path: &Path, at: u64, bytes: &[u8]) {
        let mut file = OpenOptions::new().write(true).open(path).unwrap();
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(bytes).unwrap();
    }

    #[test]
    fn created_regions_open_and_keep_identity() {
        let dir = tempfile::tempdir().unwrap();
        let path = make(&dir);
        let opened = RegionFile::open(&path, FlushMethod::None).unwrap();
        assert_eq!(opened.region().geometry(), &geometry());
        let again = RegionFile::open(&path, FlushMethod::None).unwrap();
        again.region().require_uuid(opened.region().uuid()).unwrap();
        assert!(matches!(again.region().require_uuid(Uuid::new_v4()), Err(RegionError::Uuid { .. })));
        assert!(matches!(
            RegionFile::create(&path, &geometry(), FlushMethod::None, Creation::default()),
            Err(RegionError::AlreadyExists(_))
        ));
        opened.destroy(false).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn each_defect_has_its_own_error() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path| RegionFile::open(path, FlushMethod::None).unwrap_err();

        let path = make(&dir);
        let full = std::fs::metadata(&path).unwrap().len();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(full / 2).unwrap();
        assert!(matches!(open(&path), RegionError::Truncated { .. }));
        OpenOptions::new().write(true).open(&path).unwrap().set_len(10).unwrap();
        assert!(matches!(open(&path), RegionError::Truncated { found: 10, .. }));
        std::fs::remove_file(&path).unwrap();

        let path = make(&dir);
        patch(&path, 8, &99u32.to_le_bytes());
        assert!(matches!(open(&path), RegionError::Version { found: 99 }));
        std::fs::remove_file(&path).unwrap();

        let path = make(&dir);
        patch(&path, 64 + 24, &5u32.to_le_bytes());
        assert!(matches!(open(&path), RegionError::CorruptSuperblock { .. }));
        std::fs::remove_file(&path).unwrap();

        let path = make(&dir);
        patch(&path, 0, b"SOMETHIN");
        assert!(matches!(open(&path), RegionError::NotARegion { .. }));

        let other = Geometry { segment_bytes: 2 << 20, ..geometry() };
        let path = dir.path().join("other");
        let file = RegionFile::create(&path, &other, FlushMethod::None, Creation::default()).unwrap();
        assert!(matches!(
            file.region().require_segment_bytes(1 << 20),
            Err(RegionError::GeometryMismatch { field: "segment_bytes", .. })
        ));
    }

    #[test]
    fn a_role_has_one_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = make(&dir);
        let file = RegionFile::open(&path, FlushMethod::None).unwrap();
        let held = file.claim_broker(BrokerId(1)).unwrap();
        assert!(matches!(file.claim_broker(BrokerId(1)), Err(RegionError::BrokerIdTaken { broker: BrokerId(1) })));
        let other = RegionFile::open(&path, FlushMethod::None).unwrap();
        assert!(matches!(other.claim_broker(BrokerId(1)), Err(RegionError::BrokerIdTaken { broker: BrokerId(1) })));
        assert!(matches!(other.destroy(false), Err(RegionError::InUse { broker: BrokerId(1) })));
        drop(held);
        file.claim_broker(BrokerId(1)).unwrap();
    }
}
