//! Leadership of a broker: one broker orders, the others watch it and take over when it is gone or silent.
//!
//! On one host the kernel tells when the leader's process is gone: its claim on its broker id is free. A leader that is
//! there but does not move its heartbeat is silent. It may go on at any moment, and then finds that it leads no more.
//! Nothing that it writes until then counts (`embarcadero_cxl::leadership`).

mod election;
mod follower;

pub(crate) use election::{CoherenceScope, Election};

use crate::control::{CurrentLeader, LeaderControl};
use crate::dead_broker;
use crate::lending::Lending;
use crate::membership::Liveness;
use crate::replica::completion::CompletionStage;
use crate::sequencer::{Memory, Predecessor, Sequencer, SequencerLimits, Takeover};
use crate::worker::LeaderStages;
use crossbeam_channel::{Sender, TrySendError, unbounded};
use embarcadero_cxl::broker_table::{BrokerInfo, last_lock_node, read_broker};
use embarcadero_cxl::layout::{AllocatorKind, LeaderArea};
use embarcadero_cxl::leadership::{LeaderInfo, last_active, publish_leader, read_leader_at, still_leads};
use embarcadero_cxl::region::RegionFile;
use embarcadero_cxl::segment::{PartitionAllocator, SegmentAllocator};
use embarcadero_cxl::{Native, Region, Row};
use embarcadero_os::{Clock, SystemClock};
use embarcadero_wire::{BrokerId, Incarnation, Term};
use follower::Watch;
use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::MissedTickBehavior;

/// Time between two looks at the leader, or at the other brokers' heartbeats.
const PERIOD: Duration = Duration::from_millis(20);
/// Looks at the other brokers between two rounds of reaping dead ones.
const REAP_EVERY: u32 = 50;

/// Broker that leads, or follows and may take over.
pub(crate) struct Candidate {
    /// File of the region, whose locks are the claims on broker ids.
    pub(crate) file: RegionFile,
    /// Row of this broker in the broker table.
    pub(crate) info: BrokerInfo,
    /// Allocator for the order indexes.
    pub(crate) pool: Arc<dyn SegmentAllocator>,
    /// Mirror of the region, if it has one.
    pub(crate) mirror: Option<RegionFile>,
    /// Durations by which the sequencer goes.
    pub(crate) limits: SequencerLimits,
    /// Silence after which another broker counts as dead.
    pub(crate) broker_lease: Duration,
    /// Silence after which the leader is replaced.
    pub(crate) leader_lease: Duration,
    /// Brokers whose stores this one sees.
    pub(crate) scope: CoherenceScope,
    /// Authority that elects the leader.
    pub(crate) election: Election,
    /// True if this broker may be the leader.
    pub(crate) eligible: bool,
    /// Channel to the worker that runs the leader's stages.
    pub(crate) stages: Sender<LeaderStages<Native>>,
    /// Part of the control service that works only at the leader.
    pub(crate) control: Arc<CurrentLeader>,
    /// Token that the leader's stages share. It shows when they have ended.
    pub(crate) in_use: Arc<()>,
}

/// State of a broker that leads.
pub(crate) struct Leadership {
    /// Term under which it leads.
    term: Term,
    liveness: Liveness,
    /// Live brokers, and brokers whose pins count, as last published; one bit each.
    shown: (u64, u64),
    /// Looks until the next round of reaping.
    reap_in: u32,
    /// Segments with a damaged owner entry that the log has named.
    reported: BTreeSet<u32>,
}

/// Returns the state of the leader that led last, `led`, and its bit in a mask of brokers if its process is gone.
/// `statement` is what it said, if that is whole: a leader that is changing it may have died in the middle. `is_gone` tells
/// whether the process of a broker is gone, or the one of an incarnation.
fn predecessor(
    led: Option<(LeaderArea, Term)>,
    statement: Option<&LeaderInfo>,
    is_gone: impl FnOnce(BrokerId, Option<Incarnation>) -> bool,
) -> (Predecessor, u64) {
    match led {
        None => (Predecessor::Gone(Term::NONE), 0),
        Some((LeaderArea(id), term)) if is_gone(id, statement.map(|said| said.incarnation)) => {
            (Predecessor::Gone(term), 1 << id.0)
        }
        Some(_) => (Predecessor::MayGoOn, 0),
    }
}

/// Returns true if the lock on a broker's id tells whether its process is gone. Both processes must be on this host, and
/// lock ids by the same file or device node. `node` is the broker's, 0 if it never ran.
fn locks_tell(scope: CoherenceScope, own: u64, node: u64) -> bool {
    scope == CoherenceScope::Host && (node == own || node == 0)
}

impl Candidate {
    fn region(&self) -> &Region<Native> {
        self.file.region()
    }

