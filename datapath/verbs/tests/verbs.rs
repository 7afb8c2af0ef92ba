//! The verbs layer: two queue pairs of this process, connected to each other.
//!
//! They are of a NIC in software, of a port of DPDK, of a device of the host, or of two kinds. NICs in software need root.
//! `scripts/lab run -- ...` has such a device. Elsewhere those tests are ignored.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use embarcadero_os::buffer::Buffer;
use embarcadero_os::{Interest, Poller};
#[cfg(feature = "dpdk")]
use embarcadero_verbs::DpdkConfig;
use embarcadero_verbs::{
    Completion, CompletionQueue, Context, LocalPort, MemoryRegion, MemoryWindow, Outcome, ProtectionDomain, QueuePair,
    QueuePairOptions, Request, Sending, SharedReceiveQueue, Work, WorkError, windows_are_enforced,
};
use nix::sched::{CloneFlags, unshare};
use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// Bytes of a host's memory.
const BYTES: usize = 1 << 20;
/// Time that only a broken device takes.
const LIMIT: Duration = Duration::from_secs(600);

type Device = (Arc<Context>, LocalPort);
/// Opens the device that writes, and the one that is written to.
type Open = fn() -> [Device; 2];

fn hardware() -> [Device; 2] {
    [0; 2].map(|_| Context::find(None).unwrap())
}

fn software() -> [Device; 2] {
    [0; 2].map(|_| Context::software(Some(Ipv4Addr::LOCALHOST.into())).unwrap())
}

fn software_over_ipv6() -> [Device; 2] {
    [0; 2].map(|_| Context::software(Some(Ipv6Addr::LOCALHOST.into())).unwrap())
}

const KERNEL: &str = "10.9.1.1";
const SOFTWARE: Ipv4Addr = Ipv4Addr::new(10, 9, 1, 2);

fn kernels_to_ours() -> [Device; 2] {
    [Context::find(Some("rxe8")).unwrap(), Context::software(Some(SOFTWARE.into())).unwrap()]
}

fn ours_to_the_kernels() -> [Device; 2] {
    let [kernels, ours] = kernels_to_ours();
    [ours, kernels]
}

/// Arguments of DPDK for virtual devices and no others.
#[cfg(feature = "dpdk")]
fn eal(devices: &[&str]) -> Vec<String> {
    let fixed = ["--no-huge", "--no-shconf", "--no-pci", "--no-telemetry", "-m", "384"];
    let devices = devices.iter().map(|device| format!("--vdev={device}"));
    fixed.map(str::to_owned).into_iter().chain(devices).collect()
}

/// Settings of a port that all tests of this process share.
#[cfg(feature = "dpdk")]
fn port_of_dpdk() -> DpdkConfig {
    DpdkConfig {
        eal: eal(&["net_ring0", "net_ring1"]),
        port: Some("net_ring0".to_owned()),
        address: Some(Ipv4Addr::new(10, 78, 0, 1).into()),
        ..DpdkConfig::default()
    }
}

#[cfg(feature = "dpdk")]
fn dpdk() -> [Device; 2] {
    [0; 2].map(|_| Context::dpdk(&port_of_dpdk()).unwrap())
}

/// Opens a port with two queues, so that each completion queue has its own.
#[cfg(feature = "dpdk")]
fn queues_of_dpdk() -> [Device; 2] {
    let address = Some(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).into());
    let port = Some("net_ring1".to_owned());
    let config = DpdkConfig { port, address, vlan: Some(78), queues: 2, ..port_of_dpdk() };
    [0; 2].map(|_| Context::dpdk(&config).unwrap())
}

#[cfg(feature = "dpdk")]
#[test]
fn a_port_of_dpdk_has_one_address() {
    let [(first, _), (again, _)] = dpdk();
    assert_eq!(first.name(), again.name());
    let other = DpdkConfig { address: Some(Ipv4Addr::new(10, 78, 0, 2).into()), ..port_of_dpdk() };
    let error = Context::dpdk(&other).err().expect("the port has another address").to_string();
    assert!(error.contains("other settings"), "{error}");
}

