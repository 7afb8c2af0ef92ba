//! Two hosts and the wire between them, which loses, repeats, reorders and damages packets of RoCEv2 as set.
//!
//! Each host is a network namespace.

use super::verbs::shell;
use embarcadero_roce::packet::{IPV4_BYTES, IPV4_PROTOCOL_AT, UDP, UDP_PORT, UDP_TO_AT};
use nix::sched::{CloneFlags, setns, unshare};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use socket2::{Domain, SockAddr, SockAddrStorage, Socket, Type};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Number of packets in a thousand that the wire harms, by kind of harm.
#[derive(Clone, Copy, Default)]
pub(crate) struct Faults {
    pub lost: u32,
    pub repeated: u32,
    pub reordered: u32,
    pub damaged: u32,
}

/// Address of the near host.
pub(crate) const NEAR: &str = "10.77.0.1";
/// Address of the far host.
pub(crate) const FAR: &str = "10.77.0.2";

/// Two hosts, and the wire between them.
pub(crate) struct Wire {
    name: String,
    stop: Arc<AtomicBool>,
    /// Number of packets harmed so far.
    pub harmed: Arc<AtomicU64>,
    relays: Vec<JoinHandle<()>>,
}

impl Wire {
    /// Makes a wire with room for the largest packets of RoCEv2. The seed is printed if a test fails.
    pub(crate) fn new(faults: Faults) -> Self {
        Self::with_mtu(faults, "9000")
    }

    /// Makes a wire for frames that carry `mtu` bytes.
    pub(crate) fn with_mtu(faults: Faults, mtu: &str) -> Self {
        let seed: u64 = rand::random();
        println!("wire: seed {seed}");
        let name = format!("emb{}-{:x}", std::process::id(), rand::random::<u16>());
        shell(&format!(
            "one='numtxqueues 1 numrxqueues 1'
            for side in near far wire; do ip netns add {name}-$side; done
            for side in near far; do
                ip link add name $side $one netns {name}-wire mtu {mtu} type veth peer name e0 $one mtu {mtu} netns {name}-$side
                ip -n {name}-wire link set $side up promisc on
                ip -n {name}-$side link set lo up
                ip -n {name}-$side link set e0 up
            done
            ip -n {name}-near addr add {NEAR}/24 dev e0
            ip -n {name}-far addr add {FAR}/24 dev e0"
        ));
        let mut wire = Self { name, stop: Arc::default(), harmed: Arc::default(), relays: Vec::new() };
        for (index, [from, to]) in [["near", "far"], ["far", "near"]].into_iter().enumerate() {
            let (namespace, stop, harmed) = (wire.namespace("wire"), Arc::clone(&wire.stop), Arc::clone(&wire.harmed));
            let rng = StdRng::seed_from_u64(seed ^ index as u64);
            wire.relays.push(std::thread::spawn(move || {
                enter(&format!("/run/netns/{namespace}"));
                Relay { from: port(from), to: port(to), faults, rng, held: None }.run(&stop, &harmed);
            }));
        }
        wire
    }

    /// Name of the namespace of a host, or of the wire.
    pub(crate) fn namespace(&self, side: &str) -> String {
        format!("{}-{side}", self.name)
    }

    /// Command that runs a program on a host, to be put before it.
    pub(crate) fn command(&self, side: &str) -> Vec<String> {
        ["ip", "netns", "exec", &self.namespace(side)].map(str::to_owned).to_vec()
    }

