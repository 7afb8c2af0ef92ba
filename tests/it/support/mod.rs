//! Support of whole-system tests: real broker processes on a region of their own.

pub(crate) mod etcd;
pub(crate) mod verbs;
pub(crate) mod wire;

use embarcadero_client::{Client, ClientConfig, ClusterView, Publisher, Start, TopicView};
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::region::RegionFile;
use embarcadero_cxl::session_table::read_session;
use embarcadero_wire::batch::BatchOrigin;
use embarcadero_wire::{BrokerId, Epoch, OpenPublish, SessionSlot};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_embarcadero");

/// Longest wait for what must happen. Only a broken program reaches it, however busy the machine is.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
/// Time without progress after which clients fail. A quarter of it is what they wait for a silent broker.
const PROGRESS: Duration = Duration::from_secs(120);

/// Settings of every broker that a test does not change. Leases that no descheduled process loses: brokers that end are
/// noticed without them.
const PATIENT: [(&str, &str); 6] = [
    ("EMBARCADERO_BROKER_LEADER_LEASE_MS", "30000"),
    ("EMBARCADERO_BROKER_BROKER_LEASE_MS", "60000"),
    ("EMBARCADERO_BROKER_EXHAUSTED_WAIT_MS", "120000"),
    ("EMBARCADERO_BROKER_DRAIN_MS", "120000"),
    ("EMBARCADERO_BROKER_OPENING_MS", "120000"),
    ("EMBARCADERO_BROKER_ETCD__LEASE_S", "10"),
];

pub(crate) struct Broker {
    pub child: Child,
    pub id: BrokerId,
    /// Arguments that it was started with.
    arguments: Vec<String>,
    pub data: SocketAddr,
    pub control: String,
}

impl Broker {
    /// Kills it with SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends a signal, for example `-STOP`.
    pub(crate) fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Broker processes and their region. Dropping it kills and removes them.
pub(crate) struct Cluster {
    pub brokers: Vec<Broker>,
    pub region: PathBuf,
    environment: Vec<(String, String)>,
}

static REGIONS: AtomicU32 = AtomicU32::new(0);

pub(crate) fn region_path() -> PathBuf {
    let number = REGIONS.fetch_add(1, Ordering::Relaxed);
    PathBuf::from(format!("/dev/shm/embarcadero-test-{}-{number}", std::process::id()))
}

/// Finds a free address at `host` for something that is started later, or started again. Its port lies below those that the
/// kernel hands out (`ip_local_port_range`, from 32768), so that nobody gets it in between.
pub(crate) fn address_at(host: IpAddr) -> SocketAddr {
    const FIRST: u32 = 12_000;
    const PORTS: u32 = 20_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        // Test programs that run at the same time begin at different places.
        let number = NEXT.fetch_add(1, Ordering::Relaxed) + 64 * std::process::id();
        let address = SocketAddr::new(host, (FIRST + number % PORTS) as u16);
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// Finds a free address on loopback, as [`address_at`] does.
pub(crate) fn loopback() -> SocketAddr {
    address_at(Ipv4Addr::LOCALHOST.into())
}

/// Returns the number that the variable `name` has, else `default`.
pub(crate) fn environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

pub(crate) fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).stdin(Stdio::null()).output().unwrap()
}

impl Cluster {
    /// Makes a region with the arguments `create` of `region create`, and starts `brokers` brokers on it. `environment`
    /// changes their defaults.
    pub(crate) fn start(brokers: u32, create: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::start_on(region_path(), brokers, create, environment)
    }

    /// Uses a region that is there. Brokers will be added.
    pub(crate) fn on(region: PathBuf, environment: &[(&str, &str)]) -> Self {
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self { brokers: Vec::new(), region, environment }
    }

    /// Starts a cluster as [`Cluster::start`] does, with its region at `region`, which may be a device-dax node.
    pub(crate) fn start_on(region: PathBuf, brokers: u32, create: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut arguments = vec!["region", "create", "--path", region.to_str().unwrap()];
        arguments.extend(create);
        let made = run(&arguments);
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let mut cluster = Self::on(region, environment);
        for _ in 0..brokers {
            cluster.add(&[]);
        }
        if brokers > 0 {
            cluster.await_brokers(brokers as usize);
        }
        cluster
    }

    /// Sets a variable of the brokers that are started from now on.
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Starts one more broker. Returns its index.
    pub(crate) fn add(&mut self, arguments: &[&str]) -> usize {
        self.add_under(&[], arguments)
    }

