//! Promise: what was acknowledged is there, once and in order, whatever connection or process dies.

use crate::support::{Cluster, PATIENCE, Proxy, assert_exactly_once, eventually, history, loopback, message};
use embarcadero_client::{
    BrokerId, Client, ClientConfig, ClientError, MessageId, Order, Publisher, Start, Status, TopicOptions,
};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

const REGION: &[&str] = &["--size", "256MiB", "--segment-size", "1MiB"];
/// Progress timeout in tests with a silent broker, in milliseconds. Clients leave such a broker after a quarter of it, so it
/// is half of what other tests have.
const PROGRESS_MS: u64 = 60_000;

/// Checks that messages are delivered at the offsets that their acknowledgements named.
fn assert_offsets(publisher: &Publisher, ids: &[MessageId], seen: &[(u64, u64)]) {
    for (id, (_, offset)) in ids.iter().zip(seen) {
        match publisher.poll(*id).unwrap() {
            Status::Acknowledged(acknowledged) => assert!(acknowledged.is_none_or(|acked| acked == *offset)),
            Status::Pending => panic!("still pending after flush"),
        }
    }
}

#[test]
fn connections_cut_in_mid_batch_lose_and_repeat_nothing() {
    // The proxy must know the broker's port before the broker does: both ends are chosen first.
    let mut cluster = Cluster::start(1, REGION, &[]);
    let mut proxies = Vec::new();
    for _ in 0..3 {
        let front = TcpListener::bind("127.0.0.1:0").unwrap();
        let back = loopback();
        let index =
            cluster.add(&["--data", &back.to_string(), "--advertise", &front.local_addr().unwrap().to_string()]);
        assert_eq!(cluster.brokers[index].data, front.local_addr().unwrap());
        proxies.push(Proxy::on(front, back));
    }
    cluster.await_brokers(4);
    let client =
        Client::connect(ClientConfig { batch_size: Some(16 << 10), buffer_bytes: 1 << 20, ..cluster.config() })
            .unwrap();
    client.create_topic("cut", TopicOptions::default()).unwrap();
    let publisher = client.publisher("cut").unwrap();
    let mut ids = Vec::new();
    let publish = |ids: &mut Vec<MessageId>| {
        let number = ids.len() as u64;
        ids.push(publisher.publish_wait(&message(0, number)).unwrap());
    };
    for round in 0..12 {
        // Somewhere within a batch, also within its header or its length table.
        let proxy = &proxies[round % 3];
        let before = proxy.cuts();
        proxy.cut_after((round as i64 * 7919) % 40_000);
        while proxy.cuts() == before {
            // Slowly: a cut connection is away for a while, and the others would fill the region meanwhile.
            (0..10).for_each(|_| publish(&mut ids));
            std::thread::sleep(Duration::from_millis(1));
        }
        (0..1000).for_each(|_| publish(&mut ids));
    }
    let count = ids.len() as u64;
    publisher.flush().unwrap();
    let cuts: u32 = proxies.iter().map(Proxy::cuts).sum();
    let stats = publisher.stats();
    assert!(cuts >= 12 && stats.connections_lost >= 12, "only {cuts} connections were cut ({stats:?})");
    let seen = history(&client, "cut");
    assert_exactly_once(&seen[&0], count);
    assert_offsets(&publisher, &ids, &seen[&0]);
    cluster.assert_command(&["verify", "cut"]);
}

/// Starts a proxy in front of the broker at `back`. While its flag is set, it opens new connections and then swallows
/// whatever is sent to them, without an answer or an end. Returns the flag and the number of such connections.
fn swallowing(front: TcpListener, back: SocketAddr) -> (Arc<AtomicBool>, Arc<AtomicU32>) {
    let (flag, count) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU32::new(0)));
    let (swallow, swallowed) = (Arc::clone(&flag), Arc::clone(&count));
    std::thread::spawn(move || {
        let mut held = Vec::new();
        let mut opening = [0u8; 64];
        for stream in front.incoming() {
            let Ok(mut stream) = stream else { continue };
            let Ok(mut server) = TcpStream::connect(back) else { continue };
            if swallow.load(Ordering::SeqCst) {
                stream.read_exact(&mut opening).unwrap();
                server.write_all(&opening).unwrap();
                server.read_exact(&mut opening).unwrap();
                stream.write_all(&opening).unwrap();
                held.push((stream, server));
                swallowed.fetch_add(1, Ordering::SeqCst);
            } else {
                let (mut up, mut down) = (stream.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || std::io::copy(&mut up, &mut server));
                std::thread::spawn(move || std::io::copy(&mut down, &mut stream));
            }
        }
    });
    (flag, count)
}

