//! Readers on the writer's own host. What they find in the cache that both share may not be in memory yet, and they act on
//! nothing that is not.
//!
//! Each case has a writer that shows something new, and a reader beside it. The writer begins before one of the reader's
//! operations, and stops for good before one of its own. All such moments are tried. Whatever the reader acts on, another
//! host must find in memory.

use super::full_fences::geometry;
use bytemuck::Zeroable;
use embarcadero_cxl::batchlog::{BatchlogReader, BatchlogWriter, Written};
use embarcadero_cxl::layout::{BatchEntry, IndexEntry, Layout, LeaderArea, TopicState};
use embarcadero_cxl::leadership::{activate_term, claim_term, with_leader};
use embarcadero_cxl::order_index::{
    IndexOptions, OrderIndexReader, OrderIndexWriter, StreamId, read_directory, read_extent, read_extent_at,
};
use embarcadero_cxl::segment::PartitionAllocator;
use embarcadero_cxl::sequencer_half::{ConsumedWriter, read_consumed_at};
use embarcadero_cxl::topic_table::{TopicConfig, publish_topic, read_topic, read_topic_at};
use embarcadero_cxl::{Fabric, Guard, Region, Row, Site};
use embarcadero_sim::testbed::topic;
use embarcadero_sim::{Mutation, Simulated, Turbulence, World};
use embarcadero_wire::{BrokerId, Incarnation, Order, Stream, Term, TopicId};
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;
use uuid::Uuid;

const TOPIC: TopicId = TopicId(0);
const BROKER: BrokerId = BrokerId(0);
const AREA: LeaderArea = LeaderArea(BROKER);
const TERM: Term = Term(1);
const GLOBAL: StreamId = StreamId { topic: TOPIC, stream: Stream::GLOBAL };
const OWN: StreamId = StreamId { topic: TOPIC, stream: Stream::of(BROKER) };
/// Slots of a Batchlog.
const SLOTS: u64 = 16;
/// Fences that are not full let all later loads pass.
const DELAYED: Turbulence = Turbulence { delay: 1.0, ..Turbulence::CALM };

/// Something that happens once.
type Event = Box<dyn FnOnce()>;

thread_local! {
    /// Operations of the reader until the writer shows something new, and what shows it.
    static SHOW: RefCell<Option<(u32, Event)>> = const { RefCell::new(None) };
    /// Operations of the writer until it stops; `None` for never.
    static LIFE: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Panic payload of a writer that stops.
struct Stopped;

/// Lets the writer run before one of the reader's operations.
fn intrude() {
    let due = SHOW.with_borrow_mut(|show| match show {
        Some((0, _)) => show.take(),
        Some((left, _)) => {
            *left -= 1;
            None
        }
        None => None,
    });
    if let Some((_, show)) = due {
        show();
    }
}

/// Stops the writer before one of its operations.
fn expire() {
    match LIFE.get() {
        Some(0) => resume_unwind(Box::new(Stopped)),
        Some(left) => LIFE.set(Some(left - 1)),
        None => {}
    }
}

/// Case of something that a writer shows.
struct Case {
    /// Site of the full fence behind the reader's flush. `None` where the reader looks at the line twice, so that an ordinary
    /// fence is enough.
    site: Option<Site>,
    /// Makes what shows it, on the writer's host.
    writer: fn(&Region<Simulated>) -> Box<dyn FnOnce()>,
    /// Makes a reader on the writer's host. It returns 1 once it acts on what was shown, else 0.
    reader: fn(&Region<Simulated>) -> Box<dyn FnOnce() -> u64>,
    /// Reads the same on another host.
    seen_elsewhere: fn(&Region<Simulated>) -> u64,
}

fn index(region: &Region<Simulated>, id: StreamId) -> OrderIndexWriter<Simulated> {
    let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BROKER));
    let options = IndexOptions { id, incarnation: Incarnation(1), writer: AREA, term: TERM };
    OrderIndexWriter::open(region.clone(), options, pool).unwrap()
}

