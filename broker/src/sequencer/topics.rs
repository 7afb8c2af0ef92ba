//! Topics: creating and deleting them.

use super::Sequencer;
use super::topic::TopicOrder;
use crossbeam_channel::{Sender, bounded};
use embarcadero_cxl::layout::{SessionState, TopicState};
use embarcadero_cxl::leadership::still_leads;
use embarcadero_cxl::order_index::OrderIndexWriter;
use embarcadero_cxl::topic_table::{TopicConfig, publish_topic, read_released, read_topic_at};
use embarcadero_cxl::{Damage, Fabric, Row};
use embarcadero_wire::{BrokerId, TopicId};
use std::sync::Arc;

/// Deleted topic whose memory brokers still hold.
pub(super) struct Closing<F: Fabric> {
    config: TopicConfig,
    order: Option<TopicOrder<F>>,
    reply: Sender<Result<(), Damage>>,
    /// Damage for which a broker\'s release of the topic cannot be read, as it was logged.
    damage: Option<Damage>,
}

impl<F: Fabric> Sequencer<F> {
    /// Takes up a topic, which exists or is about to.
    pub(super) fn open_topic(&mut self, config: TopicConfig) {
        let slot = config.id.index();
        self.configs[slot] = Some(config.clone());
        self.damaged[slot] = None;
        if !config.order.is_global() {
            return;
        }
        match self.open_order(config) {
            Ok(order) => {
                self.topics[slot] = Some(order);
                self.group.backlog = true;
            }
            Err(damage) => self.set_damaged(slot, damage),
        }
    }

    fn open_order(&self, config: TopicConfig) -> Result<TopicOrder<F>, Damage> {
        TopicOrder::open(&self.region, (self.area, self.term), config, Arc::clone(&self.pool))
    }

    /// Creates a topic. Its index is there before anyone can see it.
    ///
    /// # Errors
    /// [`Damage`] of the index in the region, or in the mirror. The slot shows a topic that is being deleted, so that no
    /// other topic gets it.
    pub(super) fn create_topic(&mut self, config: TopicConfig) -> Result<(), Damage> {
        let slot = config.id.index();
        self.open_topic(config.clone());
        if let (Some(mirror), Some(topic)) = (&self.mirror, &mut self.topics[slot])
            && let Err(damage) = topic.open_mirror(mirror)
        {
            self.set_damaged(slot, damage);
        }
        if let Some(damage) = self.damaged[slot] {
            self.configs[slot] = None;
            self.show_topic(&TopicConfig { state: TopicState::Deleting, ..config });
            return Err(damage);
        }
        self.show_topic(&config);
        Ok(())
    }

    /// Writes a topic's row, in the mirror first.
    fn show_topic(&self, config: &TopicConfig) {
        if let Some(mirror) = &self.mirror {
            mirror.topic(config);
        }
        publish_topic(&self.region, self.area, config);
    }

    /// Deletes a topic. [`Sequencer::finish_closing`] answers once no broker holds its memory. A topic whose order is
    /// damaged stays in deletion: the segments of its index cannot be found.
    pub(super) fn close_topic(&mut self, id: TopicId, reply: Sender<Result<(), Damage>>) {
        // The control plane asks for any slot that a client names.
        let Some(config) = self.configs.get_mut(id.index()).and_then(Option::take) else {
            let _ = reply.send(Ok(()));
            return;
        };
        self.show_topic(&TopicConfig { state: TopicState::Deleting, ..config.clone() });
        for slot in self.region.geometry().sessions() {
            let open = self.group.sessions[slot.index()].as_ref();
            if open.is_some_and(|order| order.session.topic == id) {
                self.end_session(slot, SessionState::Closed);
            }
        }
        if let Some(damage) = self.damaged[id.index()] {
            tracing::error!(topic = config.name, slot = %id, %damage, "the deletion cannot end: the slot is not freed");
            let _ = reply.send(Err(damage));
            return;
        }
        let order = self.topics[id.index()].take();
        self.closing.push(Closing { config, order, reply, damage: None });
    }

    /// Continues the deletions that an earlier leader began. A topic whose order is damaged stays in deletion, and the
    /// log names it.
    pub(super) fn resume_closing(&mut self) {
        for id in self.region.geometry().topics() {
            let config = match read_topic_at(&self.region, self.area, id) {
                Row::Used(config) if config.state == TopicState::Deleting => config,
                // The takeover has named a damaged row.
                Row::Used(_) | Row::Unused | Row::Unsettled | Row::Damaged(_) => continue,
            };
            let order = if config.order.is_global() { self.open_order(config.clone()).map(Some) } else { Ok(None) };
            let order = match order {
                Ok(order) => order,
                Err(damage) => {
                    tracing::error!(topic = config.name, slot = %id, %damage, "the deletion cannot end: the slot is not freed");
                    self.damaged[id.index()] = Some(damage);
                    self.group.stats.damaged += 1;
                    continue;
                }
            };
            // The client that asked for it asked an earlier leader: nobody waits for this answer.
            let (reply, _) = bounded(1);
            self.closing.push(Closing { config, order, reply, damage: None });
        }
    }

    /// Frees the slots of deleted topics whose memory no live broker holds any more. What a dead one holds comes back by
    /// [`crate::reclaim::OrphanedSegments`].
    pub(super) fn finish_closing(&mut self, brokers: &[BrokerId]) {
        let Self { region, area, term, mirror, closing, .. } = self;
        closing.retain_mut(|Closing { config, order, reply, damage }| {
            let holds = |broker: &BrokerId| match read_released(region, config.id, *broker) {
                Ok(released) => released < config.incarnation,
                Err(found) => {
                    if damage.replace(found) != Some(found) {
                        tracing::error!(topic = config.name, %broker, damage = %found, "the topic's slot stays taken");
                    }
                    true
                }
            };
            if brokers.iter().any(holds) {
                return true;
            }
            if let Some(order) = order {
                order.index.abandon();
                order.mirror.iter_mut().for_each(OrderIndexWriter::abandon);
            }
            let gone = TopicConfig { state: TopicState::Free, ..config.clone() };
            mirror.iter().for_each(|mirror| mirror.topic(&gone));
            publish_topic(region, *area, &gone);
            if still_leads(region, *term) {
                let _ = reply.send(Ok(()));
            }
            false
        });
    }
}