/// Opens the kernel's soft-RoCE, and a port of DPDK at the interface `soft8`.
#[cfg(feature = "dpdk")]
fn kernels_to_dpdk() -> [Device; 2] {
    let eal = eal(&["net_af_packet0,iface=soft8,blocksz=65536,framesz=8192,framecnt=512"]);
    let config = DpdkConfig { eal, address: Some(SOFTWARE.into()), mtu: 8150, ..DpdkConfig::default() };
    [Context::find(Some("rxe8")).unwrap(), Context::dpdk(&config).unwrap()]
}

#[cfg(feature = "dpdk")]
fn dpdk_to_the_kernels() -> [Device; 2] {
    let [kernels, ours] = kernels_to_dpdk();
    [ours, kernels]
}

/// All tests share one port, as DPDK is set up with its devices once in a process.
#[cfg(feature = "dpdk")]
#[test]
#[ignore = "needs the kernel's soft-RoCE: scripts/lab has it"]
fn the_kernels_soft_roce_and_a_port_of_dpdk() {
    let _wire = Wire::new("");
    shell("ip link set soft8 up");
    for (name, test) in ALL {
        println!("{name}, from soft-RoCE");
        test(kernels_to_dpdk);
        println!("{name}, to soft-RoCE");
        test(dpdk_to_the_kernels);
    }
}

fn shell(commands: &str) {
    assert!(Command::new("sh").args(["-ec", commands]).status().unwrap().success(), "{commands}");
}

/// Runs a test in a network of its own: no device of the host's has UDP port 4791 there.
fn alone(test: fn(Open), open: Open) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        shell("ip link set lo up");
        test(open);
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// Wire from the kernel's soft-RoCE to the interface `soft8`.
struct Wire;

impl Wire {
    /// Makes the wire. `at` are arguments of ip-link(8) that place the interface.
    fn new(at: &str) -> Self {
        shell(&format!(
            "modprobe veth
            ip link add kernel8 mtu 4500 type veth peer name soft8 mtu 4500 {at}
            ip addr add {KERNEL}/24 dev kernel8
            ip link set kernel8 up
            rdma link add rxe8 type rxe netdev kernel8"
        ));
        Self
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        shell("rdma link delete rxe8; ip link del kernel8");
    }
}

/// Runs a test between the kernel's soft-RoCE and a network of the test's own, where a NIC in software is.
fn between(test: fn(Open), open: Open) {
    let (networks, network) = channel();
    let (ready, is_ready) = channel();
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        networks.send(std::fs::File::open("/proc/thread-self/ns/net").unwrap()).unwrap();
        is_ready.recv().unwrap();
        shell(&format!("ip addr add {SOFTWARE}/24 dev soft8; ip link set soft8 up; ip link set lo up"));
        test(open);
    });
    let network = network.recv().unwrap();
    let _wire = Wire::new(&format!("netns /proc/{}/fd/{}", std::process::id(), network.as_raw_fd()));
    ready.send(()).unwrap();
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

macro_rules! on_all {
    ($($test:ident),* $(,)?) => {
        mod on_a_device_of_the_host {
            $(#[test]
            #[ignore = "needs an RDMA device: scripts/lab has one"]
            fn $test() {
                super::$test(super::hardware);
            })*
        }
        mod on_a_nic_in_software {
            $(#[test]
            fn $test() {
                super::alone(super::$test, super::software);
            })*
        }
        mod on_a_nic_in_software_over_ipv6 {
            $(#[test]
            fn $test() {
                super::alone(super::$test, super::software_over_ipv6);
            })*
        }
        mod from_the_kernels_soft_roce_to_a_nic_in_software {
            $(#[test]
            #[ignore = "needs the kernel's soft-RoCE: scripts/lab has it"]
            fn $test() {
                super::between(super::$test, super::kernels_to_ours);
            })*
        }
        mod from_a_nic_in_software_to_the_kernels_soft_roce {
            $(#[test]
            #[ignore = "needs the kernel's soft-RoCE: scripts/lab has it"]
            fn $test() {
                super::between(super::$test, super::ours_to_the_kernels);
            })*
        }
        #[cfg(feature = "dpdk")]
        mod on_a_port_of_dpdk {
            $(#[test]
            fn $test() {
                super::$test(super::dpdk);
            })*
        }
        #[cfg(feature = "dpdk")]
        mod on_several_queues_of_a_port_of_dpdk {
            $(#[test]
            fn $test() {
                super::$test(super::queues_of_dpdk);
            })*
        }
        #[cfg(feature = "dpdk")]
        const ALL: &[(&str, fn(Open))] = &[$((stringify!($test), $test)),*];
    };
}
on_all!(
    a_window_is_open_to_its_queue_pair_alone,
    a_write_outside_a_registration_is_refused_and_changes_nothing,
    the_probe_of_windows_answers,
    a_closed_window_refuses_and_others_are_not_disturbed,
    a_chain_arrives_in_order_and_a_write_without_bytes_signals,
    large_writes_arrive_whole,
    a_peer_that_does_not_poll_answers_all_the_same,
    a_queue_that_was_armed_wakes_its_owner,
    a_writer_waits_for_receives,
    numbers_of_packets_wrap,
);