fn append(index: &mut OrderIndexWriter<Simulated>) {
    index.make_room().unwrap();
    index.append(IndexEntry { bytes: 1, message_count: 1, ..IndexEntry::zeroed() });
    index.write_back_entries();
}

fn publish(index: &mut OrderIndexWriter<Simulated>) {
    index.publish_tail(TERM);
    index.fence();
}

/// The writer appends an entry to a stream.
fn appends(region: &Region<Simulated>, id: StreamId) -> Box<dyn FnOnce()> {
    let mut index = index(region, id);
    append(&mut index);
    Box::new(move || publish(&mut index))
}

fn polls(region: &Region<Simulated>, id: StreamId) -> Box<dyn FnOnce() -> u64> {
    let mut reader = OrderIndexReader::new(region.clone(), id);
    Box::new(move || reader.poll())
}

/// The leader takes an entry of a Batchlog, and decides it.
fn decides(region: &Region<Simulated>) -> Box<dyn FnOnce()> {
    let mut half = ConsumedWriter::recover(region.clone(), AREA, TOPIC, BROKER);
    let region = region.clone();
    half.consumed.consumed_through = 1;
    half.consumed.decided_through = 1;
    Box::new(move || {
        half.store();
        region.fabric().fence(Site::ConsumedFlush);
    })
}

fn shown_topic(region: &Region<Simulated>, state: TopicState) {
    publish_topic(region, AREA, &TopicConfig { state, ..topic((TOPIC, Incarnation(1)), Order::Strong) });
}

fn is_deleted(row: &Row<TopicConfig>) -> u64 {
    u64::from(matches!(row, Row::Used(config) if config.state == TopicState::Deleting))
}

const CASES: [Case; 8] = [
    Case {
        site: Some(Site::TailFlush),
        writer: |region| appends(region, GLOBAL),
        reader: |region| polls(region, GLOBAL),
        seen_elsewhere: |region| read_extent_at(region, AREA, GLOBAL).committed,
    },
    Case {
        site: Some(Site::TailFlush),
        writer: |region| appends(region, OWN),
        reader: |region| polls(region, OWN),
        seen_elsewhere: |region| read_extent_at(region, AREA, OWN).committed,
    },
    // A broker that reclaims.
    Case {
        site: Some(Site::TailFlush),
        writer: |region| {
            let mut index = index(region, GLOBAL);
            append(&mut index);
            publish(&mut index);
            Box::new(move || index.trim_below(1))
        },
        reader: |region| {
            let region = region.clone();
            Box::new(move || read_extent(&region, GLOBAL).unwrap().trimmed)
        },
        seen_elsewhere: |region| read_extent_at(region, AREA, GLOBAL).trimmed,
    },
    // The sequencer.
    Case {
        site: Some(Site::BatchlogHeadFlush),
        writer: |region| {
            let mut log = BatchlogWriter::new(region.clone(), TOPIC, BROKER);
            assert!(log.has_room().unwrap());
            log.append(BatchEntry::zeroed());
            Box::new(move || log.publish(Written::default()))
        },
        reader: |region| {
            let mut log = BatchlogReader::new(region.clone(), TOPIC, BROKER, 0);
            Box::new(move || log.available(SLOTS).unwrap())
        },
        seen_elsewhere: |region| BatchlogWriter::new(region.clone(), TOPIC, BROKER).head(),
    },
    // A broker whose Batchlog is full.
    Case {
        site: Some(Site::ConsumedFlush),
        writer: decides,
        reader: |region| {
            let mut log = BatchlogWriter::new(region.clone(), TOPIC, BROKER);
            for _ in 0..SLOTS {
                assert!(log.has_room().unwrap());
                log.append(BatchEntry::zeroed());
            }
            Box::new(move || u64::from(log.has_room().unwrap()))
        },
        seen_elsewhere: |region| read_consumed_at(region, AREA, TOPIC, BROKER).consumed_through,
    },
    Case {
        site: Some(Site::ConsumedFlush),
        writer: decides,
        reader: |region| {
            let region = region.clone();
            Box::new(move || {
                let read = |area| read_consumed_at(&region, area, TOPIC, BROKER).decided_through;
                with_leader(&region, read).unwrap()
            })
        },
        seen_elsewhere: |region| read_consumed_at(region, AREA, TOPIC, BROKER).decided_through,
    },
    // A broker that gives back the segment which this one replaces.
    Case {
        site: Some(Site::DirectoryFlush),
        writer: |region| {
            let mut index = index(region, GLOBAL);
            Box::new(move || index.make_room().unwrap())
        },
        reader: |region| {
            let region = region.clone();
            Box::new(move || {
                let found = with_leader(&region, |area| read_directory(&region, GLOBAL, area, 0));
                u64::from(found.unwrap().unwrap().is_some())
            })
        },
        seen_elsewhere: |region| u64::from(read_directory(region, GLOBAL, AREA, 0).unwrap().is_some()),
    },
    // A broker that gives back what it holds of the topic.
    Case {
        site: None,
        writer: |region| {
            shown_topic(region, TopicState::Live);
            let region = region.clone();
            Box::new(move || shown_topic(&region, TopicState::Deleting))
        },
        reader: |region| {
            let region = region.clone();
            Box::new(move || is_deleted(&read_topic(&region, TOPIC).unwrap()))
        },
        seen_elsewhere: |region| is_deleted(&read_topic_at(region, AREA, TOPIC)),
    },
];

