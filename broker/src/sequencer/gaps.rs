//! Gaps: how long a session may have one before it is fenced.
//!
//! - The lease of a gap lasts `gap_us`.
//! - While a broker has a connection of the session that waits for room, the lease starts again. This excuse lasts no
//!   longer than `excuse_us` beyond the lease.
//! - A session of which no broker has a connection for `abandoned_us` is fenced at once when memory is short that it
//!   holds.
//!
//! Connections count at the brokers that are alive (`embarcadero_cxl::session_connections`). A broker that stands still
//! shows old ones until it is taken for dead: that excuses no gap for longer, and ends no lease sooner. A new leader
//! reads what the brokers show, and times it anew.

use super::Sequencer;
use super::topic::TopicOrder;
use embarcadero_cxl::layout::SessionState;
use embarcadero_cxl::segment::segments_of;
use embarcadero_cxl::session_connections::ConnectionsReader;
use embarcadero_cxl::{Fabric, Region};
use embarcadero_wire::BrokerId;

impl<F: Fabric> Sequencer<F> {
    /// Fences the sessions whose gap has lasted too long, or is in others' way. `live` has the brokers that are alive,
    /// one bit each.
    pub(super) fn fence_gaps(&mut self, live: u64, now_us: u64) {
        if self.group.held == 0 {
            return;
        }
        let Self { region, topics, group, limits, .. } = self;
        let mut connections = ConnectionsReader::new(region, live);
        let mut memory = Memory { region, exhausted: vec![None; region.geometry().max_brokers as usize] };
        let mut fenced = Vec::new();
        for (slot, order) in region.geometry().sessions().zip(&mut group.sessions) {
            let Some(order) = order.as_mut().filter(|order| order.has_gap()) else { continue };
            order.note_connections(connections.of(slot), now_us);
            let topic = topics[order.session.topic.index()].as_ref();
            if order.is_overdue(limits, now_us)
                || order.is_abandoned(limits, now_us) && memory.is_short(order.holders(), topic)
            {
                fenced.push(slot);
            }
        }
        for slot in fenced {
            self.end_session(slot, SessionState::Fenced);
        }
    }
}

/// Memory that batches lie in, as one look finds it.
struct Memory<'a, F> {
    region: &'a Region<F>,
    /// True where a broker finds no segment for batches; `None` before the look at it. By broker id.
    exhausted: Vec<Option<bool>>,
}

impl<F: Fabric> Memory<'_, F> {
    /// Returns true if one of the brokers of the mask `holders` has no room for batches of the topic. It finds no segment
    /// for them, or its Batchlog is full.
    fn is_short(&mut self, holders: u64, topic: Option<&TopicOrder<F>>) -> bool {
        let mut brokers = self.region.geometry().brokers().filter(|broker| holders & 1 << broker.0 != 0);
        brokers.any(|broker| {
            let log = topic.map(|topic| &topic.brokers[broker.index()].reader);
            self.is_exhausted(broker) || log.is_some_and(|log| log.is_full())
        })
    }

    fn is_exhausted(&mut self, broker: BrokerId) -> bool {
        *self.exhausted[broker.index()].get_or_insert_with(|| segments_of(self.region, broker).is_short())
    }
}
