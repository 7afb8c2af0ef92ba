//! Who is the leader: one broker orders, the others watch it and take over when it is gone or silent.
//!
//! On one host the kernel tells when the leader's process is gone: its claim on its broker id is free. A leader that is there
//! but does not move its heartbeat is silent; it may go on at any moment, and then finds that it leads no more. Nothing
//! that it writes until then counts (`embarcadero_cxl::leadership`).

use crate::control::{CurrentLeader, LeaderControl};
use crate::dead_broker;
use crate::membership::Liveness;
use crate::membership::etcd::Etcd;
use crate::replica::completion::CompletionStage;
use crate::sequencer::{Leases, Memory, Predecessor, Sequencer, Takeover};
use crate::worker::LeaderStages;
use crossbeam_channel::{Sender, unbounded};
use embarcadero_cxl::broker_table::{BrokerInfo, read_broker, read_pulse};
use embarcadero_cxl::layout::{AllocatorKind, LeaderArea};
use embarcadero_cxl::leadership::{
    Candidacy, LeaderInfo, campaign, highest_candidacy, last_active, latest_claim, latest_claimant, publish_leader,
    read_leader_at, still_leads,
};
use embarcadero_cxl::region::RegionFile;
use embarcadero_cxl::segment::{PartitionAllocator, SegmentAllocator};
use embarcadero_cxl::{Native, Region};
use embarcadero_os::{Clock, SystemClock};
use embarcadero_wire::{BrokerId, Incarnation, Term};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::MissedTickBehavior;

/// Time between two looks at the leader, or at the other brokers' heartbeats.
const PERIOD: Duration = Duration::from_millis(20);
/// Looks at the other brokers between two at what those left that are gone.
const REAP_EVERY: u32 = 50;
/// Looks that are let pass after a takeover that failed.
const REST: u32 = 25;

/// Which brokers see each other, so that one can tell whether another is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoherenceScope {
    /// All are processes of this host.
    Host,
    /// Other hosts, on memory that is coherent among them.
    Fabric,
    /// Other hosts, on memory that is not: nobody takes over here.
    None,
}

/// Who says which broker may claim the next term.
pub enum Election {
    /// The region's election word; where brokers do not see each other, whoever is configured to be the leader.
    Region,
    /// etcd.
    Etcd(Box<Etcd>),
}

/// A broker as leader, or as one that takes over.
pub struct Candidate {
    /// The region's file, which has the claims on broker ids.
    pub file: RegionFile,
    /// This broker.
    pub info: BrokerInfo,
    /// Allocator for the order indexes.
    pub pool: Arc<dyn SegmentAllocator>,
    /// The region's mirror, if it has one.
    pub mirror: Option<RegionFile>,
    /// Times that the sequencer goes by.
    pub leases: Leases,
    /// After what silence another broker is dead.
    pub broker_lease: Duration,
    /// After what silence the leader is replaced.
    pub leader_lease: Duration,
    /// Whom it sees.
    pub reach: CoherenceScope,
    /// Who elects.
    pub election: Election,
    /// It may be the leader.
    pub eligible: bool,
    /// To the worker that runs the leader's stages.
    pub stages: Sender<LeaderStages>,
    /// What the control service can do while this is the leader.
    pub control: Arc<CurrentLeader>,
    /// Shared with the stages, so that it is seen when they have ended.
    pub in_use: Arc<()>,
}

/// How this broker leads.
pub struct Leadership {
    term: Term,
    liveness: Liveness,
    shown: (u64, u64),
    /// Looks until what others left is seen to.
    reap_in: u32,
}

/// The leader as a follower sees it.
#[derive(Default)]
struct Watch {
    /// The leader, the highest candidacy, and the leader's heartbeat.
    seen: (Option<(BrokerId, Term)>, Term, u64),
    /// Looks for which nothing of it moved.
    unmoved: u32,
    /// Looks to let pass.
    resting: u32,
    /// That nobody can take over was said.
    warned: bool,
}

impl Candidate {
    fn region(&self) -> &Region<Native> {
        self.file.region()
    }

