//! Two queue pairs of the RoCEv2 engine over a link that loses, repeats, reorders and damages packets. Some peers break
//! the protocol.
#![allow(clippy::unwrap_used, clippy::panic)]

use embarcadero_roce::packet::{Aeth, Ecn, Opcode, Packet, Reth, SCRATCH_BYTES, Syndrome, decode};
use embarcadero_roce::psn::Psn;
use embarcadero_roce::{
    Access, Attributes, Completion, Failure, Memory, Nanos, NoAccess, Operation, PathMtu, QueuePair, Receive, Work,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::io::Write;
use std::net::IpAddr;
use std::process::Command;

const KEY: u32 = 0x1234_5678;
/// Address of the memory's first byte, as peers count.
const BASE: u64 = 0x7000_0000_0000;
const MEMORY_BYTES: usize = 1 << 16;
/// Part of the memory that is open to the peer.
const WINDOW: std::ops::Range<usize> = 4096..MEMORY_BYTES - 4096;

/// Memory of which a window is open to one queue pair.
struct Window {
    bytes: Vec<u8>,
    queue_pair: u32,
    open: bool,
}

impl Window {
    fn of(queue_pair: u32) -> Self {
        Self { bytes: vec![0xee; MEMORY_BYTES], queue_pair, open: true }
    }

    /// Returns the range of `bytes` of the memory, if it is inside the window and this queue pair's.
    fn place(&self, queue_pair: u32, remote: Reth) -> Result<std::ops::Range<usize>, NoAccess> {
        let Reth { address, rkey, bytes } = remote;
        let start = address.checked_sub(BASE).and_then(|start| usize::try_from(start).ok()).ok_or(NoAccess)?;
        let end = start.checked_add(bytes as usize).ok_or(NoAccess)?;
        let allowed =
            self.open && queue_pair == self.queue_pair && rkey == KEY && start >= WINDOW.start && end <= WINDOW.end;
        if allowed { Ok(start..end) } else { Err(NoAccess) }
    }
}

impl Memory for Window {
    fn check(&self, queue_pair: u32, remote: Reth, _: Access) -> Result<(), NoAccess> {
        self.place(queue_pair, remote).map(drop)
    }

    fn write(&mut self, queue_pair: u32, rkey: u32, address: u64, bytes: &[u8]) -> Result<(), NoAccess> {
        let place = self.place(queue_pair, Reth { address, rkey, bytes: bytes.len() as u32 })?;
        self.bytes[place].copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, queue_pair: u32, remote: Reth, into: &mut Vec<u8>) -> Result<(), NoAccess> {
        into.extend_from_slice(&self.bytes[self.place(queue_pair, remote)?]);
        Ok(())
    }
}

/// A chance in a thousand for each.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    lost: u32,
    repeated: u32,
    late: u32,
    damaged: u32,
}

struct Side {
    pair: QueuePair<Vec<u8>>,
    memory: Window,
    completed: Vec<Completion>,
}

fn attributes(local: u8, peer: u8, path_mtu: PathMtu, (send, receive): (u32, u32)) -> Attributes {
    Attributes {
        local: IpAddr::from([10, 0, 0, local]),
        peer: IpAddr::from([10, 0, 0, peer]),
        number: local.into(),
        peer_number: peer.into(),
        source_port: 0xc000,
        path_mtu,
        send_psn: Psn::new(send),
        receive_psn: Psn::new(receive),
        timeout: 1_000_000,
        retries: 50,
        not_ready_retries: 7,
        rnr_timer: 1,
        window: 32,
        line_rate: 1.25e9,
    }
}

impl Side {
    fn new(local: u8, peer: u8, mtu: PathMtu, psns: (u32, u32)) -> Self {
        let attributes = attributes(local, peer, mtu, psns);
        Self { pair: QueuePair::new(attributes), memory: Window::of(local.into()), completed: Vec::new() }
    }

