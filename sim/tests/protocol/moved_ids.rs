//! Broker ids that move to another host, and what the caches of both hosts still have of the id's lines.

use super::full_fences::geometry;
use bytemuck::Zeroable;
use crossbeam_channel::bounded;
use embarcadero_broker::blog::{Blog, BlogId};
use embarcadero_broker::delegation::{Delegation, FlushGroup};
use embarcadero_broker::topics::TopicTable;
use embarcadero_cxl::batchlog::{BatchlogReader, BatchlogWriter, Written};
use embarcadero_cxl::layout::{
    AllocatorKind, BatchEntry, CommitRecord, Geometry, IndexEntry, Layout, LeaderArea, OwnerLine, TopicState,
};
use embarcadero_cxl::leadership::{activate_term, claim_term};
use embarcadero_cxl::order_index::{IndexOptions, OrderIndexWriter, StreamId};
use embarcadero_cxl::owner::{SegmentUse, publish_owner, read_owner};
use embarcadero_cxl::segment::{PartitionAllocator, SegmentAllocator};
use embarcadero_cxl::session_table::{Commit, SessionCommit, publish_commits, read_commit_at};
use embarcadero_cxl::takeover::copy_predecessor;
use embarcadero_cxl::topic_table::{TopicConfig, publish_topic};
use embarcadero_cxl::{Fabric, Guard, Region, RegionOffset, Row, Site, Versioned, refresh_own_lines};
use embarcadero_sim::testbed::topic;
use embarcadero_sim::{Mutation, Simulated, Turbulence, World};
use embarcadero_wire::{BrokerId, Incarnation, Order, SessionSlot, Stream, Term, TopicId};
use std::sync::Arc;
use uuid::Uuid;

const TOPIC: TopicId = TopicId(0);
const FIRST: Incarnation = Incarnation(1);
const BROKER: BrokerId = BrokerId(0);
const AREA: LeaderArea = LeaderArea(BROKER);
const SLOT: SessionSlot = SessionSlot(0);

/// Makes a region as three hosts see it whose caches do only what the code asks for.
fn hosts(geometry: &Geometry, removed: Option<Mutation>) -> [Region<Simulated>; 3] {
    let world = World::new(Layout::new(geometry).region_bytes, 1, Turbulence::CALM, removed);
    let first = Region::format(Simulated::join(&world, || {}), geometry, Uuid::nil(), 0).unwrap();
    let other = || Region::open(Simulated::join(&world, || {})).unwrap();
    [first, other(), other()]
}

/// Returns a further process of the host of `region`.
fn beside(region: &Region<Simulated>) -> Region<Simulated> {
    Region::open(region.fabric().beside(|| {})).unwrap()
}

/// Does what `embarcadero region flush` does on a host. What a host's cache has is written back in the end in any case.
fn flush_host(region: &Region<Simulated>) {
    let process = beside(region);
    process.fabric().invalidate(RegionOffset(0), process.fabric().bytes(), Site::PayloadFlush);
}

fn commit(region: &Region<Simulated>, sequence: u64) {
    let record = CommitRecord { tag: sequence + 1, ..CommitRecord::zeroed() };
    publish_commits(region, AREA, &[SessionCommit { slot: SLOT, record, expected: sequence + 1 }]);
    region.fabric().fence(Site::RecordFlush);
}

/// A host that has a line of a leader's area in its cache becomes that leader's. Then the leader writes another part of
/// the line there. Returns whether what it wrote into the line on its old host is still there. The leader may
/// have led on after the new process `started` and read the line.
fn a_part_of_a_line_is_written(started: bool, removed: Option<Mutation>) -> bool {
    let [old, new, far] = hosts(&geometry(), removed);
    claim_term(&old, AREA, Term(1));
    activate_term(&old, AREA, Term(1));
    if started {
        refresh_own_lines(&new, BROKER);
    }
    assert_eq!(read_commit_at(&new, AREA, SLOT, 0), Ok(Commit::Unknown));
    commit(&old, 0);
    if started {
        claim_term(&new, AREA, Term(2));
        copy_predecessor(&new, AREA);
    } else {
        refresh_own_lines(&new, BROKER);
    }
    commit(&new, 1);
    [0, 1].iter().all(|sequence| matches!(read_commit_at(&far, AREA, SLOT, *sequence), Ok(Commit::At(_))))
}

#[test]
fn a_new_host_writes_over_nothing_that_the_old_one_wrote() {
    for started in [false, true] {
        assert!(a_part_of_a_line_is_written(started, None));
        assert!(!a_part_of_a_line_is_written(started, Some(Mutation::Guard(Guard::FreshOwnLines))));
    }
}

