//! Benches print rows that can be drawn, and speak to others as they expect.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_embarcadero-bench")).args(arguments).output().unwrap()
}

/// Longest wait for what must come: long enough for a machine whose cores are busy.
const PATIENCE: Duration = Duration::from_secs(300);

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_grid_of_figures_is_drawn() {
    let directory = tempfile::tempdir().unwrap();
    let bench = ["publish", "--over", "message-bytes=64,1024", "--runs", "1", "--seconds", "0.05", "--json"];
    let printed = run(&bench);
    assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
    let rows = directory.path().join("rows");
    std::fs::write(&rows, printed.stdout).unwrap();
    let out = directory.path().join("pictures");
    let drawn = run(&["plot", rows.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    assert!(drawn.status.success(), "{}", String::from_utf8_lossy(&drawn.stderr));
    for picture in ["publish.goodput.over.message_bytes.svg", "publish.goodput.over.message_bytes.png", "ratios.svg"] {
        assert!(std::fs::metadata(out.join(picture)).unwrap().len() > 1000, "{picture}");
    }

    std::fs::write(&rows, "{\"name\": 1}\n").unwrap();
    let refused = run(&["plot", rows.to_str().unwrap()]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("line 1"), "{error}");
}

/// The other implementation is librdkafka's mock cluster, which kcat starts and reads from.
#[test]
fn what_we_publish_as_kafka_clients_do_another_implementation_reads() {
    let directory = tempfile::tempdir().unwrap();
    let read = directory.path().join("read");
    let mut kcat = Command::new("kcat")
        .args(["-b", "mock", "-X", "test.mock.num.brokers=1", "-d", "mock", "-u", "-C", "-t", "embarcadero-bench"])
        // The mock keeps little: it is read at once.
        .args([
            "-o",
            "beginning",
            "-X",
            "check.crcs=true",
            "-X",
            "fetch.wait.max.ms=1",
            "-X",
            "auto.offset.reset=earliest",
        ])
        .args(["-f", "%S %s\\n"])
        .stdout(std::fs::File::create(&read).unwrap())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kcat, which hw-setup/deps installs");
    let log = BufReader::new(kcat.stderr.take().unwrap());
    let _kcat = Killed(kcat);
    let mut lines = log.lines().map_while(Result::ok);
    let address = lines.find_map(|line| Some(line.split_once("bootstrap.servers=")?.1.to_owned())).unwrap();
    // Nobody would read it otherwise, and kcat would wait.
    let _drain = std::thread::spawn(move || lines.for_each(drop));

    let once = ["--runs", "1", "--seconds", "0.02", "--message-bytes", "100", "--json"];
    let output = run(&[["peers", "--kafka", &address].as_slice(), &once].concat());
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for figure in ["kafka.goodput", "kafka.publish_to_ack.p50"] {
        assert!(printed.contains(figure), "{printed}");
    }
    let whole = format!("100 {}", "m".repeat(100));
    eventually("kcat reads messages", || {
        let read = std::fs::read_to_string(&read).unwrap();
        let complete = read.rsplit_once('\n').map_or("", |(complete, _)| complete);
        assert!(complete.lines().all(|line| line == whole), "{complete}");
        !complete.is_empty()
    });
}
