//! The atomic bitmap under a scheduler that switches threads between any two operations. No segment is handed out twice,
//! and none is lost.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

use embarcadero_cxl::layout::{AllocatorKind, Geometry, Layout};
use embarcadero_cxl::segment::{BitmapAllocator, SegmentAllocator};
use embarcadero_cxl::{CoherentFabric, Fabric, Region, RegionOffset, Site};
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::sync::{Arc, Mutex};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Coherent memory. The scheduler may switch threads at every access.
#[derive(Clone)]
struct Coherent {
    words: Arc<Mutex<BTreeMap<u64, Arc<AtomicU64>>>>,
    bytes: u64,
}

impl Coherent {
    fn word(&self, at: RegionOffset) -> Arc<AtomicU64> {
        Arc::clone(self.words.lock().unwrap().entry(at.0).or_insert_with(|| Arc::new(AtomicU64::new(0))))
    }
}

impl Fabric for Coherent {
    fn bytes(&self) -> u64 {
        self.bytes
    }
    fn load(&self, at: RegionOffset) -> u64 {
        self.word(at).load(Ordering::SeqCst)
    }
    fn store(&self, at: RegionOffset, value: u64) {
        self.word(at).store(value, Ordering::SeqCst);
    }
    fn flush(&self, _: RegionOffset, _: u64, _: Site) {}
    fn fence(&self, _: Site) {}

    fn full_fence(&self, _site: Site) {}
    fn invalidate(&self, _: RegionOffset, _: u64, _: Site) {}
    fn read_bytes(&self, _: RegionOffset, _: &mut [u8]) {
        unreachable!("the allocator reads words");
    }
    fn write_bytes(&self, _: RegionOffset, _: &[u8]) {
        unreachable!("the allocator writes words");
    }
    fn is_coherent(&self) -> bool {
        true
    }
}

impl CoherentFabric for Coherent {
    fn fetch_or(&self, at: RegionOffset, bits: u64) -> u64 {
        self.word(at).fetch_or(bits, Ordering::SeqCst)
    }
    fn fetch_and(&self, at: RegionOffset, bits: u64) -> u64 {
        self.word(at).fetch_and(bits, Ordering::SeqCst)
    }
    fn compare_exchange(&self, at: RegionOffset, before: u64, after: u64) -> bool {
        self.word(at).compare_exchange(before, after, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

#[test]
fn no_schedule_hands_a_segment_out_twice() {
    const SEGMENTS: u32 = 3;
    shuttle::check_random(
        || {
            let tables = Geometry::with_segments_of(1 << 20, AllocatorKind::Bitmap);
            let geometry = Geometry { segment_count: SEGMENTS, ..tables };
            let bytes = Layout::new(&geometry).region_bytes;
            let region = Region::format(Coherent { words: Arc::default(), bytes }, &geometry, Uuid::nil(), 0).unwrap();
            let holders = Arc::new(Mutex::new([0u32; SEGMENTS as usize]));
            let threads: Vec<_> = (0..3)
                .map(|_| {
                    let (allocator, holders) = (BitmapAllocator::new(region.clone()), Arc::clone(&holders));
                    shuttle::thread::spawn(move || {
                        for _ in 0..3 {
                            // Three threads, three segments, one each: there is always one left.
                            let segment = allocator.allocate().expect("a segment is lost");
                            let mut held = holders.lock().unwrap();
                            held[segment as usize] += 1;
                            assert_eq!(held[segment as usize], 1, "segment {segment} has two holders");
                            drop(held);
                            shuttle::thread::yield_now();
                            holders.lock().unwrap()[segment as usize] -= 1;
                            allocator.release(segment).unwrap();
                        }
                    })
                })
                .collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        },
        2000,
    );
}