    fn post(&mut self, id: u64, operation: Operation, payload: &[u8]) {
        self.pair.post(Work { id, operation, payload: payload.to_vec() }).unwrap();
    }

    fn post_receive(&mut self, id: u64, bytes: usize) {
        self.pair.post_receive(Receive { id, buffer: vec![0; bytes] });
    }

    fn take(&mut self, mut bytes: Vec<u8>, now: Nanos) {
        if let Ok(packet) = decode(&mut bytes) {
            self.pair.receive(&packet, now, &mut self.memory);
        }
        self.completed.extend(std::iter::from_fn(|| self.pair.poll()));
    }

    /// Packets, each behind scratch bytes.
    fn send(&mut self, now: Nanos) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        self.pair.transmit(now, &self.memory, 16, |packet| {
            let mut bytes = vec![0; SCRATCH_BYTES];
            packet.encode(&mut bytes).unwrap();
            packets.push(bytes);
        });
        self.completed.extend(std::iter::from_fn(|| self.pair.poll()));
        packets
    }
}

struct Link {
    now: Nanos,
    random: StdRng,
    faults: Faults,
    /// Packets on the way: time of arrival, side that they go to, bytes.
    under_way: Vec<(Nanos, usize, Vec<u8>)>,
    sides: [Side; 2],
}

impl Link {
    fn new(seed: u64, faults: Faults, mtu: PathMtu, psns: (u32, u32)) -> Self {
        let sides = [Side::new(1, 2, mtu, psns), Side::new(2, 1, mtu, (psns.1, psns.0))];
        Self { now: 0, random: StdRng::seed_from_u64(seed), faults, under_way: Vec::new(), sides }
    }

    fn happens(&mut self, in_thousand: u32) -> bool {
        self.random.random_range(0..1000) < in_thousand
    }

    fn put(&mut self, to: usize, mut packet: Vec<u8>) {
        let faults = self.faults;
        if self.happens(faults.lost) {
            return;
        }
        if self.happens(faults.repeated) {
            self.under_way.push((self.now + 3_000, to, packet.clone()));
        }
        if self.happens(faults.damaged) {
            let at = self.random.random_range(SCRATCH_BYTES..packet.len());
            packet[at] ^= 1 << self.random.random_range(0..8);
        }
        let late = if self.happens(faults.late) { self.random.random_range(0..2_000_000) } else { 0 };
        self.under_way.push((self.now + 2_000 + late, to, packet));
    }

    fn step(&mut self) {
        self.now += 1_000;
        for side in 0..2 {
            for packet in self.sides[side].send(self.now) {
                self.put(1 - side, packet);
            }
        }
        let now = self.now;
        let (due, later) = std::mem::take(&mut self.under_way).into_iter().partition(|(at, ..)| *at <= now);
        self.under_way = later;
        for (_, to, packet) in due {
            self.sides[to].take(packet, now);
        }
    }

    /// Runs until both sides have done all posted work.
    fn settle(&mut self) {
        for _ in 0..20_000_000 {
            let failed = self.sides.iter().any(|side| side.pair.failure().is_some());
            if failed || self.sides.iter().all(|side| side.pair.is_idle()) && self.under_way.is_empty() {
                // Last words.
                (0..10).for_each(|_| self.step());
                return;
            }
            self.step();
        }
        panic!("not done after {} s of the link's time", self.now / 1_000_000_000);
    }
}

fn pattern(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 7 + seed * 13) as u8).collect()
}

/// Work of a side: kind and number of bytes of each request.
fn works() -> impl Strategy<Value = Vec<(u8, usize)>> {
    let bytes = prop_oneof![0usize..4, 1usize..700, 1000usize..9000];
    vec((0u8..6, bytes), 0..24)
}

fn mtus() -> impl Strategy<Value = PathMtu> {
    prop_oneof![Just(PathMtu::Mtu256), Just(PathMtu::Mtu1024), Just(PathMtu::Mtu4096)]
}