#[test]
fn a_broker_that_falls_silent_is_left() {
    let front = TcpListener::bind("127.0.0.1:0").unwrap();
    let back = loopback();
    let advertised = front.local_addr().unwrap().to_string();
    let (swallow, swallowed) = swallowing(front, back);
    let mut cluster = Cluster::start(0, REGION, &[]);
    cluster.add(&["--data", &back.to_string(), "--advertise", &advertised]);
    let config = ClientConfig { batch_size: Some(4096), progress_timeout_ms: PROGRESS_MS, ..cluster.config() };
    let client = Client::connect(config).unwrap();
    client.create_topic("silent", TopicOptions::default()).unwrap();
    let publisher = client.publisher("silent").unwrap();
    eventually("the connection", || swallowed.load(Ordering::SeqCst) == 1);
    swallow.store(false, Ordering::SeqCst);
    for number in 0..500 {
        publisher.publish_wait(&message(0, number)).unwrap();
    }
    publisher.flush().unwrap();
    assert!(publisher.stats().connections_lost > 0);
    assert_exactly_once(&history(&client, "silent")[&0], 500);
}

#[test]
fn followers_of_a_broker_that_falls_silent_go_to_another() {
    let cluster = Cluster::start(2, REGION, &[]);
    let leader = cluster.leader();
    let bootstrap = vec![cluster.brokers[leader].control.clone()];
    let config = ClientConfig { bootstrap, progress_timeout_ms: PROGRESS_MS, ..cluster.config() };
    let client = Client::connect(config).unwrap();
    client.create_topic("follow", TopicOptions::default()).unwrap();
    let publish = |number| {
        let publisher = client.publisher("follow").unwrap();
        publisher.publish_wait(&message(0, number)).unwrap();
        publisher.flush().unwrap();
    };
    publish(0);
    // Each chooses one of the two brokers.
    let mut followers: Vec<_> = (0..8).map(|_| client.subscriber("follow", Start::Earliest).unwrap()).collect();
    for follower in &mut followers {
        assert_eq!(follower.next(PATIENCE).unwrap().unwrap().payload, message(0, 0));
    }
    // Its sockets stay open, as those of a host that is cut off do.
    cluster.brokers[1 - leader].signal("-STOP");
    publish(1);
    std::thread::scope(|scope| {
        for follower in &mut followers {
            scope.spawn(|| {
                let received = follower.next(PATIENCE).unwrap();
                assert_eq!(received.expect("the follower never got it").payload, message(0, 1));
            });
        }
    });
}

#[test]
fn a_dead_gap_fences_the_session_and_the_client_resubmits_the_rest() {
    let environment = [("EMBARCADERO_BROKER_GAP_LEASE_MS", "300")];
    let mut cluster = Cluster::start(1, REGION, &environment);
    let front = TcpListener::bind("127.0.0.1:0").unwrap();
    let back = loopback();
    cluster.add(&["--data", &back.to_string(), "--advertise", &front.local_addr().unwrap().to_string()]);
    let (swallow, _) = swallowing(front, back);
    cluster.await_brokers(2);
    let client = Client::connect(ClientConfig {
        batch_size: Some(4096),
        buffer_bytes: 256 << 10,
        progress_timeout_ms: PROGRESS_MS,
        ..cluster.config()
    })
    .unwrap();
    client.create_topic("gap", TopicOptions::default()).unwrap();
    let publisher = client.publisher("gap").unwrap();
    let mut sent = 0;
    while publisher.stats().sessions_reopened == 0 {
        match publisher.publish(&message(0, sent)) {
            Ok(_) => sent += 1,
            Err(ClientError::BufferFull { .. }) => publisher.wait(Duration::from_millis(5)).unwrap(),
            Err(error) => panic!("{error}"),
        }
    }
    swallow.store(false, Ordering::SeqCst);
    for number in sent..sent + 500 {
        publisher.publish_wait(&message(0, number)).unwrap();
    }
    // Connections that were opened while it swallowed still do; each costs one more lease, or the client's patience.
    publisher.flush().unwrap();
    assert!(publisher.stats().batches_resubmitted > 0);
    assert_exactly_once(&history(&client, "gap")[&0], sent + 500);
    cluster.assert_command(&["verify", "gap"]);
}

