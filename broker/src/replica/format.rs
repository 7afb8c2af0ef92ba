//! Format of replica files: positions and sizes, and how damage is detected. `docs/reference/replica-files.md` draws
//! it.
//!
//! A file is a header block, then groups. One write and one `fdatasync` make a group durable. It has a header, a record
//! header for each batch, then the batches. Files and groups describe themselves, so a topic can be rebuilt from them
//! alone.
//!
//! All integers are little-endian. File headers and groups begin at multiples of [`BLOCK`], batches at multiples of 64
//! bytes.

use bytemuck::{Pod, Zeroable};
use embarcadero_cxl::layout::{IndexEntry, MAX_BROKERS, TOPIC_NAME_BYTES, TopicState};
use embarcadero_cxl::replication::Completion;
use embarcadero_cxl::topic_table::{TopicConfig, check_topic_name};
use embarcadero_wire::batch::MAX_BATCH_BYTES;
use embarcadero_wire::{BrokerId, Incarnation, MAX_ACK_LEVEL, Order, Stream, TopicId, crc32c};
use std::mem::{offset_of, size_of};
use std::ops::Range;

/// Bytes of a block. Direct I/O needs positions and lengths to be multiples of the logical block size, which no common
/// disk exceeds (open(2), `O_DIRECT`).
pub const BLOCK: usize = 4096;
/// First eight bytes of a file.
const FILE_MAGIC: u64 = u64::from_le_bytes(*b"EMBREPLI");
/// First four bytes of a group.
const GROUP_MAGIC: u32 = u32::from_le_bytes(*b"EMBG");
/// Alignment of batches in a group, in bytes.
const ALIGNMENT: u64 = 64;
/// Version of the format.
const VERSION: u32 = 1;
/// Most batches of a group.
pub(crate) const GROUP_RECORDS: usize = 4096;
/// Most bytes of a group: room for one batch of any size, or for many small ones.
pub(crate) const GROUP_BYTES: u64 = 2 * MAX_BATCH_BYTES;

/// Reason why bytes are not those of a replica file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The bytes end before the structure does.
    #[error("{what} is cut short: {found} bytes of {expected}")]
    Short {
        /// Name of the structure.
        what: &'static str,
        /// Bytes that are there.
        found: u64,
        /// Bytes of the structure.
        expected: u64,
    },
    /// The structure begins with another magic number.
    #[error("{what} does not begin as one")]
    Magic {
        /// Name of the structure.
        what: &'static str,
    },
    /// The file has another version.
    #[error("the replica file has version {found}, this build reads version {VERSION}")]
    Version {
        /// Version of the file.
        found: u32,
    },
    /// The bytes are damaged.
    #[error("the checksum of {what} is {found:#010x}, its bytes give {expected:#010x}")]
    Checksum {
        /// Name of the structure.
        what: &'static str,
        /// Checksum in the structure.
        found: u32,
        /// Checksum of the bytes.
        expected: u32,
    },
    /// A field is out of bounds, although the checksum matches.
    #[error("{field} is {value}, which cannot be")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Value of the field.
        value: u64,
    },
}

/// First bytes of a file, which name the topic and the stream that it belongs to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
struct FileHeader {
    magic: u64,
    version: u32,
    header_bytes: u32,
    region: [u8; 16],
    topic: TopicId,
    incarnation: Incarnation,
    stream: Stream,
    order: u8,
    ack_level: u8,
    replication_factor: u8,
    name_bytes: u8,
    retention_bytes: u64,
    retention_ms: u64,
    created_ms: u64,
    number: u64,
    name: [u8; TOPIC_NAME_BYTES],
    reserved: u32,
    /// CRC32C of the bytes before it.
    checksum: u32,
}
const _: () = {
    assert!(size_of::<FileHeader>() == 152);
    assert!(offset_of!(FileHeader, name) == 80);
    assert!(offset_of!(FileHeader, checksum) == 148);
};

/// First bytes of a group.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct GroupHeader {
    magic: u32,
    /// CRC32C of the rest of this header and of the record headers.
    checksum: u32,
    /// First position that the group covers.
    pub from: u64,
    /// Position after the last that the group covers.
    pub through: u64,
    /// Bytes of the group, a multiple of [`BLOCK`].
    pub bytes: u64,
    /// Brokers whose batches at these positions are all in the group, one bit each.
    pub sources: u32,
    records: u32,
    /// Position below which batches were on as many disks as the topic asks for, when the group was written.
    pub durable_through: u64,
    /// Position below which batches that no replica has went by retention.
    pub lost_through: u64,
    reserved: u64,
}
/// Start of the bytes of a group header that its checksum covers.
const COVERED: usize = offset_of!(GroupHeader, from);
const _: () = {
    assert!(size_of::<GroupHeader>() == 64);
    assert!(offset_of!(GroupHeader, checksum) + size_of::<u32>() == COVERED);
};

