//! Promise: whatever is published arrives once, in the order that the topic's configuration says, the same for all.

use crate::support::{Cluster, write_text};
use embarcadero_client::{ClientError, MessageId, TopicOptions};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

const PUBLISHERS: usize = 4;

/// Splits consumed lines by publisher. Each line begins with `p<number> `.
fn by_publisher(path: &Path) -> HashMap<String, Vec<Vec<u8>>> {
    let mut lines: HashMap<String, Vec<Vec<u8>>> = HashMap::new();
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path).unwrap());
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).unwrap() > 0 {
        let end = line.iter().position(|byte| *byte == b' ').unwrap();
        let publisher = String::from_utf8(line[..end].to_vec()).unwrap();
        lines.entry(publisher).or_default().push(std::mem::take(&mut line));
    }
    lines
}

/// Publishes `bytes` bytes of text by 4 processes over 4 brokers, and checks what 2 subscriber processes read. They run
/// during that time if `follow` is set, and afterwards otherwise.
fn publish_and_consume(order: &str, bytes: u64, follow: bool) {
    let cluster = Cluster::start(4, &["--size", "768MiB", "--segment-size", "4MiB"], &[]);
    let directory = tempfile::tempdir().unwrap();
    cluster.assert_command(&["topic", "create", "text", "--order", order]);
    let inputs: Vec<_> = (0..PUBLISHERS).map(|number| directory.path().join(format!("p{number}"))).collect();
    let mut lines = 0;
    for (number, input) in inputs.iter().enumerate() {
        write_text(input, &format!("p{number}"), bytes / PUBLISHERS as u64);
        lines += BufReader::new(File::open(input).unwrap()).split(b'\n').count();
    }
    let outputs = ["a", "b"].map(|name| directory.path().join(name));
    let consume = |output: &Path| -> Child {
        let count = lines.to_string();
        cluster.command(&["consume", "text", "--count", &count]).stdout(File::create(output).unwrap()).spawn().unwrap()
    };
    let mut subscribers: Vec<Child> =
        if follow { outputs.iter().map(|output| consume(output)).collect() } else { Vec::new() };
    let mut publishers: Vec<Child> = inputs
        .iter()
        .map(|input| {
            cluster.command(&["produce", "text", "-f", input.to_str().unwrap()]).stderr(Stdio::null()).spawn().unwrap()
        })
        .collect();
    for publisher in &mut publishers {
        assert!(publisher.wait().unwrap().success());
    }
    if !follow {
        subscribers = outputs.iter().map(|output| consume(output)).collect();
    }
    for subscriber in &mut subscribers {
        assert!(subscriber.wait().unwrap().success());
    }
    cluster.assert_command(&["verify", "text"]);
    let global = matches!(order, "strong" | "total");
    if global {
        let same = std::fs::read(&outputs[0]).unwrap() == std::fs::read(&outputs[1]).unwrap();
        assert!(same, "two subscribers read different streams");
    }
    for output in &outputs {
        let mut consumed = by_publisher(output);
        for (number, input) in inputs.iter().enumerate() {
            let mut published: Vec<Vec<u8>> = BufReader::new(File::open(input).unwrap())
                .split(b'\n')
                .map(|line| [line.unwrap(), b"\n".to_vec()].concat())
                .collect();
            let mut read = consumed.remove(&format!("p{number}")).unwrap();
            if order != "strong" {
                published.sort_unstable();
                read.sort_unstable();
            }
            assert!(
                published == read,
                "publisher {number}: {} lines went in, {} came out",
                published.len(),
                read.len()
            );
        }
        assert!(consumed.is_empty(), "lines that nobody published");
    }
}

#[test]
fn strong_order_keeps_every_line_of_200_mb_in_its_publishers_order() {
    publish_and_consume("strong", 200 << 20, true);
}

#[test]
fn total_order_is_one_for_all_and_loses_nothing() {
    publish_and_consume("total", 50 << 20, false);
}

#[test]
fn broker_order_loses_nothing() {
    publish_and_consume("broker", 50 << 20, false);
}

#[test]
fn no_order_loses_nothing() {
    publish_and_consume("none", 50 << 20, true);
}

/// A message can be polled at once, whichever thread seals its batch, and whenever.
#[test]
fn a_message_is_known_from_when_it_was_given_out() {
    let cluster = Cluster::start(1, &["--size", "256MiB", "--segment-size", "4MiB"], &[]);
    let client = cluster.client();
    client.create_topic("known", TopicOptions::default()).unwrap();
    let publisher = client.publisher("known").unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                publisher.flush().unwrap();
            }
        });
        let polled: Result<(), ClientError> = (0..100_000).try_for_each(|_| {
            let id = publisher.publish_wait(b"m")?;
            publisher.poll(id).map(drop)
        });
        done.store(true, Ordering::Relaxed);
        polled.unwrap();
    });
    let Err(ClientError::UnknownId { .. }) = publisher.poll(MessageId { batch: 1 << 40, index: 0 }) else {
        panic!("an identity that was never given out is known");
    };
}