/// Starts a proxy in front of the broker at `back`. While its flag is set, it loses what is sent to the broker on the first
/// connection, and forwards the answers. Returns the flag and the number of bytes that were lost.
fn losing(front: TcpListener, back: SocketAddr) -> (Arc<AtomicBool>, Arc<AtomicU32>) {
    let (flag, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let (lose, lost) = (Arc::clone(&flag), Arc::clone(&count));
    std::thread::spawn(move || {
        for (index, stream) in front.incoming().enumerate() {
            let Ok(mut stream) = stream else { continue };
            let Ok(mut server) = TcpStream::connect(back) else { continue };
            let (mut up, mut down) = (stream.try_clone().unwrap(), server.try_clone().unwrap());
            let (lose, lost) = (Arc::clone(&lose), Arc::clone(&lost));
            std::thread::spawn(move || {
                let mut buffer = [0; 16 << 10];
                while let Ok(read @ 1..) = up.read(&mut buffer) {
                    if index == 0 && lose.load(Ordering::SeqCst) {
                        lost.fetch_add(read as u32, Ordering::SeqCst);
                    } else if server.write_all(&buffer[..read]).is_err() {
                        return;
                    }
                }
            });
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut down, &mut stream);
                let _ = stream.shutdown(Shutdown::Both);
            });
        }
    });
    (flag, count)
}

/// Nobody can tell whether what was sent and not acknowledged is in the log. The publisher neither loses it nor sends it
/// again in silence.
#[test]
fn a_publisher_whose_slot_went_to_another_client_says_what_is_in_doubt() {
    let front = TcpListener::bind("127.0.0.1:0").unwrap();
    let back = loopback();
    let advertised = front.local_addr().unwrap().to_string();
    let (lose, lost) = losing(front, back);
    let environment = [("EMBARCADERO_BROKER_SESSION_IDLE_MS", "100")];
    let mut cluster = Cluster::start(0, &[REGION, &["--max-sessions", "1"]].concat(), &environment);
    cluster.add(&["--data", &back.to_string(), "--advertise", &advertised]);
    // It leaves no broker that is silent: only the end of its session ends it.
    let config = ClientConfig { batch_size: Some(4096), progress_timeout_ms: 3_600_000, ..cluster.config() };
    let client = Client::connect(config).unwrap();
    client.create_topic("lent", TopicOptions::default()).unwrap();
    let publisher = client.publisher("lent").unwrap();
    let known = publisher.publish_wait(&message(0, 0)).unwrap();
    publisher.flush().unwrap();
    lose.store(true, Ordering::SeqCst);
    // Nothing is in flight, so that it is sent at once.
    let doubtful = publisher.publish_wait(&message(0, 1)).unwrap();
    eventually("the batch is on its way", || lost.load(Ordering::SeqCst) > 64);

    let other = cluster.client();
    let mut lent = None;
    eventually("another client gets the slot", || {
        lent = other.publisher("lent").ok();
        lent.is_some()
    });
    let lent = lent.unwrap();
    lent.publish_wait(&message(1, 0)).unwrap();
    lent.flush().unwrap();
    let ended = publisher.flush();
    assert!(matches!(ended, Err(ClientError::SessionLost { in_doubt: 1 })), "{ended:?}");
    assert!(matches!(publisher.poll(known), Ok(Status::Acknowledged(_))));
    assert!(matches!(publisher.poll(doubtful), Err(ClientError::SessionLost { in_doubt: 1 })));
    let seen = history(&other, "lent");
    assert_eq!(seen, [(0, vec![(0, 0)]), (1, vec![(0, 1)])].into());
    cluster.assert_command(&["verify", "lent"]);
}