prop_compose! {
    fn faults()(lost in 0u32..150, repeated in 0u32..100, late in 0u32..100, damaged in 0u32..50) -> Faults {
        Faults { lost, repeated, late, damaged }
    }
}

const ROOM: usize = 9000;
/// Offset in memory that a write or a read names.
///
/// A read that is answered again may see a later write (IBTA 10.8.3.3, ordering of operations without a fence). So memory
/// that is read is never written.
fn place(index: usize, read: bool) -> usize {
    WINDOW.start + if read { 4 + index % 2 } else { index % 4 } * ROOM
}

/// Posts works at side `from`, and receives at the other in time or late; then all of them must be done, in order.
fn exchange(link: &mut Link, works: [&[(u8, usize)]; 2], receives_late: bool) {
    let mut expected: [Vec<Completion>; 2] = Default::default();
    let mut noticed: [Vec<Completion>; 2] = Default::default();
    for side in &mut link.sides {
        let read = place(0, true);
        side.memory.bytes[read..read + 2 * ROOM].copy_from_slice(&pattern(5, 2 * ROOM));
    }
    let mut memory = [0, 1].map(|side: usize| link.sides[side].memory.bytes.clone());
    for from in 0..2 {
        let to = 1 - from;
        for (index, (kind, bytes)) in works[from].iter().enumerate() {
            let (id, payload, at) = (index as u64, pattern(index, *bytes), place(index, *kind > 3));
            let (address, immediate) = (BASE + at as u64, (*kind % 2 == 1).then_some(index as u32));
            let receive = |buffer: Vec<u8>, noticed: &[Completion]| Receive { id: noticed.len() as u64, buffer };
            let operation = match kind {
                0 | 1 => {
                    let receive = receive(payload.clone(), &noticed[to]);
                    noticed[to].push(Completion::Received { receive, immediate });
                    Operation::Send { immediate }
                }
                2 | 3 => {
                    memory[to][at..at + bytes].copy_from_slice(&payload);
                    if let Some(immediate) = immediate {
                        let receive = receive(vec![0; ROOM], &noticed[to]);
                        noticed[to].push(Completion::Written { receive, immediate, bytes: *bytes as u32 });
                    }
                    Operation::Write { address, rkey: KEY, immediate }
                }
                _ => Operation::Read { address, rkey: KEY, bytes: *bytes as u32 },
            };
            if matches!(operation, Operation::Read { .. }) {
                let bytes = memory[to][at..at + bytes].to_vec();
                expected[from].push(Completion::Read { id, bytes });
                link.sides[from].post(id, operation, &[]);
            } else {
                expected[from].push(Completion::Done { id });
                link.sides[from].post(id, operation, &payload);
            }
        }
    }
    if receives_late {
        (0..50).for_each(|_| link.step());
    }
    for (side, noticed) in link.sides.iter_mut().zip(&noticed) {
        (0..noticed.len()).for_each(|id| side.post_receive(id as u64, ROOM));
    }
    link.settle();
    for (index, side) in link.sides.iter_mut().enumerate() {
        assert_eq!(side.pair.failure(), None, "side {index}");
        let (noticed_here, done): (Vec<_>, Vec<_>) = side
            .completed
            .drain(..)
            .partition(|completion| matches!(completion, Completion::Received { .. } | Completion::Written { .. }));
        assert_eq!(done, expected[index], "what side {index} posted");
        assert_eq!(noticed_here, noticed[index], "what side {index} received");
        assert!(side.memory.bytes == memory[index], "memory of side {index}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Both sides at once; with numbers that wrap.
    #[test]
    fn everything_is_done_once_and_in_order_whatever_the_link_does(
        seed: u64, faults in faults(), mtu in mtus(), near in works(), far in works(), late: bool,
        psns in (0xff_ffc0u32..0x100_0000, 0u32..0x100_0000),
    ) {
        let mut link = Link::new(seed, faults, mtu, psns);
        exchange(&mut link, [&near, &far], late);
    }

    /// Any packets from anywhere: nothing outside the window changes, and nothing panics.
    #[test]
    fn a_hostile_peer_reaches_nothing_outside_its_window(
        seed: u64, mtu in mtus(), packets in vec(hostile(), 1..60), receives in 0usize..8,
    ) {
        let mut link = Link::new(seed, Faults::default(), mtu, (5, 7));
        let victim = &mut link.sides[1];
        (0..receives).for_each(|id| victim.post_receive(id as u64, 600));
        let mut now = 0;
        for (packet, payload, offset) in &packets {
            now += 10_000;
            // Half of them are in sequence.
            let psn = Psn::new(if *offset < 4 { packet.psn.get() } else { 5 + u32::from(*offset) - 4 });
            victim.pair.receive(&Packet { psn, payload, ..*packet }, now, &mut victim.memory);
            victim.send(now);
        }
        let outside = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0xee);
        prop_assert!(outside(&victim.memory.bytes[..WINDOW.start]) && outside(&victim.memory.bytes[WINDOW.end..]));
    }
}

prop_compose! {
    fn hostile()(
        opcode in sample::select(Opcode::ALL), from in 0u8..3, wants_ack: bool, psn in 0u32..40,
        address in prop_oneof![
            Just(BASE), Just(BASE + WINDOW.start as u64), Just(BASE + WINDOW.end as u64 - 8), Just(u64::MAX - 4), any::<u64>()
        ],
        rkey in prop_oneof![4 => Just(KEY), 1 => any::<u32>()], queue_pair in 1u32..4,
        bytes in prop_oneof![Just(0u32), Just(8), Just(256), Just(300), Just(u32::MAX), any::<u32>()],
        payload in prop_oneof![Just(0usize), Just(8), Just(256), Just(44), 0usize..5000], offset in 0u8..40,
    ) -> (Packet<'static>, Vec<u8>, u8) {
        let packet = Packet {
            from: IpAddr::from([10, 0, 0, from]),
            to: IpAddr::from([10, 0, 0, 2]),
            source_port: 1,
            ecn: Ecn::Congested,
            opcode,
            solicited: false,
            wants_ack,
            queue_pair,
            psn: Psn::new(psn),
            reth: opcode.has_reth().then_some(Reth { address, rkey, bytes }),
            aeth: opcode.has_aeth().then_some(Aeth {
                syndrome: Syndrome::PsnSequenceError,
                messages: psn,
            }),
            immediate: opcode.has_immediate().then_some(psn),
            payload: &[],
        };
        (packet, vec![0x11; payload], offset)
    }
}

fn fail(operation: Operation, payload: &[u8], receive: Option<usize>) -> (Option<Failure>, Option<Failure>) {
    let mut link = Link::new(1, Faults::default(), PathMtu::Mtu1024, (1, 1));
    link.sides[0].post(1, operation, payload);
    link.sides[0].post(2, Operation::Send { immediate: None }, b"after");
    if let Some(bytes) = receive {
        link.sides[1].post_receive(9, bytes);
    }
    link.settle();
    let failures = link.sides.iter().map(|side| side.pair.failure()).collect::<Vec<_>>();
    if let Some(failure) = failures[0] {
        let flushed = [1, 2].map(|id| Completion::Flushed { id, failure });
        assert_eq!(link.sides[0].completed, flushed);
        assert!(link.sides[1].memory.bytes.iter().all(|byte| *byte == 0xee));
    }
    (failures[0], failures[1])
}

#[test]
fn what_is_not_allowed_ends_both_sides_and_changes_nothing() {
    let write = |address, rkey| Operation::Write { address, rkey, immediate: None };
    let inside = BASE + WINDOW.start as u64;
    let refused = (Some(Failure::RemoteAccess), Some(Failure::Access));
    assert_eq!(fail(write(inside, KEY + 1), &[1; 100], None), refused, "another key");
    assert_eq!(fail(write(inside - 1, KEY), &[1; 100], None), refused, "before the window");
    assert_eq!(fail(write(BASE + WINDOW.end as u64 - 99, KEY), &[1; 100], None), refused, "beyond it");
    assert_eq!(fail(write(u64::MAX - 10, KEY), &[1; 100], None), refused, "around the end of all addresses");
    // The first packet of the message would fit.
    assert_eq!(fail(write(BASE + WINDOW.end as u64 - 1024, KEY), &[1; 1025], None), refused, "partly beyond it");
    let read = Operation::Read { address: BASE, rkey: KEY, bytes: 5000 };
    assert_eq!(fail(read, &[], None), refused, "a read");
    let too_much = (Some(Failure::RemoteInvalidRequest), Some(Failure::InvalidRequest));
    assert_eq!(
        fail(Operation::Send { immediate: None }, &[1; 3000], Some(2999)),
        too_much,
        "more than a receive holds"
    );
}

#[test]
fn a_window_that_closes_in_the_middle_of_a_write_stops_it() {
    let mut link = Link::new(1, Faults::default(), PathMtu::Mtu256, (1, 1));
    link.sides[0].post(
        1,
        Operation::Write { address: BASE + WINDOW.start as u64, rkey: KEY, immediate: None },
        &[1; 9000],
    );
    (0..3).for_each(|_| link.step());
    link.sides[1].memory.open = false;
    let before = link.sides[1].memory.bytes.clone();
    assert!(before.contains(&1));
    link.settle();
    assert_eq!(link.sides[0].pair.failure(), Some(Failure::RemoteAccess));
    assert!(link.sides[1].memory.bytes == before);
}

#[test]
fn a_peer_that_is_gone_is_given_up() {
    let mut link = Link::new(1, Faults { lost: 1000, ..Faults::default() }, PathMtu::Mtu1024, (1, 1));
    link.sides[0].pair = QueuePair::new(Attributes { retries: 7, ..attributes(1, 2, PathMtu::Mtu1024, (1, 1)) });
    link.sides[0].post(1, Operation::Send { immediate: None }, b"anybody?");
    link.settle();
    // Sent eight times, after 1 ms, then twice as long each time (RFC 6298, 5.5).
    assert!((255_000_000..256_000_000).contains(&link.now), "given up after {} ns", link.now);
    assert_eq!(link.sides[0].pair.failure(), Some(Failure::NoAnswer));
    assert_eq!(link.sides[0].completed, [Completion::Flushed { id: 1, failure: Failure::NoAnswer }]);
}

#[test]
fn a_burst_of_writes_has_few_acknowledgements() {
    let mut link = Link::new(1, Faults::default(), PathMtu::Mtu1024, (1, 1));
    for id in 0..100 {
        link.sides[0].post(
            id,
            Operation::Write { address: BASE + WINDOW.start as u64, rkey: KEY, immediate: None },
            &[3; 1024],
        );
    }
    let mut acks = 0;
    while !link.sides[0].pair.is_idle() {
        link.now += 1_000;
        for packet in link.sides[0].send(link.now) {
            link.sides[1].take(packet, link.now);
        }
        for packet in link.sides[1].send(link.now) {
            acks += 1;
            link.sides[0].take(packet, link.now);
        }
    }
    // 16 packets are handed over at a time.
    assert_eq!(acks, 100u32.div_ceil(16));
}

/// Makes a packet of the peer to side 1 of a link whose sequence numbers begin at 1.
fn request(opcode: Opcode, psn: u32, payload: &[u8]) -> Packet<'_> {
    Packet {
        from: IpAddr::from([10, 0, 0, 1]),
        to: IpAddr::from([10, 0, 0, 2]),
        source_port: 1,
        ecn: Ecn::NotCapable,
        opcode,
        solicited: false,
        wants_ack: true,
        queue_pair: 2,
        psn: Psn::new(psn),
        reth: opcode.has_reth().then_some(Reth { address: BASE + WINDOW.start as u64, rkey: KEY, bytes: 600 }),
        aeth: None,
        immediate: None,
        payload,
    }
}

