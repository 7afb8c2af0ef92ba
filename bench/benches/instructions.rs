//! Instructions of the hot functions, counted by callgrind. A change that makes one longer fails.
//!
//! `cargo bench -p embarcadero-bench --bench instructions` needs valgrind, and `gungraun-runner` of the version in
//! `Cargo.lock`. Each bound is a count that was measured, and a tenth; after a gain, lower it. Region memory is coherent
//! here; `embarcadero bench sequencer` measures the cost of write-backs.
#![allow(clippy::unwrap_used, missing_docs)] // a bench fails by panicking; the macros' functions have no docs

use embarcadero_broker::blog::{Blog, BlogId};
use embarcadero_cxl::batchlog::{BatchlogWriter, Written};
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::{AllocatorKind, BatchEntry};
use embarcadero_cxl::segment::{BitmapAllocator, SegmentAllocator};
use embarcadero_cxl::{Native, Region};
use embarcadero_sim::testbed::{TOPIC, Testbed, region};
use embarcadero_wire::batch::{BatchBuilder, BatchOrigin};
use embarcadero_wire::{BrokerId, ClientId, Epoch, FRAME_BYTES, Frame, Incarnation, SessionSlot, TopicId};
use gungraun::prelude::*;
use gungraun::{Callgrind, EventKind};
use std::hint::black_box;
use std::sync::Arc;

/// Number of repetitions in one measured call, so that the call itself does not count.
const TIMES: u64 = 1000;

/// Configuration that fails above `each` instructions, and a tenth, per repetition.
fn at_most(each: u64, times: u64) -> LibraryBenchmarkConfig {
    let limit = each * times + each * times / 10;
    let mut config = LibraryBenchmarkConfig::default();
    config.tool(Callgrind::default().hard_limits([(EventKind::Ir, limit)]));
    config
}

fn memory(allocator: AllocatorKind) -> Region<Native> {
    region(allocator, FlushMethod::None, |native| native).unwrap()
}

fn blog() -> Blog<Native> {
    let region = memory(AllocatorKind::Bitmap);
    let pool: Arc<dyn SegmentAllocator> = Arc::new(BitmapAllocator::new(region.clone()));
    let (topic, incarnation) = TOPIC;
    let blog = Blog::new(region, BlogId { topic, incarnation, broker: BrokerId(0) }, 0, pool);
    // The first takes a segment.
    blog.settle(blog.reserve(64).unwrap());
    blog
}

#[library_benchmark(config = at_most(68, TIMES))]
#[bench::batches_of_4_kib(blog())]
fn reserve(blog: Blog<Native>) -> Blog<Native> {
    for _ in 0..TIMES {
        let at = black_box(blog.reserve(black_box(4096))).unwrap();
        blog.settle(at);
    }
    blog
}

fn batchlog() -> BatchlogWriter<Native> {
    let mut log = BatchlogWriter::new(memory(AllocatorKind::Bitmap), TOPIC.0, BrokerId(0));
    assert!(log.has_room().unwrap());
    log
}

#[library_benchmark(config = at_most(104, TIMES))]
#[bench::groups_of_8(batchlog())]
fn batchlog_publish(mut log: BatchlogWriter<Native>) -> BatchlogWriter<Native> {
    for index in 0..TIMES {
        log.append(black_box(BatchEntry { bytes: 1, message_count: 1, ..bytemuck::Zeroable::zeroed() }));
        if index % 8 == 7 {
            log.publish(Written::default());
        }
    }
    log
}

fn testbed() -> Testbed<Native> {
    let mut testbed = Testbed::new(memory(AllocatorKind::Partitioned), 16).unwrap();
    // The first take segments.
    let batches = testbed.append();
    testbed.order(batches);
    assert_eq!(testbed.append(), 1024);
    testbed
}

#[library_benchmark(config = at_most(708, 1024))]
#[bench::of_16_sessions_at_4_brokers(testbed())]
fn sequence(mut testbed: Testbed<Native>) -> Testbed<Native> {
    testbed.order(1024);
    testbed
}

fn batch() -> BatchBuilder {
    let mut builder = BatchBuilder::new(64 << 10);
    (0..60).for_each(|_| builder.push(&[7; 1024]));
    builder
}

const ORIGIN: BatchOrigin = BatchOrigin {
    client_id: ClientId(7),
    session_epoch: Epoch(1),
    session_slot: SessionSlot(3),
    topic: TopicId(2),
    topic_incarnation: Incarnation(9),
};

#[library_benchmark(config = at_most(1700, 1))]
#[bench::of_60_messages(batch())]
fn seal(mut builder: BatchBuilder) -> BatchBuilder {
    black_box(builder.seal(&ORIGIN, 1, false));
    builder
}

fn header() -> [u8; FRAME_BYTES] {
    let mut builder = batch();
    builder.seal(&ORIGIN, 1, true);
    *builder.bytes().first_chunk().unwrap()
}

// Of these, 31 check the flags and the reserved bytes.
#[library_benchmark(config = at_most(219, TIMES))]
#[bench::of_a_batch(header())]
fn decode(header: [u8; FRAME_BYTES]) {
    for _ in 0..TIMES {
        let _ = black_box(Frame::decode(black_box(&header)));
    }
}

library_benchmark_group!(name = hot, benchmarks = [reserve, batchlog_publish, sequence, seal, decode]);
main!(library_benchmark_groups = hot);
