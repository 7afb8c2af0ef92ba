//! Work on all cores of this machine.

use std::sync::atomic::{AtomicU64, Ordering};

/// Calls `work` with every number below `count`, in rising order, from one thread a core.
///
/// # Panics
/// When `work` panics.
pub fn on_all_cores(count: u64, work: impl Fn(u64) + Sync) {
    let next = AtomicU64::new(0);
    let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|number| *number < count);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(number) = take() {
                    work(number);
                }
            });
        }
    });
}
