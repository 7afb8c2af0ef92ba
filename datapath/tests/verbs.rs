//! The verbs layer against a real device: two queue pairs of this process, connected to each other.
//!
//! Needs an RDMA device (`scripts/lab run -- ...` has one), hence ignored elsewhere.
#![cfg(feature = "rdma")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use embarcadero_datapath::buffer::Buffer;
use embarcadero_datapath::verbs::{
    Completion, CompletionQueue, Context, LocalPort, MemoryRegion, MemoryWindow, Outcome, ProtectionDomain, QueuePair,
    QueuePairOptions, Request, Sending, SharedReceiveQueue, Work, WorkError, windows_are_enforced,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

const BYTES: usize = 1 << 20;

/// A side that is written to, and the side that writes.
struct Pair {
    near: QueuePair<Sending>,
    near_queue: CompletionQueue,
    far: QueuePair<Sending>,
    far_queue: CompletionQueue,
}

struct Host {
    port: LocalPort,
    domain: Arc<ProtectionDomain>,
    receives: Arc<SharedReceiveQueue>,
    memory: Buffer,
    region: Arc<MemoryRegion>,
}

impl Host {
    fn new() -> Self {
        let (context, port) = Context::find(None).unwrap();
        let domain = ProtectionDomain::new(&context).unwrap();
        let memory = Buffer::zeroed(BYTES).unwrap();
        let region = Arc::new(MemoryRegion::for_windows(&domain, &memory).unwrap());
        let receives = SharedReceiveQueue::new(&domain, 64).unwrap();
        Self { port, domain, receives, memory, region }
    }

    fn pair(&self) -> Pair {
        let make = |shared| {
            let queue = CompletionQueue::new(self.domain.context(), 128).unwrap();
            let options = QueuePairOptions { send_depth: 32, receive_depth: 1, inline_bytes: 64, shared };
            (QueuePair::new(&self.domain, &queue, &self.port, &options).unwrap(), queue)
        };
        let (near, near_queue) = make(None);
        let (far, far_queue) = make(Some(&self.receives));
        let (near_address, far_address) = (near.address(), far.address());
        let near = near.receive_from(&far_address).unwrap().send().unwrap();
        let far = far.receive_from(&near_address).unwrap().send().unwrap();
        Pair { near, near_queue, far, far_queue }
    }
}

fn wait(queue: &mut CompletionQueue) -> Completion {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut found = None;
    while found.is_none() {
        queue.poll(|completion| found = Some(completion)).unwrap();
        assert!(Instant::now() < deadline, "no completion");
    }
    found.unwrap()
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

#[test]
#[ignore = "needs an RDMA device: scripts/lab has one"]
fn a_window_is_open_to_its_queue_pair_alone() {
    let host = Host::new();
    let mut pair = host.pair();
    let mut other = host.pair();
    let window = MemoryWindow::new(&host.region, 4096, 8192).unwrap();
    pair.far.post(&[request(Work::Open(&window))]).unwrap();
    assert_eq!(wait(&mut pair.far_queue).outcome, Outcome::Sent);

    let mut source = Buffer::zeroed(8192).unwrap();
    source.fill(0xab);
    let local = MemoryRegion::local(&host.domain, &source).unwrap();
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

#[test]
#[ignore = "needs an RDMA device: scripts/lab has one"]
fn a_write_outside_a_registration_is_refused_and_changes_nothing() {
    let host = Host::new();
    let mut memory = Buffer::zeroed(8192).unwrap();
    memory.fill(5);
    let writable = MemoryRegion::writable(&host.domain, &memory).unwrap();
    for (at, len) in [(8129u64, 64usize), (8192, 64), (0, 8193)] {
        let mut pair = host.pair();
        let source = Buffer::zeroed(len).unwrap();
        let local = MemoryRegion::local(&host.domain, &source).unwrap();
        let to = writable.remote(0, 8192).offset(at);
        pair.near.post(&[request(Work::Write(Some(local.range(0, len as u32)), to, None))]).unwrap();
        let error = failure(wait(&mut pair.near_queue));
        assert!(error.is_remote_access(), "{error}");
    }
    // Another domain's queue pair has no key to it.
    let stranger = Host::new();
    let mut pair = stranger.pair();
    pair.near.post(&[request(Work::WriteInline(&[6; 64], writable.remote(0, 64), None))]).unwrap();
    assert!(failure(wait(&mut pair.near_queue)).is_remote_access());
    assert!(memory.iter().all(|byte| *byte == 5));
}

#[test]
#[ignore = "needs an RDMA device: scripts/lab has one"]
fn the_probe_of_windows_answers() {
    let host = Host::new();
    let enforced = windows_are_enforced(host.domain.context(), &host.port).unwrap();
    println!("this device keeps a peer inside a window: {enforced}");
}

#[test]
#[ignore = "needs an RDMA device: scripts/lab has one"]
fn a_closed_window_refuses_and_others_are_not_disturbed() {
    let mut host = Host::new();
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

#[test]
#[ignore = "needs an RDMA device: scripts/lab has one"]
fn a_chain_arrives_in_order_and_a_write_without_bytes_signals() {
    let host = Host::new();
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
    let deadline = Instant::now() + Duration::from_secs(20);
    while outcomes.len() < 10 && Instant::now() < deadline {
        pair.far_queue.poll(|completion| outcomes.push(completion.outcome)).unwrap();
    }
    let expected: Vec<_> = (0..10)
        .map(|number| Outcome::Written { bytes: if number % 2 == 0 { 64 } else { 0 }, immediate: number })
        .collect();
    assert_eq!(outcomes, expected);
    assert_eq!(wait(&mut pair.near_queue).id, 9);
    assert!((0..10).all(|number| host.memory[64 * number] == if number % 2 == 0 { 9 } else { 0 }));
}
