//! A broker's registration: its entries, the lease that they are under, and the watch.

use super::client::EtcdError;
use super::{Elected, Etcd, KEEP_ALIVES, Member, State, View};
use embarcadero_control::etcd::LeaseKeepAliveRequest;
use embarcadero_control::etcd::compare::TargetUnion;
use embarcadero_control::etcd::event::EventType;
use embarcadero_wire::Term;
use std::convert::Infallible;
use std::time::{Duration, Instant};

/// Time between attempts to reach an etcd that does not answer.
const RETRY: Duration = Duration::from_millis(250);

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
                    view.members.insert(member.broker, (member, entry.mod_revision));
                }
                None => {}
            }
        }
        Ok(view)
    }

    /// Puts this broker's entries under a lease that has not ended, and returns the lease.
    pub(super) async fn register(&self) -> Result<i64, EtcdError> {
        let lease = self.living_lease().await?;
        self.refresh().await?;
        let (mine, leader, leads) = {
            let State { view, leads, .. } = &*self.state();
            (view.members.get(&self.member.broker).cloned(), view.leader, *leads)
        };
        let name = format!("brokers/{}", self.member.broker);
        let revision = match mine {
            Some((other, _)) if !self.member.replaces(&other) => {
                return Err(EtcdError::IdTaken { id: other.broker, host: other.host, process: other.process });
            }
            found => found.map_or(0, |(_, revision)| revision),
        };
        self.put_if(&name, revision, lease).await?;
        let own = |leader: Elected| leader.broker == self.member.broker;
        if leads && leader.is_none_or(|leader| own(leader) && leader.lease != lease) {
            self.put_if("leader", leader.map_or(0, |leader| leader.revision), lease).await?;
        }
        self.refresh().await?;
        Ok(lease)
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

    /// Keeps the lease alive and watches, for as long as the broker runs.
    pub(crate) async fn run(self) {
        loop {
            let Err(error) = self.stay_registered().await;
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
                    // This broker's own entry may have gone with a lease that etcd ended.
                    let own = client.key(&format!("brokers/{}", self.member.broker));
                    let gone = news.events.iter().any(|event| {
                        event.r#type() == EventType::Delete
                            && event.kv.as_ref().is_some_and(|entry| entry.key == own.as_bytes())
                    });
                    if gone {
                        self.register().await?;
                    } else if !news.events.is_empty() {
                        self.refresh().await?;
                    }
                }
            }
        }
    }
}
