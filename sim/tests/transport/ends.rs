//! Transports that the suite runs over, and how their two ends connect.

use super::landing::TestLanding;
use super::{BATCH_BYTES, until};
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::{Mapping, Native, RegionOffset};
use embarcadero_sim::{Simulated, SimulatedTransport, Turbulence, World};
use embarcadero_transport::rdma::{RdmaClient, RdmaConnection, RdmaDevice, RdmaQueue};
use embarcadero_transport::tcp::{SocketOptions, TcpConnection, listen};
use embarcadero_transport::{Channel, Connection, Isolation, LinkOptions, Outbox, Received, Sockets, Transport};
use embarcadero_verbs::{Context, DpdkConfig, LocalPort};
use embarcadero_wire::{Frame, OpenPublish, Subscribe};
use nix::sched::{CloneFlags, unshare};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;
use std::sync::Arc;

/// Bytes of the region, with room for deliveries and for all that a test publishes.
const REGION_BYTES: u64 = 64 << 20;

type Pair<T, L> = (<T as Transport>::Connection, L);

/// Broker and client that reach each other.
pub trait Ends {
    type Transport: Transport;

    /// Returns the broker's region.
    fn memory(&self) -> &<Self::Transport as Transport>::Memory;

    /// Returns the place for a delivery, `at` bytes into the part of the region that is free for deliveries.
    fn place(&self, at: u64) -> RegionOffset {
        RegionOffset(at)
    }

    /// Connects a publisher, which has sent its opening frame.
    fn publisher(&mut self) -> Pair<Self::Transport, <Self::Transport as Transport>::Publisher>;

    /// Connects a subscriber, which has sent its request.
    fn subscriber(&mut self) -> Pair<Self::Transport, <Self::Transport as Transport>::Subscriber>;

    /// Hands the completions of its device to a connection.
    fn drive(&mut self, _: &mut <Self::Transport as Transport>::Connection) {}
}

fn options(device: Option<Arc<RdmaClient>>) -> LinkOptions {
    LinkOptions {
        timeout: super::PATIENCE,
        sockets: SocketOptions::default(),
        batch_bytes: BATCH_BYTES,
        acknowledged: true,
        ring_bytes: 1 << 20,
        device,
    }
}

fn native() -> Native {
    Native::new(Mapping::anonymous(REGION_BYTES).unwrap(), FlushMethod::None).unwrap()
}

/// Sockets, with queue pairs beside them if there is a device.
pub struct SocketEnds {
    memory: Native,
    listener: TcpListener,
    device: Option<(Arc<RdmaDevice>, RdmaQueue, Arc<RdmaClient>)>,
}

impl SocketEnds {
    fn new(device: Option<[(Arc<Context>, LocalPort); 2]>) -> Self {
        let memory = native();
        let device = device.map(|devices| {
            // Both ends are in this process, however slow it is: silence is no reason to give up.
            let [broker, client] = devices.map(|(context, port)| (context, LocalPort { retries: u8::MAX, ..port }));
            let device = RdmaDevice::open(&memory, broker, Isolation::Auto, 256 << 10).unwrap();
            let queue = RdmaQueue::new(&device).unwrap();
            (device, queue, RdmaClient::new(client).unwrap())
        });
        Self { memory, listener: listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap(), device }
    }

    /// Connects a client in a thread of its own, as that may block until the broker has answered.
    fn connect<L: Send>(&mut self, connect: impl FnOnce(SocketAddr, &LinkOptions) -> L + Send) -> (Channel, L) {
        let address = self.listener.local_addr().unwrap();
        let options = options(self.device.as_ref().map(|(.., client)| Arc::clone(client)));
        std::thread::scope(|scope| {
            let client = scope.spawn(|| connect(address, &options));
            let (stream, _) = self.listener.accept().unwrap();
            let mut channel = Channel::new(TcpConnection::new(stream, SocketOptions::default()).unwrap());
            until("the opening frame comes", || {
                let received = channel.receive(&self.memory, &mut TestLanding::default(), 1).unwrap();
                if let Received::Frame(Frame::RdmaConnect(request)) = received {
                    let (device, queue, _) = self.device.as_ref().expect("there is a device");
                    channel.upgrade(RdmaConnection::accept(device, queue, &request).unwrap());
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

    fn publisher(&mut self) -> Pair<Sockets, <Sockets as Transport>::Publisher> {
        self.connect(|address, options| Sockets.publish(address, options, &OpenPublish::blank()).unwrap())
    }

    fn subscriber(&mut self) -> Pair<Sockets, <Sockets as Transport>::Subscriber> {
        self.connect(|address, options| Sockets.subscribe(address, options, &Subscribe::blank()).unwrap())
    }

    fn drive(&mut self, connection: &mut Channel) {
        let (Some((_, queue, _)), Some(rdma)) = (&mut self.device, connection.rdma()) else { return };
        queue
            .poll(|completion| {
                // Those of connections before are of no interest.
                if completion.queue_pair == rdma.number() {
                    rdma.completed(completion);
                }
            })
            .unwrap();
    }
}

/// TCP.
pub struct Tcp;

impl Tcp {
    pub fn run(self, suite: fn(&mut SocketEnds)) {
        suite(&mut SocketEnds::new(None));
    }
}

/// Devices of the broker and of the client, each with its port.
type Devices = [(Arc<Context>, LocalPort); 2];

/// RDMA, by devices that `open` opens.
pub struct Rdma {
    open: fn() -> Option<Devices>,
    alone: bool,
}

impl Rdma {
    pub fn by_sockets() -> Self {
        Self {
            open: || Some([0; 2].map(|_| Context::software(Some(Ipv4Addr::LOCALHOST.into())).unwrap())),
            alone: true,
        }
    }

    pub fn by_dpdk() -> Self {
        Self { open: || embarcadero_verbs::has_dpdk().then(dpdk), alone: false }
    }

    pub fn by_a_device() -> Self {
        Self { open: || Some([0; 2].map(|_| Context::find(None).unwrap())), alone: false }
    }

    pub fn run(self, suite: fn(&mut SocketEnds)) {
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
pub struct InMemory;

impl InMemory {
    pub fn run(self, suite: fn(&mut MemoryEnds)) {
        let memory = Simulated::join(&World::new(REGION_BYTES, 1, Turbulence::CALM, None), || {});
        let (network, address) = (SimulatedTransport::new(16), SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
        network.listen(address);
        suite(&mut MemoryEnds { memory, network, address });
    }
}

pub struct MemoryEnds {
    memory: Simulated,
    network: SimulatedTransport<Simulated>,
    address: SocketAddr,
}

impl MemoryEnds {
    fn accept(&self) -> <SimulatedTransport<Simulated> as Transport>::Connection {
        let mut connection = self.network.accept(self.address).expect("a connection was made");
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

    fn publisher(&mut self) -> Pair<Self::Transport, <Self::Transport as Transport>::Publisher> {
        let publisher = self.network.publish(self.address, &options(None), &OpenPublish::blank()).unwrap();
        (self.accept(), publisher)
    }

    fn subscriber(&mut self) -> Pair<Self::Transport, <Self::Transport as Transport>::Subscriber> {
        let subscriber = self.network.subscribe(self.address, &options(None), &Subscribe::blank()).unwrap();
        (self.accept(), subscriber)
    }
}