/// Outcome of one moment.
struct Outcome {
    held: bool,
    /// The writer ran.
    shown: bool,
    /// The writer came to its end.
    finished: bool,
}

/// Runs a case. The writer begins before operation `begins` of the reader, and stops before its own operation `stops`.
fn run(case: &Case, removed: Option<Mutation>, begins: u32, stops: u32) -> Outcome {
    let geometry = geometry();
    let world = World::new(Layout::new(&geometry).region_bytes, 1, Turbulence::CALM, removed);
    let near = Region::format(Simulated::join(&world, expire), &geometry, Uuid::nil(), 0).unwrap();
    let beside = Region::open(near.fabric().beside(intrude)).unwrap();
    let far = Region::open(Simulated::join(&world, || {})).unwrap();
    claim_term(&near, AREA, TERM);
    activate_term(&near, AREA, TERM);
    let (show, act) = ((case.writer)(&near), (case.reader)(&beside));
    world.lock().unwrap().set_turbulence(DELAYED);
    let finished = Rc::new(Cell::new(false));
    let done = Rc::clone(&finished);
    let show = move || {
        LIFE.set(Some(stops));
        match catch_unwind(AssertUnwindSafe(show)) {
            Ok(()) => done.set(true),
            Err(cause) if cause.is::<Stopped>() => {}
            Err(cause) => resume_unwind(cause),
        }
        LIFE.set(None);
    };
    SHOW.set(Some((begins, Box::new(show))));
    let acted = act();
    let shown = SHOW.take().is_none();
    Outcome { held: acted <= (case.seen_elsewhere)(&far), shown, finished: finished.get() }
}

/// Returns whether what the reader acts on is in memory, at all moments.
fn holds(case: &Case, removed: Option<Mutation>) -> bool {
    for begins in 0.. {
        for stops in 0.. {
            let outcome = run(case, removed, begins, stops);
            if !outcome.held {
                return false;
            }
            if !outcome.shown {
                assert!(begins > 0, "the reader does nothing");
                return true;
            }
            if outcome.finished {
                break;
            }
        }
    }
    unreachable!("a reader comes to its end")
}

#[test]
fn readers_beside_the_writer_act_on_what_is_in_memory() {
    for (number, case) in CASES.iter().enumerate() {
        assert!(holds(case, None), "case {number}");
    }
}

#[test]
fn a_reader_beside_the_writer_waits_until_it_is_in_memory() {
    for (number, case) in CASES.iter().enumerate() {
        let guard = Some(Mutation::Guard(Guard::MemoryBeforeAct));
        for removed in guard.into_iter().chain(case.site.map(Mutation::FullFence)) {
            assert!(!holds(case, Some(removed)), "that {removed:?} is missing is not noticed in case {number}");
        }
    }
}