/// Header of a batch in a group.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Record {
    /// Position in the order index.
    pub position: u64,
    /// Offset of the batch's first message.
    pub first_offset: u64,
    /// Time at which the batch was ordered, microseconds since 1970.
    pub ordered_us: u64,
    /// Start of the batch, in bytes from the start of the group.
    pub at: u64,
    /// Bytes of the batch as it was received, header included.
    pub bytes: u32,
    /// CRC32C of these bytes.
    pub checksum: u32,
    /// Number of messages.
    pub message_count: u32,
    /// Broker that received the batch.
    pub source: BrokerId,
    /// Low half of the term under which the batch was ordered.
    pub term: u32,
    reserved: [u32; 3],
}
const _: () = assert!(size_of::<Record>() == 64);

/// Region, topic and stream that a file belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// UUID of the region.
    pub region: [u8; 16],
    /// Configuration of the topic when the file was begun.
    pub topic: TopicConfig,
    /// Stream of the topic.
    pub stream: Stream,
}

impl Identity {
    /// Returns true when both are of the same stream of the same topic.
    pub(super) fn is_of_the_stream_of(&self, other: &Self) -> bool {
        let key = |of: &Self| (of.region, of.topic.id, of.topic.incarnation, of.stream);
        key(self) == key(other)
    }

    /// Encodes the first block of file `number`.
    ///
    /// # Panics
    /// When the topic's name is longer than [`TOPIC_NAME_BYTES`].
    #[must_use]
    pub fn encode(&self, number: u64) -> Vec<u8> {
        let topic = &self.topic;
        let name = topic.name.as_bytes();
        let mut header = FileHeader {
            magic: FILE_MAGIC,
            version: VERSION,
            header_bytes: BLOCK as u32,
            region: self.region,
            topic: topic.id,
            incarnation: topic.incarnation,
            stream: self.stream,
            order: topic.order.code(),
            ack_level: topic.ack_level,
            replication_factor: topic.replication_factor,
            name_bytes: name.len() as u8,
            retention_bytes: topic.retention_bytes,
            retention_ms: topic.retention_ms,
            created_ms: topic.created_ms,
            number,
            ..FileHeader::zeroed()
        };
        header.name[..name.len()].copy_from_slice(name);
        header.checksum = crc32c(&bytemuck::bytes_of(&header)[..offset_of!(FileHeader, checksum)]);
        let mut block = vec![0; BLOCK];
        block[..size_of::<FileHeader>()].copy_from_slice(bytemuck::bytes_of(&header));
        block
    }

    /// Decodes the first block of a file. Returns what the file belongs to, and its number.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn parse(block: &[u8]) -> Result<(Self, u64), FormatError> {
        let header: FileHeader = read(block, 0, "the file header")?;
        if header.magic != FILE_MAGIC {
            return Err(FormatError::Magic { what: "the file header" });
        }
        let expected = crc32c(&block[..offset_of!(FileHeader, checksum)]);
        check("the file header", header.checksum, expected)?;
        if header.version != VERSION {
            return Err(FormatError::Version { found: header.version });
        }
        let field = |field, value| FormatError::Field { field, value };
        if header.header_bytes as usize != BLOCK {
            return Err(field("header_bytes", header.header_bytes.into()));
        }
        let order = Order::from_code(header.order).ok_or(field("order", header.order.into()))?;
        if !(1..=MAX_BROKERS).contains(&u32::from(header.replication_factor)) {
            return Err(field("replication_factor", header.replication_factor.into()));
        }
        if header.ack_level > MAX_ACK_LEVEL {
            return Err(field("ack_level", header.ack_level.into()));
        }
        if header.reserved != 0 {
            return Err(field("reserved", header.reserved.into()));
        }
        let padding = header.name.get(header.name_bytes.into()..).unwrap_or_default();
        if let Some(byte) = padding.iter().find(|byte| **byte != 0) {
            return Err(field("padding of the name", (*byte).into()));
        }
        let name = header.name.get(..header.name_bytes.into()).and_then(|name| std::str::from_utf8(name).ok());
        let name = name.filter(|name| check_topic_name(name).is_ok()).ok_or(field("name", header.name_bytes.into()))?;
        let topic = TopicConfig {
            id: header.topic,
            incarnation: header.incarnation,
            state: TopicState::Live,
            name: name.to_owned(),
            order,
            ack_level: header.ack_level,
            replication_factor: header.replication_factor,
            retention_bytes: header.retention_bytes,
            retention_ms: header.retention_ms,
            created_ms: header.created_ms,
        };
        Ok((Self { region: header.region, topic, stream: header.stream }, header.number))
    }
}

