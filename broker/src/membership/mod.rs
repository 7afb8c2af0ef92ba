//! Who is alive, as the leader sees it: heartbeats in the region, timed by the observer's own clock. Who may be the leader is
//! decided in the region, or by [`etcd`].

pub mod etcd;

use embarcadero_cxl::Fabric;
use embarcadero_cxl::broker_table::{BrokerInfo, read_broker, read_pulse};
use embarcadero_cxl::leadership::read_leader;
use embarcadero_cxl::region::Region;
use embarcadero_wire::BrokerId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Who elects the leader.
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
    lease: Duration,
    /// Last heartbeat of each broker, and when it was seen to move.
    seen: Vec<(u64, Option<Instant>)>,
}

impl Liveness {
    /// A broker is alive while its heartbeat moves at least once a `lease`; those in the mask `live` have just been seen.
    pub fn new<F: Fabric>(region: &Region<F>, lease: Duration, live: u64, now: Instant) -> Self {
        let seen = region
            .geometry()
            .brokers()
            .map(|broker| (read_pulse(region, broker).0, (live & 1 << broker.0 != 0).then_some(now)))
            .collect();
        Self { lease, seen }
    }

    /// Looks at all heartbeats; a bit per broker that lives.
    pub fn poll<F: Fabric>(&mut self, region: &Region<F>, now: Instant) -> u64 {
        let mut mask = 0;
        for (broker, (heartbeat, moved)) in region.geometry().brokers().zip(&mut self.seen) {
            let (current, _) = read_pulse(region, broker);
            if current != *heartbeat {
                *heartbeat = current;
                *moved = Some(now);
            }
            let fresh = moved.is_some_and(|moved| now.duration_since(moved) < self.lease);
            if fresh && read_broker(region, broker).used().is_some_and(|info| info.running) {
                mask |= 1 << broker.0;
            }
        }
        mask
    }
}

/// The brokers that the leader takes for alive, and the leader's id.
pub fn live_brokers<F: Fabric>(region: &Region<F>) -> (Vec<BrokerInfo>, Option<BrokerId>) {
    let Some(leader) = read_leader(region) else { return (Vec::new(), None) };
    let brokers = region
        .geometry()
        .brokers()
        .filter(|broker| leader.broker_mask & (1 << broker.0) != 0)
        .filter_map(|broker| read_broker(region, broker).used())
        .collect();
    (brokers, Some(leader.broker))
}
