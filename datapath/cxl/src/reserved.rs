//! Check of the lines whose readers look at single words.
//!
//! A reader that polls a word does not read the rest of its line, nor can it return an error each time. So a broker
//! checks these lines when it starts, and `region inspect` does.

use crate::fabric::{Fabric, LINE_BYTES, Line, RegionOffset};
use crate::layout::{
    BrokerHalf, CompletionLine, ElectionLine, LeaderArea, PinLine, PulseLine, SequencerHalf, SessionProgressLine,
    TermLine,
};
use crate::region::Region;
use crate::row::Damage;
use crate::session_connections::damaged_words;
use crate::site::Site;
use embarcadero_wire::BrokerId;

/// Reads every line whose readers look at single words, and returns what is damaged. Reserved bytes must be zero, and
/// flags 0 or 1. Sessions that wait have connections.
pub fn damaged_lines<F: Fabric>(region: &Region<F>) -> Vec<Damage> {
    let (layout, geometry) = (region.layout(), region.geometry());
    let mut check = Check { region, damage: Vec::new() };
    check.line::<ElectionLine>(layout.election(), Site::TermRead);
    for broker in geometry.brokers() {
        check.line::<PulseLine>(layout.pulse(broker), Site::PulseRead);
        check.damage.extend(damaged_words(region, broker));
        for topic in geometry.topics() {
            check.line::<BrokerHalf>(layout.broker_half(topic, broker), Site::BatchlogHeadRead);
            check.line::<PinLine>(layout.pin(topic, broker), Site::PinRead);
            check.zeros("OffsetEntry", layout.offset_entry_reserved(topic, broker), Site::ReplicationRead);
        }
    }
    for area in (0..geometry.max_leaders).map(BrokerId).map(LeaderArea) {
        check.line::<TermLine>(layout.terms(area), Site::TermRead);
        for topic in geometry.topics() {
            check.zeros("LeaderTopic", layout.leader_topic_reserved(area, topic), Site::TopicRead);
            for broker in geometry.brokers() {
                check.line::<SequencerHalf>(layout.sequencer_half(area, topic, broker), Site::ConsumedRead);
                check.completion(layout.completion(area, topic, broker));
            }
        }
        for slot in geometry.sessions() {
            check.line::<SessionProgressLine>(layout.session_progress(area, slot), Site::RecordRead);
        }
    }
    check.damage
}

struct Check<'a, F> {
    region: &'a Region<F>,
    damage: Vec<Damage>,
}

impl<F: Fabric> Check<'_, F> {
    fn line<T: Line>(&mut self, at: RegionOffset, site: Site) -> Option<T> {
        self.region.fabric().observe_line(at, site).map_err(|damage| self.damage.push(damage)).ok()
    }

    fn completion(&mut self, at: RegionOffset) {
        let Some(line) = self.line::<CompletionLine>(at, Site::CompletionRead) else { return };
        for (what, value, is_damaged) in [
            ("awaited", line.awaited, line.awaited > 1),
            ("lost_from", line.lost_from, line.lost_from > line.lost_through),
        ] {
            if is_damaged {
                self.damage.push(Damage { structure: "CompletionLine", at, what, value });
            }
        }
    }

    /// Checks a line all of whose bytes are reserved.
    fn zeros(&mut self, structure: &'static str, at: RegionOffset, site: Site) {
        self.region.fabric().invalidate(at, LINE_BYTES, site);
        if let Some(value) = self.region.fabric().load_words(at).into_iter().find(|word| *word != 0) {
            self.damage.push(Damage { structure, at, what: "a reserved word", value });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker_table::{Pulse, publish_replica_state};
    use crate::layout::{AllocatorKind, LeaderTopic, OffsetEntry, ReplicaState};
    use crate::leadership::claim_term;
    use crate::order_index::{Pin, StreamId};
    use crate::replication::{Completion, publish_completion};
    use crate::segment::tests::region;
    use embarcadero_wire::{SessionSlot, Stream, Term, TopicId};
    use std::mem::offset_of;

    #[test]
    fn damage_beside_the_words_that_are_polled_is_found() {
        let region = region(1, AllocatorKind::Bitmap);
        let (topic, broker, area) = (TopicId(0), BrokerId(3), LeaderArea(BrokerId(0)));
        claim_term(&region, area, Term(1));
        Pulse::new(region.clone(), broker).beat();
        publish_replica_state(&region, broker, ReplicaState::Running);
        Pin::new(region.clone(), StreamId { topic, stream: Stream::GLOBAL }, broker);
        let completion = Completion { durable_through: 7, lost_from: 3, lost_through: 5, awaited: true };
        publish_completion(&region, area, topic, broker, completion);
        assert_eq!(damaged_lines(&region), []);
        let layout = region.layout();
        let places = [
            (layout.election().add(offset_of!(ElectionLine, reserved) as u64), "ElectionLine"),
            (layout.pulse(broker).add(offset_of!(PulseLine, reserved) as u64), "PulseLine"),
            // A slot that the region does not have.
            (layout.connections_word(broker, 0), "connections of sessions"),
            (layout.broker_half(topic, broker).add(offset_of!(BrokerHalf, reserved) as u64), "BrokerHalf"),
            (layout.pin(topic, broker).add(offset_of!(PinLine, reserved) as u64), "PinLine"),
            (layout.broker_half(topic, broker).add(offset_of!(OffsetEntry, reserved) as u64), "OffsetEntry"),
            (layout.terms(area).add(offset_of!(TermLine, reserved) as u64), "TermLine"),
            (layout.topic(area, topic).add(offset_of!(LeaderTopic, reserved) as u64), "LeaderTopic"),
            (
                layout.sequencer_half(area, topic, broker).add(offset_of!(SequencerHalf, reserved) as u64),
                "SequencerHalf",
            ),
            (layout.completion(area, topic, broker).add(offset_of!(CompletionLine, reserved) as u64), "CompletionLine"),
            (
                layout.session_progress(area, SessionSlot(0)).add(offset_of!(SessionProgressLine, reserved) as u64),
                "SessionProgressLine",
            ),
        ];
        places.iter().for_each(|(at, _)| region.fabric().store(*at, 2));
        let found: Vec<_> = damaged_lines(&region).iter().map(|damage| damage.structure).collect();
        assert_eq!(found, places.map(|(_, structure)| structure));
    }
}
