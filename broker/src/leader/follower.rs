//! Follower: watches the leader, and takes over when the leader is gone or silent.

use super::{Candidate, Leadership, PERIOD};
use embarcadero_cxl::broker_table::read_pulse;
use embarcadero_cxl::layout::{AllocatorKind, LeaderArea};
use embarcadero_cxl::leadership::{highest_candidacy, latest_claim, latest_claimant, read_leader_at};
use embarcadero_cxl::{Native, Region};
use embarcadero_wire::{BrokerId, Term};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Looks that a follower skips after a takeover that failed.
const REST: u32 = 25;
/// Time after the last look from which a look is late.
const LATE: Duration = PERIOD.saturating_mul(2);

/// Follower's view of the leader.
#[derive(Default)]
pub(super) struct Watch {
    /// Latest claimant and its term, highest candidacy, and heartbeat of the claimant.
    seen: (Option<(BrokerId, Term)>, Term, u64),
    /// Time for which looks found none of these changed.
    silent: Duration,
    /// Time of the last look.
    looked: Option<Instant>,
    /// Looks to skip.
    resting: u32,
    /// True once the log says that nobody can take over.
    warned: bool,
}

impl Watch {
    /// Looks whether anything of the leader moved. `candidacy` is the highest in the region.
    ///
    /// A look that comes late says nothing about the time before it: this broker stood still, and the leader may have
    /// shared its fate. Looks may also come early.
    fn look(&mut self, region: &Region<Native>, candidacy: Term, now: Instant) {
        let leader = latest_claimant(region);
        let heartbeat = leader.map_or(0, |(broker, _)| read_pulse(region, broker).0);
        let seen = (leader, candidacy, heartbeat);
        let since = self.looked.replace(now).map_or(Duration::ZERO, |looked| now.saturating_duration_since(looked));
        if self.seen != seen {
            (self.seen, self.silent, self.warned) = (seen, Duration::ZERO, false);
        } else if since <= LATE {
            self.silent += since;
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
        watch.look(self.region(), before, Instant::now());
        if watch.resting > 0 {
            watch.resting -= 1;
            return None;
        }
        let gone = self.leader_is_gone();
        let why = if gone {
            "is gone"
        } else if watch.silent >= self.leader_lease {
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
        watch.silent = Duration::ZERO;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topics::tests::region;
    use embarcadero_cxl::broker_table::Pulse;
    use embarcadero_cxl::leadership::claim_term;

    #[test]
    fn a_look_that_comes_late_is_no_sign_of_silence() {
        let (region, leader, term) = (region(), BrokerId(0), Term(1));
        claim_term(&region, LeaderArea(leader), term);
        let mut pulse = Pulse::new(region.clone(), leader);
        let (mut watch, mut now) = (Watch::default(), Instant::now());
        let mut silent_after = |watch: &mut Watch, time: Duration| {
            now += time;
            watch.look(&region, term, now);
            watch.silent
        };
        assert_eq!(silent_after(&mut watch, PERIOD), Duration::ZERO, "it is there");
        assert_eq!(silent_after(&mut watch, PERIOD), PERIOD);
        assert_eq!(silent_after(&mut watch, LATE), PERIOD * 3);
        for _ in 0..100 {
            assert_eq!(silent_after(&mut watch, LATE + Duration::from_nanos(1)), PERIOD * 3);
        }
        assert_eq!(silent_after(&mut watch, PERIOD / 4), PERIOD * 13 / 4, "a look that comes early counts for less");
        pulse.beat();
        assert_eq!(silent_after(&mut watch, PERIOD), Duration::ZERO);
        assert_eq!(silent_after(&mut watch, PERIOD), PERIOD);
    }
}
