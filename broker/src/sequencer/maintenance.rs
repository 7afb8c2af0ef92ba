//! Maintenance: retention, reclaiming and deletion.

use super::Sequencer;
use super::topic::TopicOrder;
use crate::delegation::report_trimmed;
use crate::replica::completion::trimmable;
use embarcadero_cxl::leadership::{read_leader_at, still_leads};
use embarcadero_cxl::order_index::{Retention, lowest_pin};
use embarcadero_cxl::replication::{Completion, read_completion_at};
use embarcadero_cxl::{Fabric, Site};
use embarcadero_os::Times;
use embarcadero_wire::BrokerId;

impl<F: Fabric> Sequencer<F> {
    /// Does the work that is not done per batch. Call it every few milliseconds.
    pub fn maintain(&mut self, now: impl Into<Times>) {
        let now = now.into();
        self.now_us = now.steady_us;
        let said = read_leader_at(&self.region, self.area).used();
        let (live, pinning) = said.map_or((u64::MAX, u64::MAX), |said| (said.broker_mask, said.pinning_mask));
        let brokers: Vec<BrokerId> = self.region.geometry().brokers().filter(|id| pinning & (1 << id.0) != 0).collect();
        self.fence_gaps(live, now.steady_us);
        let awaited = self.awaited_topics();
        for topic in self.topics.iter_mut().flatten() {
            let config = &topic.config;
            // All brokers' lines say the same of the global stream. Sessions that wait are known here first.
            let shown = read_completion_at(&self.region, self.area, config.id, BrokerId(0));
            let completion = Completion { awaited: awaited & 1 << config.id.0 != 0, ..shown };
            let old = topic.ages.look(topic.index.next(), config.retention_ms, now);
            let damage = topic.index.enforce_retention(Retention {
                bytes: config.retention_bytes,
                since_us: old.since_us,
                below: old.below,
                limit: trimmable(&self.region, config, completion),
            });
            report_trimmed(&config.name, damage);
            // A segment that a successor still gives to readers is not given back.
            if !still_leads(&self.region, self.term) {
                return;
            }
            topic.index.reclaim(lowest_pin(&self.region, config.id, brokers.iter().copied()));
            if let Some(mirror) = &mut topic.mirror {
                mirror.trim_below(topic.index.earliest_offset());
                mirror.reclaim(u64::MAX);
            }
        }
        self.publish_decided();
        self.finish_closing(&brokers);
    }

    /// Tells brokers which of their batches are held or wait for room, while any are. Brokers keep the memory of these
    /// batches.
    fn publish_decided(&mut self) {
        let mut changed = false;
        for topic in self.topics.iter_mut().flatten() {
            let TopicOrder { config, brokers, undecided, .. } = topic;
            for (broker, state) in self.region.geometry().brokers().zip(brokers) {
                let next = state.reader.next();
                if state.consumed.consumed.decided_through == next {
                    continue;
                }
                let sessions = self.group.sessions.iter().flatten();
                let held = sessions.filter(|order| order.session.topic == config.id);
                let held = held.filter_map(|order| order.lowest_held(broker));
                let waiting = undecided.iter().filter(|arrival| arrival.broker == broker).map(|arrival| arrival.index);
                let decided = held.chain(waiting).min().unwrap_or(next);
                if decided != state.consumed.consumed.decided_through {
                    state.consumed.consumed.decided_through = decided;
                    state.consumed.store();
                    changed = true;
                }
            }
        }
        if changed {
            self.region.fabric().fence(Site::ConsumedFlush);
        }
    }
}
