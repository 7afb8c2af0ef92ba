//! Places at which the scheduler lets other hosts run.

use super::*;

/// Switches hosts at one operation of five. Hosts so run in bursts, and one can finish something while another stands still.
pub(super) fn interleave() {
    if shuttle::rand::Rng::gen_ratio(&mut shuttle::rand::thread_rng(), 1, 5) {
        shuttle::thread::yield_now();
    }
}

/// Steps host 2 where nobody minds its pins: it often stands still for long, as a broker that is taken for dead does.
pub(super) fn doze() {
    if shuttle::rand::Rng::gen_ratio(&mut shuttle::rand::thread_rng(), 1, 100) {
        (0..NAP).for_each(|_| shuttle::thread::yield_now());
    }
    interleave();
}

thread_local! {
    /// State of the change from host 0 to its successor. All hosts of a schedule run on one thread of the system.
    pub(super) static CHANGE_OF_LEADER: Cell<ChangeOfLeader> = const { Cell::new(ChangeOfLeader::None) };
    /// True while host 0 gives batches their place.
    pub(super) static ORDERING: Cell<bool> = const { Cell::new(false) };
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ChangeOfLeader {
    None,
    /// Host 1 waits for host 0 to stand still, and will take over then.
    Awaited,
    /// Host 0 stands still, and host 1 takes over.
    Due,
}

/// Steps host 0, the first leader. Now and then it stands still for a long time in the middle of whatever it does. When its
/// successor waits for that, it does so in the middle of ordering.
pub(super) fn pause() {
    let (awaited, ordering) = (CHANGE_OF_LEADER.get() == ChangeOfLeader::Awaited, ORDERING.get());
    let mut random = shuttle::rand::thread_rng();
    if awaited && ordering && shuttle::rand::Rng::gen_ratio(&mut random, 1, 32) {
        CHANGE_OF_LEADER.set(ChangeOfLeader::Due);
        while CHANGE_OF_LEADER.get() == ChangeOfLeader::Due {
            shuttle::thread::yield_now();
        }
        let more = shuttle::rand::Rng::gen_range(&mut random, 0..PAUSE);
        (0..more).for_each(|_| shuttle::thread::yield_now());
    } else if shuttle::rand::Rng::gen_ratio(&mut random, 1, 2000) {
        (0..PAUSE).for_each(|_| shuttle::thread::yield_now());
    }
    interleave();
}