    /// Starts one more broker by a `command` that is put before its command line. Returns its index.
    pub(crate) fn add_under(&mut self, command: &[&str], arguments: &[&str]) -> usize {
        let line = [command, &[PROGRAM]].concat();
        let control = ["--control", &loopback().to_string()].map(str::to_owned);
        let mut child = Command::new(line[0])
            .args(&line[1..])
            .args(["broker", "--region", self.region.to_str().unwrap()])
            .args(if arguments.contains(&"--control") { &[] } else { &control[..] })
            .args(arguments)
            .env("EMBARCADERO_BROKER_THREADS__POLLERS_ON_HOST", "8")
            .envs(PATIENT)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: serde_json::Value = serde_json::from_str(&line).expect("the broker did not start");
        self.brokers.push(Broker {
            child,
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            id: BrokerId(said["broker"].as_u64().unwrap() as u32),
            data: said["data"].as_str().unwrap().parse().unwrap(),
            control: said["control"].as_str().unwrap().to_owned(),
        });
        self.brokers.len() - 1
    }

    pub(crate) fn await_brokers(&self, count: usize) {
        eventually(&format!("the leader sees {count} brokers"), || self.view().brokers.len() == count);
    }

    /// Returns the report of `region inspect`.
    pub(crate) fn inspect(&self) -> serde_json::Value {
        let report = run(&["region", "inspect", "--json", "--path", self.region.to_str().unwrap()]);
        serde_json::from_slice(&report.stdout).unwrap()
    }

    pub(crate) fn control(&self) -> &str {
        &self.brokers[0].control
    }

    pub(crate) fn config(&self) -> ClientConfig {
        ClientConfig {
            connect_timeout_ms: PROGRESS.as_millis() as u64,
            progress_timeout_ms: PROGRESS.as_millis() as u64,
            ..ClientConfig::at(self.control())
        }
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.config()).unwrap()
    }

    /// Configuration of a client that knows every broker, as the first may die.
    fn config_of_all(&self) -> ClientConfig {
        let bootstrap = self.brokers.iter().map(|broker| broker.control.clone()).collect();
        ClientConfig { bootstrap, ..self.config() }
    }

    /// Connects a client that knows every broker. Its buffers are of a modest size.
    pub(crate) fn client_of_all(&self) -> Client {
        let config = ClientConfig { batch_size: Some(16 << 10), buffer_bytes: 1 << 20, ..self.config_of_all() };
        Client::connect(config).unwrap()
    }

    /// Asks for the state of the cluster until it is told. Between two leaders nobody tells it.
    pub(crate) fn view(&self) -> ClusterView {
        let mut view = None;
        eventually("a leader that answers", || {
            view = Client::connect(self.config_of_all()).and_then(|client| client.cluster()).ok();
            view.is_some()
        });
        view.unwrap()
    }

    /// Waits for a leader that lives. Returns its index among the brokers.
    pub(crate) fn leader(&self) -> usize {
        let mut index = None;
        eventually("a broker becomes the leader", || {
            let found = self.view().brokers.into_iter().find(|broker| broker.leader);
            index = found.and_then(|leader| self.brokers.iter().position(|broker| broker.id == leader.id));
            index.is_some()
        });
        index.unwrap()
    }

    /// Returns the broker that leads, or led last, and its term, as the region has them.
    pub(crate) fn leading(&self) -> (BrokerId, u64) {
        let found = std::cell::Cell::new(None);
        eventually("the leader's statement is whole", || {
            let statement = &self.inspect()["control_block"];
            found.set(statement["broker"].as_u64().zip(statement["term"].as_u64()));
            found.get().is_some()
        });
        let (broker, term) = found.get().unwrap();
        (BrokerId(broker as u32), term)
    }

    /// Returns the term of the leader, or of the last one.
    pub(crate) fn term(&self) -> u64 {
        self.leading().1
    }

    /// Waits until another broker than `broker` leads.
    pub(crate) fn await_another_leader(&self, broker: BrokerId) {
        eventually("another broker leads", || self.leading().0 != broker);
    }

    /// Kills a broker with SIGKILL. Returns what [`Cluster::restart`] needs.
    pub(crate) fn kill(&mut self, index: usize) -> Broker {
        let mut broker = self.brokers.remove(index);
        broker.kill();
        broker
    }

    /// Starts a broker again that was killed, with its id and control address.
    pub(crate) fn restart(&mut self, dead: &Broker) {
        let id = dead.id.to_string();
        let mut arguments: Vec<&str> = dead.arguments.iter().map(String::as_str).collect();
        for (flag, value) in [("--id", id.as_str()), ("--control", dead.control.as_str())] {
            if !arguments.contains(&flag) {
                arguments.extend([flag, value]);
            }
        }
        self.add(&arguments);
    }

    /// Reads the numbers and the token of a publisher's session from the region, to speak in its name.
    pub(crate) fn session(&self, publisher: &Publisher, topic: &TopicView) -> (OpenPublish, BatchOrigin) {
        let client_id = publisher.client_id();
        let report = self.inspect();
        let sessions = report["sessions"].as_array().unwrap();
        let session = sessions.iter().find(|session| session["client_id"].as_u64() == Some(client_id.0)).unwrap();
        let origin = BatchOrigin {
            client_id,
            session_epoch: Epoch(session["epoch"].as_u64().unwrap() as u32),
            session_slot: SessionSlot(session["slot"].as_u64().unwrap() as u32),
            topic: topic.id,
            topic_incarnation: topic.incarnation,
        };
        let file = RegionFile::open(&self.region, FlushMethod::None).unwrap();
        let row = read_session(file.region(), origin.session_slot).unwrap().used().unwrap();
        let open = OpenPublish {
            client_id,
            session_epoch: origin.session_epoch,
            session_slot: origin.session_slot,
            topic: topic.id,
            topic_incarnation: topic.incarnation,
            ack_level: 1,
            token: row.token,
            ..OpenPublish::blank()
        };
        (open, origin)
    }

    /// Makes a command of the program against this cluster.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).env("EMBARCADERO_BROKERS", self.control()).stdin(Stdio::null());
        let ClientConfig { connect_timeout_ms, progress_timeout_ms, .. } = self.config();
        command.env("EMBARCADERO_CLIENT_CONNECT_TIMEOUT_MS", connect_timeout_ms.to_string());
        command.env("EMBARCADERO_CLIENT_PROGRESS_TIMEOUT_MS", progress_timeout_ms.to_string());
        command
    }

    pub(crate) fn assert_command(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {out}{err}");
        out.into_owned()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.brokers.clear();
        if self.region.is_file() {
            let _ = std::fs::remove_file(&self.region);
        }
    }
}

