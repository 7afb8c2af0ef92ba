//! Everything that fails, at once and by chance, while a publisher publishes and a subscriber reads.

use super::brokers::Answers;
use super::rig::Rig;
use embarcadero_client::{ControlCode, PublisherStats, Start, Status};
use embarcadero_sim::on_all_cores;
use embarcadero_wire::{Ack, ClientId, Epoch, ErrorCode, Order};
use std::sync::Mutex;

/// Number of brokers.
const BROKERS: u32 = 3;
/// Number of messages that are published.
const MESSAGES: u64 = 400;
/// Number of storms.
const SEEDS: u64 = 300;

/// State that a storm left behind.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    /// Client, epoch, sequence and number of messages of each batch, in order.
    batches: Vec<(ClientId, Epoch, u64, u32)>,
    stats: PublisherStats,
    /// Simulated time until everything was acknowledged, and until everything was read.
    ends_ms: [u64; 2],
}

/// Faults that pass: the time at which each ends.
#[derive(Default)]
struct Weather {
    mute_until_ms: [u64; BROKERS as usize],
    silent_until_ms: u64,
    withheld_until_ms: u64,
}

impl Weather {
    /// Begins and ends faults.
    fn change(&mut self, rig: &mut Rig, client: ClientId) {
        let now_ms = rig.host.clock.passed_ms();
        for (broker, until_ms) in rig.brokers.all.iter_mut().zip(&self.mute_until_ms) {
            broker.mute = now_ms < *until_ms;
        }
        if now_ms >= self.silent_until_ms {
            rig.brokers.answers = Answers::True;
        }
        rig.brokers.withholds_acks = now_ms < self.withheld_until_ms;
        match rig.random(0..800) {
            0..4 => {
                if let Some((broker, link)) = rig.random_link() {
                    rig.brokers.cut(broker, link);
                }
            }
            4..6 => {
                if let Some((broker, link)) = rig.random_link() {
                    rig.brokers.refuse(broker, link, ErrorCode::Unavailable);
                }
            }
            6 => {
                let broker = rig.random(0..BROKERS.into()) as usize;
                self.mute_until_ms[broker] = now_ms + rig.random(1..1500);
            }
            7..9 if rig.brokers.sessions[&client].open => rig.brokers.fence(client),
            9 => {
                let refusal = Answers::Refusal(ControlCode::Unavailable);
                rig.brokers.answers = if rig.one_in(2) { Answers::None } else { refusal };
                self.silent_until_ms = now_ms + rig.random(1..1500);
            }
            10 => self.withheld_until_ms = now_ms + rig.random(1..300),
            11..14 => forge(rig, client),
            14 => {
                let entries = rig.brokers.log().len() as u64;
                if entries > 0 {
                    let entry = rig.random(0..entries) as usize;
                    let offset = rig.brokers.log()[entry].first_offset;
                    // Once each, so that no batch is given up.
                    rig.brokers.damaged.entry(offset).or_insert(1);
                }
            }
            _ => {}
        }
    }

    /// Ends all faults.
    fn calm(&mut self, rig: &mut Rig) {
        *self = Self::default();
        rig.brokers.all.iter_mut().for_each(|broker| broker.mute = false);
        rig.brokers.answers = Answers::True;
        rig.brokers.withholds_acks = false;
    }
}

/// Sends an ack of an epoch that is not the session's, for a batch that may be in flight.
fn forge(rig: &mut Rig, client: ClientId) {
    let session = &rig.brokers.sessions[&client];
    let (sequence, epoch) = (session.next, session.epoch);
    let session_epoch = Epoch(epoch.0 - 1);
    let ack = Ack { sequence, first_offset: 1 << 40, committed: sequence + 1, session_epoch, ..Ack::blank() };
    rig.brokers.tell(client, ack.encode());
}

fn storm(seed: u64) -> Outcome {
    let mut rig = Rig::new(BROKERS, Order::Strong, seed);
    let mut weather = Weather::default();
    let mut application = rig.publisher();
    let mut reader = rig.subscriber(Start::Earliest);
    let client = application.publisher.client_id();
    while application.published() < MESSAGES {
        if rig.one_in(8) {
            let burst = rig.random(0..6).min(MESSAGES - application.published());
            application.publish(burst).unwrap();
        }
        application.tick(&mut rig);
        weather.change(&mut rig, client);
        for _ in 0..rig.random(0..4) {
            reader.look(&mut rig).unwrap();
        }
        if application.published() > 0 && rig.one_in(16) {
            let number = rig.random(0..application.published());
            if let Status::Acknowledged(at) = application.status(number).unwrap() {
                assert_eq!(at, Some(number));
                assert_eq!(rig.ordered()[number as usize], number, "acknowledged, and not in the log");
            }
        }
    }
    weather.calm(&mut rig);
    application.flush(&mut rig).unwrap();
    let acknowledged_ms = rig.host.clock.passed_ms();
    rig.assert_ordered(MESSAGES);
    application.assert_acknowledged();
    reader.read_until(&mut rig, MESSAGES as usize).unwrap();
    reader.assert_read(MESSAGES);
    assert_eq!(rig.brokers.sessions.len(), 1);
    let batches = rig.brokers.log().iter().map(|entry| {
        let header = &entry.header;
        (header.client_id, header.session_epoch, header.sequence, header.message_count)
    });
    Outcome {
        batches: batches.collect(),
        stats: application.publisher.stats(),
        ends_ms: [acknowledged_ms, rig.host.clock.passed_ms()],
    }
}

#[test]
fn everything_is_ordered_acknowledged_and_read_once() {
    let all = Mutex::new(PublisherStats::default());
    on_all_cores(SEEDS, |seed| {
        println!("seed {seed}");
        let stats = storm(seed).stats;
        let mut all = all.lock().unwrap();
        all.batches_resubmitted += stats.batches_resubmitted;
        all.sessions_reopened += stats.sessions_reopened;
        all.connections_lost += stats.connections_lost;
    });
    let all = all.into_inner().unwrap();
    let least = all.batches_resubmitted.min(all.sessions_reopened).min(all.connections_lost);
    assert!(least > SEEDS, "too little went wrong: {all:?}");
}

/// No clock, no thread and no chance of this host decides anything.
#[test]
fn a_seed_decides_everything() {
    for seed in 0..10 {
        assert_eq!(storm(seed), storm(seed), "seed {seed}");
    }
    assert_ne!(storm(0).batches, storm(1).batches);
}

/// Ids of clients and choices of brokers come from the seed too.
#[test]
fn ids_and_brokers_are_chosen_by_the_seed() {
    let ids: Vec<_> = (0..4).map(|seed| Rig::new(1, Order::Strong, seed).publisher().publisher.client_id()).collect();
    let again: Vec<_> = (0..4).map(|seed| Rig::new(1, Order::Strong, seed).publisher().publisher.client_id()).collect();
    assert_eq!(ids, again);
    assert!(ids.windows(2).all(|pair| pair[0] != pair[1]), "{ids:?}");
    let first = |seed| {
        let mut rig = Rig::new(4, Order::Strong, seed);
        let mut reader = rig.subscriber(Start::Earliest);
        reader.ticks(&mut rig, 2).unwrap();
        rig.brokers.all.iter().position(|broker| broker.accepted > 0).unwrap()
    };
    let chosen: Vec<_> = (0..32).map(first).collect();
    assert!((0..4).all(|broker| chosen.contains(&broker)), "{chosen:?}");
}
