//! NICs of clients and hosts. The RoCEv2 engine carries batches, as writes to windows of the region. Nothing tells a NIC that
//! its peer crashed, and a NIC that starts again numbers its queue pairs as before.

use super::HOSTS;
use super::fate::random;
use super::host::BATCH_BYTES;
use super::network::{Batch, Network};
use embarcadero_cxl::{Fabric, RegionOffset, Site};
use embarcadero_roce::packet::{Reth, SCRATCH_BYTES, decode};
use embarcadero_roce::psn::Psn;
use embarcadero_roce::{
    Access, Attributes, Completion, Failure, Memory, NoAccess, Operation, PathMtu, QueuePair, Receive, Work,
};
use embarcadero_sim::Simulated;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Number of batches that a window has room for.
const SLOTS: u64 = 16;
/// Bytes of a window.
pub(crate) const WINDOW_BYTES: u64 = SLOTS * BATCH_BYTES;
/// Number of receives that a host has posted for a client, fewer than the client may use at once.
const RECEIVES: usize = 3;
/// Most packets that a NIC takes in a round.
const PACKETS: usize = 24;
/// Bytes of a batch that the first of its two writes carries.
const FIRST_WRITE: usize = 128;

/// Number of a NIC in the rack. Those of hosts come first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port(pub usize);

impl Port {
    pub fn of_host(host: usize) -> Self {
        Self(host)
    }

    pub fn of_client(client: usize) -> Self {
        Self(HOSTS + client)
    }

    fn address(self) -> IpAddr {
        IpAddr::from([10, 0, 0, 1 + self.0 as u8])
    }

    /// Returns the number of its queue pair with a peer, which is the same each time that it starts.
    fn number(self, peer: Self) -> u32 {
        (1 + self.0 * 16 + peer.0) as u32
    }

    fn connect(self, peer: Self, send_psn: Psn, receive_psn: Psn) -> QueuePair<Vec<u8>> {
        QueuePair::new(Attributes {
            local: self.address(),
            peer: peer.address(),
            number: self.number(peer),
            peer_number: peer.number(self),
            source_port: 0xc000,
            path_mtu: PathMtu::Mtu256,
            send_psn,
            receive_psn,
            timeout: 2_000_000,
            retries: 7,
            not_ready_retries: 7,
            rnr_timer: 1,
            window: 32,
            line_rate: 1.25e9,
        })
    }
}

/// Memory that one client may write, and the numbers of the first packets of both sides.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Number of the client's first packet, which also tells late answers from those that are waited for.
    pub client_psn: Psn,
    host_psn: Psn,
    key: u32,
    at: RegionOffset,
}

/// Chooses the number of a first packet.
pub(crate) fn first_psn() -> Psn {
    Psn::new(random(0..1 << 24) as u32)
}

/// Connection of a client to a host.
pub(crate) struct Link {
    pair: QueuePair<Vec<u8>>,
    window: Window,
    used: u64,
}

impl Link {
    pub(crate) fn new(client: usize, host: usize, window: Window) -> Self {
        let pair = Port::of_client(client).connect(Port::of_host(host), window.client_psn, window.host_psn);
        Self { pair, window, used: 0 }
    }

    /// Writes a batch to the next slot. Returns false when there is none, or when the connection is broken.
    pub(crate) fn write(&mut self, batch: &Batch) -> bool {
        if self.used == SLOTS || self.pair.failure().is_some() {
            return false;
        }
        let (slot, bytes) = (self.used, batch.encode());
        let address = self.window.at.0 + slot * BATCH_BYTES;
        let (first, second) = bytes.split_at(FIRST_WRITE);
        for (payload, offset, immediate) in [(first, 0, None), (second, FIRST_WRITE as u64, Some(slot as u32))] {
            let operation = Operation::Write { address: address + offset, rkey: self.window.key, immediate };
            let work = Work { id: slot, operation, payload: payload.to_vec() };
            self.pair.post(work).expect("a window of batches is not too much");
        }
        self.used += 1;
        true
    }

    /// Returns why the connection is broken, if it is.
    pub(crate) fn failure(&self) -> Option<Failure> {
        self.pair.failure()
    }
}

/// Memory of a client. Nobody may access it.
struct Nothing;

impl Memory for Nothing {
    fn check(&self, _: u32, _: Reth, _: Access) -> Result<(), NoAccess> {
        Err(NoAccess)
    }

    fn write(&mut self, _: u32, _: u32, _: u64, _: &[u8]) -> Result<(), NoAccess> {
        Err(NoAccess)
    }

    fn read(&self, _: u32, _: Reth, _: &mut Vec<u8>) -> Result<(), NoAccess> {
        Err(NoAccess)
    }
}

