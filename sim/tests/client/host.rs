//! Host of a client: its clock, its chance, and the lines to the simulated brokers.

use embarcadero_client::polled::{Call, Control, Environment, Reply};
use embarcadero_client::{ClientConfig, ClientError};
use embarcadero_control::v1 as proto;
use embarcadero_os::{Clock, Now};
use embarcadero_sim::{Simulated, SimulatedTransport};
use embarcadero_transport::LinkOptions;
use embarcadero_transport::tcp::SocketOptions;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Bytes of a batch, header included.
pub(crate) const BATCH_BYTES: usize = 1024;
/// Longest wait without progress, milliseconds.
pub(crate) const PROGRESS_MS: u64 = 2000;

/// Call to the control plane that nobody has answered yet.
pub(crate) enum Request {
    Cluster(Reply<proto::MetadataResponse>),
    Open(proto::OpenSessionRequest, Reply<proto::OpenSessionResponse>),
    Close(proto::CloseSessionRequest, Reply<proto::CloseSessionResponse>),
}

/// Control plane of the client: calls wait until the brokers take them.
#[derive(Default)]
pub(crate) struct Switchboard(Mutex<VecDeque<Request>>);

impl Switchboard {
    fn requests(&self) -> MutexGuard<'_, VecDeque<Request>> {
        self.0.lock().unwrap()
    }

    /// Takes the call that was made first.
    pub(crate) fn take(&self) -> Option<Request> {
        self.requests().pop_front()
    }

    /// Returns the number of calls that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.requests().len()
    }

    fn begin<R>(&self, request: impl FnOnce(Reply<R>) -> Request) -> Call<R> {
        let (reply, call) = Call::begin();
        self.requests().push_back(request(reply));
        call
    }
}

impl Control for Switchboard {
    fn cluster(&self) -> Call<proto::MetadataResponse> {
        self.begin(Request::Cluster)
    }

    fn open_session(&self, request: proto::OpenSessionRequest) -> Call<proto::OpenSessionResponse> {
        self.begin(|reply| Request::Open(request, reply))
    }

    fn close_session(&self, request: proto::CloseSessionRequest) -> Call<proto::CloseSessionResponse> {
        self.begin(|reply| Request::Close(request, reply))
    }
}

/// Clock that only the simulation moves.
pub(crate) struct SteppedClock {
    begun: Instant,
    passed_ms: AtomicU64,
}

impl SteppedClock {
    pub(crate) fn passed_ms(&self) -> u64 {
        self.passed_ms.load(Ordering::Relaxed)
    }

    pub(crate) fn step(&self) {
        self.passed_ms.fetch_add(1, Ordering::Relaxed);
    }
}

impl Clock for SteppedClock {
    fn now(&self) -> Now {
        let passed_ms = self.passed_ms();
        let (instant, us) = (self.begun + Duration::from_millis(passed_ms), passed_ms * 1000);
        Now { instant, steady_us: us, wall_us: us }
    }
}

/// Host of one client.
pub(crate) struct Host {
    config: ClientConfig,
    network: SimulatedTransport<Simulated>,
    pub(crate) clock: SteppedClock,
    pub(crate) control: Switchboard,
    chance: Mutex<StdRng>,
}

impl Host {
    pub(crate) fn new(network: SimulatedTransport<Simulated>, ack_level: u8, seed: u64) -> Self {
        let config = ClientConfig {
            ack_level,
            batch_size: Some(BATCH_BYTES),
            buffer_bytes: 64 * BATCH_BYTES,
            progress_timeout_ms: PROGRESS_MS,
            ..ClientConfig::default()
        };
        config.validate().unwrap();
        Self {
            config,
            network,
            clock: SteppedClock { begun: Instant::now(), passed_ms: AtomicU64::new(0) },
            control: Switchboard::default(),
            chance: Mutex::new(StdRng::seed_from_u64(seed)),
        }
    }
}

impl Environment for Host {
    type Transport = SimulatedTransport<Simulated>;
    type Control = Switchboard;
    type Clock = SteppedClock;

    fn config(&self) -> &ClientConfig {
        &self.config
    }

    fn transport(&self) -> &Self::Transport {
        &self.network
    }

    fn link_options(&self) -> Result<LinkOptions, ClientError> {
        Ok(LinkOptions {
            timeout: Duration::ZERO,
            sockets: SocketOptions::default(),
            batch_bytes: BATCH_BYTES,
            acknowledged: self.config.ack_level > 0,
            ring_bytes: 0,
            device: None,
        })
    }

    fn control(&self) -> &Switchboard {
        &self.control
    }

    fn clock(&self) -> &SteppedClock {
        &self.clock
    }

    fn random(&self) -> u64 {
        self.chance.lock().unwrap().random()
    }
}
