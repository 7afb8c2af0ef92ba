//! Disks in memory that fail, fill up, and lose what was not made durable.

use embarcadero_broker::replica::medium::{Medium, MediumFile};
use embarcadero_os::Buffer;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Source: include/uapi/asm-generic/errno-base.h.
const EIO: i32 = 5;

/// Behaviour of the disk under a [`SimulatedMedium`], from now on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Everything works.
    #[default]
    None,
    /// Writes fail for want of space.
    Full,
    /// Writes fail.
    Write,
    /// Writes succeed, and making them durable fails.
    Sync,
}

#[derive(Clone, Default)]
struct SimulatedFile {
    durable: Vec<u8>,
    /// Contents that a reader sees; after a power failure, `durable` is left.
    present: Vec<u8>,
}

#[derive(Default)]
struct SimulatedDisk {
    files: BTreeMap<String, SimulatedFile>,
    fault: Fault,
}

/// Files in memory on a disk that fails when it is told to. Clones share the disk.
#[derive(Clone, Default)]
pub struct SimulatedMedium {
    disk: Arc<Mutex<SimulatedDisk>>,
}

impl SimulatedMedium {
    fn disk(&self) -> MutexGuard<'_, SimulatedDisk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets what goes wrong from now on.
    pub fn set_fault(&self, fault: Fault) {
        self.disk().fault = fault;
    }

    /// Cuts the power. Blocks of 512 bytes that were not made durable keep their new contents only where `survives` returns
    /// true.
    pub fn lose_power(&self, mut survives: impl FnMut() -> bool) {
        for file in self.disk().files.values_mut() {
            let present = std::mem::take(&mut file.present);
            file.durable.resize(present.len().max(file.durable.len()), 0);
            for (durable, present) in file.durable.chunks_mut(512).zip(present.chunks(512)) {
                if durable != present && survives() {
                    durable.copy_from_slice(present);
                }
            }
            file.present = file.durable.clone();
        }
    }

    /// Changes the bytes of a file, as a disk that goes bad does.
    pub fn damage(&self, name: &str, change: impl FnOnce(&mut [u8])) {
        if let Some(file) = self.disk().files.get_mut(name) {
            change(&mut file.present);
            file.durable = file.present.clone();
        }
    }
}

impl Medium for SimulatedMedium {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.disk().files.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn MediumFile>> {
        self.disk().files.insert(name.to_owned(), SimulatedFile::default());
        self.open(name)
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn MediumFile>> {
        Ok(Box::new(SimulatedHandle { medium: self.clone(), name: name.to_owned() }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk().files.remove(name);
        Ok(())
    }

    fn name(&self) -> String {
        "a simulated disk".to_owned()
    }
}

struct SimulatedHandle {
    medium: SimulatedMedium,
    name: String,
}

impl SimulatedHandle {
    fn with<R>(&self, work: impl FnOnce(&mut SimulatedFile, Fault) -> io::Result<R>) -> io::Result<R> {
        let mut disk = self.medium.disk();
        let fault = disk.fault;
        work(disk.files.get_mut(&self.name).ok_or(io::ErrorKind::NotFound)?, fault)
    }
}

impl MediumFile for SimulatedHandle {
    fn bytes(&self) -> io::Result<u64> {
        self.with(|file, _| Ok(file.present.len() as u64))
    }

    fn write(&mut self, at: u64, from: &Buffer) -> io::Result<()> {
        self.with(|file, fault| {
            match fault {
                Fault::Full => return Err(io::ErrorKind::StorageFull.into()),
                Fault::Write => return Err(io::Error::from_raw_os_error(EIO)),
                Fault::None | Fault::Sync => {}
            }
            let end = at as usize + from.len();
            file.present.resize(file.present.len().max(end), 0);
            file.present[at as usize..end].copy_from_slice(from);
            Ok(())
        })
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.with(|file, _| {
            let from = file.present.get(at as usize..at as usize + into.len());
            into.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn sync(&mut self) -> io::Result<()> {
        self.with(|file, fault| {
            if fault == Fault::Sync {
                return Err(io::Error::from_raw_os_error(EIO));
            }
            file.durable = file.present.clone();
            Ok(())
        })
    }

    fn settle(&mut self) -> io::Result<()> {
        self.sync()
    }

    fn truncate(&mut self, bytes: u64) -> io::Result<()> {
        self.with(|file, _| {
            file.present.truncate(bytes as usize);
            file.durable = file.present.clone();
            Ok(())
        })
    }
}
