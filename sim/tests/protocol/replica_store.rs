//! Replica files on disks that fail, fill up, lose power and damage what they hold.

use bytemuck::Zeroable;
use embarcadero_broker::replica::format::{BLOCK, Group, Identity, Indexed, group_bytes, peek_group, write_group};
use embarcadero_broker::replica::medium::Medium;
use embarcadero_broker::replica::restore::Plan;
use embarcadero_broker::replica::store::{Damage, StoreError, StoreOptions, StreamLog, read_batch, scan};
use embarcadero_cxl::layout::IndexEntry;
use embarcadero_cxl::replication::Completion;
use embarcadero_cxl::topic_table::TopicConfig;
use embarcadero_cxl::{Native, Region};
use embarcadero_os::Buffer;
use embarcadero_sim::testbed::topic;
use embarcadero_sim::{Fault, SimulatedMedium};
use embarcadero_wire::{BrokerId, Incarnation, Order, Stream, TopicId, crc32c};
use proptest::prelude::*;

const SOURCES: [BrokerId; 2] = [BrokerId(0), BrokerId(1)];
const OPTIONS: StoreOptions = StoreOptions { file_bytes: 40_000, retention_bytes: 0 };

fn identity() -> Identity {
    let topic =
        TopicConfig { ack_level: 2, replication_factor: 2, ..topic((TopicId(1), Incarnation(2)), Order::Strong) };
    Identity { region: [1; 16], topic, stream: Stream::GLOBAL }
}

fn open(medium: &SimulatedMedium) -> (StreamLog, Vec<Damage>) {
    StreamLog::open(Box::new(medium.clone()), identity(), 2, OPTIONS).unwrap()
}

/// Appends a group of one batch of source 0 at `position`. Its bytes are that number.
fn append(log: &mut StreamLog, position: u64, bytes: u32) -> Result<(), StoreError> {
    let entry = IndexEntry {
        bytes,
        first_offset: position,
        message_count: 1,
        ordered_us: 1000 + position / 2,
        ..IndexEntry::zeroed()
    };
    let batches: [Indexed; 1] = [(position, entry)];
    let mut group = Buffer::zeroed(group_bytes(&batches) as usize).unwrap();
    let positions = position..position + 1;
    let parts = Group { positions, sources: 1, completion: Completion::default(), batches: &batches };
    write_group(&mut group, &parts, |_, into| into.fill(position as u8));
    log.append(&peek_group(&group).unwrap(), &group)
}

fn positions(medium: &SimulatedMedium) -> Vec<u64> {
    let mut bytes = Vec::new();
    let found = scan(medium).unwrap().batches(medium).unwrap();
    for batch in &found {
        read_batch(medium, batch, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == batch.record.position as u8));
    }
    found.iter().map(|batch| batch.record.position).collect()
}

#[test]
fn what_was_appended_is_there_again_and_gaps_are_known() {
    let medium = SimulatedMedium::default();
    let (mut log, damage) = open(&medium);
    assert_eq!(damage, []);
    for position in [0, 1, 2, 5, 6] {
        append(&mut log, position, 9000).unwrap();
    }
    log.cover(1, 9..12);
    assert_eq!((log.missing(SOURCES[0], 0), log.missing_until(SOURCES[0], 3), log.missing(SOURCES[0], 5)), (3, 5, 7));
    assert_eq!(
        (log.missing(SOURCES[0], 9), log.missing_until(SOURCES[0], 12), log.missing(SOURCES[1], 0)),
        (12, u64::MAX, 0)
    );
    drop(log);
    let (mut log, damage) = open(&medium);
    assert_eq!((damage, positions(&medium)), (vec![], vec![0, 1, 2, 5, 6]));
    // What is known to be empty is not written down.
    assert_eq!((log.missing(SOURCES[0], 5), log.missing(SOURCES[0], 9)), (7, 9));
    assert!(medium.list().unwrap().len() > 1);
    log.destroy().unwrap();
    assert_eq!(medium.list().unwrap(), Vec::<String>::new());
}

