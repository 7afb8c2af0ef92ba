//! Membership: which brokers are alive, as the leader sees it.
//!
//! Brokers show heartbeats in the region, and the observer's own clock times them. The leader is elected in the region,
//! or by [`etcd`].

pub mod etcd;

use embarcadero_cxl::broker_table::{BrokerInfo, read_broker, read_pulse};
use embarcadero_cxl::leadership::{NoLeader, UnknownLeader, read_leader};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::{Damage, Fabric, Row};
use embarcadero_wire::BrokerId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Election of the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Membership {
    /// Compare-and-swap in the region: one host, or hosts that hardware keeps coherent.
    Embedded,
    /// etcd.
    Etcd,
}

/// The leader's view of the other brokers.
pub struct Liveness {
    /// Longest time between two heartbeats of a broker that is alive.
    lease: Duration,
    /// Last heartbeat of each broker, by id, and the time at which it was seen to move.
    seen: Vec<(u64, Option<Instant>)>,
}

impl Liveness {
    /// Returns a view in which the brokers of the mask `live` have just been seen. A broker is alive while its
    /// heartbeat moves at least once in `lease`.
    pub fn new<F: Fabric>(region: &Region<F>, lease: Duration, live: u64, now: Instant) -> Self {
        let seen = region
            .geometry()
            .brokers()
            .map(|broker| (read_pulse(region, broker).0, (live & 1 << broker.0 != 0).then_some(now)))
            .collect();
        Self { lease, seen }
    }

    /// Reads all heartbeats. Returns the brokers that are alive, one bit each.
    pub fn poll<F: Fabric>(&mut self, region: &Region<F>, now: Instant) -> u64 {
        let mut mask = 0;
        for (broker, (heartbeat, moved)) in region.geometry().brokers().zip(&mut self.seen) {
            let (current, _) = read_pulse(region, broker);
            if current != *heartbeat {
                *heartbeat = current;
                *moved = Some(now);
            }
            let fresh = moved.is_some_and(|moved| now.duration_since(moved) < self.lease);
            let runs = || match read_broker(region, broker) {
                Row::Used(info) => info.running,
                Row::Unused => false,
                // Its heartbeat moves: it reads, and its pins count.
                Row::Unsettled | Row::Damaged(_) => true,
            };
            if fresh && runs() {
                mask |= 1 << broker.0;
            }
        }
        mask
    }
}

/// Brokers that the leader takes for alive.
#[derive(Debug, Default)]
pub struct LiveBrokers {
    /// Brokers whose row is whole.
    pub brokers: Vec<BrokerInfo>,
    /// Leader, if one is known.
    pub leader: Option<BrokerId>,
    /// Damage of the leader's statement and of brokers' rows.
    pub damaged: Vec<Damage>,
}

impl LiveBrokers {
    /// Reads the leader's statement, and the rows of the brokers that it names. Where the statement is damaged, every
    /// broker that says that it runs counts.
    pub fn read<F: Fabric>(region: &Region<F>) -> Self {
        let mut live = Self::default();
        let (mask, certain) = match read_leader(region) {
            Ok(leader) => {
                live.leader = Some(leader.broker);
                (leader.broker_mask, true)
            }
            Err(UnknownLeader::Damaged(damage)) => {
                live.damaged.push(damage);
                (region.geometry().broker_mask(), false)
            }
            Err(UnknownLeader::NoLeader(NoLeader) | UnknownLeader::Unsettled) => (0, true),
        };
        for broker in region.geometry().brokers().filter(|broker| mask & (1 << broker.0) != 0) {
            match read_broker(region, broker) {
                Row::Used(info) if info.running || certain => live.brokers.push(info),
                Row::Damaged(damage) => live.damaged.push(damage),
                Row::Used(_) | Row::Unused | Row::Unsettled => {}
            }
        }
        live
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topics::tests::region;
    use embarcadero_cxl::broker_table::publish_broker;
    use embarcadero_cxl::layout::LeaderArea;
    use embarcadero_cxl::leadership::{LeaderInfo, activate_term, claim_term, publish_leader};
    use embarcadero_wire::{Incarnation, Term};

    #[test]
    fn where_the_leaders_statement_is_damaged_brokers_that_run_count() {
        let (region, incarnation, term) = (region(), Incarnation(1), Term(1));
        let area = LeaderArea(BrokerId(0));
        let address = "127.0.0.1:1".parse().unwrap();
        for (id, running) in [(BrokerId(0), true), (BrokerId(1), false)] {
            let info =
                BrokerInfo { id, incarnation, data: address, control: address, process_id: 1, running, lock_node: 1 };
            publish_broker(&region, &info);
        }
        let read = || {
            let live = LiveBrokers::read(&region);
            (live.brokers.iter().map(|info| info.id.0).collect::<Vec<_>>(), live.leader, live.damaged.len())
        };
        assert_eq!(read(), (vec![], None, 0));
        claim_term(&region, area, term);
        activate_term(&region, area, term);
        let whole = LeaderInfo { term, broker: area.0, incarnation, broker_mask: 0b11, pinning_mask: 0b11 };
        publish_leader(&region, &whole);
        assert_eq!(read(), (vec![0, 1], Some(BrokerId(0)), 0));
        // The region has two brokers.
        publish_leader(&region, &LeaderInfo { broker_mask: 0b111, ..whole });
        assert_eq!(read(), (vec![0], None, 1));
    }
}
