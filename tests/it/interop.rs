//! Promise: `docs/reference/protocol.md` is enough for a client in another language. One in Python was written from it
//! alone (`tests/interop/`), holds brokers to it, and finds every order kept whatever dies.
//!
//! A short run by default; `EMBARCADERO_CHAOS_ROUNDS=200` for the long one, `EMBARCADERO_CHAOS_SEED` to choose another.

use crate::support::{Cluster, PATIENCE, environment, eventually};
use embarcadero_wire::batch::{BatchBuilder, BatchOrigin};
use embarcadero_wire::{
    ClientId, Epoch, FRAME_BYTES, FRAME_MAGIC, FRAMES, Frame, Incarnation, SessionSlot, TopicId, WIRE_VERSION, crc32c,
};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

const REGION: &[&str] = &["--size", "512MiB", "--segment-size", "1MiB"];

/// Makes a command of a program of the second client. Distributions install grpcio for their own Python.
fn python(program: &str) -> Command {
    let script = format!("{}/tests/interop/{program}.py", env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new("/usr/bin/python3");
    // Without -B, Python would leave compiled files in the sources.
    command.args(["-B", &script]).stdin(Stdio::null());
    command
}

fn endpoints(cluster: &Cluster) -> String {
    cluster.brokers.iter().map(|broker| broker.control.as_str()).collect::<Vec<_>>().join(",")
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes a frame of a kind with random fields, as a line for the second client.
fn random_frame(kind: u8, fields: &[(&str, usize)], rng: &mut StdRng) -> Value {
    let mut bytes = [0; FRAME_BYTES];
    bytes[..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
    (bytes[4], bytes[5]) = (kind, WIRE_VERSION);
    let ends = fields.iter().skip(1).map(|(_, at)| *at).chain([FRAME_BYTES - 4]);
    let mut values = serde_json::Map::new();
    for ((name, at), end) in fields.iter().zip(ends).filter(|((name, _), _)| !name.starts_with("reserved")) {
        rng.fill_bytes(&mut bytes[*at..end]);
        values.insert((*name).to_owned(), hexadecimal(&bytes[*at..end]).into());
    }
    let checksum = crc32c(&bytes[..FRAME_BYTES - 4]);
    bytes[FRAME_BYTES - 4..].copy_from_slice(&checksum.to_le_bytes());
    assert_eq!(Frame::decode(&bytes).map(|frame| frame.kind()), Ok(kind));
    json!({"kind": kind, "fields": values, "bytes": hexadecimal(&bytes)})
}

/// Makes a batch of random messages, as a line for the second client.
fn random_batch(rng: &mut StdRng) -> Value {
    let [client_id, session_epoch, session_slot, topic, topic_incarnation] = std::array::from_fn(|_| rng.next_u32());
    let origin = BatchOrigin {
        client_id: ClientId(u64::from(client_id) << 32 | 1),
        session_epoch: Epoch(session_epoch),
        session_slot: SessionSlot(session_slot),
        topic: TopicId(topic),
        topic_incarnation: Incarnation(topic_incarnation),
    };
    let mut builder = BatchBuilder::new(16 << 10);
    let mut messages = Vec::new();
    for _ in 0..rng.random_range(1..20) {
        let mut message = vec![0; rng.random_range(0..300)];
        rng.fill_bytes(&mut message);
        builder.push(&message);
        messages.push(hexadecimal(&message));
    }
    let sequence = rng.next_u64();
    builder.seal(&origin, sequence, true);
    json!({
        "origin": {
            "client_id": origin.client_id.0,
            "session_epoch": session_epoch,
            "session_slot": session_slot,
            "topic": topic,
            "topic_incarnation": topic_incarnation,
        },
        "sequence": sequence,
        "messages": messages,
        "bytes": hexadecimal(builder.bytes()),
    })
}

#[test]
fn both_clients_encode_the_same_bytes() {
    let rng = &mut StdRng::seed_from_u64(1);
    let mut cases = Vec::new();
    for _ in 0..10 {
        cases.extend(FRAMES.iter().map(|(kind, _, fields)| random_frame(*kind, fields, rng)));
        cases.push(random_batch(rng));
    }
    let mut client = python("frames_agree").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = client.stdin.take().unwrap();
    for case in &cases {
        writeln!(input, "{case}").unwrap();
    }
    drop(input);
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), cases.len().to_string());
}

#[test]
fn the_second_client_and_its_judge_are_sound() {
    assert!(python("tests").status().unwrap().success());
}

/// Longest `gap_lease_ms` and `session_idle_ms` of these tests, which no busy machine reaches, and the shortest.
const LONG_MS: &str = "3600000";
const SHORT_MS: &str = "300";

/// Starts two brokers with these leases, and holds them to the document.
fn keeps_the_contract(gap_lease_ms: &str, session_idle_ms: &str, arguments: &[&str]) {
    let settings =
        [("EMBARCADERO_BROKER_GAP_LEASE_MS", gap_lease_ms), ("EMBARCADERO_BROKER_SESSION_IDLE_MS", session_idle_ms)];
    let cluster = Cluster::start(2, REGION, &settings);
    let checked = python("contract").args(["--control", &endpoints(&cluster)]).args(arguments).output().unwrap();
    let (said, errors) = (String::from_utf8_lossy(&checked.stdout), String::from_utf8_lossy(&checked.stderr));
    assert!(checked.status.success() && said.trim_end().ends_with("ok"), "{said}{errors}");
}

#[test]
fn brokers_keep_what_the_document_says() {
    keeps_the_contract(LONG_MS, LONG_MS, &[]);
}

#[test]
fn gaps_and_clients_without_a_batch_end_as_the_document_says() {
    keeps_the_contract(SHORT_MS, LONG_MS, &["--short", "gap_lease_ms"]);
}

#[test]
fn idle_clients_end_as_the_document_says() {
    keeps_the_contract(LONG_MS, SHORT_MS, &["--short", "session_idle_ms"]);
}

/// Second client, which publishes and reads until it is told that all is calm. It is killed when dropped.
struct History {
    child: Child,
    lines: Receiver<String>,
    /// Number of acks that it told of last.
    acks: u64,
}

impl History {
    fn start(cluster: &Cluster, seed: u64) -> Self {
        let mut command = python("history");
        command.args(["--control", &endpoints(cluster), "--seed", &seed.to_string(), "--durable"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines, acks: 0 }
    }

    /// Waits until `more` batches were acknowledged.
    fn await_acks(&mut self, more: u64) {
        let due = self.acks + more;
        while self.acks < due {
            let line = self.lines.recv_timeout(PATIENCE).expect("the second client makes no progress");
            let acks = line.strip_prefix("acks ").and_then(|acks| acks.parse().ok());
            self.acks = acks.unwrap_or_else(|| panic!("{line}\n{}", self.rest()));
        }
    }

    /// Returns what it still says.
    fn rest(&self) -> String {
        let lines = std::iter::from_fn(|| self.lines.recv_timeout(PATIENCE).ok());
        lines.filter(|line| !line.starts_with("acks ")).map(|line| line + "\n").collect()
    }

    /// Tells it that all is calm, and returns its verdict: violations, how often what happened, and `ok` if all was
    /// right.
    fn verdict(mut self) -> String {
        self.child.stdin.take().unwrap().write_all(b"calm\n").unwrap();
        self.rest()
    }
}

impl Drop for History {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Kills a broker and starts it again, or stops it for a while.
fn strike(cluster: &mut Cluster, random: &mut StdRng) {
    let leader = cluster.leading().0;
    let leader = cluster.brokers.iter().position(|broker| broker.id == leader).unwrap();
    let any = random.random_range(0..cluster.brokers.len());
    let broker = if random.random_bool(0.5) { leader } else { any };
    if random.random_bool(0.7) {
        let dead = cluster.kill(broker);
        std::thread::sleep(Duration::from_millis(random.random_range(0..300)));
        cluster.restart(&dead);
    } else {
        cluster.brokers[broker].signal("-STOP");
        // Long enough, at times, for another to lead, and for the client to go elsewhere.
        std::thread::sleep(Duration::from_millis(random.random_range(50..2500)));
        cluster.brokers[broker].signal("-CONT");
    }
}

#[test]
fn a_second_client_finds_every_order_kept_whatever_dies() {
    let seed = environment("EMBARCADERO_CHAOS_SEED", 1);
    let strikes = 6 + 2 * environment("EMBARCADERO_CHAOS_ROUNDS", 2);
    println!("EMBARCADERO_CHAOS_SEED={seed}");
    let disk = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(
        3,
        REGION,
        &[
            ("EMBARCADERO_BROKER_REPLICA__PATH", disk.path().to_str().unwrap()),
            ("EMBARCADERO_BROKER_LEADER_LEASE_MS", "100"),
            ("EMBARCADERO_BROKER_GAP_LEASE_MS", "1000"),
        ],
    );
    let mut random = StdRng::seed_from_u64(seed);
    let mut history = History::start(&cluster, seed);
    history.await_acks(100);
    for _ in 0..strikes {
        strike(&mut cluster, &mut random);
        history.await_acks(random.random_range(50..300));
    }
    eventually("all brokers are back", || cluster.view().brokers.len() == 3);
    let verdict = history.verdict();
    assert!(verdict.trim_end().ends_with("\nok"), "{verdict}");
}
