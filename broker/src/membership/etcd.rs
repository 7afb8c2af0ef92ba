//! Membership and election by etcd, where hosts cannot compare and swap in the region.
//!
//! Below `PREFIX/REGION-UUID/` lie `brokers/ID`, one a live broker, and `leader`, both under a lease that the broker keeps
//! alive, and `base`. Whoever replaces `leader`, in a transaction that fails if another did, is elected; its term is `base`
//! plus the revision of that transaction, so that terms grow in the order in which leaders were elected (etcd v3 API,
//! "Revision"). `base` is the region's highest term when etcd first saw it: a region outlives an etcd.
//!
//! etcd only decides who may claim the next term. What keeps a superseded leader from being believed is the claim itself, in
//! the region (`embarcadero_cxl::leadership`), so a lease that expired late or early loses nothing.

use crate::config::EtcdConfig;
use embarcadero_control::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
use embarcadero_control::etcd::event::EventType;
use embarcadero_control::etcd::kv_client::KvClient;
use embarcadero_control::etcd::lease_client::LeaseClient;
use embarcadero_control::etcd::request_op::Request;
use embarcadero_control::etcd::watch_client::WatchClient;
use embarcadero_control::etcd::watch_request::RequestUnion;
use embarcadero_control::etcd::{
    Compare, DeleteRangeRequest, KeyValue, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseRevokeRequest, LeaseTimeToLiveRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest,
    WatchRequest, WatchResponse,
};
use embarcadero_cxl::broker_table::BrokerInfo;
use embarcadero_wire::{BrokerId, Incarnation, Term};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{StreamExt, once, pending};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status, Streaming};
use uuid::Uuid;

/// Time that one call to one endpoint may take at first. It doubles when every endpoint has been silent for so long.
const CALL: Duration = Duration::from_secs(2);
/// Times that each endpoint is called before etcd counts as silent.
const ROUNDS: u32 = 3;
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
        source: CallError,
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

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// An endpoint is no address.
    #[error(transparent)]
    Transport(#[from] tonic::transport::Error),
    /// An endpoint asks for more than plain HTTP.
    #[error("{0} is not http://HOST:PORT; there is no TLS")]
    Scheme(String),
    /// etcd says no, or cannot be reached; the text has the cause.
    #[error("grpc request error: {0}")]
    Status(Status),
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

/// The leader's entry as etcd has it.
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
    leader: Option<Elected>,
    /// Since when there is no leader.
    leaderless_since: Option<Instant>,
    members: BTreeMap<BrokerId, (Member, i64)>,
}

struct State {
    view: View,
    /// Index of the endpoint that is called first.
    endpoint: usize,
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
    /// One for each of the endpoints; connected when needed.
    channels: Vec<Channel>,
    config: EtcdConfig,
    /// Ends with a slash.
    prefix: String,
    member: Member,
    latest_claim: Arc<dyn Fn() -> Term + Send + Sync>,
    state: Arc<Mutex<State>>,
    /// Something changed.
    changed: Arc<Notify>,
}

/// Both ends of a stream that keeps a lease alive.
type KeepAlive = (mpsc::Sender<LeaseKeepAliveRequest>, Streaming<LeaseKeepAliveResponse>);

/// A connection to be made to an endpoint.
fn channel(endpoint: &str) -> Result<Channel, CallError> {
    let scheme = if endpoint.contains("://") { "" } else { "http://" };
    let endpoint = Endpoint::from_shared(format!("{scheme}{endpoint}"))?.connect_timeout(CALL);
    // Without this check tonic would speak plain HTTP where https is asked for.
    if endpoint.uri().scheme_str() != Some("http") {
        return Err(CallError::Scheme(endpoint.uri().to_string()));
    }
    let endpoint = endpoint.keep_alive_while_idle(true).http2_keep_alive_interval(CALL).keep_alive_timeout(CALL);
    Ok(endpoint.connect_lazy())
}