/// The new host has read ahead in a segment which the id's own order was still filling.
#[test]
fn a_new_host_reads_the_entries_that_the_old_one_wrote() {
    let [old, new, _] = hosts(&geometry(), None);
    let open = |region: &Region<Simulated>| {
        let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BROKER));
        let id = StreamId { topic: TOPIC, stream: Stream::of(BROKER) };
        let options = IndexOptions { id, incarnation: FIRST, writer: AREA, term: Term::NONE };
        OrderIndexWriter::open(region.clone(), options, pool)
    };
    let mut index = open(&old).unwrap();
    index.make_room().unwrap();
    let taken = |segment: &u32| matches!(read_owner(&new, *segment), Row::Used(SegmentUse::Index { .. }));
    let segment = (0..4).find(taken).unwrap();
    new.fabric().load(new.layout().segment(segment));
    index.append(IndexEntry { bytes: 1, message_count: 5, ..IndexEntry::zeroed() });
    index.write_back_entries();
    index.publish_tail(Term::NONE);
    index.fence();
    refresh_own_lines(&new, BROKER);
    assert_eq!(open(&new).map(|index| index.next_offset()), Ok(5));
}

/// A segment goes from one host to another, which knows its owner entry from before.
#[test]
fn the_version_of_an_owner_entry_goes_on_on_another_host() {
    let [old, new, far] = hosts(&geometry(), None);
    let version = || far.fabric().observe(far.layout().owner(0).add(OwnerLine::VERSION_AT), Site::OwnerRead);
    assert_eq!(read_owner(&new, 0), Row::Unused);
    let owner = |broker| SegmentUse::Blog { topic: TOPIC, incarnation: FIRST, broker, ordinal: 0 };
    publish_owner(&old, 0, owner(BrokerId(0)));
    publish_owner(&old, 0, SegmentUse::Free);
    let before = version();
    publish_owner(&new, 0, owner(BrokerId(1)));
    assert!(version() > before, "a reader takes it for what it knew");
}

/// A broker is killed with an entry in its host's cache, and goes on under its id on another host. Returns whether the
/// entry that it writes there stays.
fn the_id_of_a_killed_broker_moves(is_flushed: bool) -> bool {
    let [old, new, far] = hosts(&geometry(), None);
    let write = |region: &Region<Simulated>, sequence| {
        let mut log = BatchlogWriter::new(region.clone(), TOPIC, BROKER);
        assert!(log.has_room().unwrap());
        log.append(BatchEntry { sequence, ..BatchEntry::zeroed() });
        log
    };
    let unpublished = write(&old, 7);
    old.fabric().kill();
    drop(unpublished);
    if is_flushed {
        flush_host(&old);
    }
    refresh_own_lines(&new, BROKER);
    write(&new, 8).publish(Written::default());
    flush_host(&old);
    let mut log = BatchlogReader::new(far, TOPIC, BROKER, 0);
    assert_eq!(log.available(1), Ok(1));
    log.take().unwrap().sequence == 8
}

/// The command is needed, and is enough.
#[test]
fn the_old_host_of_a_killed_broker_is_flushed_before_its_id_moves() {
    assert!(the_id_of_a_killed_broker_moves(true));
    assert!(!the_id_of_a_killed_broker_moves(false));
}

/// A broker is killed in the middle of a batch and starts again on its host. Another host gets the segment next. What was
/// left is written over none of its batches, whether the topic is still there or was deleted meanwhile.
#[test]
fn what_a_killed_broker_left_is_not_written_over_another_hosts() {
    for state in [TopicState::Live, TopicState::Free] {
        let geometry = Geometry { segment_count: 2, allocator: AllocatorKind::Leader, ..geometry() };
        let [near, far, leader] = hosts(&geometry, None);
        let pool: Arc<dyn SegmentAllocator> = Arc::new(PartitionAllocator::of_leader(leader.clone()));
        let show = |state| {
            publish_topic(&leader, AREA, &TopicConfig { state, ..topic((TOPIC, FIRST), Order::Strong) });
        };
        claim_term(&leader, AREA, Term(1));
        show(TopicState::Live);
        activate_term(&leader, AREA, Term(1));
        let blog = |region: &Region<Simulated>, broker| {
            Blog::new(region.clone(), BlogId { topic: TOPIC, incarnation: FIRST, broker }, 0, Arc::clone(&pool))
        };
        let at = blog(&near, BROKER).reserve(256).unwrap();
        near.fabric().write_bytes(at, &[1; 256]);
        near.fabric().kill();

        let again = beside(&near);
        refresh_own_lines(&again, BROKER);
        if state == TopicState::Live {
            let own = blog(&again, BROKER);
            own.retired().iter().for_each(|retired| own.release(retired.segment));
        } else {
            show(state);
            let topics = Arc::new(TopicTable::new(again.clone(), BROKER, Arc::clone(&pool)));
            let ((_, queue), (acks, _)) = (bounded(1), bounded(1));
            Delegation::new(topics, queue, vec![acks], FlushGroup::default()).maintain(0);
        }
        let other = blog(&far, BrokerId(1));
        assert_eq!(other.reserve(256).unwrap(), at, "the segment came back");
        far.fabric().write_bytes(at, &[2; 256]);
        far.fabric().flush(at, 256, Site::PayloadFlush);
        far.fabric().fence(Site::PayloadFlush);
        flush_host(&near);
        let mut found = [0; 256];
        leader.fabric().read_bytes(at, &mut found);
        assert_eq!(found, [2; 256]);
    }
}
