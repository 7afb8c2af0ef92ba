//! The conformance suite of transports: whatever carries batches and frames keeps the same promises.
//!
//! It runs over:
//!
//! - TCP;
//! - RDMA by NICs in software: over the kernel's sockets, which needs root, and over a port of DPDK;
//! - RDMA by a device of the host (`scripts/lab run -- ...` has one; ignored elsewhere);
//! - the simulated transport.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

mod ends;
mod landing;

use embarcadero_cxl::{Fabric, RegionOffset};
use embarcadero_os::{Interest, Poller};
use embarcadero_transport::{
    Connection, Endpoint, Item, LinkError, Outbox, Outgoing, PublisherLink, Received, SendBuffer, Slots,
    SubscriberLink, Transport, TransportError,
};
use embarcadero_wire::batch::{BatchBuilder, BatchOrigin};
use embarcadero_wire::{
    Ack, BatchHeader, ClientId, Deliver, Epoch, ErrorCode, FRAME_BYTES, Frame, Incarnation, Position, RdmaConnect,
    SessionSlot, TopicId,
};
use ends::Ends;
use landing::TestLanding;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// Longest wait for what must happen. Only a broken transport reaches it, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(300);
/// Largest batch, header and body.
const BATCH_BYTES: usize = 48 << 10;

