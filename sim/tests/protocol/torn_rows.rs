//! Torn rows: those that their writer was changing when it died.

use embarcadero_cxl::layout::{AllocatorKind, Geometry, Layout, LeaderArea, SessionLine, SessionState, TopicState};
use embarcadero_cxl::session_table::{Session, publish_session, read_session_at, repair_torn_session};
use embarcadero_cxl::topic_table::{publish_topic, read_topic_at, repair_torn_topic};
use embarcadero_cxl::{Fabric, LINE_BYTES, Region, RegionOffset, Row, Site, Versioned};
use embarcadero_sim::testbed::topic;
use embarcadero_sim::{Simulated, Turbulence, World};
use embarcadero_wire::{BrokerId, ClientId, Epoch, Incarnation, Order, SessionSlot, SessionToken, TopicId};

/// A leader died in the middle of a session's row or a topic's line. Its successor uses no epoch and no incarnation twice.
#[test]
fn what_a_leader_was_changing_when_it_died_is_brought_to_an_end() {
    let geometry = Geometry {
        max_brokers: 1,
        max_leaders: 1,
        max_topics: 1,
        max_sessions: 2,
        ..Geometry::with_segments_of(1 << 20, AllocatorKind::Partitioned)
    };
    let world = World::new(Layout::new(&geometry).region_bytes, 1, Turbulence::CALM, None);
    let region = Region::format(Simulated::join(&world, || {}), &geometry, uuid::Uuid::nil(), 0).unwrap();
    let (area, state) = (LeaderArea(BrokerId(0)), SessionState::Open);
    let session = |slot| Session {
        slot,
        client_id: ClientId(7),
        epoch: Epoch(3),
        state,
        topic: TopicId(0),
        topic_incarnation: Incarnation(5),
        committed: 0,
        ack_level: 1,
        first_epoch: Epoch(2),
        first_sequence: 0,
        token: SessionToken(9),
    };
    let topic = topic((TopicId(0), Incarnation(5)), Order::Strong);
    // The version of each versioned line is at the same place.
    let tear = |at: RegionOffset| {
        let version_at = at.add(SessionLine::VERSION_AT);
        let version = region.fabric().load(version_at);
        region.fabric().store(version_at, version | 1);
        region.fabric().flush(at, LINE_BYTES, Site::SessionFlush);
        region.fabric().fence(Site::SessionFlush);
    };
    publish_topic(&region, area, &topic);
    let slots = [SessionSlot(0), SessionSlot(1)];
    slots.iter().for_each(|slot| publish_session(&region, area, &session(*slot)));
    tear(region.layout().session(area, slots[1]));
    tear(region.layout().topic(area, topic.id));
    assert_eq!(
        (read_session_at(&region, area, slots[1]), read_topic_at(&region, area, topic.id)),
        (Row::Unsettled, Row::Unsettled)
    );
    slots.iter().for_each(|slot| repair_torn_session(&region, area, *slot));
    repair_torn_topic(&region, area, topic.id);
    assert_eq!(read_session_at(&region, area, slots[0]), Row::Used(session(slots[0])), "it was whole");
    let repaired = Session { epoch: Epoch(4), state: SessionState::Fenced, ..session(slots[1]) };
    assert_eq!(read_session_at(&region, area, slots[1]), Row::Used(repaired));
    let left = read_topic_at(&region, area, topic.id).used().map(|topic| (topic.incarnation, topic.state));
    assert_eq!(left, Some((topic.incarnation, TopicState::Deleting)));
    // The leader stopped before it wrote the first word of a slot that was never used.
    let unused = region.layout().topic(area, topic.id);
    region.fabric().store(unused, 0);
    tear(unused);
    repair_torn_topic(&region, area, topic.id);
    let left = read_topic_at(&region, area, topic.id).used().map(|topic| (topic.incarnation, topic.state));
    assert_eq!(left, Some((Incarnation::NONE, TopicState::Free)));
}
