//! Fuzzes the tables of a region: whatever bytes another host writes into them, opening and reading the region does not panic.
#![no_main]

use embarcadero_broker::mirror;
use embarcadero_cxl::batchlog::BatchlogReader;
use embarcadero_cxl::broker_table::{BrokerInfo, publish_broker, read_broker, read_replica_state};
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::{AllocatorKind, Geometry, LeaderArea, SessionState, TopicState};
use embarcadero_cxl::leadership::{LeaderInfo, activate_term, claim_term, publish_leader, read_leader, with_leader};
use embarcadero_cxl::order_index::{OrderIndexReader, StreamId};
use embarcadero_cxl::owner::read_owner;
use embarcadero_cxl::session_table::{Session, publish_session, read_commit, read_progress, read_session};
use embarcadero_cxl::topic_table::{TopicConfig, TopicRows, publish_topic};
use embarcadero_cxl::{Fabric, Mapping, Native, Region, RegionOffset};
use embarcadero_wire::{BrokerId, ClientId, Epoch, Incarnation, Order, SessionSlot, SessionToken, Stream, Term, TopicId};
use libfuzzer_sys::fuzz_target;
use std::cell::OnceCell;
use uuid::Uuid;

/// Region with one broker, which leads, one topic and one session; and its bytes before the segments, as written.
struct Pristine {
    memory: Native,
    tables: Vec<u8>,
}

thread_local! {
    static PRISTINE: OnceCell<Pristine> = const { OnceCell::new() };
}

fn pristine() -> Pristine {
    let tables = Geometry::with_segments_of(1 << 20, AllocatorKind::Bitmap);
    let geometry =
        Geometry { max_brokers: 2, max_leaders: 2, max_topics: 2, max_sessions: 4, batchlog_slots: 16, ..tables }
            .fit(8 << 20)
            .expect("8 MiB hold small tables and a segment");
    let mapping = Mapping::anonymous(8 << 20).expect("anonymous memory");
    let memory = Native::new(mapping, FlushMethod::None).expect("every host can leave flushes out");
    let region = Region::format(memory.clone(), &geometry, Uuid::from_u128(1), 1).expect("the geometry fits");
    let (broker, incarnation, area) = (BrokerId(0), Incarnation(1), LeaderArea(BrokerId(0)));
    let address = "10.0.0.1:7000".parse().expect("an address");
    publish_broker(
        &region,
        &BrokerInfo { id: broker, incarnation, data: address, control: address, process_id: 1, running: true, lock_node: 1 },
    );
    claim_term(&region, area, Term(1));
    publish_leader(&region, &LeaderInfo { term: Term(1), broker, incarnation, broker_mask: 1, pinning_mask: 1 });
    let config = TopicConfig {
        id: TopicId(0),
        incarnation,
        state: TopicState::Live,
        name: "t".to_owned(),
        order: Order::Strong,
        ack_level: 1,
        replication_factor: 1,
        retention_bytes: 0,
        retention_ms: 0,
        created_ms: 1,
    };
    publish_topic(&region, area, &config);
    let session = Session {
        slot: SessionSlot(0),
        client_id: ClientId(1),
        epoch: Epoch(1),
        state: SessionState::Open,
        topic: config.id,
        topic_incarnation: incarnation,
        committed: 0,
        ack_level: 1,
        first_epoch: Epoch(1),
        first_sequence: 0,
        token: SessionToken(1),
    };
    publish_session(&region, area, &session);
    activate_term(&region, area, Term(1));
    let bytes = region.layout().segment(0).0;
    let tables = memory.with_bytes(RegionOffset(0), bytes, <[u8]>::to_vec);
    Pristine { memory, tables }
}

fn read_all(region: &Region<Native>) {
    let _ = (with_leader(region, |area| TopicRows::read(region, area)), read_leader(region));
    let _ = mirror::read(region);
    let geometry = *region.geometry();
    for broker in geometry.brokers() {
        let _ = (read_broker(region, broker), read_replica_state(region, broker));
    }
    for slot in geometry.sessions() {
        let _ = (read_session(region, slot), read_progress(region, slot), read_commit(region, slot, 0));
    }
    for segment in 0..geometry.segment_count {
        let _ = read_owner(region, segment);
    }
    for topic in geometry.topics() {
        for broker in geometry.brokers() {
            let mut batchlog = BatchlogReader::new(region.clone(), topic, broker, 0);
            for _ in 0..batchlog.available(4).unwrap_or(0) {
                let _ = batchlog.take();
            }
        }
        for stream in [Stream::GLOBAL, Stream::of(BrokerId(0))] {
            let mut index = OrderIndexReader::new(region.clone(), StreamId { topic, stream });
            let committed = index.poll();
            for position in (0..committed.min(4)).chain(committed.saturating_sub(4)..committed) {
                let _ = index.read(position);
            }
        }
    }
}

// An input is a list of words with their places in the tables, and a run of bytes with its place.
fuzz_target!(|input: (Vec<(u32, u64)>, u32, Vec<u8>)| {
    PRISTINE.with(|cell| {
        let Pristine { memory, tables } = cell.get_or_init(pristine);
        let (words, at, bytes) = input;
        let mut damaged = tables.clone();
        for (at, word) in words {
            let at = at as usize % (damaged.len() / 8) * 8;
            damaged[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        let at = at as usize % damaged.len();
        let count = bytes.len().min(damaged.len() - at);
        damaged[at..at + count].copy_from_slice(&bytes[..count]);
        memory.write_bytes(RegionOffset(0), &damaged);
        if let Ok(region) = Region::open(memory.clone()) {
            read_all(&region);
        }
    });
});