/// Two connected queue pairs: `near` writes, `far` is written to.
struct Pair {
    near: QueuePair<Sending>,
    near_queue: CompletionQueue,
    far: QueuePair<Sending>,
    far_queue: CompletionQueue,
}

/// Host with memory that is written to, and the domain of the writer.
struct Host {
    writer: (Arc<ProtectionDomain>, LocalPort),
    domain: Arc<ProtectionDomain>,
    port: LocalPort,
    receives: Arc<SharedReceiveQueue>,
    memory: Buffer,
    region: MemoryRegion,
}

impl Host {
    fn new(open: Open) -> Self {
        Self::with(open, BYTES, 64)
    }

    fn with(open: Open, bytes: usize, receives: u32) -> Self {
        let [near, (far, port)] = open();
        let domain = ProtectionDomain::new(&far).unwrap();
        let memory = Buffer::zeroed(bytes).unwrap();
        let region = MemoryRegion::for_windows(&domain, &memory).unwrap();
        let receives = SharedReceiveQueue::new(&domain, receives).unwrap();
        Self { writer: (ProtectionDomain::new(&near.0).unwrap(), near.1), domain, port, receives, memory, region }
    }

    fn pair(&self) -> Pair {
        self.pair_from(rand::random())
    }

    /// Connects two queue pairs whose packets are numbered from `psn` on, each way.
    fn pair_from(&self, psn: u32) -> Pair {
        let make = |domain: &Arc<ProtectionDomain>, port, shared| {
            let queue = CompletionQueue::new(domain.context(), 128).unwrap();
            let options = QueuePairOptions { send_depth: 32, receive_depth: 1, inline_bytes: 64, shared };
            let mut pair = QueuePair::new(domain, &queue, port, &options).unwrap();
            pair.number_packets_from(psn);
            // Both ends are in this process, however slow it is: silence is no reason to give up.
            pair.send_again(u8::MAX);
            (pair, queue)
        };
        let (near, near_queue) = make(&self.writer.0, &self.writer.1, None);
        let (far, far_queue) = make(&self.domain, &self.port, Some(&self.receives));
        let (near_address, far_address) = (near.address(), far.address());
        let near = near.receive_from(&far_address).unwrap().send().unwrap();
        let far = far.receive_from(&near_address).unwrap().send().unwrap();
        Pair { near, near_queue, far, far_queue }
    }
}

/// Calls `step` until it returns something.
fn until<T>(what: &str, mut step: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = step() {
            return found;
        }
        assert!(begun.elapsed() < LIMIT, "{what}: nothing came");
    }
}

/// Polls until a completion comes.
fn wait(queue: &mut CompletionQueue) -> Completion {
    until("a completion", || {
        let mut found = None;
        queue.poll(|completion| found = Some(completion)).unwrap();
        found
    })
}

fn failure(completion: Completion) -> WorkError {
    match completion.outcome {
        Outcome::Failed(error) => error,
        other => panic!("expected a failure, found {other:?}"),
    }
}

