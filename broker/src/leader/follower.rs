//! Follower: watches the leader, and takes over when the leader is gone or silent.

use super::{Candidate, Leadership, PERIOD};
use embarcadero_cxl::broker_table::read_pulse;
use embarcadero_cxl::layout::{AllocatorKind, LeaderArea};
use embarcadero_cxl::leadership::{highest_candidacy, latest_claim, latest_claimant, read_leader_at};
use embarcadero_cxl::{Native, Region};
use embarcadero_wire::{BrokerId, Term};
use std::sync::Arc;

/// Looks that a follower skips after a takeover that failed.
const REST: u32 = 25;

/// Follower's view of the leader.
#[derive(Default)]
pub(super) struct Watch {
    /// Latest claimant and its term, highest candidacy, and heartbeat of the claimant.
    seen: (Option<(BrokerId, Term)>, Term, u64),
    /// Looks since any of these changed.
    unmoved: u32,
    /// Looks to skip.
    resting: u32,
    /// True once the log says that nobody can take over.
    warned: bool,
}

impl Watch {
    /// Looks whether anything of the leader moved. `candidacy` is the highest in the region.
    fn look(&mut self, region: &Region<Native>, candidacy: Term) {
        let leader = latest_claimant(region);
        let heartbeat = leader.map_or(0, |(broker, _)| read_pulse(region, broker).0);
        let seen = (leader, candidacy, heartbeat);
        if self.seen == seen {
            self.unmoved += 1;
        } else {
            (self.seen, self.unmoved, self.warned) = (seen, 0, false);
        }
    }
}

impl Candidate {
    /// Takes over if there is no leader that could go on. Returns this broker's leadership, if it leads now.
    pub(crate) async fn take_over_if_gone(&self) -> Option<Leadership> {
        // Read before the look at the leader: a candidate that campaigns in between wins.
        let before = highest_candidacy(self.region());
        if self.eligible && self.leader_is_gone() { self.take_over(before).await } else { None }
    }

    /// Looks at the leader, and takes over when the leader is gone or silent.
    pub(super) async fn follow(&self, watch: &mut Watch) -> Option<Leadership> {
        let before = highest_candidacy(self.region());
        watch.look(self.region(), before);
        if watch.resting > 0 {
            watch.resting -= 1;
            return None;
        }
        let gone = self.leader_is_gone();
        let why = if gone {
            "is gone"
        } else if PERIOD * watch.unmoved >= self.leader_lease {
            "is silent"
        } else if self.election.has_resigned() {
            "is no more in etcd"
        } else {
            return None;
        };
        if let Err(reason) = self.can_take_over(gone) {
            if !std::mem::replace(&mut watch.warned, true) {
                tracing::warn!(reason, "the leader {why}, and nobody can take over");
            }
            return None;
        }
        tracing::warn!("the leader {why}: taking over");
        let leadership = self.take_over(before).await;
        watch.unmoved = 0;
        if leadership.is_none() && latest_claim(self.region()) > before {
            watch.resting = REST;
        }
        leadership
    }

    /// Checks that somebody can take over from a leader that is `gone`, or else may go on. Returns the reason if nobody
    /// can.
    fn can_take_over(&self, gone: bool) -> Result<(), String> {
        self.election.can_elect(self.scope)?;
        // With the leader allocator a leader also gives out segments. Two might give out the same.
        if !gone && self.region().geometry().allocator == AllocatorKind::Leader {
            return Err("the leader allocator's own leader may go on".to_owned());
        }
        Ok(())
    }

    /// Returns true when there is no leader, and no earlier one can come back.
    fn leader_is_gone(&self) -> bool {
        let Some((broker, term)) = latest_claimant(self.region()) else { return true };
        let line = read_leader_at(self.region(), LeaderArea(broker)).used().filter(|line| line.term == term);
        self.is_gone(broker, line.map(|line| line.incarnation))
    }

    /// Campaigns, and leads if this broker is elected. `before` is the highest candidacy that it saw.
    async fn take_over(&self, before: Term) -> Option<Leadership> {
        if Arc::strong_count(&self.in_use) > 1 {
            return None;
        }
        let term = self.election.elect(self.region(), self.scope, before).await?;
        let leadership = self.lead(term);
        self.election.set_leads(leadership.is_some()).await;
        leadership
    }
}
