//! Faults of hosts, and their turns to run. A host's code can be stopped at any operation on the fabric. A pause stops it
//! for a while, a crash for ever: it is a panic that only [`or_crash`] catches.

use super::HOSTS;
use embarcadero_os::Now;
use shuttle::rand::Rng;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Microseconds from 1970 to the moment at which a correct clock begins.
const EPOCH_US: u64 = 1_700_000_000_000_000;

/// Faults that a host will have.
#[derive(Clone, Copy, Default)]
struct Fate {
    /// Operations on the fabric until it crashes; 0 for never.
    crash_in: u32,
    /// Operations on the fabric until it stands still; 0 for never.
    pause_in: u32,
    /// Length of the pause, in switches to other hosts.
    pause: u32,
}

/// Panic payload of a crash.
struct Crash;

thread_local! {
    // All hosts of a schedule run on one thread of the system.
    static FATES: [Cell<Fate>; HOSTS] = const { [const { Cell::new(Fate { crash_in: 0, pause_in: 0, pause: 0 }) }; HOSTS] };
    static TICKS: Cell<u64> = const { Cell::new(0) };
}

/// Returns a random number, which the schedule's seed determines.
pub(crate) fn random(range: std::ops::Range<u64>) -> u64 {
    shuttle::rand::thread_rng().gen_range(range)
}

/// Returns true once in `odds` times, at random.
pub(crate) fn one_in(odds: u64) -> bool {
    random(0..odds) == 0
}

/// Begins a schedule: no host has a fault before it, and the time is 0.
pub(crate) fn reset() {
    FATES.with(|fates| fates.iter().for_each(|fate| fate.set(Fate::default())));
    TICKS.set(0);
}

/// Moves time on by 100 microseconds.
pub(crate) fn tick() {
    TICKS.set(TICKS.get() + 1);
}

/// Clocks of a host. They are wrong, and run too fast or too slow. Somebody may set the wall clock, forward or back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    offset_us: u64,
    per_mille: u64,
    /// Microseconds by which the wall clock is ahead before and after it is set, at most a day each.
    ahead_us: [u64; 2],
    /// Time at which the wall clock is set, microseconds.
    set_at_us: u64,
}

impl Clock {
    /// Makes a clock that is up to a minute fast, and counts 0.7 to 1.5 seconds in a true second.
    pub(crate) fn drifting() -> Self {
        let offset_us = random(0..60_000_000);
        let ahead_us = [(); 2].map(|()| [0, random(0..86_400_000_000)][random(0..2) as usize]);
        Self { offset_us, per_mille: random(700..1500), ahead_us, set_at_us: offset_us + random(0..60_000) }
    }

    /// Makes a clock that runs fifty times as fast. Clients' waits are made for links that are slow.
    pub(crate) fn of_client() -> Self {
        let clock = Self::drifting();
        Self { per_mille: clock.per_mille * 50, ..clock }
    }

    /// Returns the time that it shows, in microseconds.
    pub(crate) fn now_us(self) -> u64 {
        self.offset_us + TICKS.get() * 100 * self.per_mille / 1000
    }
}

impl embarcadero_os::Clock for Clock {
    fn now(&self) -> Now {
        static BEGAN: OnceLock<Instant> = OnceLock::new();
        let steady_us = self.now_us();
        let instant = *BEGAN.get_or_init(Instant::now) + Duration::from_micros(steady_us);
        let ahead_us = self.ahead_us[usize::from(steady_us > self.set_at_us)];
        Now { instant, steady_us, wall_us: EPOCH_US + steady_us + ahead_us }
    }
}

/// Lets happen what is due before host `HOST` uses the fabric.
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

/// Functions that each host calls before it uses the fabric.
pub(crate) const STEPS: [fn(); HOSTS] = [step::<0>, step::<1>, step::<2>, step::<3>, step::<4>];

/// Makes a host crash at one of its next 1500 operations.
pub(crate) fn doom(host: usize) {
    FATES.with(|fates| fates[host].set(Fate { crash_in: random(1..1500) as u32, ..fates[host].get() }));
}

/// Makes a host stand still at one of its next 500 operations.
pub(crate) fn halt(host: usize) {
    let (pause_in, pause) = (random(1..500) as u32, random(100..4000) as u32);
    FATES.with(|fates| fates[host].set(Fate { pause_in, pause, ..fates[host].get() }));
}

/// Takes back all faults that a host has before it.
pub(crate) fn spare(host: usize) {
    FATES.with(|fates| fates[host].take());
}

/// Runs `work` on a host. Returns `None` if a crash interrupted it.
pub(crate) fn or_crash<R>(host: usize, work: impl FnOnce() -> R) -> Option<R> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => Some(result),
        Err(cause) if cause.is::<Crash>() => {
            spare(host);
            None
        }
        Err(cause) => resume_unwind(cause),
    }
}
