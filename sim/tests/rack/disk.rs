//! A host's disk. It is slow, fails, and forgets what was not synced. It tells the history what it made durable.

use super::fate::{STEPS, one_in, random};
use super::history::History;
use embarcadero_broker::replica::format::{Record, parse_group};
use embarcadero_broker::replica::medium::{Medium, MediumFile};
use embarcadero_broker::replica::store::scan;
use embarcadero_os::buffer::Buffer;
use embarcadero_sim::{Fault, SimulatedMedium};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Disk of a host. Clones share it.
#[derive(Clone)]
pub(crate) struct Disk {
    pub host: u32,
    pub files: SimulatedMedium,
    pub history: Arc<History>,
}

impl Disk {
    pub(crate) fn new(host: u32, history: &Arc<History>) -> Self {
        Self { host, files: SimulatedMedium::default(), history: Arc::clone(history) }
    }

    /// Makes it fail from now on, in one way or another.
    pub(crate) fn fail(&self) {
        let faults = [Fault::Full, Fault::Write, Fault::Sync];
        self.files.set_fault(faults[random(0..faults.len() as u64) as usize]);
    }

    /// Makes it work again.
    pub(crate) fn repair(&self) {
        self.files.set_fault(Fault::None);
    }

    /// Restarts it after a crash of its host. Writes that were not durable are lost, in part or as a whole. A disk that failed
    /// works again.
    pub(crate) fn restart(&self) {
        self.files.lose_power(|| one_in(2));
        self.repair();
    }
}

impl Medium for Disk {
    fn list(&self) -> io::Result<Vec<String>> {
        self.files.list()
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn MediumFile>> {
        Ok(Box::new(Handle { disk: self.clone(), file: self.files.create(name)?, written: Vec::new() }))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn MediumFile>> {
        Ok(Box::new(Handle { disk: self.clone(), file: self.files.open(name)?, written: Vec::new() }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.files.remove(name)
    }

    fn name(&self) -> String {
        format!("the disk of host {}", self.host)
    }
}

struct Handle {
    disk: Disk,
    file: Box<dyn MediumFile>,
    /// Offsets of messages that are written and not yet durable.
    written: Vec<u64>,
}

/// Offsets of a batch's messages.
fn offsets(record: &Record) -> Range<u64> {
    record.first_offset..record.first_offset + u64::from(record.message_count)
}

impl MediumFile for Handle {
    fn bytes(&self) -> io::Result<u64> {
        self.file.bytes()
    }

    fn write(&mut self, at: u64, from: &Buffer) -> io::Result<()> {
        self.file.write(at, from)?;
        // The first block of a file is no group.
        if let Ok((_, records)) = parse_group(from) {
            self.written.extend(records.iter().flat_map(offsets));
        }
        Ok(())
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read(at, into)
    }

    fn sync(&mut self) -> io::Result<()> {
        // Its host may stop before it is done.
        let slow = if one_in(8) { random(0..300) } else { 1 };
        (0..slow).for_each(|_| STEPS[self.disk.host as usize]());
        self.file.sync()?;
        self.disk.history.synced(self.disk.host, self.written.drain(..));
        Ok(())
    }

    fn settle(&mut self) -> io::Result<()> {
        self.file.settle()?;
        // What a crash left of what was not durable is so now.
        let batches =
            scan(&self.disk.files).and_then(|found| found.batches(&self.disk.files)).map_err(io::Error::other)?;
        self.disk.history.synced(self.disk.host, batches.iter().flat_map(|batch| offsets(&batch.record)));
        Ok(())
    }

    fn truncate(&mut self, bytes: u64) -> io::Result<()> {
        self.file.truncate(bytes)
    }
}
