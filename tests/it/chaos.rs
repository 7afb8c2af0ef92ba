//! Promise: each acknowledged message is there once and in order, and every other at most once, whatever is killed or paused
//! and however often.
//!
//! A short run by default; `EMBARCADERO_CHAOS_ROUNDS=200` for the long one, `EMBARCADERO_CHAOS_SEED` to choose another.

use crate::support::{Cluster, Proxy, assert_exactly_once, environment, eventually, history, loopback, message};
use embarcadero_client::{Client, ClientConfig, MessageId, Order, Publisher, Status, TopicOptions};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Number of clients that live through it.
const CLIENTS: u32 = 4;
/// Number of messages that each of them publishes in a round.
const EACH: u64 = 150;
/// Number of the first client that is killed. The others have the numbers after it.
const VICTIMS: u32 = 100;

fn client(cluster: &Cluster) -> Client {
    let bootstrap = cluster.brokers.iter().map(|broker| broker.control.clone()).collect();
    let config = ClientConfig {
        bootstrap,
        ack_level: 2,
        batch_size: Some(8 << 10),
        buffer_bytes: 512 << 10,
        ..cluster.config()
    };
    Client::connect(config).unwrap()
}

/// Starts broker `id` behind a proxy. The proxy stays when the broker is killed and started again.
fn proxied(cluster: &mut Cluster, id: u32) -> Proxy {
    let free = loopback();
    let proxy = Proxy::start(free);
    let (id, data, advertise) = (id.to_string(), free.to_string(), proxy.address.to_string());
    cluster.add(&["--id", &id, "--data", &data, "--advertise", &advertise]);
    proxy
}

