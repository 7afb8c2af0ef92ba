//! Holders of segments.

use crate::fabric::{Fabric, LINE_BYTES};
use crate::layout::{OwnerLine, SegmentKind};
use crate::region::Region;
use crate::row::{Damage, Row};
use crate::site::Site;
use bytemuck::Zeroable;
use embarcadero_wire::{BrokerId, Incarnation, Stream, TopicId};
use serde::Serialize;

/// Use of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "use", rename_all = "lowercase")]
pub enum SegmentUse {
    /// The segment is in the pool.
    Free,
    /// The segment holds batches that a broker received.
    Blog {
        /// Topic slot.
        topic: TopicId,
        /// Incarnation of the topic.
        incarnation: Incarnation,
        /// Broker that received the batches.
        broker: BrokerId,
        /// Position in the broker's chain of segments, from 0.
        ordinal: u64,
    },
    /// The segment holds entries of an order index.
    Index {
        /// Topic slot.
        topic: TopicId,
        /// Incarnation of the topic.
        incarnation: Incarnation,
        /// Stream.
        stream: Stream,
        /// Position in the index, in segments.
        ordinal: u64,
        /// Broker that took the segment from the pool, and alone may give it back.
        holder: BrokerId,
    },
}

/// Records the holder of a segment, for inspection and for the holder's next incarnation. Only the holder may.
pub fn publish_owner<F: Fabric>(region: &Region<F>, segment: u32, owner: SegmentUse) {
    // The holder before may be on another host. The version goes on from what it wrote.
    region.fabric().invalidate(region.layout().owner(segment), LINE_BYTES, Site::OwnerRead);
    let line = match owner {
        SegmentUse::Free => OwnerLine { kind: SegmentKind::Free.code(), ..OwnerLine::zeroed() },
        SegmentUse::Blog { topic, incarnation, broker, ordinal } => OwnerLine {
            kind: SegmentKind::Blog.code(),
            topic,
            broker: broker.0,
            topic_incarnation: incarnation,
            ordinal,
            holder: broker,
            ..OwnerLine::zeroed()
        },
        SegmentUse::Index { topic, incarnation, stream, ordinal, holder } => OwnerLine {
            kind: SegmentKind::Index.code(),
            topic,
            broker: region.geometry().stream_number(stream),
            topic_incarnation: incarnation,
            ordinal,
            holder,
            ..OwnerLine::zeroed()
        },
    };
    region.fabric().publish_versioned(region.layout().owner(segment), &line, Site::OwnerFlush);
}

/// Reads the holder of a segment. The row of a segment that was never taken is unused.
pub fn read_owner<F: Fabric>(region: &Region<F>, segment: u32) -> Row<SegmentUse> {
    let at = region.layout().owner(segment);
    region.fabric().observe_versioned::<OwnerLine, ()>(at, Site::OwnerRead, |_| ()).decode(|(line, ())| {
        let damage = |what, value: u32| Damage { structure: "OwnerLine", at, what, value: value.into() };
        let OwnerLine { kind, topic, topic_incarnation: incarnation, broker, ordinal, holder, .. } = line;
        let kind = SegmentKind::from_code(kind).ok_or_else(|| damage("kind", kind))?;
        if kind == SegmentKind::Free {
            return Ok(SegmentUse::Free);
        }
        let geometry = region.geometry();
        if topic.0 >= geometry.max_topics {
            return Err(damage("topic", topic.0));
        }
        if holder.0 >= geometry.max_brokers {
            return Err(damage("holder", holder.0));
        }
        if kind == SegmentKind::Index && broker == geometry.stream_number(Stream::GLOBAL) {
            return Ok(SegmentUse::Index { topic, incarnation, stream: Stream::GLOBAL, ordinal, holder });
        }
        if broker >= geometry.max_brokers {
            return Err(damage("broker", broker));
        }
        let broker = BrokerId(broker);
        Ok(if kind == SegmentKind::Blog {
            SegmentUse::Blog { topic, incarnation, broker, ordinal }
        } else {
            SegmentUse::Index { topic, incarnation, stream: Stream::of(broker), ordinal, holder }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::AllocatorKind;
    use crate::segment::tests::region;

    #[test]
    fn numbers_that_the_region_does_not_have_are_damage() {
        let region = region(1, AllocatorKind::Bitmap);
        let (topic, incarnation, holder) = (TopicId(0), Incarnation(1), BrokerId(3));
        let owner = SegmentUse::Index { topic, incarnation, stream: Stream::GLOBAL, ordinal: 0, holder };
        publish_owner(&region, 0, owner);
        assert_eq!(read_owner(&region, 0), Row::Used(owner));
        let whole: OwnerLine = region.fabric().load_line(region.layout().owner(0)).unwrap();
        for (what, line) in [
            ("kind", OwnerLine { kind: 9, ..whole }),
            ("topic", OwnerLine { topic: TopicId(1), ..whole }),
            ("holder", OwnerLine { holder: BrokerId(4), ..whole }),
            ("broker", OwnerLine { broker: 5, ..whole }),
            ("broker", OwnerLine { kind: SegmentKind::Blog.code(), ..whole }),
        ] {
            region.fabric().publish_versioned(region.layout().owner(0), &line, Site::OwnerFlush);
            assert!(matches!(read_owner(&region, 0), Row::Damaged(damage) if damage.what == what), "{what}");
        }
    }
}