/// Returns the answers of a side to these packets, one at most for each, and why the side ended.
fn answers(packets: &[Packet<'_>]) -> (Vec<(u32, Syndrome)>, Option<Failure>) {
    let mut side = Side::new(2, 1, PathMtu::Mtu256, (1, 1));
    let mut answers = Vec::new();
    for (now, packet) in (1..).zip(packets) {
        side.pair.receive(packet, now, &mut side.memory);
        for mut bytes in side.send(now) {
            let packet = decode(&mut bytes).unwrap();
            answers.push((packet.psn.get(), packet.aeth.unwrap().syndrome));
        }
    }
    assert!(side.memory.bytes[WINDOW.start + 600..].iter().all(|byte| *byte == 0xee));
    (answers, side.pair.failure())
}

#[test]
fn answers_are_those_of_the_specification() {
    use Opcode::{SendOnly, WriteFirst, WriteLast, WriteMiddle, WriteOnly};
    let (full, rest) = ([1; 256], [1; 88]);
    let write = [request(WriteFirst, 1, &full), request(WriteMiddle, 2, &full), request(WriteLast, 3, &rest)];
    let done = |psn| (psn, Syndrome::Ack(31));
    let [first, middle, last] = write;
    assert_eq!(answers(&write), (vec![done(1), done(2), done(3)], None));
    // One NAK for a gap until it closes; then one for the next.
    let gap = (2, Syndrome::PsnSequenceError);
    assert_eq!(answers(&[first, last, last, middle, last]), (vec![done(1), gap, done(2), done(3)], None));
    assert_eq!(
        answers(&[first, last, middle, request(SendOnly, 5, &[])]).0,
        [done(1), gap, done(2), (3, Syndrome::PsnSequenceError)]
    );
    // A write that comes again is acknowledged again, and is not executed again.
    assert_eq!(answers(&[first, middle, first]), (vec![done(1), done(2), done(2)], None));
    assert_eq!(answers(&[request(SendOnly, 1, &[])]), (vec![(1, Syndrome::RnrNak(1))], None));
    // Packets that were under way behind it are dropped without a NAK.
    let [early, behind] = [request(SendOnly, 1, &[]), request(SendOnly, 2, &[])];
    assert_eq!(answers(&[early, behind]), (vec![(1, Syndrome::RnrNak(1))], None));
    // A repeated read gets no more than the first one asked for.
    assert_eq!(answers(&[first, request(Opcode::ReadRequest, 1, &[])]), (vec![done(1)], None));
    let malformed = |packets: &[Packet<'_>], psn| {
        let (answers, failure) = answers(packets);
        assert_eq!((answers.last(), failure), (Some(&(psn, Syndrome::InvalidRequest)), Some(Failure::InvalidRequest)));
    };
    malformed(&[request(WriteMiddle, 1, &full)], 1);
    malformed(&[first, first, request(WriteFirst, 2, &full)], 2);
    malformed(&[first, request(Opcode::SendLast, 2, &rest)], 2);
    malformed(&[request(WriteFirst, 1, &rest)], 1);
    malformed(&[request(WriteOnly, 1, &rest)], 1);
    malformed(&[first, request(WriteLast, 2, &rest)], 2);
    malformed(&[first, middle, request(WriteMiddle, 3, &full)], 3);
    malformed(&[first, middle, request(WriteLast, 3, &full)], 3);
    malformed(&[first, middle, request(WriteLast, 3, &[])], 3);
}

#[test]
fn a_stranger_is_not_heard() {
    let good = request(Opcode::WriteFirst, 1, &[1; 256]);
    let strangers = [
        Packet { from: IpAddr::from([10, 0, 0, 3]), ..good },
        Packet { to: IpAddr::from([10, 0, 0, 3]), ..good },
        Packet { queue_pair: 3, ..good },
    ];
    assert_eq!(answers(&strangers), (vec![], None));
    // Nor an acknowledgement of what was never sent.
    let mut side = Side::new(1, 2, PathMtu::Mtu256, (1, 1));
    side.post(7, Operation::Send { immediate: None }, b"not sent yet");
    let aeth = Some(Aeth { syndrome: Syndrome::Ack(31), messages: 1 });
    let (from, to) = (IpAddr::from([10, 0, 0, 2]), IpAddr::from([10, 0, 0, 1]));
    let ack = Packet { from, to, aeth, queue_pair: 1, ..request(Opcode::Acknowledge, 1, &[]) };
    side.pair.receive(&ack, 1, &mut side.memory);
    assert_eq!(side.pair.poll(), None);
    side.send(2);
    side.pair.receive(&ack, 3, &mut side.memory);
    assert_eq!(side.pair.poll(), Some(Completion::Done { id: 7 }));
}

/// Returns the number of data packets that a sender with endless work sends in 100 us, and of notifications that come back.
fn packets_in_a_while(congested: bool) -> (u32, u32) {
    let [mut sender, mut receiver] = Link::new(1, Faults::default(), PathMtu::Mtu4096, (1, 1)).sides;
    for id in 0..1000 {
        sender.post(
            id,
            Operation::Write { address: BASE + WINDOW.start as u64, rkey: KEY, immediate: None },
            &[3; 4096],
        );
    }
    let (mut data, mut notifications) = (0, 0);
    for now in (1_000..101_000).step_by(1_000) {
        for mut bytes in sender.send(now) {
            data += 1;
            let packet = decode(&mut bytes).unwrap();
            let ecn = if congested { Ecn::Congested } else { packet.ecn };
            receiver.pair.receive(&Packet { ecn, ..packet }, now, &mut receiver.memory);
        }
        for bytes in receiver.send(now) {
            notifications += u32::from(decode(&mut bytes.clone()).unwrap().opcode == Opcode::CongestionNotification);
            sender.take(bytes, now);
        }
    }
    (data, notifications)
}

#[test]
fn congestion_is_told_and_slows_the_sender() {
    // Without a rate all goes that is posted.
    assert_eq!(packets_in_a_while(false), (1000, 0));
    let (data, notifications) = packets_in_a_while(true);
    // A port of 10 Gbit/s, of which first a half is left and then less, takes 15 such packets in 100 us.
    assert!((16..50).contains(&data), "{data} packets");
    assert_eq!(notifications, 2);
}

#[test]
fn a_late_acknowledgement_spares_what_would_be_sent_again() {
    let mut side = Side::new(1, 2, PathMtu::Mtu256, (1, 1));
    for id in 0..3 {
        side.post(id, Operation::Send { immediate: None }, b"slow");
    }
    assert_eq!(side.send(1).len(), 3);
    // The time is up, but nothing goes yet.
    let late = 1 + side.pair.attributes().timeout;
    assert_eq!(side.pair.wake_at(), Some(late));
    side.pair.transmit(late, &side.memory, 0, |_| ());
    let aeth = Some(Aeth { syndrome: Syndrome::Ack(31), messages: 2 });
    let (from, to) = (IpAddr::from([10, 0, 0, 2]), IpAddr::from([10, 0, 0, 1]));
    let ack = Packet { from, to, aeth, queue_pair: 1, ..request(Opcode::Acknowledge, 2, &[]) };
    side.pair.receive(&ack, late, &mut side.memory);
    let psns: Vec<_> = side.send(late).iter_mut().map(|bytes| decode(bytes).unwrap().psn.get()).collect();
    assert_eq!(psns, [3]);
    assert_eq!(side.completed, [0, 1].map(|id| Completion::Done { id }));
}

/// Makes a packet of every kind, over both families, with payloads that need each pad.
fn one_of_each() -> Vec<(Vec<u8>, String)> {
    let addresses = [
        (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2])),
        ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap()),
    ];
    let mut all = Vec::new();
    for ((from, to), opcode) in
        addresses.into_iter().flat_map(|pair| Opcode::ALL.iter().map(move |opcode| (pair, *opcode)))
    {
        let payload = match opcode {
            Opcode::Acknowledge | Opcode::ReadRequest => Vec::new(),
            Opcode::CongestionNotification => vec![0; 16],
            _ => vec![0xa5; [64, 61, 62, 63][all.len() % 4]],
        };
        let packet = Packet {
            from,
            to,
            aeth: opcode.has_aeth().then_some(Aeth { syndrome: Syndrome::Ack(31), messages: 0x12_3456 }),
            immediate: opcode.has_immediate().then_some(0xcafe_f00d),
            ..request(opcode, 0x65_4321, &payload)
        };
        let mut bytes = Vec::new();
        packet.encode(&mut bytes).unwrap();
        let crc = u32::from_be_bytes(*bytes.last_chunk().unwrap());
        let or_none = |there: bool, text: &str| if there { text.to_owned() } else { String::new() };
        let fields = [
            opcode.code().to_string(),
            (payload.len().wrapping_neg() & 3).to_string(),
            "0x000002".to_owned(),
            0x65_4321.to_string(),
            or_none(opcode.has_reth(), &format!("0x{:016x}", BASE + WINDOW.start as u64)),
            or_none(opcode.has_reth(), &format!("0x{KEY:08x}")),
            or_none(opcode.has_reth(), "600"),
            or_none(opcode.has_aeth(), &0x12_3456.to_string()),
            or_none(opcode.has_immediate(), "cafef00d"),
            // Of a notification it shows no checksum.
            or_none(opcode != Opcode::CongestionNotification, &format!("0x{crc:08x}")),
            String::new(),
        ];
        all.push((bytes, fields.join("\t")));
    }
    all
}