/// Starts a client process that publishes without end, as client `number`.
fn victim(cluster: &Cluster, number: u32) -> Child {
    let mut child = cluster.command(&["produce", "t"]).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut feed = child.stdin.take().unwrap();
    std::thread::spawn(move || {
        for line in 0.. {
            let mut bytes = message(number, line);
            bytes.push(b'\n');
            if feed.write_all(&bytes).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    child
}

fn publish(publisher: &Publisher, number: u32, rounds: u64, round: &AtomicU64) -> Vec<MessageId> {
    let mut ids = Vec::new();
    for line in 0..rounds * EACH {
        // A share for each round: work goes on until the last of them.
        while line >= (round.load(Ordering::SeqCst) + 1) * EACH {
            std::thread::sleep(Duration::from_millis(1));
        }
        ids.push(publisher.publish_wait(&message(number, line)).unwrap());
    }
    publisher.flush().unwrap();
    ids
}

/// Source of harm: it kills and pauses brokers, cuts connections, and kills publishers that nobody waits for.
struct Chaos<'a> {
    random: StdRng,
    cluster: &'a mut Cluster,
    proxies: &'a [Proxy],
    reading: &'a Client,
    /// Publisher that is killed next.
    victim: Option<Child>,
    /// Number of the publishers so far that were to be killed.
    victims: u32,
}

impl Chaos<'_> {
    fn strike(&mut self) {
        std::thread::sleep(Duration::from_millis(self.random.random_range(5..100)));
        let brokers = self.reading.cluster().map_or(Vec::new(), |view| view.brokers);
        let leader = brokers.into_iter().find(|broker| broker.leader);
        let leader = leader.and_then(|leader| self.cluster.brokers.iter().position(|broker| broker.id == leader.id));
        let any = self.random.random_range(0..self.cluster.brokers.len());
        match self.random.random_range(0..7) {
            0 | 1 => self.kill(leader.unwrap_or(any)),
            2 => self.kill(any),
            3 => self.pause(any, 10..400),
            // Long enough for another to take over from it.
            4 => self.pause(leader.unwrap_or(any), 150..500),
            // In mid-batch, most likely: towards the broker or from it.
            5 => {
                let proxy = &self.proxies[self.random.random_range(0..self.proxies.len())];
                proxy.cut_after(self.random.random_range(0..200_000));
            }
            _ => {
                self.kill_victim();
                self.victim = Some(victim(self.cluster, VICTIMS + self.victims));
                self.victims += 1;
            }
        }
    }

    fn kill(&mut self, broker: usize) {
        let dead = self.cluster.kill(broker);
        self.cluster.restart(&dead);
    }

    fn pause(&mut self, broker: usize, ms: Range<u64>) {
        self.cluster.brokers[broker].signal("-STOP");
        std::thread::sleep(Duration::from_millis(self.random.random_range(ms)));
        self.cluster.brokers[broker].signal("-CONT");
    }

    fn kill_victim(&mut self) {
        if let Some(mut child) = self.victim.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

#[test]
fn nothing_acknowledged_is_lost_whatever_dies() {
    let (rounds, seed) = (environment("EMBARCADERO_CHAOS_ROUNDS", 2), environment("EMBARCADERO_CHAOS_SEED", 1));
    println!("EMBARCADERO_CHAOS_SEED={seed}");
    let disk = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(
        0,
        &["--size", "512MiB", "--segment-size", "1MiB"],
        &[
            ("EMBARCADERO_BROKER_REPLICA__PATH", disk.path().to_str().unwrap()),
            ("EMBARCADERO_BROKER_LEADER_LEASE_MS", "100"),
        ],
    );
    // Clients reach brokers through proxies, which cut connections.
    let proxies: Vec<Proxy> = (0..4).map(|id| proxied(&mut cluster, id)).collect();
    cluster.await_brokers(4);
    let reading = client(&cluster);
    let options = TopicOptions { order: Order::Strong, ack_level: 2, replication_factor: 3, ..TopicOptions::default() };
    reading.create_topic("t", options).unwrap();
    let publishers: Vec<Publisher> = (0..CLIENTS).map(|_| client(&cluster).publisher("t").unwrap()).collect();
    let round = AtomicU64::new(0);
    let random = StdRng::seed_from_u64(seed);
    let mut chaos =
        Chaos { random, cluster: &mut cluster, proxies: &proxies, reading: &reading, victim: None, victims: 0 };
    let ids: BTreeMap<u32, Vec<MessageId>> = std::thread::scope(|scope| {
        let round = &round;
        let threads: Vec<_> = (0..CLIENTS)
            .zip(&publishers)
            .map(|(number, publisher)| (number, scope.spawn(move || publish(publisher, number, rounds, round))))
            .collect();
        for number in 0..rounds {
            round.store(number, Ordering::SeqCst);
            chaos.strike();
        }
        chaos.kill_victim();
        threads.into_iter().map(|(number, thread)| (number, thread.join().unwrap())).collect()
    });
    let victims = chaos.victims;
    eventually("all brokers are back", || cluster.view().brokers.len() == 4);
    let seen = history(&client(&cluster), "t");
    for (number, ids) in &ids {
        assert_exactly_once(&seen[number], rounds * EACH);
        // The offset that an acknowledgement named is the message's.
        for (id, (_, offset)) in ids.iter().zip(&seen[number]) {
            let status = publishers[*number as usize].poll(*id).unwrap();
            assert!(matches!(status, Status::Acknowledged(known) if known.is_none_or(|known| known == *offset)));
        }
    }
    for victim in (VICTIMS..VICTIMS + victims).filter_map(|victim| seen.get(&victim)) {
        assert_exactly_once(victim, victim.len() as u64);
    }
    cluster.assert_command(&["verify", "t"]);
    // The disks alone hold the same history, as far as anybody was promised it.
    crate::support::rebuild(&mut cluster, &["--size", "512MiB", "--segment-size", "1MiB"], &[disk.path()]);
    let restored = history(&client(&cluster), "t");
    for (number, seen) in &seen {
        let restored = restored.get(number).map_or(&[][..], Vec::as_slice);
        assert!(seen.starts_with(restored) && (*number >= VICTIMS || restored.len() == seen.len()), "client {number}");
    }
}