fn request(work: Work<'_>) -> Request<'_> {
    Request { id: 7, signaled: true, work }
}

fn a_window_is_open_to_its_queue_pair_alone(open: Open) {
    let host = Host::new(open);
    let mut pair = host.pair();
    let mut other = host.pair();
    let window = MemoryWindow::new(&host.region, 4096, 8192).unwrap();
    pair.far.post(&[request(Work::Open(&window))]).unwrap();
    assert_eq!(wait(&mut pair.far_queue).outcome, Outcome::Sent);

    let mut source = Buffer::zeroed(8192).unwrap();
    source.fill(0xab);
    let local = MemoryRegion::local(&host.writer.0, &source).unwrap();
    let write = |at: u64, len: u32| Work::Write(Some(local.range(0, len)), window.remote().offset(at), Some(42));
    pair.near.post(&[request(write(0, 8192))]).unwrap();
    assert_eq!(wait(&mut pair.near_queue).outcome, Outcome::Sent);
    assert_eq!(wait(&mut pair.far_queue).outcome, Outcome::Written { bytes: 8192, immediate: 42 });
    assert!(host.memory[4096..12288].iter().all(|byte| *byte == 0xab));

    // Inside, by the peer of another queue pair: the window is not its.
    other.near.post(&[request(write(0, 64))]).unwrap();
    let error = failure(wait(&mut other.near_queue));
    assert!(error.is_remote_access(), "{error}");
}

fn a_write_outside_a_registration_is_refused_and_changes_nothing(open: Open) {
    let host = Host::new(open);
    let mut memory = Buffer::zeroed(8192).unwrap();
    memory.fill(5);
    let writable = MemoryRegion::writable(&host.domain, &memory).unwrap();
    for (at, len) in [(8129u64, 64usize), (8192, 64), (0, 8193)] {
        let mut pair = host.pair();
        let source = Buffer::zeroed(len).unwrap();
        let local = MemoryRegion::local(&host.writer.0, &source).unwrap();
        let to = writable.remote(0, 8192).offset(at);
        pair.near.post(&[request(Work::Write(Some(local.range(0, len as u32)), to, None))]).unwrap();
        let error = failure(wait(&mut pair.near_queue));
        assert!(error.is_remote_access(), "{error}");
    }
    // Another domain's queue pair has no key to it.
    let stranger = Host::new(open);
    let mut pair = stranger.pair();
    pair.near.post(&[request(Work::WriteInline(&[6; 64], writable.remote(0, 64), None))]).unwrap();
    assert!(failure(wait(&mut pair.near_queue)).is_remote_access());
    assert!(memory.iter().all(|byte| *byte == 5));
}

fn the_probe_of_windows_answers(open: Open) {
    let host = Host::new(open);
    let enforced = windows_are_enforced(host.domain.context(), &host.port).unwrap();
    let name = host.domain.context().name();
    println!("{name} keeps a peer inside a window: {enforced}");
    // Soft-RoCE does not; ours does.
    assert!(enforced || !name.starts_with("roce-"));
}

fn a_closed_window_refuses_and_others_are_not_disturbed(open: Open) {
    let mut host = Host::new(open);
    let mut pair = host.pair();
    let mut other = host.pair();
    let window = MemoryWindow::new(&host.region, 0, 4096).unwrap();
    let others = MemoryWindow::new(&host.region, 4096, 4096).unwrap();
    pair.far.post(&[request(Work::Open(&window))]).unwrap();
    other.far.post(&[request(Work::Open(&others))]).unwrap();
    wait(&mut pair.far_queue);
    wait(&mut other.far_queue);
    let stale = window.remote();
    drop(window);
    host.memory[..4096].fill(1);
    pair.near.post(&[request(Work::WriteInline(&[2; 64], stale, Some(0)))]).unwrap();
    let error = failure(wait(&mut pair.near_queue));
    assert!(error.is_remote_access(), "{error}");
    assert!(host.memory[..4096].iter().all(|byte| *byte == 1));
    other.near.post(&[request(Work::WriteInline(&[3; 64], others.remote(), None))]).unwrap();
    assert_eq!(wait(&mut other.near_queue).outcome, Outcome::Sent);
    assert!(host.memory[4096..4160].iter().all(|byte| *byte == 3));
}

fn a_chain_arrives_in_order_and_a_write_without_bytes_signals(open: Open) {
    let host = Host::new(open);
    let mut pair = host.pair();
    let window = MemoryWindow::new(&host.region, 0, 65536).unwrap();
    pair.far.post(&[request(Work::Open(&window))]).unwrap();
    wait(&mut pair.far_queue);
    let bytes = [9u8; 64];
    let requests: Vec<Request<'_>> = (0..10)
        .map(|number| Request {
            id: number,
            signaled: number == 9,
            work: if number % 2 == 0 {
                Work::WriteInline(&bytes, window.remote().offset(64 * number), Some(number as u32))
            } else {
                Work::Write(None, window.remote(), Some(number as u32))
            },
        })
        .collect();
    assert_eq!(pair.near.post(&requests).unwrap(), 10);
    let mut outcomes = Vec::new();
    until("ten completions", || {
        pair.far_queue.poll(|completion| outcomes.push(completion.outcome)).unwrap();
        (outcomes.len() >= 10).then_some(())
    });
    let expected: Vec<_> = (0..10)
        .map(|number| Outcome::Written { bytes: if number % 2 == 0 { 64 } else { 0 }, immediate: number })
        .collect();
    assert_eq!(outcomes, expected);
    assert_eq!(wait(&mut pair.near_queue).id, 9);
    assert!((0..10).all(|number| host.memory[64 * number] == if number % 2 == 0 { 9 } else { 0 }));
}

/// Makes a pair, an open window of 64 KiB at its far side, and 64 KiB of registered memory to write.
fn writer(host: &Host) -> (Pair, MemoryWindow, MemoryRegion, Buffer) {
    let mut pair = host.pair();
    let window = MemoryWindow::new(&host.region, 0, 65536).unwrap();
    pair.far.post(&[request(Work::Open(&window))]).unwrap();
    wait(&mut pair.far_queue);
    let source = Buffer::zeroed(65536).unwrap();
    let local = MemoryRegion::local(&host.writer.0, &source).unwrap();
    (pair, window, local, source)
}

fn a_peer_that_does_not_poll_answers_all_the_same(open: Open) {
    let host = Host::new(open);
    let (mut pair, window, local, _source) = writer(&host);
    for number in 0..20 {
        let write = Work::Write(Some(local.range(0, 65536)), window.remote(), Some(number));
        pair.near.post(&[request(write)]).unwrap();
        assert_eq!(wait(&mut pair.near_queue).outcome, Outcome::Sent);
    }
    let mut arrived = VecDeque::new();
    for number in 0..20 {
        assert_eq!(
            wait_in_order(&mut pair.far_queue, &mut arrived),
            Outcome::Written { bytes: 65536, immediate: number }
        );
    }
}

/// Polls until a completion is there, and takes the oldest. `arrived` keeps those behind it.
fn wait_in_order(queue: &mut CompletionQueue, arrived: &mut VecDeque<Outcome>) -> Outcome {
    until("a completion", || {
        queue.poll(|completion| arrived.push_back(completion.outcome)).unwrap();
        arrived.pop_front()
    })
}

fn a_queue_that_was_armed_wakes_its_owner(open: Open) {
    let host = Host::new(open);
    let (pair, window, local, _source) = writer(&host);
    let Pair { mut near, mut near_queue, far: _far, mut far_queue } = pair;
    let mut poller = Poller::new().unwrap();
    poller.add(far_queue.descriptor(), 7, Interest::INPUT).unwrap();
    far_queue.arm().unwrap();
    far_queue.poll(|completion| panic!("{completion:?}")).unwrap();
    let writing = std::thread::spawn(move || {
        // The owner most likely sleeps by then. If not, it must not fall asleep.
        std::thread::sleep(Duration::from_millis(50));
        near.post(&[request(Work::Write(Some(local.range(0, 65536)), window.remote(), Some(9)))]).unwrap();
        assert_eq!(wait(&mut near_queue).outcome, Outcome::Sent);
    });
    let mut ready = Vec::new();
    let found = until("a completion", || {
        let mut found = None;
        poller.wait(LIMIT, &mut ready).unwrap();
        assert!(ready.iter().any(|ready| ready.token == 7), "the owner was not woken");
        far_queue.arm().unwrap();
        far_queue.poll(|completion| found = Some(completion.outcome)).unwrap();
        found
    });
    assert_eq!(found, Outcome::Written { bytes: 65536, immediate: 9 });
    writing.join().unwrap();
}

fn large_writes_arrive_whole(open: Open) {
    const LEN: usize = 8 << 20;
    let host = Host::with(open, LEN, 64);
    let mut source = Buffer::zeroed(LEN).unwrap();
    for (index, byte) in source.iter_mut().enumerate() {
        *byte = (index % 251) as u8;
    }
    let mut pair = host.pair();
    let window = MemoryWindow::new(&host.region, 0, LEN as u64).unwrap();
    pair.far.post(&[request(Work::Open(&window))]).unwrap();
    wait(&mut pair.far_queue);
    let local = MemoryRegion::local(&host.writer.0, &source).unwrap();
    // The last is as large as soft-RoCE takes (rxe_param.h, RXE_MAX_MSG_SZ).
    for len in [1, 63, 64, 4095, 4096, 4097, 65_536, 1_000_001, LEN as u32] {
        let at = LEN as u64 - u64::from(len);
        let write = Work::Write(Some(local.range(at, len)), window.remote().offset(at), Some(len));
        pair.near.post(&[request(write)]).unwrap();
        let written = Outcome::Written { bytes: len, immediate: len };
        assert_eq!(poll_both(&mut pair, 1, 1), [vec![Outcome::Sent], vec![written]], "{len} bytes");
        assert!(host.memory[at as usize..] == source[at as usize..], "{len} bytes differ");
        host.receives.post(1).unwrap();
    }
}

/// Polls both sides until `near` and `far` many completions came. Polling also answers the other side.
fn poll_both(pair: &mut Pair, near: usize, far: usize) -> [Vec<Outcome>; 2] {
    let mut outcomes = [Vec::new(), Vec::new()];
    until("completions at both sides", || {
        pair.near_queue.poll(|completion| outcomes[0].push(completion.outcome)).unwrap();
        pair.far_queue.poll(|completion| outcomes[1].push(completion.outcome)).unwrap();
        (outcomes[0].len() >= near && outcomes[1].len() >= far).then_some(())
    });
    outcomes
}

fn a_writer_waits_for_receives(open: Open) {
    let host = Host::with(open, BYTES, 1);
    let (mut pair, window, local, _source) = writer(&host);
    let write = |number| request(Work::Write(Some(local.range(0, 65536)), window.remote(), Some(number)));
    let written = |number| Outcome::Written { bytes: 65536, immediate: number };
    assert_eq!(pair.near.post(&[0, 1, 2].map(write)).unwrap(), 3);
    assert_eq!(poll_both(&mut pair, 1, 1), [vec![Outcome::Sent], vec![written(0)]]);
    // The peer has no receive, and says so several times in a while. Nothing completes, however long it lasts.
    let until = Instant::now() + Duration::from_millis(50);
    while Instant::now() < until {
        pair.near_queue.poll(|completion| panic!("{completion:?}")).unwrap();
        pair.far_queue.poll(|completion| panic!("{completion:?}")).unwrap();
    }
    for number in 1..3 {
        host.receives.post(1).unwrap();
        assert_eq!(poll_both(&mut pair, 1, 1), [vec![Outcome::Sent], vec![written(number)]]);
    }
}

/// Packet sequence numbers have 24 bits (IBTA 9.2.9).
fn numbers_of_packets_wrap(open: Open) {
    let mut host = Host::new(open);
    let mut pair = host.pair_from(0xff_ffff - 40);
    let window = MemoryWindow::new(&host.region, 0, 65536).unwrap();
    pair.far.post(&[request(Work::Open(&window))]).unwrap();
    wait(&mut pair.far_queue);
    let mut source = Buffer::zeroed(65536).unwrap();
    for round in 0..8u8 {
        // Several packets, of which the numbers wrap in the midst of one write.
        source.fill(round + 1);
        host.memory.fill(0);
        let local = MemoryRegion::local(&host.writer.0, &source).unwrap();
        let write = Work::Write(Some(local.range(0, 65536)), window.remote(), Some(round.into()));
        pair.near.post(&[request(write)]).unwrap();
        let written = Outcome::Written { bytes: 65536, immediate: round.into() };
        assert_eq!(poll_both(&mut pair, 1, 1), [vec![Outcome::Sent], vec![written]]);
        assert!(host.memory[..65536] == source[..], "write {round} differs");
    }
}