/// Takes the packets that came to a client's NIC, and sends those that are due.
pub(crate) fn drive(client: usize, links: &mut [Option<Link>; HOSTS], now_us: u64, network: &Network) {
    let (port, now) = (Port::of_client(client), now_us * 1000);
    for mut packet in std::iter::from_fn(|| network.take_packet(port)).take(PACKETS) {
        let Ok(packet) = decode(&mut packet) else { continue };
        for link in links.iter_mut().flatten() {
            link.pair.receive(&packet, now, &mut Nothing);
        }
    }
    for (host, link) in links.iter_mut().enumerate() {
        if let Some(Link { pair, .. }) = link {
            send(pair, now, &Nothing, Port::of_host(host), network);
            while pair.poll().is_some() {}
        }
    }
}

fn send(pair: &mut QueuePair<Vec<u8>>, now: u64, memory: &impl Memory, to: Port, network: &Network) {
    pair.transmit(now, memory, PACKETS, |packet| {
        let mut bytes = vec![0; SCRATCH_BYTES];
        packet.encode(&mut bytes).expect("what the engine makes is sound");
        network.packet(to, bytes);
    });
}

/// NIC of a host's process.
#[derive(Default)]
pub(crate) struct Nic {
    /// Connection and window of each client.
    ends: BTreeMap<usize, (QueuePair<Vec<u8>>, Window)>,
}

/// Region as a queue pair reaches it: past the caches, and only within its window.
struct Reach<'a> {
    fabric: &'a Simulated,
    window: Window,
}

impl Memory for Reach<'_> {
    fn check(&self, _: u32, remote: Reth, _: Access) -> Result<(), NoAccess> {
        let start = remote.address.checked_sub(self.window.at.0).ok_or(NoAccess)?;
        let ends_inside = start.checked_add(remote.bytes.into()).is_some_and(|end| end <= WINDOW_BYTES);
        if ends_inside && remote.rkey == self.window.key { Ok(()) } else { Err(NoAccess) }
    }

    fn write(&mut self, queue_pair: u32, rkey: u32, address: u64, bytes: &[u8]) -> Result<(), NoAccess> {
        self.check(queue_pair, Reth { address, rkey, bytes: bytes.len() as u32 }, Access::Write)?;
        self.fabric.write_bytes(RegionOffset(address), bytes);
        self.fabric.flush(RegionOffset(address), bytes.len() as u64, Site::PayloadFlush);
        Ok(())
    }

    fn read(&self, _: u32, _: Reth, _: &mut Vec<u8>) -> Result<(), NoAccess> {
        Err(NoAccess)
    }
}

impl Nic {
    /// Connects a client, which may write to the window at `at` from now on. Returns the place of the window that it had
    /// before, if any; it may no longer write there.
    pub(crate) fn accept(
        &mut self,
        host: usize,
        client: usize,
        client_psn: Psn,
        at: RegionOffset,
    ) -> (Window, Option<RegionOffset>) {
        let window = Window { client_psn, host_psn: first_psn(), key: random(0..1 << 32) as u32, at };
        let mut pair = Port::of_host(host).connect(Port::of_client(client), window.host_psn, client_psn);
        (0..RECEIVES).for_each(|_| pair.post_receive(Receive { id: 0, buffer: Vec::new() }));
        let before = self.ends.insert(client, (pair, window));
        (window, before.map(|(_, window)| window.at))
    }

    /// Takes the packets that came to the NIC and sends those that are due. Returns the batches that were written, and where
    /// they lie.
    pub(crate) fn drive(
        &mut self,
        host: usize,
        now_us: u64,
        fabric: &Simulated,
        network: &Network,
    ) -> Vec<(RegionOffset, Batch)> {
        let (port, now) = (Port::of_host(host), now_us * 1000);
        for mut packet in std::iter::from_fn(|| network.take_packet(port)).take(PACKETS) {
            let Ok(packet) = decode(&mut packet) else { continue };
            for (pair, window) in self.ends.values_mut() {
                pair.receive(&packet, now, &mut Reach { fabric, window: *window });
            }
        }
        let mut written = Vec::new();
        for (client, (pair, window)) in &mut self.ends {
            while let Some(completion) = pair.poll() {
                if let Completion::Written { receive, immediate: slot, .. } = completion {
                    let at = window.at.add(u64::from(slot) * BATCH_BYTES);
                    let mut bytes = [0; BATCH_BYTES as usize];
                    fabric.read_bytes(at, &mut bytes);
                    written.push((at, Batch::decode(&bytes)));
                    pair.post_receive(receive);
                }
            }
            send(pair, now, &Reach { fabric, window: *window }, Port::of_client(*client), network);
        }
        written
    }
}
