//! Store of a replica: the files of one stream, which consist of groups and are verified when they are opened.

use super::format::{
    BLOCK, FormatError, GroupHeader, Identity, Record, check_batch, check_group, most_headers, parse_group, peek_group,
};
use super::medium::{Medium, MediumFile};
use embarcadero_os::buffer::Buffer;
use embarcadero_wire::BrokerId;
use rangemap::RangeSet;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

/// Reason why a replica cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk failed.
    #[error("cannot {action} {file} in {medium}: {source}")]
    Io {
        /// Action that failed.
        action: &'static str,
        /// File.
        file: String,
        /// Medium.
        medium: String,
        /// Error of the system.
        source: io::Error,
    },
    /// The files are another topic's, or another region's.
    #[error("{file} in {medium} belongs to another topic, or to another region")]
    Foreign {
        /// File.
        file: String,
        /// Medium.
        medium: String,
    },
    /// The region holds something other than the batch that should be copied.
    #[error("the region cannot be copied: {0}")]
    Memory(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The replica failed before. What its disk holds is not known any more.
    #[error("the replica in {medium} failed before and takes no more")]
    Failed {
        /// Medium.
        medium: String,
    },
    /// A file does not hold any more what it held when it was opened.
    #[error("{file} in {medium}: {source}")]
    Damaged {
        /// File.
        file: String,
        /// Medium.
        medium: String,
        /// Fault of the bytes.
        source: FormatError,
    },
}

impl StoreError {
    /// Returns the error of a region whose contents are `damage`.
    pub(super) fn memory(damage: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Memory(Box::new(damage))
    }
}

/// Bytes of a replica file that are not what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Name of the file.
    pub file: String,
    /// Damaged bytes of the file.
    pub bytes: Range<u64>,
    /// Positions that the bytes may have covered. Empty for a file header, and for a write that was cut short: nothing was
    /// promised about such a write.
    pub positions: Range<u64>,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { file, bytes, positions } = self;
        write!(formatter, "{file}, bytes {} to {}: ", bytes.start, bytes.end)?;
        if bytes.start == 0 {
            write!(formatter, "the file header is damaged, or of another version")
        } else if positions.is_empty() {
            write!(formatter, "a write that was cut short")
        } else {
            write!(formatter, "damaged; it held positions within {} to {}", positions.start, positions.end)
        }
    }
}

/// Place of a group in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    from: u64,
    through: u64,
    sources: u32,
    /// Offset of the first message of the group's first batch.
    first_offset: u64,
    /// Offset after the last message of the group's last batch.
    end_offset: u64,
    /// Start of the group, in bytes from the start of the file.
    at: u64,
    bytes: u64,
}

/// Returns the offset of the first message of these batches, and the offset after their last.
fn offsets(records: &[Record]) -> (u64, u64) {
    let end = |record: &Record| record.first_offset + u64::from(record.message_count);
    (records.first().map_or(0, |first| first.first_offset), records.last().map_or(0, end))
}

/// File of a stream, and the groups in it.
#[derive(Debug)]
struct Filed {
    number: u64,
    bytes: u64,
    groups: Vec<Place>,
}

fn file_name(number: u64) -> String {
    format!("{number:010}.replica")
}

fn file_number(name: &str) -> Option<u64> {
    name.strip_suffix(".replica").filter(|number| number.len() == 10)?.parse().ok()
}

/// Contents of the files of a stream.
pub struct Scan {
    /// Topic and stream that the files name; `None` when there is no file.
    pub identity: Option<Identity>,
    files: Vec<Filed>,
    /// Highest position below which batches were known to be on as many disks as the topic asks for.
    pub durable_through: u64,
    /// Highest position below which batches that no replica has are known to have gone by retention.
    pub lost_through: u64,
    /// Damage in the files.
    pub damage: Vec<Damage>,
}

