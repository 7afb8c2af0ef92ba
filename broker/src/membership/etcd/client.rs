//! Calls to etcd: endpoints, keys below the prefix, and transactions.

use super::KEEP_ALIVES;
use crate::config::EtcdConfig;
use embarcadero_control::etcd::compare::{CompareResult, CompareTarget, TargetUnion};
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
use embarcadero_wire::BrokerId;
use serde::Deserialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{StreamExt, once, pending};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status, Streaming};
use uuid::Uuid;

/// Time that a call to one endpoint may take in the first round. It doubles with each round.
const CALL: Duration = Duration::from_secs(2);
/// Rounds in which each endpoint is called, before etcd counts as silent.
const ROUNDS: u32 = 3;

/// Reason why etcd did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// etcd cannot be reached, or refuses.
    #[error("etcd at {endpoints}: {source}")]
    Failed {
        /// Configured endpoints.
        endpoints: String,
        /// Error of the last call.
        source: CallError,
    },
    /// etcd does not answer in time.
    #[error("etcd at {endpoints} does not answer")]
    Silent {
        /// Configured endpoints.
        endpoints: String,
    },
    /// Others change the entries faster than this broker can write its own.
    #[error("etcd at {endpoints}: entries below {prefix} change while this broker registers")]
    Contended {
        /// Configured endpoints.
        endpoints: String,
        /// Prefix of the region's keys.
        prefix: String,
    },
    /// Another broker has the id.
    #[error("broker id {id} is taken by process {process} of host {host}, says etcd")]
    IdTaken {
        /// Broker id.
        id: BrokerId,
        /// Host of the other broker.
        host: String,
        /// Process id of the other broker on that host.
        process: u32,
    },
    /// A key below the prefix holds another program's value.
    #[error("etcd's key {key} holds {value:?}, which is not this program's; choose another etcd.prefix")]
    Foreign {
        /// Key.
        key: String,
        /// First characters of the value.
        value: String,
        /// Reason why it cannot be decoded.
        source: serde_json::Error,
    },
}

