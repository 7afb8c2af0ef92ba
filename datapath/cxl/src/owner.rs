//! Holders of segments.

use crate::fabric::Fabric;
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

/// Number of a stream in an owner line: a broker's id, or one past the last broker's for the global order.
fn stream_number<F: Fabric>(region: &Region<F>, stream: Stream) -> u32 {
    stream.broker().map_or(region.geometry().max_brokers, |broker| broker.0)
}

/// Records the holder of a segment, for inspection and for the holder's next incarnation. Only the holder may.
pub fn publish_owner<F: Fabric>(region: &Region<F>, segment: u32, owner: SegmentUse) {
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
            broker: stream_number(region, stream),
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
        let max_brokers = region.geometry().max_brokers;
        match SegmentKind::from_code(kind).ok_or_else(|| damage("kind", kind))? {
            SegmentKind::Free => Ok(SegmentUse::Free),
            SegmentKind::Blog if broker < max_brokers => {
                Ok(SegmentUse::Blog { topic, incarnation, broker: BrokerId(broker), ordinal })
            }
            SegmentKind::Index if broker <= max_brokers => {
                let stream = if broker == max_brokers { Stream::GLOBAL } else { Stream::of(BrokerId(broker)) };
                Ok(SegmentUse::Index { topic, incarnation, stream, ordinal, holder })
            }
            SegmentKind::Blog | SegmentKind::Index => Err(damage("broker", broker)),
        }
    })
}
