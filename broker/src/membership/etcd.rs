//! Membership and election by etcd, where hosts cannot compare and swap in the region.
//!
//! Below `PREFIX/REGION-UUID/` lie `brokers/ID`, one a live broker, and `head`, both under a lease that the broker keeps
//! alive, and `base`. Whoever replaces `head`, in a transaction that fails if another did, is elected; its epoch is `base`
//! plus the revision of that transaction, so that epochs grow in the order in which heads were elected (etcd v3 API,
//! "Revision"). `base` is the region's highest epoch when etcd first saw it: a region outlives an etcd.
//!
//! etcd only decides who may claim the next epoch. What keeps a deposed head from being believed is the claim itself, in
//! the region (`embarcadero_cxl::headship`), so a lease that expired late or early loses nothing.

use crate::config::EtcdConfig;
use embarcadero_cxl::tables::BrokerInfo;
use embarcadero_wire::{BrokerId, Incarnation, Term};
use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, KeyValue, PutOptions, Txn, TxnOp, WatchOptions,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use uuid::Uuid;

/// How long one call may take.
const CALL: Duration = Duration::from_secs(2);
/// Time between attempts to reach an etcd that does not answer.
const RETRY: Duration = Duration::from_millis(250);
/// Times that a lease is kept alive while it lasts.
const KEEP_ALIVES: u32 = 3;

/// Why etcd did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// It does not answer, or says no.
    #[error("etcd at {endpoints}: {source}")]
    Failed {
        /// Where it should be.
        endpoints: String,
        /// What went wrong.
        source: etcd_client::Error,
    },
    /// It does not answer in time.
    #[error("etcd at {endpoints} does not answer")]
    Silent {
        /// Where it should be.
        endpoints: String,
    },
    /// Another broker has the id.
    #[error("broker id {id} is taken by process {process} of host {host}, says etcd")]
    IdTaken {
        /// Which.
        id: BrokerId,
        /// Whose host.
        host: String,
        /// Whose process.
        process: u32,
    },
    /// What lies below the prefix is not ours.
    #[error("etcd's key {key} holds {value:?}, which is not this program's; choose another etcd.prefix")]
    Foreign {
        /// Which.
        key: String,
        /// What it holds.
        value: String,
    },
}

/// A broker's entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Member {
    broker: BrokerId,
    incarnation: Incarnation,
    host: String,
    /// Changes when the host boots.
    boot: String,
    process: u32,
    data: String,
    control: String,
}

impl Member {
    fn new(info: &BrokerInfo) -> Self {
        let read = |path| std::fs::read_to_string(path).map_or(String::new(), |text| text.trim().to_owned());
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

    /// True when `other` can only be an earlier process of this broker: on one host, the region's file has one process for
    /// each id.
    fn replaces(&self, other: &Self) -> bool {
        self == other || self.boot == other.boot
    }
}

/// The head's entry as etcd has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elected {
    /// Which broker.
    pub broker: BrokerId,
    /// Whoever replaces it names this.
    revision: i64,
    lease: i64,
}

/// What etcd holds, as last seen.
#[derive(Clone, Debug, Default)]
struct View {
    base: Option<Term>,
    head: Option<Elected>,
    /// Since when there is no head.
    headless_since: Option<Instant>,
    members: BTreeMap<BrokerId, (Member, i64)>,
}

struct State {
    view: View,
    /// 0: none.
    lease: i64,
    /// Since when etcd does not answer, and what it was.
    lost: Option<(Instant, String)>,
    /// This broker leads, so that its entry is put back if it gets lost.
    leads: bool,
}

/// This broker's place in etcd. Clones are the same.
#[derive(Clone)]
pub struct Etcd {
    client: Client,
    config: EtcdConfig,
    /// Ends with a slash.
    prefix: String,
    member: Member,
    latest_claim: Arc<dyn Fn() -> Term + Send + Sync>,
    state: Arc<Mutex<State>>,
    /// Something changed.
    changed: Arc<Notify>,
}

