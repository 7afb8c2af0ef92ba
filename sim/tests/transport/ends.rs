//! Transports that the suite runs over, and how their two ends connect.

use super::landing::TestLanding;
use super::{BATCH_BYTES, until};
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::{Mapping, Native, RegionOffset};
use embarcadero_sim::{Simulated, SimulatedEndpoint, SimulatedTransport, Turbulence, World};
use embarcadero_transport::rdma::{RdmaClient, RdmaDevice, WindowBounds};
use embarcadero_transport::tcp::{SocketOptions, listen};
use embarcadero_transport::{
    Channel, Connection, Endpoint, Isolation, LinkOptions, Outbox, Received, Slots, SocketEndpoint, Sockets, Transport,
};
use embarcadero_verbs::{Context, DpdkConfig, LocalPort};
use embarcadero_wire::{Frame, OpenPublish, Subscribe};
use nix::sched::{CloneFlags, unshare};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;

/// Bytes of the region, with room for deliveries and for all that a test publishes.
const REGION_BYTES: u64 = 64 << 20;

type Pair<T, L> = (<T as Transport>::Connection, L);

/// Broker and client that reach each other.
pub(crate) trait Ends {
    type Transport: Transport;

    /// Returns the broker's region.
    fn memory(&self) -> &<Self::Transport as Transport>::Memory;

    /// Returns the place for a delivery, `at` bytes into the part of the region that is free for deliveries.
    fn place(&self, at: u64) -> RegionOffset {
        RegionOffset(at)
    }

    /// Connects a publisher, which has sent its opening frame.
    fn publisher(&mut self) -> Pair<Self::Transport, <Self::Transport as Transport>::Publisher> {
        self.publisher_with(true)
    }

    /// Connects a publisher, which has sent its opening frame and is sent acknowledgements, or is not.
    fn publisher_with(
        &mut self,
        acknowledged: bool,
    ) -> Pair<Self::Transport, <Self::Transport as Transport>::Publisher>;

    /// Connects a subscriber, which has sent its request.
    fn subscriber(&mut self) -> Pair<Self::Transport, <Self::Transport as Transport>::Subscriber>;

    /// Returns true when completions of a device come to the broker's endpoint.
    fn has_device(&self) -> bool;

    /// Returns the broker's endpoint, and the slot of the connection that was made last.
    fn endpoint(&mut self) -> (&mut <Self::Transport as Transport>::Endpoint, usize);

    /// Hands completions to the connection that was made last.
    fn drive(&mut self, connection: &mut <Self::Transport as Transport>::Connection) {
        let (endpoint, slot) = self.endpoint();
        endpoint.complete(&mut Last { slot, connection }).unwrap();
    }
}

/// The connection that was made last. Completions of those before are of no interest.
struct Last<'a, C> {
    slot: usize,
    connection: &'a mut C,
}

impl<C> Slots<C> for Last<'_, C> {
    fn connection(&mut self, slot: usize) -> Option<&mut C> {
        (slot == self.slot).then_some(&mut *self.connection)
    }
}

fn options(device: Option<Arc<RdmaClient>>, acknowledged: bool) -> LinkOptions {
    LinkOptions {
        timeout: super::PATIENCE,
        sockets: SocketOptions::default(),
        batch_bytes: BATCH_BYTES,
        acknowledged,
        ring_bytes: 1 << 20,
        device,
    }
}

fn native() -> Native {
    Native::new(Mapping::anonymous(REGION_BYTES).unwrap(), FlushMethod::None).unwrap()
}

/// Sockets, with queue pairs beside them if there is a device.
pub(crate) struct SocketEnds {
    memory: Native,
    address: SocketAddr,
    endpoint: SocketEndpoint,
    device: Option<Arc<RdmaClient>>,
    connections: usize,
}

impl SocketEnds {
    fn new(device: Option<[(Arc<Context>, LocalPort); 2]>) -> Self {
        let memory = native();
        let devices = device.map(|devices| {
            // Both ends are in this process, however slow it is: silence is no reason to give up.
            let [broker, client] = devices.map(|(context, port)| (context, LocalPort { retries: u8::MAX, ..port }));
            let bounds = WindowBounds::new(256 << 10, 4 << 20, 16 << 20);
            let broker = RdmaDevice::open(&memory, broker, Isolation::Auto, bounds).unwrap();
            (broker, RdmaClient::new(client).unwrap())
        });
        let (broker, client) = devices.unzip();
        let listener = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let address = listener.local_addr().unwrap();
        let accept = move || listener.accept().ok().map(|(stream, _)| stream);
        let endpoint = SocketEndpoint::new(accept, SocketOptions::default(), broker.as_ref()).unwrap();
        Self { memory, address, endpoint, device: client, connections: 0 }
    }

    /// Connects a client in a thread of its own, as that may block until the broker has answered.
    fn connect<L: Send>(
        &mut self,
        acknowledged: bool,
        connect: impl FnOnce(SocketAddr, &LinkOptions) -> L + Send,
    ) -> (Channel, L) {
        let (address, options) = (self.address, options(self.device.clone(), acknowledged));
        self.connections += 1;
        std::thread::scope(|scope| {
            let client = scope.spawn(|| connect(address, &options));
            let mut channel = self.endpoint.accept().expect("the client connects").unwrap();
            until("the opening frame comes", || {
                let received = channel.receive(&self.memory, &mut TestLanding::default(), 1).unwrap();
                if let Received::Frame(Frame::RdmaConnect(request)) = received {
                    self.endpoint.upgrade(self.connections, &mut channel, &request).unwrap();
                }
                channel.send(&self.memory, &mut Outbox::default()).unwrap();
                matches!(received, Received::Frame(Frame::OpenPublish(_) | Frame::Subscribe(_)))
            });
            (channel, client.join().unwrap())
        })
    }
}

