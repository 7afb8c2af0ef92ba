//! Membership and election by etcd, where hosts cannot compare and swap in the region.
//!
//! A region's keys lie below `PREFIX/REGION-UUID/`:
//!
//! - `brokers/ID`, one for each live broker, under a lease that the broker keeps alive;
//! - `leader`, the elected broker, under that broker's lease;
//! - `base`, the region's highest term when etcd first saw the region. A region outlives an etcd.
//!
//! A broker is elected by replacing `leader`, in a transaction that fails if another broker replaced it first. The term
//! is `base` plus the revision of that transaction. So terms grow in the order in which leaders were elected (etcd v3
//! API, "Revision").
//!
//! etcd only decides who may claim the next term. The claim itself is in the region (`embarcadero_cxl::leadership`),
//! and it makes readers ignore a superseded leader. So a lease that ends late or early loses nothing.

mod client;
mod registration;

pub use client::{CallError, EtcdError};

use crate::config::EtcdConfig;
use client::Client;
use embarcadero_control::etcd::compare::TargetUnion;
use embarcadero_cxl::broker_table::BrokerInfo;
use embarcadero_wire::{BrokerId, Incarnation, Term};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use uuid::Uuid;

/// Number of times that a lease is kept alive while it lasts.
const KEEP_ALIVES: u32 = 3;

/// Entry of a broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Member {
    broker: BrokerId,
    incarnation: Incarnation,
    host: String,
    /// Id that changes when the host boots.
    boot: String,
    process: u32,
    data: String,
    control: String,
}

impl Member {
    fn new(info: &BrokerInfo) -> Self {
        let read = |path| std::fs::read_to_string(path).map_or(String::new(), |text| text.trim().to_owned());
        // Source of both files: proc_sys_kernel(5).
        Self {
            broker: info.id,
            incarnation: info.incarnation,
            host: read("/proc/sys/kernel/hostname"),
            boot: read("/proc/sys/kernel/random/boot_id"),
            process: info.process_id,
            data: info.data.to_string(),
            control: info.control.to_string(),
        }
    }

    /// Returns true when `other` can only be this process, or an earlier one of this broker. `joined` says that this
    /// process was in etcd already.
    fn replaces(&self, other: &Self, joined: bool) -> bool {
        let earlier = if joined {
            // Whoever came later counted on from this process.
            other.incarnation < self.incarnation
        } else {
            // On one host, the locks of the region's file admit one process for each id. A host that cannot tell its boot
            // id is no known host.
            self.boot == other.boot && !self.boot.is_empty()
        };
        self == other || earlier
    }
}

/// Entry of the leader, as etcd has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Elected {
    /// Broker that was elected.
    pub(crate) broker: BrokerId,
    /// Revision of the entry, which a successor names when it replaces the entry.
    revision: i64,
    lease: i64,
}

/// Entry of a broker, as etcd has it.
#[derive(Clone, Debug)]
struct Registered {
    member: Member,
    /// Revision of the entry.
    revision: i64,
    lease: i64,
}

/// Entries of etcd, as last seen.
#[derive(Clone, Debug, Default)]
struct View {
    base: Option<Term>,
    leader: Option<Elected>,
    /// Time since which there is no leader.
    leaderless_since: Option<Instant>,
    /// Entry of each broker.
    members: BTreeMap<BrokerId, Registered>,
}

struct State {
    view: View,
    /// Lease of this broker; 0 for none.
    lease: i64,
    /// Time since which etcd does not answer, and the last error.
    lost: Option<(Instant, String)>,
    /// True once this broker was registered.
    joined: bool,
    /// True while this broker leads: its entry as leader is put back if it gets lost.
    leads: bool,
}

/// This broker's part in etcd. Clones share it.
#[derive(Clone)]
pub(crate) struct Etcd {
    client: Client,
    lease_s: u32,
    member: Member,
    /// Reads the region's highest claimed term.
    latest_claim: Arc<dyn Fn() -> Term + Send + Sync>,
    state: Arc<Mutex<State>>,
    /// Wakes [`Etcd::changed`] when the leader's entry changes.
    changed: Arc<Notify>,
}