impl Etcd {
    /// Registers a broker of the region `uuid`, of which `latest_claim` tells the highest epoch.
    ///
    /// # Errors
    /// [`EtcdError`].
    pub async fn join(
        config: EtcdConfig,
        uuid: Uuid,
        info: &BrokerInfo,
        latest_claim: impl Fn() -> Term + Send + Sync + 'static,
    ) -> Result<Self, EtcdError> {
        let options = ConnectOptions::new().with_connect_timeout(CALL).with_keep_alive(CALL, CALL);
        let connected = Client::connect(&config.endpoints, Some(options)).await;
        let client =
            connected.map_err(|source| EtcdError::Failed { endpoints: config.endpoints.join(", "), source })?;
        let prefix = format!("{}/{uuid}/", config.prefix.trim_end_matches('/'));
        let etcd = Self {
            client,
            config,
            prefix,
            member: Member::new(info),
            latest_claim: Arc::new(latest_claim),
            state: Arc::new(Mutex::new(State { view: View::default(), lease: 0, lost: None, leads: false })),
            changed: Arc::default(),
        };
        etcd.refresh().await?;
        etcd.register().await?;
        Ok(etcd)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn endpoints(&self) -> String {
        self.config.endpoints.join(", ")
    }

    fn failed(&self, source: etcd_client::Error) -> EtcdError {
        EtcdError::Failed { endpoints: self.endpoints(), source }
    }

    fn silent(&self) -> EtcdError {
        EtcdError::Silent { endpoints: self.endpoints() }
    }

    async fn call<R>(&self, call: impl Future<Output = Result<R, etcd_client::Error>>) -> Result<R, EtcdError> {
        match tokio::time::timeout(CALL, call).await {
            Ok(result) => result.map_err(|source| self.failed(source)),
            Err(_) => Err(self.silent()),
        }
    }

    /// Runs a transaction; the revision at which it happened, or `None` if its conditions did not hold.
    async fn transact(&self, when: Vec<Compare>, then: TxnOp) -> Result<Option<i64>, EtcdError> {
        let mut client = self.client.kv_client();
        let answer = self.call(client.txn(Txn::new().when(when).and_then([then]))).await?;
        Ok(answer.succeeded().then(|| answer.header().map_or(0, |header| header.revision())))
    }

    fn decode<T: for<'a> Deserialize<'a>>(&self, entry: &KeyValue) -> Result<T, EtcdError> {
        serde_json::from_slice(entry.value()).map_err(|_| EtcdError::Foreign {
            key: String::from_utf8_lossy(entry.key()).into_owned(),
            value: String::from_utf8_lossy(entry.value()).chars().take(80).collect(),
        })
    }

    /// Looks at everything below the prefix.
    async fn refresh(&self) -> Result<(), EtcdError> {
        let mut client = self.client.kv_client();
        loop {
            let answer = self.call(client.get(self.prefix.clone(), Some(GetOptions::new().with_prefix()))).await?;
            let mut view = View::default();
            for entry in answer.kvs() {
                match entry.key().strip_prefix(self.prefix.as_bytes()) {
                    Some(b"base") => view.base = Some(self.decode(entry)?),
                    Some(b"head") => {
                        let Member { broker, .. } = self.decode(entry)?;
                        view.head = Some(Elected { broker, revision: entry.mod_revision(), lease: entry.lease() });
                    }
                    Some(_) => {
                        let member: Member = self.decode(entry)?;
                        view.members.insert(member.broker, (member, entry.mod_revision()));
                    }
                    None => {}
                }
            }
            if view.base.is_some() {
                let mut state = self.state();
                if view.head.is_none() {
                    view.headless_since = Some(state.view.headless_since.unwrap_or_else(Instant::now));
                }
                if state.view.head != view.head {
                    self.changed.notify_one();
                }
                state.view = view;
                return Ok(());
            }
            // The first, or the first after etcd lost everything.
            let base = TxnOp::put(self.key("base"), (self.latest_claim)().to_string(), None);
            self.transact(vec![Compare::version(self.key("base"), CompareOp::Equal, 0)], base).await?;
        }
    }

    /// Puts this broker's entries under a lease that lives.
    async fn register(&self) -> Result<i64, EtcdError> {
        let mut client = self.client.lease_client();
        let mut lease = self.state().lease;
        if lease == 0 || self.call(client.time_to_live(lease, None)).await.is_ok_and(|answer| answer.ttl() <= 0) {
            lease = self.call(client.grant(self.config.lease_s.into(), None)).await?.id();
            self.state().lease = lease;
        }
        self.refresh().await?;
        let (mine, head, leads) = {
            let State { view, leads, .. } = &*self.state();
            (view.members.get(&self.member.broker).cloned(), view.head, *leads)
        };
        let name = format!("brokers/{}", self.member.broker);
        let revision = match mine {
            Some((other, _)) if !self.member.replaces(&other) => {
                return Err(EtcdError::IdTaken { id: other.broker, host: other.host, process: other.process });
            }
            found => found.map_or(0, |(_, revision)| revision),
        };
        self.put_if(&name, revision, lease).await?;
        let own = |head: Elected| head.broker == self.member.broker;
        if leads && head.is_none_or(|head| own(head) && head.lease != lease) {
            self.put_if("head", head.map_or(0, |head| head.revision), lease).await?;
        }
        self.refresh().await?;
        Ok(lease)
    }

    /// Writes this broker's entry if the key is still at `revision` (0: not there).
    async fn put_if(&self, name: &str, revision: i64, lease: i64) -> Result<Option<i64>, EtcdError> {
        let value = serde_json::to_vec(&self.member).unwrap_or_default();
        let same = Compare::mod_revision(self.key(name), CompareOp::Equal, revision);
        // Epochs count from the base: it must be the one that was seen.
        let base = self.state().view.base.unwrap_or(Term::NONE).to_string();
        let base = Compare::value(self.key("base"), CompareOp::Equal, base);
        let put = TxnOp::put(self.key(name), value, Some(PutOptions::new().with_lease(lease)));
        self.transact(vec![same, base], put).await
    }

    /// The head, as etcd has it, and how long there has been none.
    pub fn elected(&self) -> Result<Elected, Duration> {
        let view = &self.state().view;
        view.head.ok_or_else(|| view.headless_since.map_or(Duration::ZERO, |since| since.elapsed()))
    }

    /// Time after which a head whose entry is gone does not come back for it.
    pub fn grace(&self) -> Duration {
        Duration::from_secs(u64::from(self.config.lease_s) * 2)
    }

    /// Stands for election, to replace `seen`. The epoch to lead under, if this broker won.
    ///
    /// # Errors
    /// [`EtcdError`]: nobody can be elected now.
    pub async fn stand(&self, seen: Option<Elected>) -> Result<Option<Term>, EtcdError> {
        let (lease, base) = {
            let state = self.state();
            (state.lease, state.view.base.unwrap_or(Term::NONE))
        };
        let elected = self.put_if("head", seen.map_or(0, |seen| seen.revision), lease).await?;
        self.refresh().await?;
        Ok(elected.map(|revision| Term(base.0 + revision as u64)))
    }

    /// Notes whether this broker leads, so that its entry as head stays; takes it back when it does not lead after all.
    pub async fn set_leads(&self, leads: bool) {
        let head = {
            let mut state = self.state();
            state.leads = leads;
            state.view.head
        };
        if let Some(head) = head.filter(|head| !leads && head.broker == self.member.broker) {
            let same = Compare::mod_revision(self.key("head"), CompareOp::Equal, head.revision);
            // If it fails, the lease ends it.
            let _ = self.transact(vec![same], TxnOp::delete(self.key("head"), None)).await;
        }
    }

    /// Leaves: the entries go.
    pub async fn leave(&self) {
        let lease = std::mem::take(&mut self.state().lease);
        let _ = self.call(self.client.lease_client().revoke(lease)).await;
    }

    /// Waits until the head's entry changes.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// How long etcd has not answered, and what it was.
    pub fn lost(&self) -> Option<(Duration, String)> {
        self.state().lost.as_ref().map(|(since, error)| (since.elapsed(), error.clone()))
    }

    /// Keeps the lease alive and watches, for as long as the broker runs.
    pub async fn run(self) {
        loop {
            let Err(error) = self.attend().await;
            let first = {
                let mut state = self.state();
                let first = state.lost.is_none();
                let since = state.lost.as_ref().map_or_else(Instant::now, |(since, _)| *since);
                state.lost = Some((since, error.to_string()));
                first
            };
            if first {
                tracing::warn!(%error, "lost etcd: topics go on, but no head can be elected");
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn attend(&self) -> Result<std::convert::Infallible, EtcdError> {
        let mut watcher = self.client.watch_client();
        let options = WatchOptions::new().with_prefix();
        let mut watch = self.call(watcher.watch(self.prefix.clone(), Some(options))).await?;
        let lease = self.register().await?;
        let (mut keeper, mut kept) = self.call(self.client.lease_client().keep_alive(lease)).await?;
        if let Some((since, _)) = self.state().lost.take() {
            tracing::info!(seconds = since.elapsed().as_secs(), "etcd is back");
        }
        let mut ticks = tokio::time::interval(Duration::from_secs(self.config.lease_s.into()) / KEEP_ALIVES);
        let mut unanswered = 0;
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    if unanswered > 1 {
                        return Err(self.silent());
                    }
                    self.call(keeper.keep_alive()).await?;
                    unanswered += 1;
                }
                answer = kept.message() => match answer.map_err(|source| self.failed(source))? {
                    Some(answer) if answer.ttl() > 0 => unanswered = 0,
                    // The lease, or the stream, is gone: all is done again.
                    Some(_) | None => return Err(self.silent()),
                },
                news = watch.message() => {
                    let news = news.map_err(|source| self.failed(source))?;
                    let news = news.filter(|news| !news.canceled()).ok_or_else(|| self.silent())?;
                    // Its own key may have gone with a lease that etcd ended.
                    let own = self.key(&format!("brokers/{}", self.member.broker));
                    let gone = news.events().iter().any(|event| {
                        event.event_type() == EventType::Delete
                            && event.kv().is_some_and(|entry| entry.key() == own.as_bytes())
                    });
                    if gone {
                        self.register().await?;
                    } else if !news.events().is_empty() {
                        self.refresh().await?;
                    }
                }
            }
        }
    }
}