    /// True when a broker's process is known to be gone for ever, or never was: `incarnation` is that of the process.
    fn is_gone(&self, broker: BrokerId, incarnation: Option<Incarnation>) -> bool {
        if broker == self.info.id {
            // We have its claim, and our own threads that led have ended.
            return Arc::strong_count(&self.in_use) == 1;
        }
        if self.reach != CoherenceScope::Host {
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

    /// True when there is no leader, and none can come back.
    fn leader_is_gone(&self) -> bool {
        let Some((broker, term)) = latest_claimant(self.region()) else { return true };
        let line = read_leader_at(self.region(), LeaderArea(broker)).used().filter(|line| line.term == term);
        self.is_gone(broker, line.map(|line| line.incarnation))
    }

    /// Takes over if there is no leader that could go on. Returns how this broker leads, if it does.
    pub async fn take_over_if_gone(&self) -> Option<Leadership> {
        // Looked at before the leader is: whoever stands in between wins.
        let before = highest_candidacy(self.region());
        if self.eligible && self.leader_is_gone() { self.take_over(before).await } else { None }
    }

    /// Stands for election, and leads if it wins.
    async fn take_over(&self, before: Term) -> Option<Leadership> {
        if Arc::strong_count(&self.in_use) > 1 {
            return None;
        }
        match &self.election {
            Election::Region => {
                let term = before.max(latest_claim(self.region())).next();
                // Where nobody could see the others' candidacies there is only one who may be the leader.
                if self.reach != CoherenceScope::None && !campaign(self.region(), Candidacy { term, before }) {
                    return None;
                }
                self.lead(term)
            }
            Election::Etcd(etcd) => {
                let term = match etcd.campaign(etcd.elected().ok()).await {
                    Ok(elected) => elected?,
                    Err(error) => {
                        tracing::warn!(%error, "nobody can take over");
                        return None;
                    }
                };
                let claimed = latest_claim(self.region());
                let leadership = if term > claimed {
                    self.lead(term)
                } else {
                    tracing::error!(%term, %claimed, "etcd was set back to before the region's leaders: delete its keys");
                    None
                };
                etcd.set_leads(leadership.is_some()).await;
                leadership
            }
        }
    }

    /// True when the leader has long given up its place with who elects, although it goes on.
    fn has_resigned(&self) -> bool {
        match &self.election {
            Election::Region => false,
            Election::Etcd(etcd) => etcd.lost().is_none() && etcd.elected().is_err_and(|none| none > etcd.grace()),
        }
    }

    /// True when who elects can be asked; what it is otherwise.
    fn can_elect(&self) -> Result<(), String> {
        match &self.election {
            Election::Region if self.reach == CoherenceScope::None => {
                Err("membership: embedded elects nobody on memory that is not coherent".to_owned())
            }
            Election::Region => Ok(()),
            Election::Etcd(etcd) => etcd.lost().map_or(Ok(()), |(_, error)| Err(error)),
        }
    }

    /// Becomes the leader, with everything that is in the region.
    fn lead(&self, term: Term) -> Option<Leadership> {
        let region = self.region();
        let led = last_active(region);
        let before = led.and_then(|(area, _)| read_leader_at(region, area).used());
        let gone = before.filter(|before| self.is_gone(before.broker, Some(before.incarnation)));
        // One whose line cannot be read is in the middle of changing it, or died there.
        let predecessor = match led {
            None => Predecessor::Gone(Term::NONE),
            Some((_, led)) if gone.is_some() => Predecessor::Gone(led),
            Some(_) => Predecessor::MayGoOn,
        };
        let gone = gone.map_or(0, |gone| 1 << gone.broker.0);
        let live = before.map_or(0, |before| before.broker_mask & !gone) | 1 << self.info.id.0;
        let shown = self.publish(term, live);
        let (commands, queue) = unbounded();
        let area = LeaderArea(self.info.id);
        let mirror = self.mirror.as_ref().map(|file| file.region().clone());
        let memory = Memory { region: region.clone(), pool: Arc::clone(&self.pool), mirror };
        let takeover = Takeover { memory, area, term, before: predecessor, leases: self.leases, commands: queue };
        let sequencer = match Sequencer::recover(takeover, SystemClock.now().wall_us) {
            Ok(sequencer) => sequencer,
            Err(error) => {
                tracing::error!(%error, %term, "cannot take over");
                return None;
            }
        };
        let completion = CompletionStage::new(region.clone(), area);
        // There is room: the stages of an earlier time have ended.
        let _ = self.stages.try_send(LeaderStages { sequencer, completion, in_use: Arc::clone(&self.in_use) });
        let topics = tokio::sync::Mutex::new(());
        *self.control.write().unwrap_or_else(PoisonError::into_inner) =
            Some(Arc::new(LeaderControl { commands, topics }));
        tracing::info!(broker = %self.info.id, %term, "leader");
        Some(Leadership {
            term,
            liveness: Liveness::new(region, self.broker_lease, live, Instant::now()),
            shown,
            reap_in: REAP_EVERY,
        })
    }

    /// Shows which brokers live, and whose pins count.
    fn publish(&self, term: Term, live: u64) -> (u64, u64) {
        let shown = (live, live | self.stopped_brokers(live));
        let BrokerInfo { id: broker, incarnation, .. } = self.info;
        let (broker_mask, pinning_mask) = shown;
        publish_leader(self.region(), &LeaderInfo { term, broker, incarnation, broker_mask, pinning_mask });
        shown
    }

    /// Brokers that are silent but not gone: they may go on, and deliver what they were about to.
    fn stopped_brokers(&self, live: u64) -> u64 {
        self.region()
            .geometry()
            .brokers()
            .filter(|id| live & 1 << id.0 == 0 && self.reach == CoherenceScope::Host)
            .filter_map(|id| read_broker(self.region(), id).used())
            .filter(|info| info.running && !self.is_gone(info.id, Some(info.incarnation)))
            .fold(0, |mask, info| mask | 1 << info.id.0)
    }

    /// Brokers of the mask `live` whose process has ended. On one host the kernel tells at once, and their leases need not
    /// expire.
    fn ended_brokers(&self, live: u64) -> u64 {
        let others = self.region().geometry().brokers().filter(|id| *id != self.info.id && live & 1 << id.0 != 0);
        others.filter(|id| self.is_gone(*id, None)).fold(0, |mask, id| mask | 1 << id.0)
    }

    /// Leads, or follows and takes over, until the broker stops.
    pub async fn run(self, mut leadership: Option<Leadership>) {
        let mut ticks = tokio::time::interval(PERIOD);
        // A look counts for one, even if this host stood still for many.
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
                    if let Election::Etcd(etcd) = &self.election {
                        etcd.set_leads(false).await;
                    }
                }
                None if self.eligible => leadership = self.follow(&mut watch).await,
                None => {}
            }
        }
    }

    /// The leader's look at the others.
    fn look_after(&self, leadership: &mut Leadership) {
        let beating = leadership.liveness.poll(self.region(), Instant::now()) | 1 << self.info.id.0;
        let live = beating & !self.ended_brokers(beating);
        let now = (live, live | self.stopped_brokers(live));
        if now != leadership.shown {
            tracing::info!(mask = format!("{live:#b}"), "membership changed");
            leadership.shown = self.publish(leadership.term, live);
        }
        leadership.reap_in = leadership.reap_in.checked_sub(1).unwrap_or(REAP_EVERY);
        if leadership.reap_in == 0 && self.reach == CoherenceScope::Host {
            self.reap(live);
        }
    }

    /// Gives back the memory of brokers that are gone. Holds their ids meanwhile: none of them starts.
    fn reap(&self, live: u64) {
        let region = self.region();
        let dead = dead_broker::holders(region) & !live;
        for broker in region.geometry().brokers().filter(|broker| dead & 1 << broker.0 != 0) {
            // Taken by a process that stands still, or starts now.
            let Ok(_claim) = self.file.claim_broker(broker) else { continue };
            let pool: Arc<dyn SegmentAllocator> = match region.geometry().allocator {
                AllocatorKind::Partitioned => Arc::new(PartitionAllocator::of_broker(region.clone(), broker)),
                AllocatorKind::Bitmap | AllocatorKind::Leader => Arc::clone(&self.pool),
            };
            dead_broker::reap(region, broker, pool, SystemClock.now().wall_us);
        }
    }

    /// A follower's look at the leader.
    async fn follow(&self, watch: &mut Watch) -> Option<Leadership> {
        let region = self.region();
        let before = highest_candidacy(region);
        let leader = latest_claimant(region);
        let heartbeat = leader.map_or(0, |(broker, _)| read_pulse(region, broker).0);
        let seen = (leader, before, heartbeat);
        if watch.seen != seen {
            (watch.seen, watch.unmoved, watch.warned) = (seen, 0, false);
        } else {
            watch.unmoved += 1;
        }
        if watch.resting > 0 {
            watch.resting -= 1;
            return None;
        }
        let gone = self.leader_is_gone();
        // With the leader allocator a leader also gives segments, and might give one that its successor gave.
        let silent = PERIOD * watch.unmoved >= self.leader_lease;
        let why = match (gone, silent) {
            (true, _) => "is gone",
            (_, true) => "is silent",
            _ if self.has_resigned() => "is no more in etcd",
            _ => return None,
        };
        let blocked = match self.can_elect() {
            Err(error) => Some(error),
            Ok(()) if !gone && region.geometry().allocator == AllocatorKind::Leader => {
                Some("the leader allocator's own leader may go on".to_owned())
            }
            Ok(()) => None,
        };
        if let Some(reason) = blocked {
            if !std::mem::replace(&mut watch.warned, true) {
                tracing::warn!(reason, "the leader {why}, and nobody can take over");
            }
            return None;
        }
        tracing::warn!("the leader {why}: taking over");
        let leadership = self.take_over(before).await;
        (watch.unmoved, watch.resting) =
            (0, if leadership.is_none() && latest_claim(region) > before { REST } else { 0 });
        leadership
    }
}
