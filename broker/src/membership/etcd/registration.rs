//! A broker's registration: its entries, the lease that they are under, and the watch.

use super::client::EtcdError;
use super::{Elected, Etcd, KEEP_ALIVES, Member, Registered, State, View};
use embarcadero_control::etcd::LeaseKeepAliveRequest;
use embarcadero_control::etcd::compare::TargetUnion;
use embarcadero_wire::Term;
use std::convert::Infallible;
use std::time::{Duration, Instant};

/// Time between attempts to reach an etcd that does not answer.
const RETRY: Duration = Duration::from_millis(250);
/// Times that entries are looked at and written, if somebody else writes in between.
const ATTEMPTS: u32 = 3;

impl Etcd {
    /// Reads every entry below the prefix into the view. Writes `base` first if it is missing.
    pub(super) async fn refresh(&self) -> Result<(), EtcdError> {
        loop {
            let mut view = self.read_view().await?;
            if view.base.is_some() {
                let mut state = self.state();
                if view.leader.is_none() {
                    view.leaderless_since = Some(state.view.leaderless_since.unwrap_or_else(Instant::now));
                }
                if state.view.leader != view.leader {
                    self.changed.notify_one();
                }
                state.view = view;
                return Ok(());
            }
            // This is the first broker, or the first after etcd lost everything.
            let base = self.client.put("base", (self.latest_claim)().to_string().into(), 0);
            self.client.transact(vec![self.client.equal("base", TargetUnion::Version(0))], base).await?;
        }
    }

    async fn read_view(&self) -> Result<View, EtcdError> {
        let mut view = View::default();
        for entry in &self.client.entries().await? {
            match self.client.name_of(entry) {
                Some(b"base") => view.base = Some(self.client.decode(entry)?),
                Some(b"leader") => {
                    let Member { broker, .. } = self.client.decode(entry)?;
                    view.leader = Some(Elected { broker, revision: entry.mod_revision, lease: entry.lease });
                }
                Some(_) => {
                    let member: Member = self.client.decode(entry)?;
                    let registered = Registered { member, revision: entry.mod_revision, lease: entry.lease };
                    view.members.insert(registered.member.broker, registered);
                }
                None => {}
            }
        }
        Ok(view)
    }

    /// Puts this broker's entries under a lease that has not ended, and returns the lease.
    ///
    /// # Errors
    /// [`EtcdError`]: [`EtcdError::IdTaken`] when another broker has the id.
    pub(super) async fn register(&self) -> Result<i64, EtcdError> {
        let lease = self.living_lease().await?;
        for _ in 0..ATTEMPTS {
            self.refresh().await?;
            if self.put_member(lease).await? && self.put_leader(lease).await? {
                self.refresh().await?;
                return Ok(lease);
            }
            // Somebody else wrote meanwhile: another broker with this id, a new leader, or who put the base back.
        }
        Err(self.client.contended())
    }

    /// Puts this broker's own entry under a lease. Returns false if something changed since the view was read.
    async fn put_member(&self, lease: i64) -> Result<bool, EtcdError> {
        let (found, joined) = {
            let State { view, joined, .. } = &*self.state();
            (view.members.get(&self.member.broker).cloned(), *joined)
        };
        let revision = match found {
            Some(Registered { member, .. }) if !self.member.replaces(&member, joined) => {
                return Err(EtcdError::IdTaken { id: member.broker, host: member.host, process: member.process });
            }
            found => found.map_or(0, |found| found.revision),
        };
        Ok(self.put_if(&self.entry(), revision, lease).await?.is_some())
    }

    /// Puts the leader's entry under a lease, if this broker leads and nobody else was elected. Returns false if
    /// something changed since the view was read.
    async fn put_leader(&self, lease: i64) -> Result<bool, EtcdError> {
        let (leader, leads) = {
            let State { view, leads, .. } = &*self.state();
            (view.leader, *leads)
        };
        let own = |leader: Elected| leader.broker == self.member.broker;
        if !leads || leader.is_some_and(|leader| !own(leader) || leader.lease == lease) {
            return Ok(true);
        }
        Ok(self.put_if("leader", leader.map_or(0, |leader| leader.revision), lease).await?.is_some())
    }