impl Ends for SocketEnds {
    type Transport = Sockets;

    fn memory(&self) -> &Native {
        &self.memory
    }

    fn publisher_with(&mut self, acknowledged: bool) -> Pair<Sockets, <Sockets as Transport>::Publisher> {
        self.connect(acknowledged, |address, options| Sockets.publish(address, options, &OpenPublish::blank()).unwrap())
    }

    fn subscriber(&mut self) -> Pair<Sockets, <Sockets as Transport>::Subscriber> {
        self.connect(true, |address, options| Sockets.subscribe(address, options, &Subscribe::blank()).unwrap())
    }

    fn has_device(&self) -> bool {
        self.device.is_some()
    }

    fn endpoint(&mut self) -> (&mut SocketEndpoint, usize) {
        (&mut self.endpoint, self.connections)
    }
}

/// TCP.
pub(crate) struct Tcp;

impl Tcp {
    pub(crate) fn run(self, suite: fn(&mut SocketEnds)) {
        suite(&mut SocketEnds::new(None));
    }
}

/// Devices of the broker and of the client, each with its port.
type Devices = [(Arc<Context>, LocalPort); 2];

/// RDMA, by devices that `open` opens.
pub(crate) struct Rdma {
    open: fn() -> Option<Devices>,
    alone: bool,
}

impl Rdma {
    pub(crate) fn by_sockets() -> Self {
        Self {
            open: || Some([0; 2].map(|_| Context::software(Some(Ipv4Addr::LOCALHOST.into())).unwrap())),
            alone: true,
        }
    }

    pub(crate) fn by_dpdk() -> Self {
        Self { open: || embarcadero_verbs::has_dpdk().then(dpdk), alone: false }
    }

    pub(crate) fn by_a_device() -> Self {
        Self { open: || Some([0; 2].map(|_| Context::find(None).unwrap())), alone: false }
    }

    pub(crate) fn run(self, suite: fn(&mut SocketEnds)) {
        let Self { open, alone } = self;
        let run = move || match open() {
            Some(devices) => suite(&mut SocketEnds::new(Some(devices))),
            None => println!("SKIPPED: this build has no DPDK"),
        };
        if !alone {
            return run();
        }
        // No device of the host's has UDP port 4791 in a network of the test's own.
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network of the test's own, which needs root");
            assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
            run();
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }
}

/// A port of DPDK that sends to itself.
fn dpdk() -> [(Arc<Context>, LocalPort); 2] {
    let eal = ["--no-huge", "--no-shconf", "--no-pci", "--no-telemetry", "-m", "384", "--vdev=net_ring0"];
    let config = DpdkConfig {
        eal: eal.map(str::to_owned).to_vec(),
        address: Some(Ipv4Addr::new(10, 78, 0, 1).into()),
        ..DpdkConfig::default()
    };
    [0; 2].map(|_| Context::dpdk(&config).unwrap())
}

/// The simulated transport, on the simulated fabric.
pub(crate) struct InMemory;

impl InMemory {
    pub(crate) fn run(self, suite: fn(&mut MemoryEnds)) {
        let memory = Simulated::join(&World::new(REGION_BYTES, 1, Turbulence::CALM, None), || {});
        let (network, address) = (SimulatedTransport::new(16), SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
        let endpoint = network.listen(address);
        suite(&mut MemoryEnds { memory, network, address, endpoint });
    }
}

pub(crate) struct MemoryEnds {
    memory: Simulated,
    network: SimulatedTransport<Simulated>,
    address: SocketAddr,
    endpoint: SimulatedEndpoint<Simulated>,
}

impl MemoryEnds {
    fn accept(&mut self) -> <SimulatedTransport<Simulated> as Transport>::Connection {
        let mut connection = self.endpoint.accept().expect("a connection was made").unwrap();
        let opening = connection.receive(&self.memory, &mut TestLanding::default(), 1).unwrap();
        assert!(matches!(opening, Received::Frame(_)));
        connection
    }
}

impl Ends for MemoryEnds {
    type Transport = SimulatedTransport<Simulated>;

    fn memory(&self) -> &Simulated {
        &self.memory
    }

    fn publisher_with(
        &mut self,
        acknowledged: bool,
    ) -> Pair<Self::Transport, <Self::Transport as Transport>::Publisher> {
        let options = options(None, acknowledged);
        let publisher = self.network.publish(self.address, &options, &OpenPublish::blank()).unwrap();
        (self.accept(), publisher)
    }

    fn subscriber(&mut self) -> Pair<Self::Transport, <Self::Transport as Transport>::Subscriber> {
        let subscriber = self.network.subscribe(self.address, &options(None, true), &Subscribe::blank()).unwrap();
        (self.accept(), subscriber)
    }

    fn has_device(&self) -> bool {
        false
    }

    fn endpoint(&mut self) -> (&mut SimulatedEndpoint<Simulated>, usize) {
        (&mut self.endpoint, 0)
    }
}
