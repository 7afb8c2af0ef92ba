//! Disk that a simulated replica writes to.

use super::*;

/// Disk that remembers which batches are durable on it. It checks that they are whole as they come.
pub(super) struct Disk {
    pub(super) durable: Durable,
    pub(super) written: Vec<(u64, (ClientId, u64))>,
}

impl Disk {
    pub(super) fn of(durable: &Durable) -> Box<Self> {
        Box::new(Self { durable: Arc::clone(durable), written: Vec::new() })
    }
}

impl Medium for Disk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn create(&self, _: &str) -> io::Result<Box<dyn MediumFile>> {
        Ok(Self::of(&self.durable))
    }

    fn open(&self, _: &str) -> io::Result<Box<dyn MediumFile>> {
        Ok(Self::of(&self.durable))
    }

    fn remove(&self, _: &str) -> io::Result<()> {
        Ok(())
    }

    fn name(&self) -> String {
        "a disk".to_owned()
    }
}

impl MediumFile for Disk {
    fn bytes(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn write(&mut self, at: u64, from: &Buffer) -> io::Result<()> {
        if at > 0 {
            for record in parse_group(from).expect("a whole group").1 {
                let pair = |at: u64| {
                    let words: [u64; 2] = bytemuck::pod_read_unaligned(&from[at as usize..at as usize + 16]);
                    (ClientId(words[0]), words[1])
                };
                let (first, last) = (pair(record.at), pair(record.at + BATCH_BYTES - 64));
                assert_eq!(first, last, "a replica copied what is not a batch");
                self.written.push((record.position, first));
            }
        }
        Ok(())
    }

    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.durable.lock().unwrap().extend(self.written.drain(..));
        Ok(())
    }

    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn truncate(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

pub(super) fn replicator(topics: &Arc<TopicTable<Simulated>>, durable: &Durable) -> Replicator<Simulated> {
    let durable = Arc::clone(durable);
    let open = move |_: &Identity| -> Box<dyn Medium> { Disk::of(&durable) };
    let store = StoreOptions { file_bytes: u64::MAX, retention_bytes: 0 };
    // One that stands still is never left: the schedule decides how long anything takes.
    let options = ReplicaOptions { group_bytes: 2 * BATCH_BYTES, patience_us: u64::MAX / 2, store };
    Replicator::new(Arc::clone(topics), Box::new(open), options).unwrap()
}