fn read<T: Pod>(bytes: &[u8], at: usize, what: &'static str) -> Result<T, FormatError> {
    let expected = (at + size_of::<T>()) as u64;
    let found = bytes.get(at..at + size_of::<T>());
    found.map(bytemuck::pod_read_unaligned).ok_or(FormatError::Short { what, found: bytes.len() as u64, expected })
}

fn check(what: &'static str, found: u32, expected: u32) -> Result<(), FormatError> {
    if found == expected { Ok(()) } else { Err(FormatError::Checksum { what, found, expected }) }
}

/// Returns the bytes of the headers of a group with `records` batches.
const fn headers(records: usize) -> usize {
    size_of::<GroupHeader>() + records * size_of::<Record>()
}

/// Returns the most bytes that the headers of a group of `bytes` can have.
pub(super) fn most_headers(bytes: u64) -> usize {
    bytes.min(headers(GROUP_RECORDS) as u64) as usize
}

/// Batch that goes into a group: its position in the order index, and its entry there.
pub type Indexed = (u64, IndexEntry);

/// Returns the bytes of a group with these batches.
#[must_use]
pub fn group_bytes(batches: &[Indexed]) -> u64 {
    let payload: u64 = batches.iter().map(|(_, entry)| u64::from(entry.bytes).next_multiple_of(ALIGNMENT)).sum();
    (headers(batches.len()) as u64 + payload).next_multiple_of(BLOCK as u64)
}

/// Group that is to be written.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    /// Positions that the group covers.
    pub positions: Range<u64>,
    /// Brokers whose batches at these positions are all in the group, one bit each.
    pub sources: u32,
    /// Replication of the stream before this group.
    pub completion: Completion,
    /// Batches, in the order of their positions.
    pub batches: &'a [Indexed],
}

/// Writes a group into `into`. `copy` copies the batch of an index entry into the bytes that it gets.
///
/// # Panics
/// When `into` is shorter than [`group_bytes`] says.
pub fn write_group(into: &mut [u8], group: &Group<'_>, mut copy: impl FnMut(&IndexEntry, &mut [u8])) {
    let Group { positions, sources, completion, batches } = group;
    let table = headers(batches.len());
    let mut at = table;
    for (index, (position, entry)) in batches.iter().enumerate() {
        let end = at + entry.bytes as usize;
        copy(entry, &mut into[at..end]);
        let record = Record {
            position: *position,
            first_offset: entry.first_offset,
            ordered_us: entry.ordered_us,
            at: at as u64,
            bytes: entry.bytes,
            checksum: crc32c(&into[at..end]),
            message_count: entry.message_count,
            source: entry.broker.into(),
            term: entry.term,
            ..Record::zeroed()
        };
        into[headers(index)..headers(index + 1)].copy_from_slice(bytemuck::bytes_of(&record));
        at = end.next_multiple_of(ALIGNMENT as usize);
        into[end..at].fill(0);
    }
    let bytes = into.len() as u64;
    into[at..].fill(0);
    let header = GroupHeader {
        magic: GROUP_MAGIC,
        from: positions.start,
        through: positions.end,
        bytes,
        sources: *sources,
        durable_through: completion.durable_through,
        lost_through: completion.lost_through,
        records: batches.len() as u32,
        ..GroupHeader::zeroed()
    };
    into[..size_of::<GroupHeader>()].copy_from_slice(bytemuck::bytes_of(&header));
    let checksum = crc32c(&into[COVERED..table]);
    into[offset_of!(GroupHeader, checksum)..COVERED].copy_from_slice(&checksum.to_le_bytes());
}