impl Etcd {
    /// Registers a broker of the region `uuid`, of which `latest_claim` tells the highest term.
    ///
    /// # Errors
    /// [`EtcdError`].
    pub async fn join(
        config: EtcdConfig,
        uuid: Uuid,
        info: &BrokerInfo,
        latest_claim: impl Fn() -> Term + Send + Sync + 'static,
    ) -> Result<Self, EtcdError> {
        let channels = config.endpoints.iter().map(|endpoint| channel(endpoint)).collect::<Result<_, _>>();
        let channels =
            channels.map_err(|source| EtcdError::Failed { endpoints: config.endpoints.join(", "), source })?;
        let prefix = format!("{}/{uuid}/", config.prefix.trim_end_matches('/'));
        let state = State { view: View::default(), endpoint: 0, lease: 0, lost: None, leads: false };
        let etcd = Self {
            channels,
            config,
            prefix,
            member: Member::new(info),
            latest_claim: Arc::new(latest_claim),
            state: Arc::new(Mutex::new(state)),
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

    /// The first key after all that begin with the prefix: `0` follows the slash.
    fn range_end(&self) -> String {
        format!("{}0", self.prefix.trim_end_matches('/'))
    }

    fn endpoints(&self) -> String {
        self.config.endpoints.join(", ")
    }

    fn failed(&self, status: Status) -> EtcdError {
        EtcdError::Failed { endpoints: self.endpoints(), source: CallError::Status(status) }
    }

    fn silent(&self) -> EtcdError {
        EtcdError::Silent { endpoints: self.endpoints() }
    }

    /// Calls the endpoint that answered last, and those after it until one answers. All are called again, with more time, if
    /// one was silent: it may be slow. A call that nobody answered may still have happened, so that each call can be made twice
    /// without harm.
    async fn call<Q: Clone, R, F>(&self, request: Q, call: impl Fn(Channel, Q) -> F) -> Result<R, EtcdError>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let mut error = self.silent();
        for round in 0..ROUNDS {
            let mut slow = false;
            for _ in &self.channels {
                let endpoint = self.state().endpoint;
                let answer = call(self.channels[endpoint].clone(), request.clone());
                error = match tokio::time::timeout(CALL * 2u32.pow(round), answer).await {
                    Ok(Ok(answer)) => return Ok(answer.into_inner()),
                    Ok(Err(status)) if status.code() != Code::Unavailable => return Err(self.failed(status)),
                    Ok(Err(status)) => self.failed(status),
                    Err(_) => {
                        slow = true;
                        self.silent()
                    }
                };
                self.state().endpoint = (endpoint + 1) % self.channels.len();
            }
            if !slow {
                break;
            }
        }
        Err(error)
    }

    /// Runs a transaction; the revision at which it happened, or `None` if its conditions did not hold.
    async fn transact(&self, when: Vec<Compare>, then: Request) -> Result<Option<i64>, EtcdError> {
        let request = TxnRequest { compare: when, success: vec![RequestOp { request: Some(then) }] };
        let txn = |channel, request| async move { KvClient::new(channel).txn(request).await };
        let answer = self.call(request, txn).await?;
        Ok(answer.succeeded.then(|| answer.header.map_or(0, |header| header.revision)))
    }

    /// The condition that a key is at `value`.
    fn equal(&self, name: &str, value: TargetUnion) -> Compare {
        let target = match value {
            TargetUnion::Version(_) => CompareTarget::Version,
            TargetUnion::ModRevision(_) => CompareTarget::Mod,
            TargetUnion::Value(_) => CompareTarget::Value,
        };
        Compare {
            result: CompareResult::Equal.into(),
            target: target.into(),
            key: self.key(name).into(),
            target_union: Some(value),
        }
    }

    fn put(&self, name: &str, value: Vec<u8>, lease: i64) -> Request {
        Request::RequestPut(PutRequest { key: self.key(name).into(), value, lease })
    }

    fn decode<T: for<'a> Deserialize<'a>>(&self, entry: &KeyValue) -> Result<T, EtcdError> {
        serde_json::from_slice(&entry.value).map_err(|_| EtcdError::Foreign {
            key: String::from_utf8_lossy(&entry.key).into_owned(),
            value: String::from_utf8_lossy(&entry.value).chars().take(80).collect(),
        })
    }

    /// Looks at everything below the prefix.
    async fn refresh(&self) -> Result<(), EtcdError> {
        let range = |channel, request| async move { KvClient::new(channel).range(request).await };
        loop {
            let request = RangeRequest { key: self.prefix.clone().into(), range_end: self.range_end().into() };
            let answer = self.call(request, range).await?;
            let mut view = View::default();
            for entry in &answer.kvs {
                match entry.key.strip_prefix(self.prefix.as_bytes()) {
                    Some(b"base") => view.base = Some(self.decode(entry)?),
                    Some(b"leader") => {
                        let Member { broker, .. } = self.decode(entry)?;
                        view.leader = Some(Elected { broker, revision: entry.mod_revision, lease: entry.lease });
                    }
                    Some(_) => {
                        let member: Member = self.decode(entry)?;
                        view.members.insert(member.broker, (member, entry.mod_revision));
                    }
                    None => {}
                }
            }
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
            // The first, or the first after etcd lost everything.
            let base = self.put("base", (self.latest_claim)().to_string().into(), 0);
            self.transact(vec![self.equal("base", TargetUnion::Version(0))], base).await?;
        }
    }

    /// Puts this broker's entries under a lease that lives.
    async fn register(&self) -> Result<i64, EtcdError> {
        let mut lease = self.state().lease;
        let time_to_live =
            |channel, request| async move { LeaseClient::new(channel).lease_time_to_live(request).await };
        let request = LeaseTimeToLiveRequest { id: lease };
        if lease == 0 || self.call(request, time_to_live).await.is_ok_and(|answer| answer.ttl <= 0) {
            let grant = |channel, request| async move { LeaseClient::new(channel).lease_grant(request).await };
            lease = self.call(LeaseGrantRequest { ttl: self.config.lease_s.into() }, grant).await?.id;
            self.state().lease = lease;
        }
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

    /// Writes this broker's entry if the key is still at `revision` (0: not there).
    async fn put_if(&self, name: &str, revision: i64, lease: i64) -> Result<Option<i64>, EtcdError> {
        let value = serde_json::to_vec(&self.member).unwrap_or_default();
        let same = self.equal(name, TargetUnion::ModRevision(revision));
        // Epochs count from the base: it must be the one that was seen.
        let base = self.state().view.base.unwrap_or(Term::NONE).to_string();
        let base = self.equal("base", TargetUnion::Value(base.into()));
        self.transact(vec![same, base], self.put(name, value, lease)).await
    }

    /// The leader, as etcd has it, and how long there has been none.
    pub fn elected(&self) -> Result<Elected, Duration> {
        let view = &self.state().view;
        view.leader.ok_or_else(|| view.leaderless_since.map_or(Duration::ZERO, |since| since.elapsed()))
    }

    /// Time after which a leader whose entry is gone does not come back for it.
    pub fn grace(&self) -> Duration {
        Duration::from_secs(u64::from(self.config.lease_s) * 2)
    }

    /// Stands for election, to replace `seen`. The term to lead under, if this broker won.
    ///
    /// # Errors
    /// [`EtcdError`]: nobody can be elected now.
    pub async fn campaign(&self, seen: Option<Elected>) -> Result<Option<Term>, EtcdError> {
        let (lease, base) = {
            let state = self.state();
            (state.lease, state.view.base.unwrap_or(Term::NONE))
        };
        let elected = self.put_if("leader", seen.map_or(0, |seen| seen.revision), lease).await?;
        self.refresh().await?;
        Ok(elected.map(|revision| Term(base.0 + revision as u64)))
    }

    /// Notes whether this broker leads, so that its entry as leader stays; takes it back when it does not lead after all.
    pub async fn set_leads(&self, leads: bool) {
        let leader = {
            let mut state = self.state();
            state.leads = leads;
            state.view.leader
        };
        if let Some(leader) = leader.filter(|leader| !leads && leader.broker == self.member.broker) {
            let same = self.equal("leader", TargetUnion::ModRevision(leader.revision));
            let delete = Request::RequestDeleteRange(DeleteRangeRequest { key: self.key("leader").into() });
            // If it fails, the lease ends it.
            let _ = self.transact(vec![same], delete).await;
        }
    }

    /// Leaves: the entries go.
    pub async fn leave(&self) {
        let request = LeaseRevokeRequest { id: std::mem::take(&mut self.state().lease) };
        let revoke = |channel, request| async move { LeaseClient::new(channel).lease_revoke(request).await };
        let _ = self.call(request, revoke).await;
    }

    /// Waits until the leader's entry changes.
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
                tracing::warn!(%error, "lost etcd: topics go on, but no leader can be elected");
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Watches everything below the prefix.
    async fn watch(&self) -> Result<Streaming<WatchResponse>, EtcdError> {
        let create = WatchCreateRequest { key: self.prefix.clone().into(), range_end: self.range_end().into() };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        // Requests do not end after the first: the watch could end with them.
        let watch =
            |channel, request| async move { WatchClient::new(channel).watch(once(request).chain(pending())).await };
        self.call(request, watch).await
    }

    /// Opens a stream of requests to keep a lease alive, of which it makes the first, and the stream of their answers.
    async fn keep_alive(&self, request: LeaseKeepAliveRequest) -> Result<KeepAlive, EtcdError> {
        let keep_alive = |channel, request| async move {
            let (keeper, requests) = mpsc::channel(KEEP_ALIVES as usize);
            // etcd says nothing before it has a request.
            let _ = keeper.try_send(request);
            let kept = LeaseClient::new(channel).lease_keep_alive(ReceiverStream::new(requests)).await?;
            Ok(kept.map(|kept| (keeper, kept)))
        };
        self.call(request, keep_alive).await
    }

    async fn attend(&self) -> Result<std::convert::Infallible, EtcdError> {
        let mut watch = self.watch().await?;
        let request = LeaseKeepAliveRequest { id: self.register().await? };
        let (keeper, mut kept) = self.keep_alive(request).await?;
        if let Some((since, _)) = self.state().lost.take() {
            tracing::info!(seconds = since.elapsed().as_secs(), "etcd is back");
        }
        let mut ticks = tokio::time::interval(Duration::from_secs(self.config.lease_s.into()) / KEEP_ALIVES);
        let mut unanswered = 0;
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    if unanswered > 1 || keeper.try_send(request).is_err() {
                        return Err(self.silent());
                    }
                    unanswered += 1;
                }
                answer = kept.message() => match answer.map_err(|status| self.failed(status))? {
                    Some(answer) if answer.ttl > 0 => unanswered = 0,
                    // The lease, or the stream, is gone: all is done again.
                    Some(_) | None => return Err(self.silent()),
                },
                news = watch.message() => {
                    let news = news.map_err(|status| self.failed(status))?;
                    let news = news.filter(|news| !news.canceled).ok_or_else(|| self.silent())?;
                    // Its own key may have gone with a lease that etcd ended.
                    let own = self.key(&format!("brokers/{}", self.member.broker));
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
