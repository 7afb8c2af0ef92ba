//! Checks of what must hold at the end of a schedule.

use super::*;

/// Checks that each position was acknowledged to the client whose batch was read there.
pub(super) fn check_acks(acknowledged: &Acknowledged, log: &Log) {
    for (position, batch) in acknowledged.lock().unwrap().iter() {
        let read = log.lock().unwrap().get(position).map(|(client, sequence, _)| (*client, *sequence));
        assert!(
            read.is_none_or(|read| read == *batch),
            "position {position} was acknowledged as {batch:?} and read as {read:?}"
        );
    }
}

/// Checks that host 2 sees at once what the leader and a broker write, without turbulence, although it had read the tables
/// before.
pub(super) fn check_tables(
    regions: &[Region<Simulated>],
    leader: usize,
    sequencer: &mut Sequencer<Simulated>,
    commands: &Sender<Command>,
    sessions: &[Session],
) {
    let far = &regions[2];
    let look = || {
        let broker = read_broker(far, BrokerId(1)).used().map(|info| info.incarnation);
        let session = read_session(far, sessions[1].slot).unwrap().used().map(|session| session.state);
        let retention = read_topic(far, TOPIC).unwrap().used().map(|topic| topic.retention_ms);
        (read_leader(far).map(|leader| leader.broker_mask), retention, broker, session)
    };
    let _ = look();
    let mut info = read_broker(far, BrokerId(0)).used().expect("the broker slot is visible");
    info.incarnation = Incarnation(8);
    publish_broker(&regions[0], &info);
    let (broker, incarnation) = (BrokerId(leader as u32), Incarnation(1));
    let term = latest_claim(far);
    publish_leader(&regions[leader], &LeaderInfo { term, broker, incarnation, broker_mask: 3, pinning_mask: 3 });
    publish_topic(&regions[leader], LeaderArea(broker), &TopicConfig { retention_ms: 77, ..config(Replication::None) });
    let (reply, answer) = bounded(1);
    let Session { slot, client_id, epoch, token, .. } = sessions[1];
    commands.send(Command::CloseSession { slot, client_id, epoch, token, reply }).unwrap();
    sequencer.poll(1 << 40, 1);
    answer.recv().unwrap().unwrap();
    let (mask, retention, _, session) = look();
    assert_eq!((mask, retention, session), (Ok(3), Some(77), Some(SessionState::Closed)), "tables are stale");
    assert_eq!(
        read_broker(far, BrokerId(0)).used().map(|info| info.incarnation),
        Some(Incarnation(8)),
        "the broker slot is stale"
    );
    // A broker that dies while it shows itself anew is still known to have been there.
    let (fabric, version) = (regions[0].fabric(), regions[0].layout().broker(BrokerId(0)).add(BrokerLine::VERSION_AT));
    fabric.store(version, fabric.load(version) | 1);
    fabric.flush(version, 8, Site::BrokerSlotFlush);
    fabric.fence(Site::BrokerSlotFlush);
    assert_eq!(
        (read_broker(far, BrokerId(0)), last_incarnation(far, BrokerId(0))),
        (Row::Unsettled, Incarnation(8)),
        "a broker is forgotten"
    );
}

/// Checks that host 2 sees at once which segment the leader takes, and for what, although it had looked before.
pub(super) fn check_pool(regions: &[Region<Simulated>], leader: &Host) {
    let far = &regions[2];
    let look = || (free_segments(far), (0..SEGMENTS).map(|segment| read_owner(far, segment)).collect::<Vec<_>>());
    let (free, _) = look();
    let Ok(segment) = leader.topics.pool().allocate() else { return };
    let (topic, stream) = (TOPIC, Stream::GLOBAL);
    let owner = SegmentUse::Index { topic, incarnation: FIRST, stream, ordinal: 99, holder: LEADER.0 };
    publish_owner(&regions[0], segment, owner);
    let (now_free, owners) = look();
    assert_eq!(now_free, free - 1, "the bitmap is stale");
    assert_eq!(owners[segment as usize], Row::Used(owner), "the owner is stale");
}

/// Checks what must hold when everything has come to its end, as host 2 sees it.
pub(super) fn check_end(regions: &[Region<Simulated>], hosts: &[Host], log: &Log, durable: Option<&Durable>) {
    let far = &regions[2];
    let taken = |owner: &Row<SegmentUse>| !matches!(owner, Row::Unused | Row::Used(SegmentUse::Free));
    let held = (0..SEGMENTS).map(|segment| read_owner(far, segment)).filter(taken).count();
    assert_eq!(free_segments(far) as usize, SEGMENTS as usize - held, "bitmap and owners disagree");
    for host in hosts {
        if let Some(segment) = host.last_segment {
            let owner = read_owner(far, segment);
            assert!(
                matches!(owner, Row::Used(SegmentUse::Blog { broker, .. }) if broker == host.id),
                "segment {segment}: {owner:?}"
            );
        }
    }
    // One order: positions are contiguous where they were read, offsets follow, sessions are in sequence.
    let log = log.lock().unwrap();
    let mut due: BTreeMap<ClientId, u64> = BTreeMap::new();
    for (client, sequence, _) in log.values() {
        let due = due.entry(*client).or_insert(*sequence);
        assert!(*sequence >= *due, "client {client}: sequence {sequence} after {due}");
        *due = sequence + 1;
    }
    for (position, batch) in durable.iter().flat_map(|durable| durable.lock().unwrap().clone()) {
        let read = log.get(&position).map(|(client, sequence, _)| (*client, *sequence));
        assert!(
            read.is_none_or(|read| read == batch),
            "position {position} was read as {read:?} and copied as {batch:?}"
        );
    }
    for (a, b) in log.iter().zip(log.iter().skip(1)) {
        assert_eq!(b.0 - a.0, b.1.2 - a.1.2, "offsets do not follow positions");
    }
    const { assert!(SESSION_WINDOW > BATCHES, "commit records must last for the run") };
}