/// Returns a function that makes a [`StoreError`] of an error of the system.
fn io_error(medium: &dyn Medium, action: &'static str, file: &str) -> impl Fn(io::Error) -> StoreError {
    let (file, medium) = (file.to_owned(), medium.name());
    move |source| StoreError::Io { action, file: file.clone(), medium: medium.clone(), source }
}

/// Reads and verifies every file of a stream, and changes none.
///
/// # Errors
/// [`StoreError::Io`]; [`StoreError::Foreign`] when the files are of several streams; [`StoreError::Damaged`] when a file
/// has another version. Other damage is no error: the result reports it.
pub fn scan(medium: &dyn Medium) -> Result<Scan, StoreError> {
    let names = medium.list().map_err(io_error(medium, "list", "files"))?;
    let mut numbers: Vec<u64> = names.iter().filter_map(|name| file_number(name)).collect();
    numbers.sort_unstable();
    let mut scan = Scan { identity: None, files: Vec::new(), durable_through: 0, lost_through: 0, damage: Vec::new() };
    let mut bytes = Vec::new();
    for number in numbers {
        let name = file_name(number);
        let failed = |action| io_error(medium, action, &name);
        let file = medium.open(&name).map_err(failed("open"))?;
        let len = file.bytes().map_err(failed("size"))?;
        let mut filed = Filed { number, bytes: len, groups: Vec::new() };
        bytes.resize(BLOCK.min(len as usize), 0);
        file.read(0, &mut bytes).map_err(failed("read"))?;
        match Identity::parse(&bytes) {
            Ok((identity, _)) => {
                if !scan.identity.get_or_insert_with(|| identity.clone()).is_of_the_stream_of(&identity) {
                    return Err(StoreError::Foreign { file: name, medium: medium.name() });
                }
            }
            Err(source @ FormatError::Version { .. }) => {
                return Err(StoreError::Damaged { file: name, medium: medium.name(), source });
            }
            // A damaged file header loses nothing while another file of the directory says the same.
            Err(_) => {
                let cut = 0..(BLOCK as u64).min(len);
                scan.damage.push(Damage { file: name.clone(), bytes: cut, positions: 0..0 });
            }
        }
        let mut at = BLOCK as u64;
        // Start of damage that no whole group has followed yet.
        let mut damaged: Option<u64> = None;
        while at < len {
            let group = read_group(&*file, at, len, &mut bytes).map_err(failed("read"))?;
            let Some((header, records, whole)) = group else {
                damaged.get_or_insert(at);
                at += BLOCK as u64;
                continue;
            };
            if !whole {
                damaged.get_or_insert(at);
                at += header.bytes;
                continue;
            }
            if let Some(begun) = damaged.take() {
                let from = filed.groups.last().map_or(0, |before| before.through);
                // Where gaps were filled, groups are not in the order of positions: only the end is known.
                let positions = if from < header.from { from..header.from } else { 0..header.from };
                scan.damage.push(Damage { file: name.clone(), bytes: begun..at, positions });
            }
            let GroupHeader { from, through, bytes, sources, durable_through, lost_through, .. } = header;
            scan.durable_through = scan.durable_through.max(durable_through);
            scan.lost_through = scan.lost_through.max(lost_through);
            let (first_offset, end_offset) = offsets(&records);
            filed.groups.push(Place { from, through, sources, first_offset, end_offset, at, bytes });
            at += bytes;
        }
        if let Some(begun) = damaged {
            filed.bytes = begun;
            scan.damage.push(Damage { file: name, bytes: begun..len, positions: 0..0 });
        }
        scan.files.push(filed);
    }
    Ok(scan)
}