#[test]
fn another_implementation_reads_what_we_send() {
    let packets = one_of_each();
    assert!(packets.len() > 30);
    // The file format of libpcap, with packets from their IP header on (LINKTYPE_RAW).
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let mut bytes = Vec::new();
    for word in [0xa1b2_c3d4u32, 4 << 16 | 2, 0, 0, 1 << 16, 101] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes[4..8].copy_from_slice(&[2u16.to_ne_bytes(), 4u16.to_ne_bytes()].concat());
    for (packet, _) in &packets {
        for word in [0, 0, packet.len() as u32, packet.len() as u32] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(packet);
    }
    file.write_all(&bytes).unwrap();
    let fields = "opcode padcnt destqp psn".split(' ').map(|field| format!("infiniband.bth.{field}"));
    let others = "reth.va reth.r_key reth.dmalen aeth.msn immdt invariant.crc".split(' ');
    let fields = fields.chain(others.map(|field| format!("infiniband.{field}"))).chain(["_ws.malformed".to_owned()]);
    let mut tshark = Command::new("tshark");
    tshark.args(["-r", file.path().to_str().unwrap(), "-T", "fields", "-E", "occurrence=f"]);
    // It guesses what payloads are; ours are nothing.
    for guess in ["rpcordma", "smb_direct", "iser", "nvme-rdma"] {
        tshark.args(["--disable-protocol", guess]);
    }
    fields.for_each(|field| {
        tshark.args(["-e", &field]);
    });
    let said = tshark.output().expect("tshark is needed: hw-setup/deps apply");
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let said = String::from_utf8(said.stdout).unwrap();
    let said: Vec<&str> = said.lines().collect();
    assert_eq!(said.len(), packets.len());
    for (said, (_, expected)) in said.iter().zip(&packets) {
        assert_eq!(said, expected);
    }
}
