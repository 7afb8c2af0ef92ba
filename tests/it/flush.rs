//! Promise: `embarcadero region flush` empties this host's caches of a region, and changes nothing in it.

use crate::support::{Cluster, assert_exactly_once, history, message, run};
use embarcadero_client::TopicOptions;
use std::os::unix::fs::MetadataExt;

const LINE_BYTES: u64 = 64;

/// The broker is killed, its host is flushed, and the id goes on.
#[test]
fn a_killed_brokers_host_is_flushed_before_its_id_goes_on() {
    let create =
        ["--size", "128MiB", "--segment-size", "1MiB", "--allocator", "partitioned", "--max-brokers", "4", "--sparse"];
    let environment = [("EMBARCADERO_BROKER_CXL__COHERENCE", "none"), ("EMBARCADERO_BROKER_CXL__PREFAULT", "false")];
    let mut cluster = Cluster::start(0, &create, &environment);
    cluster.set("EMBARCADERO_BROKER_ROLE", "leader");
    cluster.add(&["--id", "0"]);
    let client = cluster.client();
    client.create_topic("t", TopicOptions::default()).unwrap();
    let publisher = client.publisher("t").unwrap();
    for number in 0..100 {
        publisher.publish_wait(&message(0, number)).unwrap();
    }
    publisher.flush().unwrap();
    publisher.close().unwrap();
    let dead = cluster.kill(0);

    let in_memory = || std::fs::metadata(&cluster.region).unwrap().blocks() * 512;
    let (before, held) = (cluster.inspect(), in_memory());
    let path = cluster.region.to_str().unwrap();
    let flushed = run(&["region", "flush", "--path", path]);
    let said = String::from_utf8(flushed.stdout).unwrap();
    assert!(flushed.status.success(), "{said}{}", String::from_utf8_lossy(&flushed.stderr));
    // "flushed 1234 lines (78976 bytes) of /dev/shm/r by clflushopt in 0.001 s"
    let numbers: Vec<u64> = said.split([' ', '(']).filter_map(|word| word.parse().ok()).collect();
    let [lines, bytes] = numbers[..] else { panic!("{said}") };
    assert_eq!(bytes, lines * LINE_BYTES, "{said}");
    assert!(said.contains(path) && said.contains(" by clflush"), "{said}");
    assert_eq!(bytes, held, "all that is in memory is flushed, and no more");
    assert!(in_memory() == held && held < 64 << 20, "pages that were not there stay away");
    assert_eq!(cluster.inspect(), before);

    cluster.restart(&dead);
    assert_exactly_once(&history(&cluster.client(), "t")[&0], 100);
}
