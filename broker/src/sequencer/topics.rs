//! Topics: creating and deleting them.

use super::Sequencer;
use super::topic::TopicOrder;
use crossbeam_channel::{Sender, bounded};
use embarcadero_cxl::layout::{SessionState, TopicState};
use embarcadero_cxl::leadership::still_leads;
use embarcadero_cxl::order_index::OrderIndexWriter;
use embarcadero_cxl::topic_table::{TopicConfig, publish_topic, read_released, read_topic_at};
use embarcadero_cxl::{Damage, Fabric};
use embarcadero_wire::{BrokerId, TopicId};
use std::sync::Arc;

/// Deleted topic whose memory brokers still hold.
pub(super) struct Closing<F: Fabric> {
    config: TopicConfig,
    order: Option<TopicOrder<F>>,
    reply: Sender<()>,
    /// Damage for which a broker's release of the topic cannot be read, as it was logged.
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
    pub(super) fn create_topic(&mut self, config: TopicConfig) {
        self.open_topic(config.clone());
        if let (Some(mirror), Some(topic)) = (&self.mirror, &mut self.topics[config.id.index()])
            && let Err(damage) = topic.open_mirror(mirror)
        {
            self.set_damaged(config.id.index(), damage);
        }
        self.show_topic(&config);
    }

    /// Writes a topic's row, in the mirror first.
    fn show_topic(&self, config: &TopicConfig) {
        if let Some(mirror) = &self.mirror {
            mirror.topic(config);
        }
        publish_topic(&self.region, self.area, config);
    }

    /// Deletes a topic. [`Sequencer::finish_closing`] answers once no broker holds its memory.
    pub(super) fn close_topic(&mut self, id: TopicId, reply: Sender<()>) {
        // The control plane asks for any slot that a client names.
        let Some(config) = self.configs.get_mut(id.index()).and_then(Option::take) else {
            let _ = reply.send(());
            return;
        };
        self.show_topic(&TopicConfig { state: TopicState::Deleting, ..config.clone() });
        for slot in self.region.geometry().sessions() {
            let open = self.group.sessions[slot.index()].as_ref();
            if open.is_some_and(|order| order.session.topic == id) {
                self.end_session(slot, SessionState::Closed);
            }
        }
        let order = self.topics[id.index()].take();
        self.closing.push(Closing { config, order, reply, damage: None });
    }

    /// Continues the deletions that an earlier leader began.
    pub(super) fn resume_closing(&mut self) {
        for id in self.region.geometry().topics() {
            let topic = read_topic_at(&self.region, self.area, id).used();
            let Some(config) = topic.filter(|topic| topic.state == TopicState::Deleting) else { continue };
            let order = if config.order.is_global() { self.open_order(config.clone()).ok() } else { None };
            // The client that asked for it asked an earlier leader: nobody waits for this answer.
            let (reply, _) = bounded(1);
            self.closing.push(Closing { config, order, reply, damage: None });
        }
    }

    /// Frees the slots of deleted topics whose memory no live broker holds any more.
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
                let _ = reply.send(());
            }
            false
        });
    }
}