/// Decodes the header of a group from its first block without checking its checksum: enough to know how much to read.
///
/// # Errors
/// [`FormatError`].
pub fn peek_group(block: &[u8]) -> Result<GroupHeader, FormatError> {
    let header: GroupHeader = read(block, 0, "the group header")?;
    if header.magic != GROUP_MAGIC {
        return Err(FormatError::Magic { what: "the group header" });
    }
    let field = |field, value| Err(FormatError::Field { field, value });
    if !(BLOCK as u64..=GROUP_BYTES).contains(&header.bytes) || !header.bytes.is_multiple_of(BLOCK as u64) {
        return field("group bytes", header.bytes);
    }
    let records = header.records as usize;
    if records == 0 || records > GROUP_RECORDS || headers(records) as u64 > header.bytes {
        return field("records", header.records.into());
    }
    if header.from >= header.through {
        return field("through", header.through);
    }
    Ok(header)
}

/// Decodes the headers of a group. `bytes` begins with the group and has at least all of its headers. The records are
/// in the order of their positions, and point into the group.
///
/// # Errors
/// [`FormatError`].
pub fn parse_group(bytes: &[u8]) -> Result<(GroupHeader, Vec<Record>), FormatError> {
    let header = peek_group(bytes)?;
    let table = headers(header.records as usize);
    let Some(covered) = bytes.get(COVERED..table) else {
        let (found, expected) = (bytes.len() as u64, table as u64);
        return Err(FormatError::Short { what: "the record headers", found, expected });
    };
    check("the group's headers", header.checksum, crc32c(covered))?;
    let field = |field, value| Err(FormatError::Field { field, value });
    if header.reserved != 0 {
        return field("reserved", header.reserved);
    }
    let mut records = Vec::with_capacity(header.records as usize);
    let (mut due, mut end) = (header.from, table as u64);
    for index in 0..header.records as usize {
        let record: Record = read(bytes, headers(index), "a record header")?;
        if record.position < due || record.position >= header.through {
            return field("position", record.position);
        }
        if record.at < end || !record.at.is_multiple_of(ALIGNMENT) || u64::from(record.bytes) > MAX_BATCH_BYTES {
            return field("at", record.at);
        }
        if record.source.0 >= MAX_BROKERS || header.sources & (1 << record.source.0) == 0 {
            return field("source", record.source.0.into());
        }
        if let Some(word) = record.reserved.into_iter().find(|word| *word != 0) {
            return field("reserved", word.into());
        }
        end = match record.at.checked_add(record.bytes.into()) {
            Some(end) if end <= header.bytes && record.bytes > 0 => end,
            _ => return field("bytes", record.bytes.into()),
        };
        due = record.position + 1;
        records.push(record);
    }
    Ok((header, records))
}

/// Checks a batch against its record.
///
/// # Errors
/// [`FormatError::Checksum`].
pub(crate) fn check_batch(record: &Record, batch: &[u8]) -> Result<(), FormatError> {
    check("a batch", record.checksum, crc32c(batch))
}