#[test]
fn what_is_durable_is_read_beside_the_writer() {
    let medium = SimulatedMedium::default();
    let (mut log, _) = open(&medium);
    let readable = log.readable();
    // Of each position the offset is the same, and there are gaps that are filled later.
    for position in [0, 1, 4, 5, 2, 9] {
        append(&mut log, position, 5000).unwrap();
    }
    let read = |from, bytes| -> Vec<u64> {
        readable.read(from, bytes).unwrap().iter().map(|batch| batch.first_offset).collect()
    };
    assert_eq!((read(0, 1), read(1, 1 << 20)), (vec![0], vec![1, 2]));
    assert_eq!((read(3, 1 << 20), read(6, 1 << 20), read(10, 1)), (vec![4], vec![9], vec![]));
    assert!(readable.read(5, 1).unwrap()[0].bytes.iter().all(|byte| *byte == 5));
    let since = |us| readable.first_since(us).unwrap();
    assert_eq!([0, 1000, 1001, 1002, 1003, 1004].map(since), [0, 0, 2, 4, 9, 9].map(Some));
    // A new process finds the same.
    drop(log);
    assert_eq!(open(&medium).0.readable().read(2, 1).unwrap(), readable.read(2, 1).unwrap());
    medium.damage("0000000000.replica", |bytes| bytes[BLOCK + 200] ^= 1);
    assert!(matches!(readable.read(0, 1), Err(StoreError::Damaged { .. })));
}

#[test]
fn old_files_go_when_there_is_too_much() {
    let medium = SimulatedMedium::default();
    let options = StoreOptions { retention_bytes: 100_000, ..OPTIONS };
    let (mut log, _) = StreamLog::open(Box::new(medium.clone()), identity(), 2, options).unwrap();
    for position in 0..40 {
        append(&mut log, position, 9000).unwrap();
    }
    let kept = positions(&medium);
    assert!(kept[0] > 20 && kept.ends_with(&[38, 39]), "{kept:?}");
}

#[test]
fn another_topics_files_are_refused() {
    let medium = SimulatedMedium::default();
    append(&mut open(&medium).0, 0, 100).unwrap();
    let mut other = identity();
    other.topic.incarnation = Incarnation(3);
    let refused = StreamLog::open(Box::new(medium), other, 2, OPTIONS);
    assert!(matches!(refused, Err(StoreError::Foreign { .. })));
}

#[test]
fn a_directory_of_which_no_header_is_whole_is_a_loss() {
    let medium = SimulatedMedium::default();
    let (mut log, _) = open(&medium);
    append(&mut log, 0, 5000).unwrap();
    drop(log);
    let whole = SimulatedMedium::default();
    let other = Identity { stream: Stream::of(BrokerId(1)), ..identity() };
    let (mut log, _) = StreamLog::open(Box::new(whole.clone()), other, 2, OPTIONS).unwrap();
    append(&mut log, 0, 5000).unwrap();
    let plan =
        || Plan::read(vec![Box::new(medium.clone()), Box::new(whole.clone())], None::<&Region<Native>>, None).unwrap();
    assert_eq!(plan().losses(), None);
    medium.damage("0000000000.replica", |bytes| bytes[20] ^= 1);
    let losses = plan().losses();
    assert!(losses.as_ref().is_some_and(|losses| losses.contains("no whole file header")), "{losses:?}");
}

#[test]
fn a_first_group_that_was_not_durable_is_no_loss() {
    // The power fails while the first group is on its way. Of the blocks of the file, one after the other is lost.
    let whole = SimulatedMedium::default();
    append(&mut open(&whole).0, 0, 5000).unwrap();
    for lost in 0..20 {
        let medium = SimulatedMedium::default();
        let (mut log, _) = open(&medium);
        medium.set_fault(Fault::Sync);
        assert!(append(&mut log, 0, 5000).is_err());
        let mut block = 0;
        medium.lose_power(|| {
            block += 1;
            block != lost + 1
        });
        medium.set_fault(Fault::None);
        let media: Vec<Box<dyn Medium>> = vec![Box::new(medium), Box::new(whole.clone())];
        let plan = Plan::read(media, None::<&Region<Native>>, None).unwrap();
        assert_eq!(plan.losses(), None, "block {lost}");
    }
}