/// Kills every broker, removes the region, rebuilds it from the directories `from`, and starts other brokers on it.
pub(crate) fn rebuild(cluster: &mut Cluster, create: &[&str], from: &[&Path]) {
    cluster.brokers.iter_mut().for_each(Broker::kill);
    let brokers = std::mem::take(&mut cluster.brokers).len();
    std::fs::remove_file(&cluster.region).unwrap();
    let path = cluster.region.to_str().unwrap();
    assert!(run(&[&["region", "create", "--path", path], create].concat()).status.success());
    let from: Vec<&str> = from.iter().map(|path| path.to_str().unwrap()).collect();
    let restored = run(&[&["region", "restore", "--path", path, "--from"], from.as_slice()].concat());
    assert!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    for _ in 0..brokers {
        cluster.add(&[]);
    }
    cluster.await_brokers(brokers);
}

/// Runs a command of the program that must fail, and give the reason.
pub(crate) fn refused(arguments: &[&str], environment: &[(&str, &str)], reason: &str) {
    let output = Command::new(PROGRAM).args(arguments).envs(environment.iter().copied()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains(reason), "{arguments:?}: {said}");
}

/// Polls until `done` returns true. Fails after [`PATIENCE`].
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// TCP proxy that cuts a connection after a number of bytes.
pub(crate) struct Proxy {
    pub address: SocketAddr,
    /// Bytes left until the next cut; negative for never.
    budget: Arc<AtomicI64>,
    cuts: Arc<AtomicU32>,
    stop: Arc<AtomicBool>,
}