#[test]
fn killed_publisher_subscriber_and_broker_leave_the_others_undisturbed() {
    let mut cluster = Cluster::start(4, &["--size", "512MiB", "--segment-size", "1MiB"], &[]);
    let client =
        Client::connect(ClientConfig { batch_size: Some(16 << 10), buffer_bytes: 1 << 20, ..cluster.config() })
            .unwrap();
    client.create_topic("kill", TopicOptions { order: Order::Strong, ..TopicOptions::default() }).unwrap();

    let mut victim = cluster.command(&["produce", "kill"]).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut feed = victim.stdin.take().unwrap();
    let feeder = std::thread::spawn(move || {
        for number in 0.. {
            let mut line = message(9, number);
            line.push(b'\n');
            if feed.write_all(&line).is_err() {
                return;
            }
            // It must not fill the pool before it is killed.
            if number % 100 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    eventually("the victim publishes", || client.describe_topic("kill").unwrap().1[0].batches > 2);
    let mut reader = cluster.command(&["consume", "kill", "--follow"]).stdout(Stdio::null()).spawn().unwrap();

    let publisher = client.publisher("kill").unwrap();
    let mut ids = Vec::new();
    for number in 0..60_000u64 {
        match number {
            15_000 => {
                victim.kill().unwrap();
                victim.wait().unwrap();
            }
            25_000 => {
                reader.kill().unwrap();
                reader.wait().unwrap();
            }
            35_000 => cluster.brokers[2].kill(),
            _ => {}
        }
        ids.push(publisher.publish_wait(&message(0, number)).unwrap());
    }
    publisher.flush().unwrap();
    feeder.join().unwrap();
    let seen = history(&client, "kill");
    assert_exactly_once(&seen[&0], 60_000);
    assert_offsets(&publisher, &ids, &seen[&0]);
    // The killed publisher's messages are a prefix of what it sent, each once.
    assert_exactly_once(&seen[&9], seen[&9].len() as u64);

    // The broker comes back under its id as another incarnation and serves again.
    let again = cluster.add(&["--id", "2"]);
    assert_eq!(cluster.brokers[again].id, BrokerId(2));
    cluster.await_brokers(4);
    let second = client.publisher("kill").unwrap();
    for number in 0..1000 {
        second.publish_wait(&message(1, number)).unwrap();
    }
    second.flush().unwrap();
    assert_exactly_once(&history(&client, "kill")[&1], 1000);
}

#[test]
fn a_leader_that_restarts_goes_on_where_the_region_stands() {
    let mut cluster = Cluster::start(2, REGION, &[("EMBARCADERO_BROKER_GAP_LEASE_MS", "500")]);
    let client =
        Client::connect(ClientConfig { batch_size: Some(16 << 10), buffer_bytes: 1 << 20, ..cluster.config() })
            .unwrap();
    client.create_topic("leader", TopicOptions::default()).unwrap();
    let first = client.publisher("leader").unwrap();
    for number in 0..5000 {
        first.publish_wait(&message(0, number)).unwrap();
    }
    first.flush().unwrap();
    let control = cluster.control().to_owned();
    cluster.brokers[0].kill();
    let index = {
        // The same region, id and control port.
        cluster.brokers.remove(0);
        cluster.add(&["--id", "0", "--control", &control])
    };
    cluster.brokers.swap(0, index);
    cluster.await_brokers(2);
    for number in 5000..6000 {
        first.publish_wait(&message(0, number)).unwrap();
    }
    first.flush().unwrap();
    let client = cluster.client();
    assert_exactly_once(&history(&client, "leader")[&0], 6000);
}
