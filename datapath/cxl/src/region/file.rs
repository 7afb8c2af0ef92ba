//! Files and devices that hold regions.

use super::{Region, RegionError, superblock};
use crate::cache::FlushMethod;
use crate::fabric::{Fabric, RegionOffset};
use crate::layout::{AllocatorKind, Geometry, Layout};
use crate::native::{Mapping, Native};
use crate::site::Site;
use embarcadero_wire::{BrokerId, DIGEST_SEED, digest};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Options for making a region's file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Creation {
    /// Allocates every page now, so that the log cannot run out of memory later.
    pub reserve: bool,
    /// NUMA node from which every page comes; any node if unset.
    pub numa_node: Option<u32>,
    /// Overwrites the region that a dax device holds.
    pub force: bool,
    /// UUID of the region; a new one if unset. A mirror has the UUID of its region.
    pub uuid: Option<Uuid>,
}

/// Open region, with the file or device that holds it.
#[derive(Debug)]
pub struct RegionFile {
    file: File,
    path: PathBuf,
    region: Region<Native>,
}

/// Outcome of [`RegionFile::flush_out`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flushed {
    /// Bytes of the lines that were flushed.
    pub bytes: u64,
    /// Instruction that flushed them.
    pub method: FlushMethod,
}

/// Claim on a broker id. The kernel ends it with the process.
#[derive(Debug)]
pub struct BrokerLock {
    _file: File,
}

/// Byte at which the locks of broker ids start. It lies beyond every region, so no lock covers data.
const LOCK_BASE: i64 = 1 << 60;

fn broker_lock(broker: BrokerId) -> libc::flock {
    // SAFETY: flock is plain data, for which zero is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = LOCK_BASE + i64::from(broker.0);
    lock.l_len = 1;
    lock
}

impl RegionFile {
    /// Makes a region at `path`: a new file on tmpfs or hugetlbfs, or a dax device that holds none yet.
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
    /// [`RegionError`], with a variant per defect.
    pub fn open(path: &Path, method: FlushMethod) -> Result<Self, RegionError> {
        let io = |action: &'static str| move |source| RegionError::Io { action, path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(permission).map_err(io("open"))?;
        let meta = file.metadata().map_err(io("size"))?;
        let bytes =
            if meta.file_type().is_char_device() { device_bytes(&file).map_err(io("size"))? } else { meta.len() };
        if bytes < superblock::BYTES {
            return Err(RegionError::Truncated { found: bytes, expected: superblock::BYTES });
        }
        let native = Native::new(Mapping::of_file(&file, bytes).map_err(io("map"))?, method)?;
        let region = Region::open(native)?;
        if region.geometry().allocator == AllocatorKind::Bitmap && method != FlushMethod::None {
            return Err(RegionError::AllocatorNeedsCoherence);
        }
        Ok(Self { file, path: path.to_owned(), region })
    }

    /// Takes pages that are not allocated yet from NUMA node `node` only.
    ///
    /// # Errors
    /// [`RegionError::Io`] for a device, and for a node that the host does not have.
    pub fn bind(&self, node: u32) -> Result<(), RegionError> {
        let device = self.file.metadata().is_ok_and(|meta| meta.file_type().is_char_device());
        Place { file: &self.file, path: &self.path, device }.bind(self.region.fabric().mapping(), node)
    }

    /// Checks that a NIC can register the region's pages.
    ///
    /// # Errors
    /// [`RegionError::FsDax`] for a file on fsdax. Source: `check_vma_flags` in mm/gup.c of the kernel refuses
    /// long-term pins.
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

    /// Region in the file.
    #[must_use]
    pub fn region(&self) -> &Region<Native> {
        &self.region
    }