/// Reads the group at `at`. Returns its headers if they are whole, and true if its batches are too.
fn read_group(
    file: &dyn MediumFile,
    at: u64,
    len: u64,
    bytes: &mut Vec<u8>,
) -> io::Result<Option<(GroupHeader, Vec<Record>, bool)>> {
    bytes.resize(BLOCK.min((len - at) as usize), 0);
    file.read(at, bytes)?;
    let Ok(header) = peek_group(bytes) else { return Ok(None) };
    if header.bytes > len - at {
        return Ok(None);
    }
    bytes.resize(header.bytes as usize, 0);
    file.read(at, bytes)?;
    // A damaged header does not even tell where the next group begins.
    Ok(parse_group(bytes).ok().map(|(header, records)| (header, records, check_group(bytes).is_ok())))
}

/// Options of a stream's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreOptions {
    /// Bytes of a file after which the next file begins.
    pub file_bytes: u64,
    /// Bytes that are kept of a stream; 0 keeps everything until the topic is deleted.
    pub retention_bytes: u64,
}

/// Replica of one stream, which its broker writes.
pub struct StreamLog {
    medium: Arc<dyn Medium>,
    identity: Identity,
    options: StoreOptions,
    files: Vec<Filed>,
    /// Durable groups, for readers beside the writer.
    readable: Arc<StreamFiles>,
    writer: Option<Box<dyn MediumFile>>,
    /// Positions at which each source's batches are on the disk.
    covered: Vec<RangeSet<u64>>,
    /// True once a write failed.
    failed: bool,
}

impl StreamLog {
    /// Opens the files of a stream on `medium`, verifies them, and cuts off what a crash left half written. Returns the
    /// damage as well.
    ///
    /// # Errors
    /// [`StoreError::Io`] or [`StoreError::Foreign`].
    pub fn open(
        medium: Box<dyn Medium>,
        identity: Identity,
        max_brokers: u32,
        options: StoreOptions,
    ) -> Result<(Self, Vec<Damage>), StoreError> {
        for name in medium.list().map_err(io_error(&*medium, "list", "files"))? {
            let settled = medium.open(&name).and_then(|mut file| file.settle());
            settled.map_err(io_error(&*medium, "make durable", &name))?;
        }
        let Scan { identity: found, files, damage, .. } = scan(&*medium)?;
        if let (Some(found), Some(first)) = (&found, files.first())
            && !found.is_of_the_stream_of(&identity)
        {
            return Err(StoreError::Foreign { file: file_name(first.number), medium: medium.name() });
        }
        for torn in damage.iter().filter(|damage| damage.positions.is_empty() && damage.bytes.start > 0) {
            let failed = |action| io_error(&*medium, action, &torn.file);
            let mut file = medium.open(&torn.file).map_err(failed("open"))?;
            file.truncate(torn.bytes.start).map_err(failed("truncate"))?;
        }
        let covered = vec![RangeSet::new(); max_brokers as usize];
        let medium: Arc<dyn Medium> = Arc::from(medium);
        let readable = Arc::new(StreamFiles { medium: Arc::clone(&medium), groups: RwLock::default() });
        let mut log = Self { medium, identity, options, files, readable, writer: None, covered, failed: false };
        for index in 0..log.files.len() {
            let number = log.files[index].number;
            for group in log.files[index].groups.clone() {
                log.cover(group.sources, group.from..group.through);
                log.readable.add(number, group);
            }
        }
        Ok((log, damage))
    }

    /// Returns the durable groups, for readers beside the writer.
    #[must_use]
    pub fn readable(&self) -> Arc<StreamFiles> {
        Arc::clone(&self.readable)
    }

    /// Records that all batches of `sources` at these positions are on the disk; there may be none.
    pub fn cover(&mut self, sources: u32, positions: Range<u64>) {
        for (source, covered) in self.covered.iter_mut().enumerate() {
            if sources & (1 << source) != 0 && !positions.is_empty() {
                covered.insert(positions.clone());
            }
        }
    }

    /// Returns the first position from `from` on at which a batch of `source` may be missing.
    #[must_use]
    pub fn missing(&self, source: BrokerId, from: u64) -> u64 {
        self.covered.get(source.index()).and_then(|covered| covered.get(&from)).map_or(from, |range| range.end)
    }

