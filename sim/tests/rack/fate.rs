//! What befalls hosts, and when they run. A host's code is stopped at an operation on the fabric: for a while (a pause) or
//! for ever (a crash, as a panic that only [`or_crash`] catches).

use super::HOSTS;
use shuttle::rand::Rng;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Operations on the fabric from now on after which something happens; 0 for never.
#[derive(Clone, Copy, Default)]
struct Fate {
    crash_in: u32,
    pause_in: u32,
    /// How long the pause is, in switches to others.
    pause: u32,
}

/// What a crash unwinds with.
struct Crash;

thread_local! {
    // All hosts of a schedule run on one thread of the system.
    static FATES: [Cell<Fate>; HOSTS] = const { [const { Cell::new(Fate { crash_in: 0, pause_in: 0, pause: 0 }) }; HOSTS] };
    static TICKS: Cell<u64> = const { Cell::new(0) };
}

/// A random number of the schedule.
pub fn random(range: std::ops::Range<u64>) -> u64 {
    shuttle::rand::thread_rng().gen_range(range)
}

/// True once in `odds` times.
pub fn one_in(odds: u64) -> bool {
    random(0..odds) == 0
}

/// A schedule begins: nothing is going to happen, and it is early.
pub fn reset() {
    FATES.with(|fates| fates.iter().for_each(|fate| fate.set(Fate::default())));
    TICKS.set(0);
}

/// Time goes on.
pub fn tick() {
    TICKS.set(TICKS.get() + 1);
}

/// A host's clock: it is wrong, and runs too fast or too slow.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    offset_us: u64,
    per_mille: u64,
}

impl Clock {
    /// One that is wrong by up to a minute, and whose seconds take from 0.7 to 1.5 of a true one.
    pub fn drifting() -> Self {
        Self { offset_us: random(0..60_000_000), per_mille: random(700..1500) }
    }

    /// What it shows, microseconds.
    pub fn now_us(self) -> u64 {
        self.offset_us + TICKS.get() * 100 * self.per_mille / 1000
    }
}

/// Host `HOST` is about to use the fabric.
fn step<const HOST: usize>() {
    if std::thread::panicking() {
        return;
    }
    let mut fate = FATES.with(|fates| fates[HOST].get());
    let crash = fate.crash_in == 1;
    let pause = if fate.pause_in == 1 { fate.pause } else { 0 };
    fate.crash_in = fate.crash_in.saturating_sub(1);
    fate.pause_in = fate.pause_in.saturating_sub(1);
    FATES.with(|fates| fates[HOST].set(fate));
    if crash {
        resume_unwind(Box::new(Crash));
    }
    (0..pause).for_each(|_| shuttle::thread::yield_now());
    // Hosts run in bursts of a few operations, so that one can do something whole while another stands still.
    if one_in(5) {
        shuttle::thread::yield_now();
    }
}

/// What each host calls before it uses the fabric.
pub const STEPS: [fn(); HOSTS] = [step::<0>, step::<1>, step::<2>, step::<3>, step::<4>];

/// The host will crash in the middle of what it does then.
pub fn doom(host: usize) {
    FATES.with(|fates| fates[host].set(Fate { crash_in: random(1..1500) as u32, ..fates[host].get() }));
}

/// The host will stand still in the middle of what it does then.
pub fn halt(host: usize) {
    let (pause_in, pause) = (random(1..500) as u32, random(100..4000) as u32);
    FATES.with(|fates| fates[host].set(Fate { pause_in, pause, ..fates[host].get() }));
}

/// Nothing more will happen to a host.
pub fn spare(host: usize) {
    FATES.with(|fates| fates[host].take());
}

/// Does something that a crash may interrupt; then `None`.
pub fn or_crash<R>(host: usize, work: impl FnOnce() -> R) -> Option<R> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => Some(result),
        Err(cause) if cause.is::<Crash>() => {
            spare(host);
            None
        }
        Err(cause) => resume_unwind(cause),
    }
}
