//! Calls to the control plane over gRPC.

use crate::call::Call;
use crate::config::ClientConfig;
use crate::environment::Control;
use crate::error::{Cause, ClientError, ControlCode};
use embarcadero_control::v1::control_client::ControlClient;
use embarcadero_control::v1::{self as proto};
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Longest search for a leader before a call gives up, unless a connection may take longer.
const LEADER_WAIT: Duration = Duration::from_secs(5);
/// Time between two looks for a leader.
const LEADER_POLL: Duration = Duration::from_millis(50);
/// Longest duration of one call.
const CALL: Duration = Duration::from_secs(35);
/// Silence after which a broker is asked whether it is still there, and the wait for its answer.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Control plane as one client sees it, over gRPC. Calls run on a runtime of its own.
pub(crate) struct GrpcControl {
    runtime: tokio::runtime::Runtime,
    plane: Arc<Plane>,
}

/// Endpoints of all known brokers, and a connection to the leader.
struct Plane {
    endpoints: Mutex<Vec<String>>,
    connect_timeout: Duration,
    leader: Mutex<Option<ControlClient<Channel>>>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Error for a refusal of the control service.
fn refused(error: &Status) -> ClientError {
    let cause = error.source().map_or(String::new(), |source| format!(": {source}"));
    let message = format!("{}{cause}", error.message());
    let source = error.source().map(|_| Arc::new(error.clone()) as Cause);
    ClientError::Control { code: error.code().into(), message, source }
}

impl GrpcControl {
    pub(crate) fn new(config: &ClientConfig) -> Result<Self, ClientError> {
        // A thread of its own answers and asks between calls too. Otherwise an answer that came after a call would look
        // like none at the next call.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("control")
            .enable_all()
            .build()
            .map_err(ClientError::io("start the control runtime"))?;
        let plane = Arc::new(Plane {
            endpoints: Mutex::new(config.bootstrap.clone()),
            connect_timeout: config.connect_timeout(),
            leader: Mutex::new(None),
        });
        Ok(Self { runtime, plane })
    }

    fn spawn<R: Send + 'static>(&self, work: impl Future<Output = Result<R, ClientError>> + Send + 'static) -> Call<R> {
        let (reply, call) = Call::begin();
        self.runtime.spawn(async move { reply.send(work.await) });
        call
    }

    /// Begins a call to the leader. Searches for it again when it does not answer or no longer leads. `call` makes one
    /// attempt.
    pub(crate) fn leader<R: Send + 'static, A>(
        &self,
        call: impl Fn(ControlClient<Channel>) -> A + Send + Sync + 'static,
    ) -> Call<R>
    where
        A: Future<Output = Result<tonic::Response<R>, Status>> + Send,
    {
        let plane = Arc::clone(&self.plane);
        self.spawn(async move { plane.call_leader(call).await })
    }
}

impl Control for GrpcControl {
    fn cluster(&self) -> Call<proto::MetadataResponse> {
        let plane = Arc::clone(&self.plane);
        self.spawn(async move { plane.metadata().await })
    }

    fn open_session(&self, request: proto::OpenSessionRequest) -> Call<proto::OpenSessionResponse> {
        self.leader(move |mut client| {
            let request = request.clone();
            async move { client.open_session(request).await }
        })
    }

    fn close_session(&self, request: proto::CloseSessionRequest) -> Call<proto::CloseSessionResponse> {
        self.leader(move |mut client| async move { client.close_session(request).await })
    }
}

impl Plane {
    fn deadline(&self) -> Instant {
        Instant::now() + LEADER_WAIT.max(self.connect_timeout)
    }

    async fn connect(&self, endpoint: &str) -> Result<ControlClient<Channel>, ClientError> {
        let unreachable = |error: tonic::transport::Error| {
            let cause = error.source().map_or(String::new(), |source| format!(": {source}"));
            let reason = format!("no broker answers: {endpoint}: {error}{cause}");
            ClientError::Unreachable { reason, source: Some(Arc::new(error)) }
        };
        let endpoint = Endpoint::try_from(format!("http://{endpoint}"))
            .map_err(unreachable)?
            .connect_timeout(self.connect_timeout)
            .timeout(CALL)
            .keep_alive_while_idle(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE);
        Ok(ControlClient::new(endpoint.connect().await.map_err(unreachable)?))
    }

    /// Asks for the state of the cluster. Waits while the brokers have no leader.
    async fn metadata(&self) -> Result<proto::MetadataResponse, ClientError> {
        let deadline = self.deadline();
        loop {
            match self.ask_in_turn().await {
                Err(ClientError::Control { code: ControlCode::Unavailable, .. }) if Instant::now() < deadline => {
                    tokio::time::sleep(LEADER_POLL).await;
                }
                answer => return answer,
            }
        }
    }

    /// Asks brokers in turn for the state of the cluster, until one answers. Remembers the endpoints that it names.
    async fn ask_in_turn(&self) -> Result<proto::MetadataResponse, ClientError> {
        let known = lock(&self.endpoints).clone();
        let mut last = ClientError::unreachable("no endpoint is configured");
        for endpoint in &known {
            let answer = match self.connect(endpoint).await {
                Ok(mut client) => client.metadata(proto::MetadataRequest {}).await.map_err(|error| refused(&error)),
                Err(error) => Err(error),
            };
            let found = match answer {
                Ok(answer) => answer.into_inner(),
                Err(error) => {
                    last = error;
                    continue;
                }
            };
            let mut endpoints = lock(&self.endpoints);
            for broker in &found.brokers {
                if !endpoints.contains(&broker.control_endpoint) {
                    endpoints.push(broker.control_endpoint.clone());
                }
            }
            return Ok(found);
        }
        Err(last)
    }

    async fn call_leader<R, A>(&self, call: impl Fn(ControlClient<Channel>) -> A) -> Result<R, ClientError>
    where
        A: Future<Output = Result<tonic::Response<R>, Status>>,
    {
        let deadline = self.deadline();
        loop {
            let attempt = match self.find_leader().await {
                Ok(client) => Ok(call(client).await),
                Err(error) => Err(error),
            };
            let error = match attempt {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(error)) if matches!(error.code(), Code::Unavailable | Code::FailedPrecondition) => {
                    refused(&error)
                }
                Ok(Err(error)) => {
                    let error = refused(&error);
                    if !error.is_permanent() {
                        // The next call finds out anew who leads.
                        *lock(&self.leader) = None;
                    }
                    return Err(error);
                }
                Err(error) => error,
            };
            *lock(&self.leader) = None;
            if Instant::now() >= deadline {
                return Err(error);
            }
            tokio::time::sleep(LEADER_POLL).await;
        }
    }

    /// Connection to the leader: the last one, or another to the broker that leads now.
    async fn find_leader(&self) -> Result<ControlClient<Channel>, ClientError> {
        let known = lock(&self.leader).clone();
        if let Some(client) = known {
            return Ok(client);
        }
        let metadata = self.ask_in_turn().await?;
        let leader = metadata.brokers.iter().find(|broker| broker.leader);
        let leader = leader.ok_or_else(|| match &metadata.damaged_brokers[..] {
            [] => ClientError::unreachable("the cluster has no live leader"),
            damaged => ClientError::unreachable(format!("the leader is not known: {}", damaged.join("; "))),
        })?;
        let client = self.connect(&leader.control_endpoint).await?;
        *lock(&self.leader) = Some(client.clone());
        Ok(client)
    }
}