/// Reason why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// An endpoint is not an address.
    #[error(transparent)]
    Transport(#[from] tonic::transport::Error),
    /// An endpoint asks for more than plain HTTP.
    #[error("{0} is not http://HOST:PORT; there is no TLS")]
    Scheme(String),
    /// etcd refuses, or cannot be reached; the text has the cause.
    #[error("grpc request error: {0}")]
    Status(#[source] Status),
}

/// Both ends of a stream that keeps a lease alive: where requests go, and where answers come from.
pub(super) type KeepAlive = (mpsc::Sender<LeaseKeepAliveRequest>, Streaming<LeaseKeepAliveResponse>);

/// Connection to the members of etcd. Clones share it.
#[derive(Clone)]
pub(super) struct Client {
    endpoints: Vec<String>,
    /// Channel to each endpoint. It connects when it is first used.
    channels: Vec<Channel>,
    /// Prefix of every key, with a slash at its end.
    prefix: String,
    /// Index of the endpoint that is called first.
    first: Arc<AtomicUsize>,
}

/// Returns a channel to an endpoint, which connects when it is first used.
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

impl Client {
    /// Returns a client for the keys of the region `uuid`. It has not connected yet.
    pub(super) fn new(config: &EtcdConfig, uuid: Uuid) -> Result<Self, EtcdError> {
        let endpoints = config.endpoints.clone();
        let channels = endpoints.iter().map(|endpoint| channel(endpoint)).collect::<Result<_, _>>();
        let channels = channels.map_err(|source| EtcdError::Failed { endpoints: endpoints.join(", "), source })?;
        let prefix = format!("{}/{uuid}/", config.prefix.trim_end_matches('/'));
        Ok(Self { endpoints, channels, prefix, first: Arc::default() })
    }

    /// Returns the key of an entry.
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Returns the name of an entry; `None` for a key that does not begin with the prefix.
    pub(super) fn name_of<'a>(&self, entry: &'a KeyValue) -> Option<&'a [u8]> {
        entry.key.strip_prefix(self.prefix.as_bytes())
    }

    /// Returns the first key after all that begin with the prefix: in ASCII, `0` follows the slash.
    fn range_end(&self) -> String {
        format!("{}0", self.prefix.trim_end_matches('/'))
    }

    /// Returns the error of a call that etcd refused.
    pub(super) fn failed(&self, status: Status) -> EtcdError {
        EtcdError::Failed { endpoints: self.endpoints.join(", "), source: CallError::Status(status) }
    }

    /// Returns the error of a call that nobody answered.
    pub(super) fn silent(&self) -> EtcdError {
        EtcdError::Silent { endpoints: self.endpoints.join(", ") }
    }

    /// Returns the error of entries that others keep changing.
    pub(super) fn contended(&self) -> EtcdError {
        EtcdError::Contended { endpoints: self.endpoints.join(", "), prefix: self.prefix.clone() }
    }

    /// Calls the endpoint that answered last, and those after it until one answers. If one was silent, it may be slow,
    /// and all are called again with more time. A call that nobody answered may still have happened, so every call must
    /// be harmless when it is made twice.
    async fn call<Q: Clone, R, F>(&self, request: Q, call: impl Fn(Channel, Q) -> F) -> Result<R, EtcdError>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let mut error = self.silent();
        for round in 0..ROUNDS {
            let mut slow = false;
            for _ in &self.channels {
                let endpoint = self.first.load(Ordering::Relaxed);
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
                self.first.store((endpoint + 1) % self.channels.len(), Ordering::Relaxed);
            }
            if !slow {
                break;
            }
        }
        Err(error)
    }

    /// Runs a transaction. Returns the revision at which it happened, or `None` if a condition did not hold.
    pub(super) async fn transact(&self, when: Vec<Compare>, then: Request) -> Result<Option<i64>, EtcdError> {
        let request = TxnRequest { compare: when, success: vec![RequestOp { request: Some(then) }] };
        let txn = |channel, request| async move { KvClient::new(channel).txn(request).await };
        let answer = self.call(request, txn).await?;
        Ok(answer.succeeded.then(|| answer.header.map_or(0, |header| header.revision)))
    }

    /// Returns the condition that an entry has a version, a revision or a value.
    pub(super) fn equal(&self, name: &str, value: TargetUnion) -> Compare {
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

    /// Returns the operation that writes an entry under a lease; 0 for none.
    pub(super) fn put(&self, name: &str, value: Vec<u8>, lease: i64) -> Request {
        Request::RequestPut(PutRequest { key: self.key(name).into(), value, lease })
    }

    /// Returns the operation that removes an entry.
    pub(super) fn delete(&self, name: &str) -> Request {
        Request::RequestDeleteRange(DeleteRangeRequest { key: self.key(name).into() })
    }

    /// Reads every entry below the prefix.
    pub(super) async fn entries(&self) -> Result<Vec<KeyValue>, EtcdError> {
        let range = |channel, request| async move { KvClient::new(channel).range(request).await };
        let request = RangeRequest { key: self.prefix.clone().into(), range_end: self.range_end().into() };
        Ok(self.call(request, range).await?.kvs)
    }

    /// Decodes the value of an entry.
    pub(super) fn decode<T: for<'a> Deserialize<'a>>(&self, entry: &KeyValue) -> Result<T, EtcdError> {
        serde_json::from_slice(&entry.value).map_err(|source| EtcdError::Foreign {
            key: String::from_utf8_lossy(&entry.key).into_owned(),
            value: String::from_utf8_lossy(&entry.value).chars().take(80).collect(),
            source,
        })
    }

    /// Makes a lease of `seconds` seconds, and returns its id.
    pub(super) async fn grant(&self, seconds: u32) -> Result<i64, EtcdError> {
        let grant = |channel, request| async move { LeaseClient::new(channel).lease_grant(request).await };
        Ok(self.call(LeaseGrantRequest { ttl: seconds.into() }, grant).await?.id)
    }

    /// Returns the seconds that are left of a lease; 0 or less once it has ended.
    pub(super) async fn time_to_live(&self, lease: i64) -> Result<i64, EtcdError> {
        let look = |channel, request| async move { LeaseClient::new(channel).lease_time_to_live(request).await };
        Ok(self.call(LeaseTimeToLiveRequest { id: lease }, look).await?.ttl)
    }

    /// Ends a lease, and with it the entries under it.
    pub(super) async fn revoke(&self, lease: i64) -> Result<(), EtcdError> {
        let revoke = |channel, request| async move { LeaseClient::new(channel).lease_revoke(request).await };
        self.call(LeaseRevokeRequest { id: lease }, revoke).await.map(drop)
    }

    /// Watches every entry below the prefix.
    pub(super) async fn watch(&self) -> Result<Streaming<WatchResponse>, EtcdError> {
        let create = WatchCreateRequest { key: self.prefix.clone().into(), range_end: self.range_end().into() };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        // The stream of requests stays open after the first: the watch could end with it.
        let watch =
            |channel, request| async move { WatchClient::new(channel).watch(once(request).chain(pending())).await };
        self.call(request, watch).await
    }

    /// Opens a stream of requests that keep a lease alive, and sends the first.
    pub(super) async fn keep_alive(&self, request: LeaseKeepAliveRequest) -> Result<KeepAlive, EtcdError> {
        let keep_alive = |channel, request| async move {
            let (keeper, requests) = mpsc::channel(KEEP_ALIVES as usize);
            // etcd says nothing before it has a request.
            let _ = keeper.try_send(request);
            let kept = LeaseClient::new(channel).lease_keep_alive(ReceiverStream::new(requests)).await?;
            Ok(kept.map(|kept| (keeper, kept)))
        };
        self.call(request, keep_alive).await
    }
}
