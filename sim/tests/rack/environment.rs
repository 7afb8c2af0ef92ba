//! Environment of the production client on a host of the rack: its clock, its chance, and its lines to the brokers.

use super::fate::{Clock, random};
use super::link::RackTransport;
use super::network::{Answer, Call, Network, Outcome, Request};
use super::nic::{Nic, Port};
use super::{BATCH_BYTES, HOSTS, Rack};
use embarcadero_client::polled::{Call as Pending, Control, Environment, Reply};
use embarcadero_client::{ClientConfig, ClientError, ControlCode};
use embarcadero_control::v1 as proto;
use embarcadero_sim::Power;
use embarcadero_transport::LinkOptions;
use embarcadero_transport::tcp::SocketOptions;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Time for which a client waits for the answer to a call, in microseconds of its own clock.
const PATIENCE_US: u64 = 400_000;

/// Call that is not answered yet.
enum Waiting {
    Cluster(Reply<proto::MetadataResponse>),
    Open(Reply<proto::OpenSessionResponse>),
    Close(Reply<proto::CloseSessionResponse>),
}

impl Waiting {
    fn fail(self, error: ClientError) {
        match self {
            Self::Cluster(reply) => reply.send(Err(error)),
            Self::Open(reply) => reply.send(Err(error)),
            Self::Close(reply) => reply.send(Err(error)),
        }
    }

    /// Takes the answer. One to another kind of call ends the call.
    fn take(self, outcome: Outcome) {
        match (self, outcome) {
            (Self::Cluster(reply), Outcome::Cluster(answer)) => reply.send(Ok(answer)),
            (Self::Open(reply), Outcome::Opened(answer)) => reply.send(Ok(answer)),
            (Self::Close(reply), Outcome::Closed) => reply.send(Ok(proto::CloseSessionResponse {})),
            (waiting, Outcome::InUse) => {
                let message = "another client has the id".to_owned();
                waiting.fail(ClientError::Control { code: ControlCode::AlreadyExists, message, source: None });
            }
            (_, outcome) => panic!("{outcome:?} answers another call"),
        }
    }
}

/// Calls of one client. Each goes to all brokers, and the leader is one of them.
pub(crate) struct Lines {
    client: usize,
    clock: Clock,
    network: Arc<Network>,
    waiting: Mutex<BTreeMap<u64, (Waiting, u64)>>,
}

impl Lines {
    fn waiting(&self) -> MutexGuard<'_, BTreeMap<u64, (Waiting, u64)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin<R>(&self, call: Call, waiting: impl FnOnce(Reply<R>) -> Waiting) -> Pending<R> {
        let (reply, pending) = Pending::begin();
        let number = random(0..u64::MAX);
        self.waiting().insert(number, (waiting(reply), self.clock.now_us()));
        for host in 0..HOSTS {
            self.network.request(host, Request { client: self.client, number, call: call.clone() });
        }
        pending
    }

    /// Takes the answers that have come, and gives up calls that nobody answers.
    pub(crate) fn turn(&self) {
        while let Some(Answer { number, outcome }) = self.network.take_answer(self.client) {
            if let Some((waiting, _)) = self.waiting().remove(&number) {
                waiting.take(outcome);
            }
        }
        let now = self.clock.now_us();
        let is_late = |since: u64| now.saturating_sub(since) > PATIENCE_US;
        let mut waiting = self.waiting();
        while let Some(number) = waiting.iter().find_map(|(number, (_, since))| is_late(*since).then_some(*number)) {
            let call = waiting.remove(&number);
            call.into_iter().for_each(|(call, _)| {
                call.fail(ClientError::Unreachable { reason: "no answer".to_owned(), source: None });
            });
        }
    }
}

impl Control for Lines {
    fn cluster(&self) -> Pending<proto::MetadataResponse> {
        self.begin(Call::Cluster, Waiting::Cluster)
    }

    fn open_session(&self, request: proto::OpenSessionRequest) -> Pending<proto::OpenSessionResponse> {
        self.begin(Call::Open(request), Waiting::Open)
    }

    fn close_session(&self, request: proto::CloseSessionRequest) -> Pending<proto::CloseSessionResponse> {
        self.begin(Call::Close(request), Waiting::Close)
    }
}

/// Host of one client, as long as its process runs.
pub(crate) struct ClientHost {
    config: ClientConfig,
    transport: RackTransport,
    lines: Lines,
    clock: Clock,
}

impl ClientHost {
    /// Starts the process of a client whose host has this clock and power supply.
    pub(crate) fn start(client: usize, rack: &Arc<Rack>, clock: Clock, power: &Power) -> Arc<Self> {
        let nic = || (Arc::new(Mutex::new(Nic::new(Port::of_client(client), &rack.network, None))), clock);
        let config = ClientConfig {
            ack_level: rack.topic().ack_level,
            batch_size: Some(BATCH_BYTES),
            buffer_bytes: 32 * BATCH_BYTES,
            ..ClientConfig::default()
        };
        config.validate().expect("it is in bounds");
        let network = Arc::clone(&rack.network);
        rack.network.hang_up(client);
        Arc::new(Self {
            config,
            transport: rack.transport.of_client(power, rack.has_nics.then(nic)),
            lines: Lines { client, clock, network, waiting: Mutex::default() },
            clock,
        })
    }

    /// Lines to the control plane.
    pub(crate) fn lines(&self) -> &Lines {
        &self.lines
    }
}

impl Environment for ClientHost {
    type Transport = RackTransport;
    type Control = Lines;
    type Clock = Clock;

    fn config(&self) -> &ClientConfig {
        &self.config
    }

    fn transport(&self) -> &RackTransport {
        &self.transport
    }

    fn link_options(&self) -> Result<LinkOptions, ClientError> {
        Ok(LinkOptions {
            timeout: Duration::ZERO,
            sockets: SocketOptions::default(),
            batch_bytes: BATCH_BYTES,
            acknowledged: true,
            ring_bytes: 0,
            device: None,
        })
    }

    fn control(&self) -> &Lines {
        &self.lines
    }

    fn clock(&self) -> &Clock {
        &self.clock
    }

    fn random(&self) -> u64 {
        random(0..u64::MAX)
    }
}