/// Checks a whole group, batches included. Returns its headers.
///
/// # Errors
/// [`FormatError`].
pub fn check_group(bytes: &[u8]) -> Result<(GroupHeader, Vec<Record>), FormatError> {
    let (header, records) = parse_group(bytes)?;
    for record in &records {
        let batch = bytes.get(record.at as usize..(record.at + u64::from(record.bytes)) as usize);
        let (found, expected) = (bytes.len() as u64, header.bytes);
        check_batch(record, batch.ok_or(FormatError::Short { what: "the group", found, expected })?)?;
    }
    Ok((header, records))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn identity() -> Identity {
        let topic = TopicConfig {
            id: TopicId(3),
            incarnation: Incarnation(7),
            state: TopicState::Live,
            name: "orders".to_owned(),
            order: Order::Strong,
            ack_level: 2,
            replication_factor: 3,
            retention_bytes: 1 << 30,
            retention_ms: 0,
            created_ms: 1,
        };
        Identity { region: [9; 16], topic, stream: Stream::GLOBAL }
    }

    /// A group of batches of these sizes, each filled with the low byte of its position.
    fn group(sizes: &[u32]) -> Vec<u8> {
        let mut offset = 1000;
        let batches: Vec<Indexed> = (5u64..)
            .step_by(2)
            .zip(sizes)
            .map(|(position, bytes)| {
                offset += 3;
                let entry = IndexEntry {
                    bytes: *bytes,
                    first_offset: offset,
                    message_count: 3,
                    broker: 1,
                    ..IndexEntry::zeroed()
                };
                (position, entry)
            })
            .collect();
        let mut bytes = vec![0xaa; group_bytes(&batches) as usize];
        let through = 5 + 2 * sizes.len() as u64;
        let group =
            Group { positions: 5..through, sources: 0b10, completion: Completion::default(), batches: &batches };
        write_group(&mut bytes, &group, |entry, into| into.fill(entry.first_offset as u8));
        bytes
    }

    proptest! {
        #[test]
        fn a_group_reads_as_it_was_written(sizes in prop::collection::vec(64u32..5000, 1..40)) {
            let bytes = group(&sizes);
            let (header, records) = check_group(&bytes).unwrap();
            prop_assert_eq!((header.from, header.bytes), (5, bytes.len() as u64));
            prop_assert_eq!(records.iter().map(|record| record.bytes).collect::<Vec<_>>(), sizes);
            for (index, record) in records.iter().enumerate() {
                prop_assert_eq!(record.position, 5 + 2 * index as u64);
                let batch = &bytes[record.at as usize..][..record.bytes as usize];
                prop_assert!(batch.iter().all(|byte| *byte == record.first_offset as u8));
            }
        }

        #[test]
        fn any_changed_byte_that_matters_is_noticed(
            sizes in prop::collection::vec(64u32..500, 1..8), at in any::<prop::sample::Index>(), bit in 0u8..8,
        ) {
            let mut bytes = group(&sizes);
            let (_, records) = check_group(&bytes).unwrap();
            let matters = |at: usize| {
                at < headers(records.len())
                    || records.iter().any(|r| (r.at..r.at + u64::from(r.bytes)).contains(&(at as u64)))
            };
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(check_group(&bytes).is_err(), matters(at));
        }

        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..9000), seed in any::<bool>()) {
            if seed && bytes.len() > 200 {
                bytes[..8].copy_from_slice(&FILE_MAGIC.to_le_bytes());
            } else if bytes.len() > 200 {
                bytes[..4].copy_from_slice(&GROUP_MAGIC.to_le_bytes());
            }
            let _ = (Identity::parse(&bytes), check_group(&bytes));
        }
    }

    /// Puts `bytes` at `at` into the first block of a file, with a checksum that matches.
    fn forged(at: usize, bytes: &[u8]) -> Result<(Identity, u64), FormatError> {
        let mut block = identity().encode(12);
        block[at..at + bytes.len()].copy_from_slice(bytes);
        let checksum = offset_of!(FileHeader, checksum);
        let crc = crc32c(&block[..checksum]);
        block[checksum..size_of::<FileHeader>()].copy_from_slice(&crc.to_le_bytes());
        Identity::parse(&block)
    }

    #[test]
    fn fields_of_a_file_that_no_writer_makes_are_named() {
        let refused = |field, value| Err(FormatError::Field { field, value });
        assert_eq!(forged(offset_of!(FileHeader, reserved), &[1]), refused("reserved", 1));
        assert_eq!(forged(offset_of!(FileHeader, name) + 63, b"x"), refused("padding of the name", b'x'.into()));
        assert_eq!(forged(offset_of!(FileHeader, ack_level), &[3]), refused("ack_level", 3));
        assert_eq!(forged(offset_of!(FileHeader, replication_factor), &[0]), refused("replication_factor", 0));
        assert_eq!(forged(offset_of!(FileHeader, replication_factor), &[33]), refused("replication_factor", 33));
        assert_eq!(forged(offset_of!(FileHeader, reserved), &[0]), Ok((identity(), 12)));
    }

    #[test]
    fn fields_of_a_group_that_no_writer_makes_are_named() {
        for at in [offset_of!(GroupHeader, reserved), headers(1) + offset_of!(Record, reserved)] {
            let mut bytes = group(&[64, 64]);
            bytes[at] = 7;
            let crc = crc32c(&bytes[COVERED..headers(2)]);
            bytes[offset_of!(GroupHeader, checksum)..COVERED].copy_from_slice(&crc.to_le_bytes());
            assert_eq!(check_group(&bytes).map(drop), Err(FormatError::Field { field: "reserved", value: 7 }));
        }
    }

    #[test]
    fn a_file_names_what_it_belongs_to() {
        let block = identity().encode(12);
        assert_eq!(Identity::parse(&block), Ok((identity(), 12)));
        let version = offset_of!(FileHeader, version);
        assert_eq!(forged(version, &[99]), Err(FormatError::Version { found: 99 }));
        for at in [version, 100] {
            let mut damaged = block.clone();
            damaged[at] ^= 1;
            assert!(matches!(Identity::parse(&damaged), Err(FormatError::Checksum { .. })));
        }
        assert!(matches!(Identity::parse(&[0; 8]), Err(FormatError::Short { .. })));
    }
}