    /// Name of this broker's entry.
    fn entry(&self) -> String {
        format!("brokers/{}", self.member.broker)
    }

    /// Returns true when this broker's entry is there, under its lease.
    fn is_registered(&self) -> bool {
        let State { view, lease, .. } = &*self.state();
        let found = view.members.get(&self.member.broker);
        found.is_some_and(|found| found.member == self.member && found.lease == *lease)
    }

    /// Returns this broker's lease, or a new one if it has ended.
    async fn living_lease(&self) -> Result<i64, EtcdError> {
        let lease = self.state().lease;
        if lease != 0 && !self.client.time_to_live(lease).await.is_ok_and(|seconds| seconds <= 0) {
            return Ok(lease);
        }
        let lease = self.client.grant(self.lease_s).await?;
        self.state().lease = lease;
        Ok(lease)
    }

    /// Writes this broker into an entry, if the entry is still at `revision`; 0 stands for an entry that does not
    /// exist. Returns the new revision, or `None` if the entry has changed.
    pub(super) async fn put_if(&self, name: &str, revision: i64, lease: i64) -> Result<Option<i64>, EtcdError> {
        let Ok(value) = serde_json::to_vec(&self.member) else { unreachable!("a member is text and numbers") };
        let same = self.client.equal(name, TargetUnion::ModRevision(revision));
        // Terms count from the base: it must be the one that was seen.
        let base = self.state().view.base.unwrap_or(Term::NONE).to_string();
        let base = self.client.equal("base", TargetUnion::Value(base.into()));
        self.client.transact(vec![same, base], self.client.put(name, value, lease)).await
    }

    /// Keeps the lease alive and watches, until another broker has the id. Returns the error that says so.
    pub(crate) async fn run(self) -> EtcdError {
        loop {
            let Err(error) = self.stay_registered().await;
            if matches!(error, EtcdError::IdTaken { .. }) {
                return error;
            }
            let first = {
                let mut state = self.state();
                let first = state.lost.is_none();
                let since = state.lost.as_ref().map_or_else(Instant::now, |(since, _)| *since);
                state.lost = Some((since, error.to_string()));
                first
            };
            if first {
                tracing::warn!(%error, "lost etcd: topics go on, but no leader can be elected");
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Registers, keeps the lease alive and watches until that fails.
    async fn stay_registered(&self) -> Result<Infallible, EtcdError> {
        let client = &self.client;
        let mut watch = client.watch().await?;
        let request = LeaseKeepAliveRequest { id: self.register().await? };
        let (keeper, mut kept) = client.keep_alive(request).await?;
        if let Some((since, _)) = self.state().lost.take() {
            tracing::info!(seconds = since.elapsed().as_secs(), "etcd is back");
        }
        let mut ticks = tokio::time::interval(Duration::from_secs(self.lease_s.into()) / KEEP_ALIVES);
        let mut unanswered = 0;
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    if unanswered > 1 || keeper.try_send(request).is_err() {
                        return Err(client.silent());
                    }
                    unanswered += 1;
                }
                answer = kept.message() => match answer.map_err(|status| client.failed(status))? {
                    Some(answer) if answer.ttl > 0 => unanswered = 0,
                    // The lease or the stream has ended: register again.
                    Some(_) | None => return Err(client.silent()),
                },
                news = watch.message() => {
                    let news = news.map_err(|status| client.failed(status))?;
                    let news = news.filter(|news| !news.canceled).ok_or_else(|| client.silent())?;
                    if !news.events.is_empty() {
                        self.refresh().await?;
                    }
                    // The own entry may have gone with a lease that etcd ended, or another broker may have replaced it.
                    if !self.is_registered() {
                        self.register().await?;
                    }
                }
            }
        }
    }
}