    /// Returns true when a broker's process is known to be gone for ever, or never was. `incarnation` is that of the
    /// process, if known.
    fn is_gone(&self, broker: BrokerId, incarnation: Option<Incarnation>) -> bool {
        if broker == self.info.id {
            // This process holds the id's claim, so only its own stages could still lead.
            return Arc::strong_count(&self.in_use) == 1;
        }
        if !self.locks_tell(broker) {
            return false;
        }
        let claimed = self.file.is_claimed(broker).unwrap_or_else(|error| {
            tracing::error!(%error, "cannot look whether a broker is gone");
            true
        });
        let replaced = read_broker(self.region(), broker)
            .used()
            .is_some_and(|now| incarnation.is_some_and(|incarnation| now.incarnation > incarnation));
        !claimed || replaced
    }

    /// Returns true if the lock on a broker's id tells whether its process is gone. Else only silence does.
    fn locks_tell(&self, broker: BrokerId) -> bool {
        locks_tell(self.scope, self.info.lock_node, last_lock_node(self.region(), broker))
    }

    /// Becomes the leader, with everything that is in the region.
    fn lead(&self, term: Term) -> Option<Leadership> {
        let region = self.region();
        let led = last_active(region);
        let statement = led.map(|(area, _)| read_leader_at(region, area));
        if let Some(Row::Damaged(damage)) = &statement {
            tracing::error!(%damage, "the predecessor's list of live brokers is lost: all count as alive for a lease");
        }
        let before = statement.and_then(Row::used);
        let (predecessor, gone) = predecessor(led, before.as_ref(), |id, incarnation| self.is_gone(id, incarnation));
        let live = match (before, led) {
            (Some(before), _) => before.broker_mask & !gone,
            (None, None) => 0,
            // Any broker may be alive and pin what it reads, until its lease shows otherwise.
            (None, Some(_)) => {
                let all = region.geometry().broker_mask();
                all & !self.ended_brokers(all)
            }
        };
        let live = live | 1 << self.info.id.0;
        let shown = self.publish(term, live);
        let (commands, queue) = unbounded();
        let area = LeaderArea(self.info.id);
        let mirror = self.mirror.as_ref().map(|file| file.region().clone());
        let memory = Memory { region: region.clone(), pool: Arc::clone(&self.pool), mirror };
        let takeover = Takeover { memory, area, term, before: predecessor, limits: self.limits, commands: queue };
        let sequencer = match Sequencer::recover(takeover, SystemClock.now().times()) {
            Ok(sequencer) => sequencer,
            Err(error) => {
                tracing::error!(%error, %term, "cannot take over");
                return None;
            }
        };
        let completion = CompletionStage::new(region.clone(), area);
        let stages = LeaderStages { sequencer, completion, in_use: Arc::clone(&self.in_use) };
        let sent = self.stages.try_send(stages);
        assert!(!matches!(sent, Err(TrySendError::Full(_))), "term {term} begins before this broker's last one ended");
        if sent.is_err() {
            tracing::error!(%term, "cannot lead: the worker that runs the leader's stages has ended");
            return None;
        }
        let topics = tokio::sync::Mutex::new(());
        let lends = region.geometry().allocator == AllocatorKind::Leader;
        let lending = lends.then(|| Arc::new(Lending::new(region.clone(), Arc::clone(&self.pool))));
        *self.control.write().unwrap_or_else(PoisonError::into_inner) =
            Some(Arc::new(LeaderControl { commands, topics, lending }));
        tracing::info!(broker = %self.info.id, %term, "leader");
        Some(Leadership {
            term,
            liveness: Liveness::new(region, self.broker_lease, live, Instant::now()),
            shown,
            reap_in: REAP_EVERY,
            reported: BTreeSet::new(),
        })
    }

    /// Publishes which brokers are alive, and whose pins count.
    fn publish(&self, term: Term, live: u64) -> (u64, u64) {
        let shown = (live, live | self.stopped_brokers(live));
        let BrokerInfo { id: broker, incarnation, .. } = self.info;
        let (broker_mask, pinning_mask) = shown;
        publish_leader(self.region(), &LeaderInfo { term, broker, incarnation, broker_mask, pinning_mask });
        shown
    }

    /// Returns the brokers that are silent but not gone, one bit each. They may go on, and deliver what they were about
    /// to.
    fn stopped_brokers(&self, live: u64) -> u64 {
        self.region()
            .geometry()
            .brokers()
            .filter(|id| live & 1 << id.0 == 0 && self.locks_tell(*id))
            .filter(|id| match read_broker(self.region(), *id) {
                Row::Used(info) => info.running && !self.is_gone(*id, Some(info.incarnation)),
                Row::Unused => false,
                // Whoever has the row may go on.
                Row::Unsettled | Row::Damaged(_) => !self.is_gone(*id, None),
            })
            .fold(0, |mask, id| mask | 1 << id.0)
    }

