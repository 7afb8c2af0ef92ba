//! Promise: `embarcadero cluster` destroys nothing that may be needed.

use crate::support::{Cluster, PROGRAM, assert_exactly_once, history, loopback, message, region_path};
use embarcadero_client::{Client, ClientConfig, TopicOptions};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

/// The command. Dropped, it is told to stop, with its brokers.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

#[test]
fn a_region_outlives_brokers_that_all_died() {
    let (region, port) = (region_path(), loopback().port().to_string());
    let path = region.to_str().unwrap();
    let size = ["--size", "128MiB", "--segment-size", "1MiB"];
    let child = Command::new(PROGRAM)
        .args(["cluster", "-n", "2", "--region", path, "--port", &port])
        .args(size)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut running = Running(child);
    let mut lines = BufReader::new(running.0.stdout.take().unwrap()).lines();
    // "broker 0: pid 1234, control 127.0.0.1:7000"
    let started: Vec<String> = lines.by_ref().take(2).map(Result::unwrap).collect();
    let part = |line: &str, begin: &str| line.split(begin).nth(1).unwrap().split(',').next().unwrap().to_owned();

    let client = Client::connect(ClientConfig::at(part(&started[0], "control "))).unwrap();
    client.create_topic("t", TopicOptions::default()).unwrap();
    let publisher = client.publisher("t").unwrap();
    for number in 0..100 {
        publisher.publish_wait(&message(0, number)).unwrap();
    }
    publisher.flush().unwrap();
    publisher.close().unwrap();
    for line in &started {
        assert!(Command::new("kill").args(["-9", &part(line, "pid ")]).status().unwrap().success());
    }
    let mut said = String::new();
    running.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(!running.0.wait().unwrap().success());
    assert!(said.contains("all brokers ended") && said.contains(&format!("cluster --region {path}")), "{said}");

    let mut cluster = Cluster::on(region, &[]);
    cluster.add(&[]);
    cluster.await_brokers(1);
    assert_exactly_once(&history(&cluster.client(), "t")[&0], 100);
}