    /// Returns the first position after `from` at which the batches of `source` are on the disk; `u64::MAX` if there is
    /// none. `from` itself is missing.
    #[must_use]
    pub fn missing_until(&self, source: BrokerId, from: u64) -> u64 {
        let covered = self.covered.get(source.index());
        covered.and_then(|covered| covered.overlapping(from..u64::MAX).next()).map_or(u64::MAX, |range| range.start)
    }

    /// Writes a group and makes it durable. After an error the log takes no more: what a failed `fdatasync` left on the
    /// disk is not known. Source: fsync(2); Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC
    /// 2020.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn append(&mut self, header: &GroupHeader, group: &Buffer) -> Result<(), StoreError> {
        if self.failed {
            return Err(StoreError::Failed { medium: self.medium.name() });
        }
        self.failed = true;
        let full = |file: &Filed| file.bytes + header.bytes > self.options.file_bytes && !file.groups.is_empty();
        let next = match (&self.writer, self.files.last()) {
            (Some(_), Some(file)) if !full(file) => None,
            (_, last) => Some(last.map_or(0, |last| last.number + 1)),
        };
        if let Some(number) = next {
            self.begin(number)?;
        }
        let (Some(file), Some(writer)) = (self.files.last_mut(), &mut self.writer) else {
            return Err(StoreError::Failed { medium: self.medium.name() });
        };
        let name = file_name(file.number);
        let failed = |action| io_error(&*self.medium, action, &name);
        writer.write_durable(file.bytes, group).map_err(failed("write, or make durable,"))?;
        let GroupHeader { from, through, bytes, sources, .. } = *header;
        let damaged = |source| StoreError::Damaged { file: name.clone(), medium: self.medium.name(), source };
        let (first_offset, end_offset) = offsets(&parse_group(group).map_err(damaged)?.1);
        let place = Place { from, through, sources, first_offset, end_offset, at: file.bytes, bytes };
        self.readable.add(file.number, place);
        file.groups.push(place);
        file.bytes += bytes;
        self.cover(sources, from..through);
        self.failed = false;
        Ok(())
    }

    /// Begins file `number`.
    fn begin(&mut self, number: u64) -> Result<(), StoreError> {
        let name = file_name(number);
        let failed = |action| io_error(&*self.medium, action, &name);
        let mut file = self.medium.create(&name).map_err(failed("create"))?;
        let block = self.identity.encode(number);
        let mut buffer = Buffer::new(BLOCK).map_err(failed("buffer"))?;
        buffer.extend_from_slice(&block);
        // Durable before any group: batches in a file without a header are of no known topic, and count as lost.
        file.write_durable(0, &buffer).map_err(failed("write, or make durable,"))?;
        self.files.push(Filed { number, bytes: BLOCK as u64, groups: Vec::new() });
        self.writer = Some(file);
        self.retain()
    }

    /// Removes the oldest files while there are more bytes than are kept.
    fn retain(&mut self) -> Result<(), StoreError> {
        if self.options.retention_bytes == 0 {
            return Ok(());
        }
        let mut total: u64 = self.files.iter().map(|file| file.bytes).sum();
        while self.files.len() > 1 && total > self.options.retention_bytes {
            let file = self.files.remove(0);
            total -= file.bytes;
            let name = file_name(file.number);
            self.readable.remove(file.number);
            self.medium.remove(&name).map_err(io_error(&*self.medium, "remove", &name))?;
        }
        Ok(())
    }

    /// Removes every file: the topic is gone.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn destroy(&mut self) -> Result<(), StoreError> {
        self.writer = None;
        for file in std::mem::take(&mut self.files) {
            self.readable.remove(file.number);
            let name = file_name(file.number);
            self.medium.remove(&name).map_err(io_error(&*self.medium, "remove", &name))?;
        }
        Ok(())
    }
}