impl Etcd {
    /// Registers a broker of the region `uuid`. `latest_claim` reads the region's highest claimed term.
    ///
    /// # Errors
    /// [`EtcdError`]; nothing of this broker is left in etcd then.
    pub(crate) async fn join(
        config: EtcdConfig,
        uuid: Uuid,
        info: &BrokerInfo,
        latest_claim: impl Fn() -> Term + Send + Sync + 'static,
    ) -> Result<Self, EtcdError> {
        let state = State { view: View::default(), lease: 0, lost: None, joined: false, leads: false };
        let etcd = Self {
            client: Client::new(&config, uuid)?,
            lease_s: config.lease_s,
            member: Member::new(info),
            latest_claim: Arc::new(latest_claim),
            state: Arc::new(Mutex::new(state)),
            changed: Arc::default(),
        };
        if let Err(error) = etcd.register().await {
            etcd.leave().await;
            return Err(error);
        }
        etcd.state().joined = true;
        Ok(etcd)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the leader, as etcd has it; if there is none, the time for which there has been none.
    pub(crate) fn elected(&self) -> Result<Elected, Duration> {
        let view = &self.state().view;
        view.leader.ok_or_else(|| view.leaderless_since.map_or(Duration::ZERO, |since| since.elapsed()))
    }

    /// Time after which a leader whose entry is gone will not put it back.
    pub(crate) fn grace(&self) -> Duration {
        Duration::from_secs(u64::from(self.lease_s) * 2)
    }

    /// Campaigns to replace the leader `seen`. Returns the term to lead under if this broker was elected.
    ///
    /// # Errors
    /// [`EtcdError`]: nobody can be elected now.
    pub(crate) async fn campaign(&self, seen: Option<Elected>) -> Result<Option<Term>, EtcdError> {
        let (lease, base) = {
            let state = self.state();
            (state.lease, state.view.base.unwrap_or(Term::NONE))
        };
        let elected = self.put_if("leader", seen.map_or(0, |seen| seen.revision), lease).await?;
        self.refresh().await?;
        Ok(elected.map(|revision| Term(base.0 + revision as u64)))
    }

    /// Records whether this broker leads. While it does, its entry as leader is kept. When it does not, the entry is
    /// removed.
    pub(crate) async fn set_leads(&self, leads: bool) {
        let leader = {
            let mut state = self.state();
            state.leads = leads;
            state.view.leader
        };
        if let Some(leader) = leader.filter(|leader| !leads && leader.broker == self.member.broker) {
            let same = self.client.equal("leader", TargetUnion::ModRevision(leader.revision));
            // If it fails, the entry goes when the lease ends.
            let _ = self.client.transact(vec![same], self.client.delete("leader")).await;
        }
    }

    /// Leaves etcd: this broker's entries go. [`Etcd::run`] must have ended, or it puts them back.
    pub(crate) async fn leave(&self) {
        let lease = std::mem::take(&mut self.state().lease);
        if lease == 0 {
            return;
        }
        // If it fails, the entries go when the lease ends.
        let _ = self.client.revoke(lease).await;
    }

    /// Waits until the leader's entry changes.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Returns the time for which etcd has not answered, and the last error; `None` while it answers.
    pub(crate) fn lost(&self) -> Option<(Duration, String)> {
        self.state().lost.as_ref().map(|(since, error)| (since.elapsed(), error.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_earlier_process_of_a_broker_is_replaced() {
        let member = |incarnation, boot: &str, process| Member {
            broker: BrokerId(0),
            incarnation: Incarnation(incarnation),
            host: "host".to_owned(),
            boot: boot.to_owned(),
            process,
            data: String::new(),
            control: String::new(),
        };
        let own = member(5, "this", 1);
        for (other, at_start, later) in [
            (own.clone(), true, true),
            (member(4, "this", 2), true, true),
            (member(5, "this", 2), true, false),
            (member(6, "this", 2), true, false),
            (member(4, "another", 2), false, true),
            (member(5, "another", 2), false, false),
            (member(6, "another", 2), false, false),
        ] {
            assert_eq!((own.replaces(&other, false), own.replaces(&other, true)), (at_start, later), "{other:?}");
        }
        let nameless = member(5, "", 1);
        assert!(!nameless.replaces(&member(4, "", 2), false));
    }
}