impl Proxy {
    pub(crate) fn start(target: SocketAddr) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").unwrap(), target)
    }

    pub(crate) fn on(listener: TcpListener, target: SocketAddr) -> Self {
        let address = listener.local_addr().unwrap();
        let (budget, cuts) = (Arc::new(AtomicI64::new(-1)), Arc::new(AtomicU32::new(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let proxy = Self { address, budget: Arc::clone(&budget), cuts: Arc::clone(&cuts), stop: Arc::clone(&stop) };
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(client) = client else { continue };
                let Ok(server) = TcpStream::connect(target) else { continue };
                let (up, down) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let (budget, cuts) = (Arc::clone(&budget), Arc::clone(&cuts));
                std::thread::spawn(move || pump(up, server, Some((&budget, &cuts))));
                std::thread::spawn(move || pump(down, client, None));
            }
        });
        proxy
    }

    /// Cuts the connection that carries the `bytes`-th byte towards the broker, counted from now on.
    pub(crate) fn cut_after(&self, bytes: i64) {
        self.budget.store(bytes, Ordering::SeqCst);
    }

    pub(crate) fn cuts(&self) -> u32 {
        self.cuts.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, cut: Option<(&AtomicI64, &AtomicU32)>) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let mut pass = read;
        let mut cut_now = false;
        if let Some((budget, cuts)) = cut
            && budget.load(Ordering::SeqCst) >= 0
        {
            let before = budget.fetch_sub(read as i64, Ordering::SeqCst);
            if (0..=read as i64).contains(&before) {
                budget.store(-1, Ordering::SeqCst);
                cuts.fetch_add(1, Ordering::SeqCst);
                pass = before as usize;
                cut_now = true;
            }
        }
        if to.write_all(&buffer[..pass]).is_err() || cut_now {
            break;
        }
    }
    let _ = from.shutdown(std::net::Shutdown::Both);
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// Writes at least `bytes` bytes of text, made from files of the system. Each line begins with `prefix` and its number, so
/// that lines differ.
pub(crate) fn write_text(path: &Path, prefix: &str, bytes: u64) {
    let sources = ["/usr/share/common-licenses", "/usr/share/perl", "/usr/share/doc", "/usr/lib/python3"];
    let mut text = Vec::new();
    for source in sources {
        collect(Path::new(source), &mut text, 8 << 20);
    }
    if text.is_empty() {
        text = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock")).unwrap();
    }
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
    let (mut written, mut number) = (0, 0u64);
    while written < bytes {
        for line in text.split(|byte| *byte == b'\n') {
            let leader = format!("{prefix} {number} ");
            file.write_all(leader.as_bytes()).unwrap();
            file.write_all(line).unwrap();
            file.write_all(b"\n").unwrap();
            written += (leader.len() + line.len() + 1) as u64;
            number += 1;
            if written >= bytes {
                break;
            }
        }
    }
    file.flush().unwrap();
}

fn collect(path: &Path, text: &mut Vec<u8>, limit: usize) {
    let Ok(entries) = std::fs::read_dir(path) else { return };
    let mut entries: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    for entry in entries {
        if text.len() >= limit {
            return;
        }
        let Ok(meta) = std::fs::symlink_metadata(&entry) else { continue };
        if meta.is_dir() {
            collect(&entry, text, limit);
        } else if meta.is_file() && meta.len() < 1 << 20 {
            // Only text: a line of the file must be a line of the test.
            if let Ok(bytes) = std::fs::read(&entry)
                && std::str::from_utf8(&bytes).is_ok()
                && !bytes.contains(&0)
            {
                text.extend_from_slice(&bytes);
            }
        }
    }
}

/// Makes a message of 100 to 999 bytes that names its publisher and its number.
pub(crate) fn message(publisher: u32, number: u64) -> Vec<u8> {
    let mut bytes = format!("{publisher} {number} ").into_bytes();
    bytes.resize(100 + (number % 900) as usize, b'x');
    bytes
}

pub(crate) fn parse(payload: &[u8]) -> (u32, u64) {
    let text = std::str::from_utf8(payload).unwrap();
    let mut words = text.split(' ');
    (words.next().unwrap().parse().unwrap(), words.next().unwrap().parse().unwrap())
}

/// Reads a topic to its present end. Returns each publisher's numbers in order of delivery, with their offsets.
pub(crate) fn history(client: &Client, topic: &str) -> BTreeMap<u32, Vec<(u64, u64)>> {
    let mut seen: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
    let mut due = 0;
    let mut subscriber = client.subscriber(topic, Start::Earliest).unwrap();
    subscriber
        .drain(|message| {
            assert_eq!(message.offset, due, "offsets have a gap");
            due += 1;
            let (publisher, number) = parse(message.payload);
            seen.entry(publisher).or_default().push((number, message.offset));
        })
        .unwrap();
    seen
}

pub(crate) fn assert_exactly_once(seen: &[(u64, u64)], count: u64) {
    assert!(seen.iter().map(|(number, _)| *number).eq(0..count), "not each message once and in order");
}
