//! The Batchlog between a broker and the sequencer on another host.

use super::full_fences::{holds, hosts};
use bytemuck::Zeroable;
use embarcadero_cxl::batchlog::{BatchlogReader, BatchlogWriter, Written};
use embarcadero_cxl::layout::{AllocatorKind, BatchEntry, Geometry, Layout, LeaderArea, RegionRole, SequencerHalf};
use embarcadero_cxl::leadership::{activate_term, claim_term};
use embarcadero_cxl::{Fabric, Region, Site};
use embarcadero_sim::{Mutation, Simulated, Turbulence, World};
use embarcadero_wire::{BrokerId, Term, TopicId};
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;

const TOPIC: TopicId = TopicId(0);
const BROKER: BrokerId = BrokerId(0);

#[test]
fn entries_arrive_once_in_order_and_a_full_ring_waits() {
    let geometry = Geometry {
        max_brokers: 1,
        max_leaders: 1,
        max_topics: 1,
        max_sessions: 1,
        batchlog_slots: 16,
        segment_bytes: 1 << 20,
        segment_count: 1,
        allocator: AllocatorKind::Partitioned,
        role: RegionRole::Single,
    };
    let world = World::new(Layout::new(&geometry).region_bytes, 1, Turbulence::ROUGH, None);
    let fabric = Simulated::join(&world, || {});
    let broker = Region::format(fabric.clone(), &geometry, Uuid::nil(), 0).unwrap();
    let sequencer = Region::open(Simulated::join(&world, || {})).unwrap();
    let mut writer = BatchlogWriter::new(broker, TOPIC, BROKER);
    let mut reader = BatchlogReader::new(sequencer.clone(), TOPIC, BROKER, 0);
    claim_term(&sequencer, LeaderArea(BROKER), Term(1));
    activate_term(&sequencer, LeaderArea(BROKER), Term(1));
    let half = sequencer.layout().sequencer_half(LeaderArea(BROKER), TOPIC, BROKER);
    let consumed_at = half.add(offset_of!(SequencerHalf, consumed_through) as u64);
    let mut next = 0;
    for round in 0..100u64 {
        while writer.has_room().unwrap() && writer.unpublished() < round % 23 {
            writer.append(BatchEntry { sequence: writer.head(), ..BatchEntry::zeroed() });
        }
        writer.publish(Written::default());
        for _ in 0..reader.available(round % 7 + 1).unwrap() {
            assert_eq!(reader.take().unwrap().sequence, next);
            next += 1;
        }
        assert!(writer.head() - next <= 16);
        sequencer.fabric().store(consumed_at, next);
        sequencer.fabric().flush(consumed_at, 8, Site::ConsumedFlush);
        sequencer.fabric().fence(Site::ConsumedFlush);
    }
    assert!(next > 100);
    assert_eq!(BatchlogWriter::new(Region::open(fabric).unwrap(), TOPIC, BROKER).head(), writer.head());
}

/// A broker publishes entries one by one, while the sequencer takes them. It finds each complete.
fn publish_and_take(removed: Option<Mutation>) -> bool {
    const ENTRIES: u64 = 12;
    let (world, [broker, sequencer, _]) = hosts(removed);
    claim_term(&sequencer, LeaderArea(BROKER), Term(1));
    activate_term(&sequencer, LeaderArea(BROKER), Term(1));
    let mut writer = BatchlogWriter::new(broker, TOPIC, BROKER);
    let mut reader = BatchlogReader::new(sequencer, TOPIC, BROKER, 0);
    world.lock().unwrap().set_turbulence(Turbulence::ROUGH);
    let writing = shuttle::thread::spawn(move || {
        for sequence in 0..ENTRIES {
            writer.append(BatchEntry { sequence, ..BatchEntry::zeroed() });
            writer.publish(Written::default());
        }
    });
    let complete = Arc::new(AtomicBool::new(true));
    let found = Arc::clone(&complete);
    let reading = shuttle::thread::spawn(move || {
        let mut next = 0;
        while next < ENTRIES && found.load(Ordering::SeqCst) {
            for _ in 0..reader.available(ENTRIES).unwrap() {
                found.fetch_and(reader.take().is_ok_and(|entry| entry.sequence == next), Ordering::SeqCst);
                next += 1;
            }
            shuttle::thread::yield_now();
        }
    });
    writing.join().unwrap();
    reading.join().unwrap();
    complete.load(Ordering::SeqCst)
}

#[test]
fn an_entry_is_complete_before_the_head_covers_it() {
    assert!(holds(publish_and_take, 1, 200, None));
}

/// Other schedules come to this moment too rarely.
#[test]
fn the_fence_before_the_head_is_needed() {
    assert!(!holds(publish_and_take, 1, 2000, Some(Mutation::Site(Site::BatchEntryFence))));
}