    /// Calls `act` on a host, in a thread. Threads that it starts are there too.
    pub(crate) fn on<R: Send>(&self, side: &str, act: impl FnOnce() -> R + Send) -> R {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(&format!("/run/netns/{}", self.namespace(side)));
                act()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Sets the state of a host's interface: `up` or `down`.
    pub(crate) fn link(&self, side: &str, state: &str) {
        shell(&format!("ip -n {} link set e0 {state}", self.namespace(side)));
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for relay in self.relays.drain(..) {
            let _ = relay.join();
        }
        let name = &self.name;
        shell(&format!("for side in near far wire; do ip netns del {name}-$side || true; done"));
    }
}

/// Moves the calling thread, and those that it starts, to a namespace.
pub(crate) fn enter(namespace: &str) {
    let file = File::open(namespace).unwrap();
    setns(file, CloneFlags::CLONE_NEWNET).unwrap();
}

/// Option of packet(7): frames that this host sends do not come back.
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
/// Option of packet(7): before each frame comes the work that its sender left for a NIC, such as its checksum.
const PACKET_VNET_HDR: libc::c_int = 15;
/// Bytes of that header (linux/virtio_net.h, `struct virtio_net_hdr`).
const VNET_BYTES: usize = 10;

/// Opens a socket for all frames of an interface that others sent.
fn port(interface: &str) -> Socket {
    let socket = Socket::new(Domain::PACKET, Type::RAW, None).unwrap();
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: the storage is large and aligned enough for every family; a link-layer address has the length stated.
    let address = unsafe {
        let address = storage.view_as::<libc::sockaddr_ll>();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = nix::net::if_::if_nametoindex(interface).unwrap() as i32;
        SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t)
    };
    for option in [PACKET_IGNORE_OUTGOING, PACKET_VNET_HDR] {
        let on: libc::c_int = 1;
        let (descriptor, len) = (socket.as_raw_fd(), size_of_val(&on) as libc::socklen_t);
        // SAFETY: the option's value is an int, and lives across the call.
        let result = unsafe { libc::setsockopt(descriptor, libc::SOL_PACKET, option, (&raw const on).cast(), len) };
        assert_eq!(result, 0);
    }
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(32 << 20)).unwrap();
    socket.bind(&address).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    socket
}

/// Bytes of an Ethernet header without a tag.
const ETHERNET_BYTES: usize = 14;

/// Returns true for a frame with a packet of RoCEv2 over IPv4.
fn is_roce(frame: &[u8]) -> bool {
    let Some((ethernet, packet)) = frame.split_first_chunk::<ETHERNET_BYTES>() else { return false };
    ethernet[12..] == (libc::ETH_P_IP as u16).to_be_bytes()
        && packet.get(IPV4_PROTOCOL_AT) == Some(&UDP)
        && packet.get(IPV4_BYTES + UDP_TO_AT..).is_some_and(|port| port.starts_with(&UDP_PORT.to_be_bytes()))
}

/// Calls `act` in a network of its own, with the loopback only. No device of the host has UDP port 4791 there.
pub(crate) fn alone<R: Send>(act: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            shell("ip link set lo up");
            act()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// One direction of the wire.
struct Relay {
    from: Socket,
    to: Socket,
    faults: Faults,
    rng: StdRng,
    /// Frame that goes after the next one.
    held: Option<Vec<u8>>,
}

impl Relay {
    /// Takes frames from one side to the other, and harms them as set, until `stop`.
    fn run(&mut self, stop: &AtomicBool, harmed: &AtomicU64) {
        let mut frame = vec![0; 128 << 10];
        while !stop.load(Ordering::Relaxed) {
            match self.from.read(&mut frame) {
                Ok(len) => self.pass(&mut frame[..len], harmed),
                // Nothing came for a while: the frame that is held has waited long enough.
                Err(_) => self.release(),
            }
        }
    }

    /// Decides whether this frame is among the `of_a_thousand` that are harmed, and counts it in `harmed`.
    fn happens(&mut self, of_a_thousand: u32, harmed: &AtomicU64) -> bool {
        let happens = self.rng.random_range(0..1000) < of_a_thousand;
        harmed.fetch_add(happens.into(), Ordering::Relaxed);
        happens
    }

    /// Sends the frame that is held. A link that is down takes nothing.
    fn release(&mut self) {
        if let Some(frame) = self.held.take() {
            let _ = self.to.write(&frame);
        }
    }

    /// Takes a frame to the other side, or harms it.
    fn pass(&mut self, frame: &mut [u8], harmed: &AtomicU64) {
        if is_roce(&frame[VNET_BYTES..]) {
            if self.happens(self.faults.lost, harmed) {
                return;
            }
            if self.happens(self.faults.damaged, harmed) {
                let at = self.rng.random_range(VNET_BYTES + ETHERNET_BYTES..frame.len());
                frame[at] ^= 1 << self.rng.random_range(0..8);
            } else if self.happens(self.faults.repeated, harmed) {
                let _ = self.to.write(frame);
            } else if self.held.is_none() && self.happens(self.faults.reordered, harmed) {
                self.held = Some(frame.to_vec());
                return;
            }
        }
        // A link that is down takes nothing.
        let _ = self.to.write(frame);
        self.release();
    }
}
