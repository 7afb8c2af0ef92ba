//! Retention by time, on hosts whose clocks step.

use embarcadero_broker::sequencer::GROUP_BATCHES;
use embarcadero_cxl::Native;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::AllocatorKind;
use embarcadero_cxl::order_index::{OrderIndexReader, StreamId, read_extent};
use embarcadero_os::Times;
use embarcadero_sim::testbed::{TOPIC, Testbed, region};
use embarcadero_wire::Stream;

const STREAM: StreamId = StreamId { topic: TOPIC.0, stream: Stream::GLOBAL };
const SECOND_US: u64 = 1_000_000;
const DAY_US: u64 = 86_400 * SECOND_US;
const KEEP_MS: u64 = 60_000;

/// Clocks `seconds` after the begin. The wall clock is ahead of the right time by `ahead_us`.
fn at(seconds: u64, ahead_us: u64) -> Times {
    let steady_us = seconds * SECOND_US;
    Times { steady_us, wall_us: 20_000 * DAY_US + steady_us + ahead_us }
}

fn testbed() -> Testbed<Native> {
    let region = region(AllocatorKind::Partitioned, FlushMethod::None, |native: Native| native).unwrap();
    Testbed::keeping(region, 1, KEEP_MS).unwrap()
}

/// Appends batches and orders them. Returns their number.
fn order(testbed: &mut Testbed<Native>, now: Times) -> u64 {
    let batches = testbed.append();
    let mut taken = 0;
    while taken < batches {
        taken += testbed.sequencer().poll(now, GROUP_BATCHES);
    }
    batches
}

/// Runs maintenance. Returns the position from which batches are kept.
fn trim(testbed: &mut Testbed<Native>, now: Times) -> u64 {
    testbed.sequencer().maintain(now);
    read_extent(testbed.region(), STREAM).unwrap().trimmed
}

/// The leader's clock was a day ahead, and is set right.
#[test]
fn a_clock_that_was_ahead_does_not_stop_retention() {
    let mut testbed = testbed();
    let first = order(&mut testbed, at(0, DAY_US));
    assert_eq!(trim(&mut testbed, at(0, DAY_US)), 0);
    let second = order(&mut testbed, at(5, 0));
    assert_eq!(trim(&mut testbed, at(5, 0)), 0);
    let mut reader = OrderIndexReader::new(testbed.region().clone(), STREAM);
    assert_eq!(reader.poll(), first + second);
    let times: Vec<u64> = (0..first + second).map(|position| reader.read(position).unwrap().ordered_us).collect();
    assert!(times.is_sorted(), "times go back");
    let lead_us = times[times.len() - 1] - at(5, 0).wall_us;
    assert!(lead_us < DAY_US, "the clock does not come up with the order: {lead_us}");
    assert_eq!(trim(&mut testbed, at(59, 0)), 0, "nothing is that old");
    assert_eq!(trim(&mut testbed, at(60, 0)), first);
    assert_eq!(trim(&mut testbed, at(65, 0)), first + second);
}

/// The leader's clock steps a day ahead while it leads.
#[test]
fn a_clock_that_steps_ahead_takes_nothing_too_early() {
    let mut testbed = testbed();
    let first = order(&mut testbed, at(0, 0));
    assert_eq!(trim(&mut testbed, at(0, 0)), 0);
    assert_eq!(trim(&mut testbed, at(5, DAY_US)), 0);
    let second = order(&mut testbed, at(5, DAY_US));
    assert_eq!(trim(&mut testbed, at(5, DAY_US)), 0);
    assert_eq!(trim(&mut testbed, at(59, DAY_US)), 0);
    assert_eq!(trim(&mut testbed, at(61, DAY_US)), first);
    assert_eq!(trim(&mut testbed, at(65, DAY_US)), first + second);
}