#[test]
fn files_of_another_version_are_refused() {
    let medium = SimulatedMedium::default();
    append(&mut open(&medium).0, 0, 5000).unwrap();
    // The version is the word at 8. The checksum, at 148, is of all bytes before it.
    medium.damage("0000000000.replica", |bytes| {
        bytes[8] = 2;
        let checksum = crc32c(&bytes[..148]);
        bytes[148..152].copy_from_slice(&checksum.to_le_bytes());
    });
    let refused = scan(&medium).map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("has version 2, this build reads version 1"), "{refused}");
}

#[test]
fn files_of_several_streams_in_one_directory_are_refused() {
    let medium = SimulatedMedium::default();
    let (mut log, _) = open(&medium);
    for position in 0..9 {
        append(&mut log, position, 9000).unwrap();
    }
    drop(log);
    let other = Identity { stream: Stream::of(BrokerId(1)), ..identity() }.encode(1);
    medium.damage("0000000001.replica", |bytes| bytes[..other.len()].copy_from_slice(&other));
    assert!(matches!(scan(&medium), Err(StoreError::Foreign { file, .. }) if file == "0000000001.replica"));
}

#[test]
fn after_a_disk_error_nothing_is_taken_and_nothing_is_claimed() {
    for fault in [Fault::Full, Fault::Write, Fault::Sync] {
        let medium = SimulatedMedium::default();
        let (mut log, _) = open(&medium);
        append(&mut log, 0, 100).unwrap();
        medium.set_fault(fault);
        assert!(matches!(append(&mut log, 1, 100), Err(StoreError::Io { .. })), "{fault:?}");
        assert_eq!(log.missing(SOURCES[0], 0), 1);
        medium.set_fault(Fault::None);
        assert!(matches!(append(&mut log, 1, 100), Err(StoreError::Failed { .. })), "{fault:?}");
    }
}

#[test]
fn damage_in_the_middle_is_reported_with_its_positions_and_the_rest_stays() {
    let medium = SimulatedMedium::default();
    let (mut log, _) = open(&medium);
    (0..4).for_each(|position| append(&mut log, position, 5000).unwrap());
    // Headers and batch of the group of position 1: two blocks, after the file's header and the first group.
    for damaged in [3 * BLOCK, 3 * BLOCK + 5000] {
        medium.damage("0000000000.replica", |bytes| bytes[damaged] ^= 1);
        let (log, damage) = open(&medium);
        assert_eq!(damage.len(), 1);
        assert_eq!(damage[0].positions, 1..2, "{}", damage[0]);
        assert_eq!((log.missing(SOURCES[0], 0), log.missing(SOURCES[0], 2), positions(&medium)), (1, 4, vec![0, 2, 3]));
        medium.damage("0000000000.replica", |bytes| bytes[damaged] ^= 1);
    }
    assert_eq!(positions(&medium), [0, 1, 2, 3]);
}

proptest! {
    /// All that was promised is there and nothing else, whatever the disk keeps of unsynced writes.
    #[test]
    fn a_power_failure_costs_only_what_was_not_promised(
        promised in 0u64..12, unsynced in 0u64..2, power: bool, kept in prop::collection::vec(any::<bool>(), 0..64),
    ) {
        let medium = SimulatedMedium::default();
        let (mut log, _) = open(&medium);
        for position in 0..promised {
            append(&mut log, position, 7000).unwrap();
        }
        medium.set_fault(Fault::Sync);
        for position in promised..promised + unsynced {
            prop_assert!(append(&mut log, position, 7000).is_err());
        }
        medium.set_fault(Fault::None);
        let mut kept = kept.into_iter();
        if power {
            medium.lose_power(|| kept.next().unwrap_or(false));
        }
        let (mut log, _) = open(&medium);
        // What it claims from now on survives the next failure.
        medium.lose_power(|| false);
        let found = positions(&medium);
        prop_assert!(found.len() as u64 >= promised && found.len() as u64 <= promised + unsynced);
        prop_assert_eq!(found, (0..log.missing(SOURCES[0], 0)).collect::<Vec<_>>());
        // It goes on where it stopped, and reads as one.
        let next = log.missing(SOURCES[0], 0);
        append(&mut log, next, 3000).unwrap();
        prop_assert_eq!(positions(&medium), (0..=next).collect::<Vec<_>>());
    }
}