/// Batch that was read back, as it was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archived {
    /// Offset of the first message.
    pub first_offset: u64,
    /// Number of messages.
    pub message_count: u32,
    /// Broker that received the batch.
    pub source: BrokerId,
    /// Time at which the batch was ordered, microseconds since 1970.
    pub ordered_us: u64,
    /// Bytes of the batch, header and body.
    pub bytes: Vec<u8>,
}

impl Archived {
    /// Offset after the last message.
    #[must_use]
    pub(crate) fn end_offset(&self) -> u64 {
        self.first_offset + u64::from(self.message_count)
    }
}

/// Durable groups of a stream, for readers beside the writer.
pub struct StreamFiles {
    medium: Arc<dyn Medium>,
    /// Number of the file and place of each group, by the offset of its first message. No batch is in two groups.
    groups: RwLock<BTreeMap<u64, (u64, Place)>>,
}

impl StreamFiles {
    fn add(&self, number: u64, place: Place) {
        self.groups.write().unwrap_or_else(PoisonError::into_inner).insert(place.first_offset, (number, place));
    }

    fn remove(&self, number: u64) {
        self.groups.write().unwrap_or_else(PoisonError::into_inner).retain(|_, (of, _)| *of != number);
    }

    /// Reads batches in the order of their offsets, from the one that has the message `from`, or a later one. It stops
    /// before the first group that it did not look into, and after `max_bytes`. Returns at least one batch if there is
    /// one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn read(&self, from: u64, max_bytes: u64) -> Result<Vec<Archived>, StoreError> {
        // Groups of different sources overlap. All that begin at or before the offset and reach beyond it can have the
        // batch, and so can the next group.
        let (chosen, horizon) = {
            let groups = self.groups.read().unwrap_or_else(PoisonError::into_inner);
            let mut later = groups.range(from.saturating_add(1)..).map(|(_, place)| *place);
            let begun = groups.range(..=from).map(|(_, place)| *place).filter(|(_, place)| place.end_offset > from);
            let chosen: Vec<(u64, Place)> = begun.chain(later.next()).collect();
            (chosen, later.next().map_or(u64::MAX, |(_, place)| place.first_offset))
        };
        let mut files = Vec::new();
        let mut found: Vec<(usize, u64, Record)> = Vec::new();
        for (number, place) in chosen {
            let name = file_name(number);
            let Some(file) = self.open(&name)? else { continue };
            for record in self.records_of(&name, &*file, &place)? {
                let end = record.first_offset + u64::from(record.message_count);
                if end > from && record.first_offset < horizon {
                    found.push((files.len(), place.at + record.at, record));
                }
            }
            files.push((name, file));
        }
        found.sort_unstable_by_key(|(.., record)| record.first_offset);
        let mut batches = Vec::new();
        let mut total = 0;
        for (index, at, record) in found {
            let Some((name, file)) = files.get(index) else { break };
            total += u64::from(record.bytes);
            if total > max_bytes && !batches.is_empty() {
                break;
            }
            let mut bytes = vec![0; record.bytes as usize];
            file.read(at, &mut bytes).map_err(io_error(&*self.medium, "read", name))?;
            let damaged = |source| StoreError::Damaged { file: name.clone(), medium: self.medium.name(), source };
            check_batch(&record, &bytes).map_err(damaged)?;
            let Record { first_offset, message_count, source, ordered_us, .. } = record;
            batches.push(Archived { first_offset, message_count, source, ordered_us, bytes });
        }
        Ok(batches)
    }

    /// Returns the offset of the first batch on the disk that was ordered at `since_us` or later; microseconds since
    /// 1970.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn first_since(&self, since_us: u64) -> Result<Option<u64>, StoreError> {
        let groups: Vec<(u64, Place)> =
            self.groups.read().unwrap_or_else(PoisonError::into_inner).values().copied().collect();
        // Groups begin in the order of the batches, so the first that begins late enough is found by halving.
        let (mut low, mut high) = (0, groups.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let records = groups.get(middle).map_or(Ok(Vec::new()), |(number, place)| self.records(*number, place))?;
            // A group that retention took meanwhile was among the oldest.
            if records.first().is_none_or(|first| first.ordered_us < since_us) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let mut found = groups.get(low).map(|(_, place)| place.first_offset);
        // Groups that begin earlier may reach beyond that offset.
        let from = low.checked_sub(1).and_then(|before| groups.get(before)).map_or(0, |(_, place)| place.first_offset);
        for (number, place) in groups.iter().take(low).filter(|(_, place)| place.end_offset > from) {
            let records = self.records(*number, place)?;
            let first = records.iter().find(|record| record.ordered_us >= since_us).map(|record| record.first_offset);
            found = found.into_iter().chain(first).min();
        }
        Ok(found)
    }

    /// Reads the record headers of a group. There are none if retention took the file meanwhile.
    fn records(&self, number: u64, place: &Place) -> Result<Vec<Record>, StoreError> {
        let name = file_name(number);
        let Some(file) = self.open(&name)? else { return Ok(Vec::new()) };
        self.records_of(&name, &*file, place)
    }

    fn records_of(&self, name: &str, file: &dyn MediumFile, place: &Place) -> Result<Vec<Record>, StoreError> {
        let mut head = vec![0; most_headers(place.bytes)];
        file.read(place.at, &mut head).map_err(io_error(&*self.medium, "read", name))?;
        let damaged = |source| StoreError::Damaged { file: name.to_owned(), medium: self.medium.name(), source };
        Ok(parse_group(&head).map_err(damaged)?.1)
    }

    /// Opens a file; `None` if retention took it meanwhile.
    fn open(&self, name: &str) -> Result<Option<Box<dyn MediumFile>>, StoreError> {
        match self.medium.open(name) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error(&*self.medium, "open", name)(error)),
        }
    }
}

