//! Blocking calls to the control plane.

use crate::config::ClientConfig;
use crate::error::{Cause, ClientError, ControlCode};
use embarcadero_control::v1::control_client::ControlClient;
use embarcadero_control::v1::{self as proto};
use std::error::Error;
use std::sync::Arc;
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

/// Control plane as one client sees it: the endpoints of all known brokers, and a connection to the leader.
pub(crate) struct Control {
    runtime: tokio::runtime::Runtime,
    endpoints: Vec<String>,
    connect_timeout: Duration,
    leader: Option<ControlClient<Channel>>,
}

/// Error for a refusal of the control service.
fn refused(error: &Status) -> ClientError {
    let cause = error.source().map_or(String::new(), |source| format!(": {source}"));
    let message = format!("{}{cause}", error.message());
    let source = error.source().map(|_| Arc::new(error.clone()) as Cause);
    ClientError::Control { code: error.code().into(), message, source }
}

impl Control {
    pub(crate) fn new(config: &ClientConfig) -> Result<Self, ClientError> {
        // A thread of its own answers and asks between calls too. Otherwise an answer that came after a call would look
        // like none at the next call.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("control")
            .enable_all()
            .build()
            .map_err(ClientError::io("start the control runtime"))?;
        Ok(Self {
            runtime,
            endpoints: config.bootstrap.clone(),
            connect_timeout: config.connect_timeout(),
            leader: None,
        })
    }

    async fn connect(endpoint: &str, timeout: Duration) -> Result<ControlClient<Channel>, ClientError> {
        let unreachable = |error: tonic::transport::Error| {
            let cause = error.source().map_or(String::new(), |source| format!(": {source}"));
            let reason = format!("no broker answers: {endpoint}: {error}{cause}");
            ClientError::Unreachable { reason, source: Some(Arc::new(error)) }
        };
        let endpoint = Endpoint::try_from(format!("http://{endpoint}"))
            .map_err(unreachable)?
            .connect_timeout(timeout)
            .timeout(CALL)
            .keep_alive_while_idle(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE);
        Ok(ControlClient::new(endpoint.connect().await.map_err(unreachable)?))
    }

    /// Asks for the state of the cluster. Waits while the brokers have no leader.
    pub(crate) fn metadata(&mut self) -> Result<proto::MetadataResponse, ClientError> {
        let deadline = Instant::now() + LEADER_WAIT.max(self.connect_timeout);
        loop {
            match self.ask_in_turn() {
                Err(ClientError::Control { code: ControlCode::Unavailable, .. }) if Instant::now() < deadline => {
                    std::thread::sleep(LEADER_POLL);
                }
                answer => return answer,
            }
        }
    }

    /// Asks brokers in turn for the state of the cluster, until one answers. Remembers the endpoints that it names.
    fn ask_in_turn(&mut self) -> Result<proto::MetadataResponse, ClientError> {
        let (endpoints, timeout) = (&self.endpoints, self.connect_timeout);
        let found = self.runtime.block_on(async {
            let mut last = ClientError::unreachable("no endpoint is configured");
            for endpoint in endpoints {
                let answer = match Self::connect(endpoint, timeout).await {
                    Ok(mut client) => client.metadata(proto::MetadataRequest {}).await.map_err(|error| refused(&error)),
                    Err(error) => Err(error),
                };
                match answer {
                    Ok(answer) => return Ok(answer.into_inner()),
                    Err(error) => last = error,
                }
            }
            Err(last)
        })?;
        for broker in &found.brokers {
            if !self.endpoints.contains(&broker.control_endpoint) {
                self.endpoints.push(broker.control_endpoint.clone());
            }
        }
        Ok(found)
    }

    /// Calls the leader. Searches for it again when it does not answer or no longer leads.
    pub(crate) fn leader<R>(
        &mut self,
        call: impl AsyncFn(&mut ControlClient<Channel>) -> Result<tonic::Response<R>, Status>,
    ) -> Result<R, ClientError> {
        let deadline = Instant::now() + LEADER_WAIT.max(self.connect_timeout);
        loop {
            let error = match self.try_leader(&call) {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) if matches!(error.code(), Code::Unavailable | Code::FailedPrecondition) => {
                    refused(&error)
                }
                Ok(Err(error)) => {
                    let error = refused(&error);
                    if !error.is_permanent() {
                        // The next call finds out anew who leads.
                        self.leader = None;
                    }
                    return Err(error);
                }
                Err(error) => error,
            };
            self.leader = None;
            if Instant::now() >= deadline {
                return Err(error);
            }
            std::thread::sleep(LEADER_POLL);
        }
    }

    fn try_leader<R>(
        &mut self,
        call: &impl AsyncFn(&mut ControlClient<Channel>) -> Result<tonic::Response<R>, Status>,
    ) -> Result<Result<R, Status>, ClientError> {
        let mut client = match self.leader.take() {
            Some(client) => client,
            None => {
                let metadata = self.ask_in_turn()?;
                let leader = metadata.brokers.iter().find(|broker| broker.leader);
                let leader = leader.ok_or_else(|| match &metadata.damaged_brokers[..] {
                    [] => ClientError::unreachable("the cluster has no live leader"),
                    damaged => ClientError::unreachable(format!("the leader is not known: {}", damaged.join("; "))),
                })?;
                self.runtime.block_on(Self::connect(&leader.control_endpoint, self.connect_timeout))?
            }
        };
        let answer = self.runtime.block_on(call(&mut client));
        self.leader = Some(client);
        Ok(answer.map(tonic::Response::into_inner))
    }
}