    /// Path of the file or device.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns a digest of the file or device node by which this process has the region, never 0. Locks on broker ids
    /// are those of a node. A device may have several, for example one in each container of a host.
    ///
    /// # Errors
    /// [`RegionError::Io`].
    pub fn lock_node(&self) -> Result<u64, RegionError> {
        let meta = self.file.metadata().map_err(|error| self.lock_error(error))?;
        Ok(digest(digest(DIGEST_SEED, "device", meta.dev()), "inode", meta.ino()).max(1))
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

    /// Returns true while a process of this host, running or stopped, claims the broker id by the same file or device node.
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

    /// Writes every line of the region that this host's caches changed back to memory, and drops the region from the
    /// caches. Brokers may use it meanwhile. Parts of a file that have no memory are left out.
    ///
    /// # Errors
    /// [`RegionError::NoFlush`], or [`RegionError::Io`].
    pub fn flush_out(&self) -> Result<Flushed, RegionError> {
        let io = |source| RegionError::Io { action: "find the memory of", path: self.path.clone(), source };
        let native = self.region.fabric();
        let (mut at, mut bytes, mut method) = (0, 0, None);
        while let Some(data) = data_from(&self.file, at, native.bytes()).map_err(io)? {
            let len = data.end - data.start;
            method = Some(native.flush_out(RegionOffset(data.start), len).ok_or(RegionError::NoFlush)?);
            (at, bytes) = (data.end, bytes + len);
        }
        // A region has at least its superblock.
        method.map(|method| Flushed { bytes, method }).ok_or(RegionError::NoFlush)
    }

    fn lock_error(&self, source: io::Error) -> RegionError {
        RegionError::Io { action: "lock", path: self.path.clone(), source }
    }

    /// Removes the region: the file, or a device's superblock. Refuses while a broker runs, unless `force`.
    ///
    /// # Errors
    /// [`RegionError::InUse`], or the error of the system.
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
        superblock::erase(self.region.fabric());
        // Other hosts see it too. A CPU that cannot flush shares no memory that needs it.
        let _ = self.region.fabric().flush_out(RegionOffset(0), superblock::BYTES);
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

/// File or device that holds a region.
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
            if superblock::magic(&native) != 0 && !creation.force {
                return Err(RegionError::AlreadyExists(path.to_owned()));
            }
            superblock::erase(&native);
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
        let region = Region::format(native, geometry, creation.uuid.unwrap_or_else(Uuid::new_v4), created_ms)?;
        if device {
            // Other hosts see it too, whatever the method. A CPU that cannot flush shares no memory that needs it.
            let _ = region.fabric().flush_out(RegionOffset(0), region.layout().segments);
        }
        Ok(region)
    }

    /// Takes the pages of the mapping from a NUMA node.
    fn bind(self, mapping: &Mapping, node: u32) -> Result<(), RegionError> {
        let bound = if self.device {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "a device's memory is where it is; leave the node out"))
        } else {
            mapping.bind(node)
        };
        bound.map_err(|source| RegionError::Io { action: "bind to a NUMA node", path: self.path.to_owned(), source })
    }
}

/// Adds to an error how to get the permission that is missing.
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

/// Finds the first range of a file at or after `at` that has memory, in the first `bytes` of it. Source: lseek(2),
/// `SEEK_DATA` and `SEEK_HOLE`. All of a device has memory.
fn data_from(file: &File, at: u64, bytes: u64) -> io::Result<Option<Range<u64>>> {
    if at >= bytes {
        return Ok(None);
    }
    if !file.metadata()?.is_file() {
        return Ok(Some(at..bytes));
    }
    let seek = |from: u64, whence| {
        // SAFETY: the descriptor is open; nobody reads or writes at its offset.
        let found = unsafe { libc::lseek(file.as_raw_fd(), from.cast_signed(), whence) };
        u64::try_from(found).map_err(|_| io::Error::last_os_error())
    };
    match seek(at, libc::SEEK_DATA) {
        Ok(start) if start < bytes => Ok(Some(start..seek(start, libc::SEEK_HOLE)?.min(bytes))),
        Err(error) if error.raw_os_error() != Some(libc::ENXIO) => Err(error),
        // Beyond the last data.
        Ok(_) | Err(_) => Ok(None),
    }
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
    use crate::layout::{RegionRole, SuperblockGeometry, SuperblockHead};
    use std::io::{Seek, SeekFrom, Write};
    use std::mem::offset_of;

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
        // The other version uses a byte that is reserved in this one.
        patch(&path, offset_of!(SuperblockHead, reserved) as u64, &[1]);
        assert!(matches!(open(&path), RegionError::Version { found: 99 }));
        std::fs::remove_file(&path).unwrap();

        let path = make(&dir);
        patch(&path, 64 + offset_of!(SuperblockGeometry, segment_count) as u64, &5u32.to_le_bytes());
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

    #[test]
    fn each_file_has_a_lock_node_of_its_own() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let node = |path: &Path| RegionFile::open(path, FlushMethod::None).unwrap().lock_node().unwrap();
        let (path, other) = (make(&first), make(&second));
        let alias = first.path().join("alias");
        std::fs::hard_link(&path, &alias).unwrap();
        assert!(node(&path) != 0 && node(&path) == node(&alias), "it is one inode");
        assert_ne!(node(&path), node(&other));
    }
}
