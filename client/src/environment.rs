//! Environment of a client: all that it reaches outside its own memory, as traits.
//!
//! [`crate::context::Context`] is that of real hosts. A simulator brings its own.

use crate::call::Call;
use crate::config::ClientConfig;
use crate::error::ClientError;
use embarcadero_control::v1 as proto;
use embarcadero_os::Clock;
use embarcadero_transport::{LinkError, LinkOptions, Transport};
use embarcadero_wire::{OpenPublish, Subscribe};
use std::io;
use std::net::SocketAddr;

/// Control plane as publishers and subscribers call it. Every call returns at once, and its answer is looked for.
pub trait Control {
    /// Asks for the brokers and topics of the cluster.
    fn cluster(&self) -> Call<proto::MetadataResponse>;

    /// Opens the next epoch of a client's session on a topic. With `resume` nothing is opened, and the answer's epoch is
    /// 0, if the brokers do not know the client any more.
    fn open_session(&self, request: proto::OpenSessionRequest) -> Call<proto::OpenSessionResponse>;

    /// Closes a session.
    fn close_session(&self, request: proto::CloseSessionRequest) -> Call<proto::CloseSessionResponse>;
}

/// Environment of a client: its configuration, transport, control plane, clock and chance.
pub trait Environment {
    /// Transport of batches and deliveries.
    type Transport: Transport;
    /// Control plane.
    type Control: Control;
    /// Clock of this host.
    type Clock: Clock;

    /// Configuration of the client.
    fn config(&self) -> &ClientConfig;

    /// Transport of batches and deliveries.
    fn transport(&self) -> &Self::Transport;

    /// Options of data connections.
    ///
    /// # Errors
    /// The device of the transport cannot be used.
    fn link_options(&self) -> Result<LinkOptions, ClientError>;

    /// Control plane.
    fn control(&self) -> &Self::Control;

    /// Clock of this host.
    fn clock(&self) -> &Self::Clock;

    /// Random number, of which every bit is as likely to be set as not.
    fn random(&self) -> u64;
}

/// Publisher's end of a connection.
pub(crate) type PublisherEnd<E> = <<E as Environment>::Transport as Transport>::Publisher;
/// Subscriber's end of a connection.
pub(crate) type SubscriberEnd<E> = <<E as Environment>::Transport as Transport>::Subscriber;

/// Returns the error of a data connection that was not made.
fn not_connected(error: io::Error) -> ClientError {
    error.downcast::<LinkError>().map_or_else(ClientError::io("connect to a broker"), ClientError::from)
}

/// Connects a publisher to a broker. Blocks for as long as connecting does.
pub(crate) fn publish<E: Environment>(
    environment: &E,
    broker: SocketAddr,
    open: &OpenPublish,
) -> Result<PublisherEnd<E>, ClientError> {
    environment.transport().publish(broker, &environment.link_options()?, open).map_err(not_connected)
}

/// Connects a subscriber to a broker. Blocks for as long as connecting does.
pub(crate) fn subscribe<E: Environment>(
    environment: &E,
    broker: SocketAddr,
    request: &Subscribe,
) -> Result<SubscriberEnd<E>, ClientError> {
    environment.transport().subscribe(broker, &environment.link_options()?, request).map_err(not_connected)
}

/// Chooses one of `count` things, at least one, at random.
pub(crate) fn pick<E: Environment>(environment: &E, count: usize) -> usize {
    (environment.random() % count as u64) as usize
}

#[cfg(test)]
pub(crate) mod testing {
    //! Environment for tests, over real sockets.

    use super::*;
    use crate::call::Reply;
    use embarcadero_os::Now;
    use embarcadero_transport::Sockets;
    use embarcadero_transport::tcp::SocketOptions;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    /// Clock that only a test moves.
    pub(crate) struct TestClock {
        begun: Instant,
        passed_us: AtomicU64,
    }

    impl TestClock {
        pub(crate) fn advance(&self, by: Duration) {
            self.passed_us.fetch_add(by.as_micros() as u64, Ordering::Relaxed);
        }
    }

    impl Clock for TestClock {
        fn now(&self) -> Now {
            let passed_us = self.passed_us.load(Ordering::Relaxed);
            let instant = self.begun + Duration::from_micros(passed_us);
            Now { instant, steady_us: passed_us, wall_us: passed_us }
        }
    }

    /// Control plane that never answers. The last call of each kind is under way.
    #[derive(Default)]
    pub(crate) struct TestControl {
        cluster: Mutex<Option<Reply<proto::MetadataResponse>>>,
        open: Mutex<Option<Reply<proto::OpenSessionResponse>>>,
        close: Mutex<Option<Reply<proto::CloseSessionResponse>>>,
    }

    fn begin<R>(last: &Mutex<Option<Reply<R>>>) -> Call<R> {
        let (reply, call) = Call::begin();
        *last.lock().unwrap() = Some(reply);
        call
    }

    impl Control for TestControl {
        fn cluster(&self) -> Call<proto::MetadataResponse> {
            begin(&self.cluster)
        }

        fn open_session(&self, _: proto::OpenSessionRequest) -> Call<proto::OpenSessionResponse> {
            begin(&self.open)
        }

        fn close_session(&self, _: proto::CloseSessionRequest) -> Call<proto::CloseSessionResponse> {
            begin(&self.close)
        }
    }

    pub(crate) struct TestEnvironment {
        config: ClientConfig,
        pub(crate) clock: TestClock,
        control: TestControl,
    }

    impl TestEnvironment {
        pub(crate) fn new(config: ClientConfig) -> Self {
            let clock = TestClock { begun: Instant::now(), passed_us: AtomicU64::new(0) };
            Self { config, clock, control: TestControl::default() }
        }
    }

    impl Environment for TestEnvironment {
        type Transport = Sockets;
        type Control = TestControl;
        type Clock = TestClock;

        fn config(&self) -> &ClientConfig {
            &self.config
        }

        fn transport(&self) -> &Sockets {
            &Sockets
        }

        fn link_options(&self) -> Result<LinkOptions, ClientError> {
            Ok(LinkOptions {
                timeout: Duration::from_secs(60),
                sockets: SocketOptions::default(),
                batch_bytes: self.config.batch_bytes().1,
                acknowledged: self.config.ack_level > 0,
                ring_bytes: 0,
                device: None,
            })
        }

        fn control(&self) -> &TestControl {
            &self.control
        }

        fn clock(&self) -> &TestClock {
            &self.clock
        }

        fn random(&self) -> u64 {
            1
        }
    }
}