    /// Returns the brokers of the mask `live` whose process has ended, one bit each. On one host the kernel tells at
    /// once, and their leases need not end.
    fn ended_brokers(&self, live: u64) -> u64 {
        let others = self.region().geometry().brokers().filter(|id| *id != self.info.id && live & 1 << id.0 != 0);
        others.filter(|id| self.is_gone(*id, None)).fold(0, |mask, id| mask | 1 << id.0)
    }

    /// Leads, or follows and takes over, until the broker stops.
    pub(crate) async fn run(self, mut leadership: Option<Leadership>) {
        let mut ticks = tokio::time::interval(PERIOD);
        // After a pause of this host, looks do not come in a burst.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watch = Watch::default();
        loop {
            match &self.election {
                Election::Region => drop(ticks.tick().await),
                Election::Etcd(etcd) => tokio::select! {
                    _ = ticks.tick() => {}
                    () = etcd.changed() => {}
                },
            }
            match &mut leadership {
                Some(leading) if still_leads(self.region(), leading.term) => self.look_after(leading),
                Some(leading) => {
                    tracing::warn!(term = %leading.term, "another broker took over: this one leads no more");
                    *self.control.write().unwrap_or_else(PoisonError::into_inner) = None;
                    leadership = None;
                    self.election.set_leads(false).await;
                }
                None if self.eligible => leadership = self.follow(&mut watch).await,
                None => {}
            }
        }
    }

    /// Looks at the other brokers, as the leader.
    fn look_after(&self, leadership: &mut Leadership) {
        let beating = leadership.liveness.poll(self.region(), Instant::now()) | 1 << self.info.id.0;
        let live = beating & !self.ended_brokers(beating);
        let now = (live, live | self.stopped_brokers(live));
        if let Row::Damaged(damage) = read_leader_at(self.region(), LeaderArea(self.info.id)) {
            tracing::error!(%damage, "the list of live brokers is written again");
            leadership.shown = self.publish(leadership.term, live);
        } else if now != leadership.shown {
            tracing::info!(mask = format!("{live:#b}"), "membership changed");
            leadership.shown = self.publish(leadership.term, live);
        }
        leadership.reap_in = leadership.reap_in.checked_sub(1).unwrap_or(REAP_EVERY);
        if leadership.reap_in == 0 && self.scope == CoherenceScope::Host {
            self.reap(live, &mut leadership.reported);
            self.collect_lost(live);
        }
    }

    /// Gives back segments that were lent, and that nobody has.
    fn collect_lost(&self, live: u64) {
        let control = self.control.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(lending) = control.and_then(|control| control.lending.clone()) {
            let all = self.region().geometry().broker_mask();
            lending.collect((live | self.ended_brokers(all)) & all == all);
        }
    }

    /// Gives back memory of dead brokers. Holds their ids meanwhile, so that none of them starts. `reported` has the
    /// segments with a damaged owner entry that the log has named.
    fn reap(&self, live: u64, reported: &mut BTreeSet<u32>) {
        let region = self.region();
        let dead = dead_broker::holders(region, reported) & !live;
        for broker in region.geometry().brokers().filter(|broker| dead & 1 << broker.0 != 0) {
            // It may stand still, and this process could still claim its id.
            if !self.locks_tell(broker) {
                continue;
            }
            // Without a claim, a process with this id stands still or starts now.
            let Ok(_claim) = self.file.claim_broker(broker) else { continue };
            let pool: Arc<dyn SegmentAllocator> = match region.geometry().allocator {
                AllocatorKind::Partitioned => Arc::new(PartitionAllocator::of_broker(region.clone(), broker)),
                AllocatorKind::Bitmap | AllocatorKind::Leader => Arc::clone(&self.pool),
            };
            dead_broker::reap(region, broker, pool, SystemClock.now().times());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_by_another_node_tells_nothing() {
        assert!(locks_tell(CoherenceScope::Host, 7, 7));
        assert!(locks_tell(CoherenceScope::Host, 7, 0), "it never ran");
        assert!(!locks_tell(CoherenceScope::Host, 7, 8));
        for scope in [CoherenceScope::Fabric, CoherenceScope::None] {
            assert!(!locks_tell(scope, 7, 7));
        }
    }

    #[test]
    fn a_leader_that_died_while_it_changed_its_statement_is_gone() {
        let (id, incarnation, term) = (BrokerId(2), Incarnation(5), Term(7));
        let led = Some((LeaderArea(id), term));
        let said = LeaderInfo { term, broker: id, incarnation, broker_mask: 0b101, pinning_mask: 0b101 };
        for statement in [None, Some(&said)] {
            let known = statement.map(|_| incarnation);
            let look = |gone| {
                predecessor(led, statement, |broker, process| {
                    assert_eq!((broker, process), (id, known));
                    gone
                })
            };
            assert_eq!(look(true), (Predecessor::Gone(term), 0b100));
            assert_eq!(look(false), (Predecessor::MayGoOn, 0));
        }
        assert_eq!(predecessor(None, None, |_, _| false), (Predecessor::Gone(Term::NONE), 0));
    }
}