/// Batch in a replica file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// Number of the file.
    file: u64,
    /// Start of the batch, in bytes from the start of the file.
    at: u64,
    /// Header of the batch.
    pub record: Record,
}

impl Scan {
    /// Returns true when there is a group of batches.
    pub(super) fn holds_batches(&self) -> bool {
        self.files.iter().any(|filed| !filed.groups.is_empty())
    }

    /// Returns every batch, in the order in which they were written.
    ///
    /// # Errors
    /// [`StoreError::Io`], or [`StoreError::Damaged`] when a file changed since the scan.
    pub fn batches(&self, medium: &dyn Medium) -> Result<Vec<Located>, StoreError> {
        let mut found = Vec::new();
        let mut bytes = Vec::new();
        for filed in &self.files {
            let name = file_name(filed.number);
            let failed = |action| io_error(medium, action, &name);
            let file = medium.open(&name).map_err(failed("open"))?;
            for group in &filed.groups {
                bytes.resize(most_headers(group.bytes), 0);
                file.read(group.at, &mut bytes).map_err(failed("read"))?;
                let damaged = |source| StoreError::Damaged { file: name.clone(), medium: medium.name(), source };
                let (_, records) = parse_group(&bytes).map_err(damaged)?;
                let locate = |record: Record| Located { file: filed.number, at: group.at + record.at, record };
                found.extend(records.into_iter().map(locate));
            }
        }
        Ok(found)
    }
}

/// Reads a batch into `into`, and checks it.
///
/// # Errors
/// [`StoreError::Io`], or [`StoreError::Damaged`] when the file changed since the scan.
pub fn read_batch(medium: &dyn Medium, batch: &Located, into: &mut Vec<u8>) -> Result<(), StoreError> {
    let name = file_name(batch.file);
    into.resize(batch.record.bytes as usize, 0);
    let read = medium.open(&name).and_then(|file| file.read(batch.at, into));
    read.map_err(io_error(medium, "read", &name))?;
    let damaged = |source| StoreError::Damaged { file: name.clone(), medium: medium.name(), source };
    check_batch(&batch.record, into).map_err(damaged)
}