/// Runs the whole suite over one kind of transport.
macro_rules! conforms {
    ($($(#[$meta:meta])* $module:ident: $ends:expr;)*) => {
        $(mod $module {
            use super::*;
            $(#[$meta])*
            #[test]
            fn conforms() {
                $ends.run(suite);
            }
        })*
    };
}

conforms! {
    tcp: ends::Tcp;
    simulated: ends::InMemory;
    rdma_by_a_nic_in_software: ends::Rdma::by_sockets();
    rdma_by_a_port_of_dpdk: ends::Rdma::by_dpdk();
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    rdma_by_a_device_of_the_host: ends::Rdma::by_a_device();
}

/// Every promise, in turn.
fn suite<E: Ends>(ends: &mut E) {
    batches_arrive_whole_and_in_order(ends);
    a_call_takes_no_more_than_its_budget(ends);
    a_batch_waits_for_room_and_those_behind_it_too(ends);
    a_refusal_is_told(ends);
    frames_arrive_in_order(ends);
    deliveries_arrive_whole_and_in_order(ends);
    what_is_not_taken_stays(ends);
    an_end_that_is_gone_is_noticed(ends);
    a_connection_ends_in_order(ends);
    an_end_that_waits_is_woken(ends);
    a_batch_is_given_back_once_it_has_left(ends);
    a_slot_is_used_again(ends);
    a_lost_device_is_let_go(ends);
}

/// A thread without connections.
struct NoConnections;

impl<C> Slots<C> for NoConnections {
    fn connection(&mut self, _: usize) -> Option<&mut C> {
        None
    }
}

type PublisherOf<E> = <<E as Ends>::Transport as Transport>::Publisher;
type SubscriberOf<E> = <<E as Ends>::Transport as Transport>::Subscriber;
type ConnectionOf<E> = <<E as Ends>::Transport as Transport>::Connection;

/// A sealed batch whose one message is made of `sequence`.
fn batch(sequence: u64, bytes: usize) -> BatchBuilder<SendBuffer> {
    let mut batch = BatchBuilder::in_buffer(SendBuffer::new(BATCH_BYTES).unwrap());
    batch.push_with(bytes, |message| {
        for (at, byte) in message.iter_mut().enumerate() {
            *byte = (sequence as usize * 31 + at) as u8;
        }
    });
    let origin = BatchOrigin {
        client_id: ClientId(7),
        session_epoch: Epoch(1),
        session_slot: SessionSlot(0),
        topic: TopicId(0),
        topic_incarnation: Incarnation(1),
    };
    batch.seal(&origin, sequence, true);
    batch
}

/// Sizes that end before, at and behind the bounds of lines and packets.
fn size(sequence: u64) -> usize {
    [1, 60, 64, 65, 1000, 4096, 4097, 40_000][sequence as usize % 8]
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "{what} does not happen");
        std::thread::yield_now();
    }
}

/// Hands a batch over as far as it is taken now; true when it is.
fn write<P: PublisherLink>(publisher: &mut P, batch: &mut BatchBuilder<SendBuffer>, written: &mut usize) -> bool {
    *written += publisher.write(batch, *written).unwrap();
    publisher.flush().unwrap();
    *written == batch.bytes().len()
}

fn publish_and_receive<E: Ends>(
    ends: &mut E,
    (connection, publisher): &mut (ConnectionOf<E>, PublisherOf<E>),
    landing: &mut TestLanding,
    sequences: std::ops::Range<u64>,
) {
    let before = landing.taken.len();
    let mut sent: Vec<_> = sequences.map(|sequence| (batch(sequence, size(sequence)), 0)).collect();
    let mut next = 0;
    until("all batches are taken", || {
        while next < sent.len() {
            let (batch, written) = &mut sent[next];
            if !write(publisher, batch, written) {
                break;
            }
            next += 1;
        }
        ends.drive(connection);
        connection.receive(ends.memory(), landing, 8).unwrap();
        connection.send(ends.memory(), &mut Outbox::default()).unwrap();
        publisher.poll(&mut Vec::new()).unwrap();
        landing.taken.len() == before + sent.len()
    });
    for ((batch, _), (header, at)) in sent.iter().zip(&landing.taken[before..]) {
        assert_lies(ends.memory(), batch, header, *at);
    }
}

/// A batch lies in memory as it was sent.
fn assert_lies<F: Fabric>(memory: &F, batch: &BatchBuilder<SendBuffer>, header: &BatchHeader, at: RegionOffset) {
    let mut found = vec![0; batch.bytes().len()];
    memory.read_bytes(at, &mut found);
    assert!(found == batch.bytes(), "batch {} is not as it was sent", header.sequence);
    assert_eq!(header.encode(), batch.bytes()[..FRAME_BYTES]);
}

fn batches_arrive_whole_and_in_order<E: Ends>(ends: &mut E) {
    let mut link = ends.publisher();
    let mut landing = TestLanding::default();
    publish_and_receive(ends, &mut link, &mut landing, 0..200);
    let sequences: Vec<u64> = landing.taken.iter().map(|(header, _)| header.sequence).collect();
    assert_eq!(sequences, (0..200).collect::<Vec<_>>());
}

fn a_call_takes_no_more_than_its_budget<E: Ends>(ends: &mut E) {
    let mut link = ends.publisher();
    let mut landing = TestLanding::default();
    // The first brings a window, where one is needed.
    publish_and_receive(ends, &mut link, &mut landing, 0..1);
    let (connection, publisher) = &mut link;
    let mut sent: Vec<_> = (1..5).map(|sequence| (batch(sequence, 100), 0)).collect();
    until("four batches are handed over", || {
        ends.drive(connection);
        sent.iter_mut().all(|(batch, written)| *written > 0 || write(publisher, batch, written))
    });
    until("four batches come", || {
        ends.drive(connection);
        let before = landing.taken.len();
        let received = connection.receive(ends.memory(), &mut landing, 1).unwrap();
        let more = landing.taken.len() - before;
        assert!(more <= 1, "{more} batches with a budget of one");
        assert_eq!(more == 1, matches!(received, Received::More), "{received:?}");
        landing.taken.len() == 5
    });
}

fn a_batch_waits_for_room_and_those_behind_it_too<E: Ends>(ends: &mut E) {
    let mut link = ends.publisher();
    let mut landing = TestLanding::default();
    publish_and_receive(ends, &mut link, &mut landing, 0..1);
    let (connection, publisher) = &mut link;
    landing.full = true;
    let mut sent: Vec<_> = (1..3).map(|sequence| (batch(sequence, 5000), 0)).collect();
    until("the landing is asked", || {
        for (batch, written) in &mut sent {
            if *written < batch.bytes().len() && !write(publisher, batch, written) {
                break;
            }
        }
        ends.drive(connection);
        matches!(connection.receive(ends.memory(), &mut landing, 8).unwrap(), Received::Waiting)
    });
    assert_eq!(landing.taken.len(), 1);
    landing.full = false;
    until("both come", || {
        for (batch, written) in &mut sent {
            if *written < batch.bytes().len() && !write(publisher, batch, written) {
                break;
            }
        }
        ends.drive(connection);
        connection.receive(ends.memory(), &mut landing, 8).unwrap();
        landing.taken.len() == 3
    });
    for ((batch, _), (header, at)) in sent.iter().zip(&landing.taken[1..]) {
        assert_lies(ends.memory(), batch, header, *at);
    }
}

fn a_refusal_is_told<E: Ends>(ends: &mut E) {
    let mut link = ends.publisher();
    let mut landing = TestLanding::default();
    publish_and_receive(ends, &mut link, &mut landing, 0..1);
    let (connection, publisher) = &mut link;
    landing.refuses = true;
    let (mut refused, mut written) = (batch(1, 100), 0);
    let mut error = None;
    until("the batch is refused", || {
        if written < refused.bytes().len() {
            write(publisher, &mut refused, &mut written);
        }
        ends.drive(connection);
        error = connection.receive(ends.memory(), &mut landing, 8).err();
        error.is_some()
    });
    let error = error.unwrap();
    assert!(matches!(error, TransportError::Refused { code: ErrorCode::TopicDeleted, .. }), "{error}");
    let mut outbox = Outbox::default();
    outbox.push(Outgoing::bytes(error.frame().unwrap()));
    let mut told = None;
    until("the publisher hears of it", || {
        ends.drive(connection);
        let _ = connection.send(ends.memory(), &mut outbox);
        told = publisher.poll(&mut Vec::new()).err();
        told.is_some()
    });
    match told.unwrap() {
        LinkError::Refused { code, text, .. } => assert_eq!((code, &*text), (Some(ErrorCode::TopicDeleted), "gone")),
        other => panic!("{other}"),
    }
}

fn frames_arrive_in_order<E: Ends>(ends: &mut E) {
    let (mut connection, mut publisher) = ends.publisher();
    let (mut outbox, mut heard) = (Outbox::default(), Vec::new());
    let mut next = 0;
    until("a thousand frames come", || {
        while next < 1000 && outbox.len() < 20 {
            outbox.push(Outgoing::frame(Ack { sequence: next, ..Ack::blank() }.encode()));
            next += 1;
        }
        ends.drive(&mut connection);
        connection.send(ends.memory(), &mut outbox).unwrap();
        publisher.poll(&mut heard).unwrap();
        heard.len() == 1000
    });
    for (sequence, frame) in heard.iter().enumerate() {
        assert!(matches!(frame, Frame::Ack(ack) if ack.sequence == sequence as u64), "{frame:?} is number {sequence}");
    }
}

/// Queues a delivery of a batch, from the region or a copy of it.
fn deliver<E: Ends>(ends: &E, outbox: &mut Outbox, sequence: u64) {
    let batch = batch(sequence, size(sequence));
    let bytes = batch.bytes();
    let frame = Deliver { first_offset: sequence, batch_bytes: bytes.len() as u32, ..Deliver::blank() }.encode();
    if sequence % 5 == 4 {
        outbox.push(Outgoing::copied(&frame, bytes).unwrap());
        return;
    }
    let at = ends.place(sequence % 64 * BATCH_BYTES as u64);
    ends.memory().write_bytes(at, bytes);
    outbox.push(Outgoing::batch(frame, at, bytes.len() as u64, sequence));
}

/// Takes what came next, and checks it against what is due.
fn take<E: Ends>(subscriber: &mut SubscriberOf<E>, due: u64) -> bool {
    match subscriber.take().unwrap() {
        Item::Nothing => false,
        Item::Frame(Frame::Position(position)) => {
            assert_eq!((position.next_offset, due % 7), (due, 6));
            true
        }
        Item::Frame(other) => panic!("{other:?}"),
        Item::Batch(deliver, header, body) => {
            let expected = batch(due, size(due));
            assert_eq!((deliver.first_offset, header.unwrap().sequence), (due, due));
            assert!(
                subscriber.bytes()[body] == expected.bytes()[FRAME_BYTES..],
                "delivery {due} is not as it was sent"
            );
            true
        }
    }
}

fn queue_next<E: Ends>(ends: &E, outbox: &mut Outbox, sequence: u64) {
    if sequence % 7 == 6 {
        outbox.push(Outgoing::frame(Position { next_offset: sequence, ..Position::blank() }.encode()));
    } else {
        deliver(ends, outbox, sequence);
    }
}

fn deliveries_arrive_whole_and_in_order<E: Ends>(ends: &mut E) {
    let (mut connection, mut subscriber) = ends.subscriber();
    let mut outbox = Outbox::default();
    let (mut next, mut due) = (0, 0);
    until("300 things are delivered", || {
        while next < 300 && outbox.len() < 8 {
            queue_next(ends, &mut outbox, next);
            next += 1;
        }
        ends.drive(&mut connection);
        connection.receive(ends.memory(), &mut TestLanding::default(), 8).unwrap();
        connection.send(ends.memory(), &mut outbox).unwrap();
        while take::<E>(&mut subscriber, due) {
            due += 1;
        }
        due == 300
    });
    // It can also ask.
    let question = Position { next_offset: 5, ..Position::blank() }.encode();
    until("the question is sent", || subscriber.send(&question).unwrap());
    until("the question is heard", || {
        ends.drive(&mut connection);
        let received = connection.receive(ends.memory(), &mut TestLanding::default(), 8).unwrap();
        matches!(received, Received::Frame(Frame::Position(asked)) if asked.next_offset == 5)
    });
}

/// A subscriber that does not read stops its broker's sending, and loses nothing.
fn what_is_not_taken_stays<E: Ends>(ends: &mut E) {
    let (mut connection, mut subscriber) = ends.subscriber();
    let mut outbox = Outbox::default();
    let (mut next, mut idle) = (0, 0);
    while idle < 1000 {
        assert!(next < 50_000, "the transport takes without end what nobody reads");
        if outbox.len() < 8 {
            queue_next(ends, &mut outbox, next);
            next += 1;
        }
        ends.drive(&mut connection);
        let sent = connection.send(ends.memory(), &mut outbox).unwrap();
        idle = if sent == 0 && outbox.len() == 8 { idle + 1 } else { 0 };
    }
    assert!(outbox.len() == 8 && outbox.lowest_position() < next);
    let mut due = 0;
    until("all of it comes", || {
        ends.drive(&mut connection);
        connection.receive(ends.memory(), &mut TestLanding::default(), 8).unwrap();
        connection.send(ends.memory(), &mut outbox).unwrap();
        while take::<E>(&mut subscriber, due) {
            due += 1;
        }
        due == next
    });
}

fn an_end_that_is_gone_is_noticed<E: Ends>(ends: &mut E) {
    let (mut connection, publisher) = ends.publisher();
    drop(publisher);
    until("the broker notices", || {
        ends.drive(&mut connection);
        connection.receive(ends.memory(), &mut TestLanding::default(), 8).is_err()
    });
    let (connection, mut publisher) = ends.publisher();
    drop(connection);
    until("the publisher notices", || publisher.poll(&mut Vec::new()).is_err());
    let (connection, mut subscriber) = ends.subscriber();
    drop(connection);
    until("the subscriber notices", || subscriber.take().is_err());
}

/// A broker that ends a connection takes the peer's windows back, sends no more, and waits for the peer to close.
fn a_connection_ends_in_order<E: Ends>(ends: &mut E) {
    let mut link = ends.publisher();
    publish_and_receive(ends, &mut link, &mut TestLanding::default(), 0..4);
    let (mut connection, mut publisher) = link;
    connection.close_windows();
    assert_eq!(connection.windows().count(), 0);
    let (mut outbox, mut heard) = (Outbox::default(), Vec::new());
    outbox.push(Outgoing::frame(Ack { sequence: 7, ..Ack::blank() }.encode()));
    until("the last frame comes", || {
        ends.drive(&mut connection);
        connection.send(ends.memory(), &mut outbox).unwrap();
        publisher.poll(&mut heard).unwrap();
        heard.len() == 1 && outbox.is_empty() && !connection.has_to_send()
    });
    connection.finish();
    until("the publisher notices", || publisher.poll(&mut heard).is_err());
    assert!(!connection.discard(), "the publisher has not closed yet");
    drop(publisher);
    until("the broker notices", || connection.discard());
}

/// Waits until one of the descriptors is readable, if there are any.
fn wait(descriptors: impl Iterator<Item = RawFd>) {
    let (mut poller, mut ready) = (Poller::new().unwrap(), Vec::new());
    let added = descriptors.map(|descriptor| poller.add(descriptor, 0, Interest::INPUT).unwrap()).count();
    until("a descriptor is readable", || {
        added == 0 || poller.wait(PATIENCE, &mut ready).is_ok_and(|()| ready.iter().any(|ready| ready.readable))
    });
}

/// An end that armed its descriptors and found nothing sleeps on them until something comes.
fn an_end_that_waits_is_woken<E: Ends>(ends: &mut E) {
    let (mut connection, mut publisher) = ends.publisher();
    let (mut outbox, mut heard) = (Outbox::default(), Vec::new());
    publisher.arm().unwrap();
    publisher.poll(&mut heard).unwrap();
    assert_eq!(heard.len(), 0);
    outbox.push(Outgoing::frame(Ack { sequence: 7, ..Ack::blank() }.encode()));
    until("the frame leaves", || {
        ends.drive(&mut connection);
        connection.send(ends.memory(), &mut outbox).unwrap();
        outbox.is_empty()
    });
    wait(publisher.descriptors(false).map(|(descriptor, _)| descriptor));
    until("the frame comes", || {
        publisher.poll(&mut heard).unwrap();
        heard.len() == 1
    });

    let (mut connection, mut subscriber) = ends.subscriber();
    subscriber.arm().unwrap();
    assert!(matches!(subscriber.take().unwrap(), Item::Nothing));
    deliver(ends, &mut outbox, 0);
    until("the delivery leaves", || {
        ends.drive(&mut connection);
        connection.send(ends.memory(), &mut outbox).unwrap();
        outbox.is_empty()
    });
    wait(subscriber.descriptors());
    until("the delivery comes", || take::<E>(&mut subscriber, 0));

    let mut link = ends.publisher();
    let mut landing = TestLanding::default();
    // The first brings a window, where one is needed.
    publish_and_receive(ends, &mut link, &mut landing, 0..1);
    let (connection, publisher) = &mut link;
    ends.endpoint().0.arm().unwrap();
    until("nothing is left", || {
        ends.drive(connection);
        connection.send(ends.memory(), &mut Outbox::default()).unwrap();
        let received = connection.receive(ends.memory(), &mut landing, 8).unwrap();
        matches!(received, Received::Nothing) && !connection.has_work()
    });
    ends.endpoint().0.arm().unwrap();
    ends.drive(connection);
    let (mut sent, mut written) = (batch(1, 5000), 0);
    until("the batch leaves", || write(publisher, &mut sent, &mut written));
    wait(ends.endpoint().0.descriptor().into_iter());
    until("the batch comes", || {
        ends.drive(connection);
        connection.receive(ends.memory(), &mut landing, 8).unwrap();
        landing.taken.len() == 2
    });
}

/// A publisher without acknowledgements asks which batches are still read in place.
fn a_batch_is_given_back_once_it_has_left<E: Ends>(ends: &mut E) {
    let mut link = ends.publisher_with(false);
    let mut landing = TestLanding::default();
    publish_and_receive(ends, &mut link, &mut landing, 0..20);
    let (connection, publisher) = &mut link;
    until("no batch is in use", || {
        ends.drive(connection);
        connection.receive(ends.memory(), &mut landing, 8).unwrap();
        publisher.poll(&mut Vec::new()).unwrap();
        let in_use = publisher.batches_in_use();
        assert!(in_use <= 20, "{in_use} of 20 batches are in use");
        in_use == 0
    });
}

/// Completions that come late for a connection that is gone do not reach the next one in its slot.
fn a_slot_is_used_again<E: Ends>(ends: &mut E) {
    for _ in 0..3 {
        let mut link = ends.publisher();
        publish_and_receive(ends, &mut link, &mut TestLanding::default(), 0..8);
        let (connection, publisher) = link;
        drop(connection);
        let (endpoint, slot) = ends.endpoint();
        while endpoint.complete(&mut NoConnections).unwrap() > 0 {}
        endpoint.forget(slot);
        drop(publisher);
    }
}

/// An endpoint without its device says whose connections end, and refuses and completes nothing more.
fn a_lost_device_is_let_go<E: Ends>(ends: &mut E) {
    let (gone, _) = ends.publisher();
    let forgotten = ends.endpoint().1;
    drop(gone);
    ends.endpoint().0.forget(forgotten);
    let (mut connection, _publisher) = ends.publisher();
    let has_device = ends.has_device();
    let (endpoint, slot) = ends.endpoint();
    let lost = endpoint.lose_device();
    assert_eq!(lost.contains(&slot), has_device, "{lost:?}");
    assert!(slot == forgotten || !lost.contains(&forgotten), "{lost:?}");
    assert!(endpoint.descriptor().is_none());
    assert_eq!(endpoint.complete(&mut NoConnections).unwrap(), 0);
    let refusal = endpoint.upgrade(slot, &mut connection, &RdmaConnect::blank());
    assert!(matches!(refusal, Err(TransportError::Refused { code: ErrorCode::NoTransport, .. })), "{refusal:?}");
}
