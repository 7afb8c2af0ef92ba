//! NICs of clients and hosts. The RoCEv2 engine carries batches, as writes to windows of the region. Nothing tells a NIC that
//! its peer crashed, and a NIC that starts again numbers its queue pairs as before.

use super::HOSTS;
use super::fate::random;
use super::network::Network;
use embarcadero_cxl::{Fabric, RegionOffset, Site};
use embarcadero_roce::packet::{Reth, SCRATCH_BYTES, decode};
use embarcadero_roce::psn::Psn;
use embarcadero_roce::{
    Access, Attributes, Completion, Failure, Memory, NoAccess, Operation, PathMtu, QueuePair, Receive, Work,
};
use embarcadero_sim::Simulated;
use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

/// Number of receives that a host has posted for a client, fewer than the client may use at once.
const RECEIVES: usize = 3;
/// Most packets that a NIC takes in a round.
const PACKETS: usize = 24;
/// Bytes of a batch that the first of its two writes carries.
const FIRST_WRITE: usize = 128;

/// Number of a NIC in the rack. Those of hosts come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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
}

/// End of a queue pair: its NIC, its number there, and the number of the first packet that it sends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PairEnd {
    pub port: Port,
    pub number: u32,
    pub psn: Psn,
}

/// Memory that the peer of a queue pair may write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Granted {
    pub at: RegionOffset,
    pub bytes: u64,
    pub key: u32,
}

struct Pair {
    queue: QueuePair<Vec<u8>>,
    peer: Port,
    granted: Vec<Granted>,
    /// Immediate data of the peer's writes that are complete.
    written: VecDeque<u32>,
}

/// Memory of the NIC's host as the peer of a queue pair reaches it: past the caches, and only where it was granted.
struct Reach<'a> {
    fabric: Option<&'a Simulated>,
    granted: &'a [Granted],
}

impl Memory for Reach<'_> {
    fn check(&self, _: u32, remote: Reth, _: Access) -> Result<(), NoAccess> {
        let reaches = |granted: &Granted| {
            let start = remote.address.checked_sub(granted.at.0);
            let end = start.and_then(|start| start.checked_add(remote.bytes.into()));
            remote.rkey == granted.key && end.is_some_and(|end| end <= granted.bytes)
        };
        if self.granted.iter().any(reaches) { Ok(()) } else { Err(NoAccess) }
    }

    fn write(&mut self, queue_pair: u32, rkey: u32, address: u64, bytes: &[u8]) -> Result<(), NoAccess> {
        self.check(queue_pair, Reth { address, rkey, bytes: bytes.len() as u32 }, Access::Write)?;
        let fabric = self.fabric.ok_or(NoAccess)?;
        fabric.write_bytes(RegionOffset(address), bytes);
        fabric.flush(RegionOffset(address), bytes.len() as u64, Site::PayloadFlush);
        Ok(())
    }

    fn read(&self, _: u32, _: Reth, _: &mut Vec<u8>) -> Result<(), NoAccess> {
        Err(NoAccess)
    }
}

/// NIC of a client, or of a host's process.
pub(crate) struct Nic {
    port: Port,
    network: Arc<Network>,
    /// Region, which the peers of a host's NIC may write.
    fabric: Option<Simulated>,
    last_number: u32,
    pairs: BTreeMap<u32, Pair>,
}

impl Nic {
    pub(crate) fn new(port: Port, network: &Arc<Network>, fabric: Option<Simulated>) -> Self {
        Self { port, network: Arc::clone(network), fabric, last_number: 0, pairs: BTreeMap::new() }
    }

    /// Returns the NIC as it goes on once its process is gone, until somebody ends its queue pairs.
    pub(crate) fn leave(&mut self) -> Self {
        Self { pairs: std::mem::take(&mut self.pairs), ..Self::new(self.port, &self.network, None) }
    }

    /// Returns the NIC with another view of the region.
    pub(crate) fn on(self, fabric: &Simulated) -> Self {
        Self { fabric: Some(fabric.clone()), ..self }
    }

    /// Chooses the end of a new queue pair.
    pub(crate) fn open(&mut self) -> PairEnd {
        self.last_number += 1;
        PairEnd { port: self.port, number: self.last_number, psn: Psn::new(random(0..1 << 24) as u32) }
    }

    /// Connects the queue pair whose end is `own` to its peer.
    pub(crate) fn join(&mut self, own: PairEnd, peer: PairEnd) {
        let mut queue = QueuePair::new(Attributes {
            local: own.port.address(),
            peer: peer.port.address(),
            number: own.number,
            peer_number: peer.number,
            source_port: 0xc000,
            path_mtu: PathMtu::Mtu256,
            send_psn: own.psn,
            receive_psn: peer.psn,
            timeout: 2_000_000,
            retries: 7,
            not_ready_retries: 7,
            rnr_timer: 1,
            window: 32,
            line_rate: 1.25e9,
        });
        (0..RECEIVES).for_each(|_| queue.post_receive(Receive { id: 0, buffer: Vec::new() }));
        let pair = Pair { queue, peer: peer.port, granted: Vec::new(), written: VecDeque::new() };
        self.pairs.insert(own.number, pair);
    }

    /// Ends a queue pair. Nothing is written through it any more.
    pub(crate) fn close(&mut self, number: u32) {
        self.pairs.remove(&number);
    }

    /// Lets the peer of a queue pair write to memory.
    pub(crate) fn grant(&mut self, number: u32, granted: Granted) {
        if let Some(pair) = self.pairs.get_mut(&number) {
            pair.granted.push(granted);
        }
    }

    /// Takes back memory that the peer of a queue pair could write.
    pub(crate) fn revoke(&mut self, number: u32, at: RegionOffset) {
        if let Some(pair) = self.pairs.get_mut(&number) {
            pair.granted.retain(|granted| granted.at != at);
        }
    }

    /// Writes a batch to the peer's memory, in two writes, and then tells the peer `immediate`.
    pub(crate) fn write(&mut self, number: u32, to: Granted, bytes: &[u8], immediate: u32) {
        let Some(pair) = self.pairs.get_mut(&number) else { return };
        let (first, second) = bytes.split_at(FIRST_WRITE);
        for (payload, at, immediate) in [(first, 0, None), (second, FIRST_WRITE as u64, Some(immediate))] {
            let operation = Operation::Write { address: to.at.0 + at, rkey: to.key, immediate };
            let work = Work { id: 0, operation, payload: payload.to_vec() };
            pair.queue.post(work).expect("a window of batches is not too much");
        }
    }

    /// Takes the immediate data of the next write of a queue pair's peer that is complete.
    pub(crate) fn take_written(&mut self, number: u32) -> Option<u32> {
        self.pairs.get_mut(&number)?.written.pop_front()
    }

    /// Returns true when the peer of a queue pair has told of a write.
    pub(crate) fn has_written(&self, number: u32) -> bool {
        self.pairs.get(&number).is_some_and(|pair| !pair.written.is_empty())
    }

    /// Returns why a queue pair is broken, if it is.
    pub(crate) fn failure(&self, number: u32) -> Option<Failure> {
        self.pairs.get(&number)?.queue.failure()
    }

    /// Takes the packets that have come, and sends those that are due. Returns the number of packets taken.
    pub(crate) fn drive(&mut self, now_us: u64) -> usize {
        let Self { port, network, fabric, pairs, .. } = self;
        let (now, fabric, mut count) = (now_us * 1000, fabric.as_ref(), 0);
        for mut packet in std::iter::from_fn(|| network.take_packet(*port)).take(PACKETS) {
            count += 1;
            let Ok(packet) = decode(&mut packet) else { continue };
            for Pair { queue, granted, .. } in pairs.values_mut() {
                queue.receive(&packet, now, &mut Reach { fabric, granted });
            }
        }
        for Pair { queue, peer, granted, written } in pairs.values_mut() {
            while let Some(completion) = queue.poll() {
                if let Completion::Written { receive, immediate, .. } = completion {
                    written.push_back(immediate);
                    queue.post_receive(receive);
                }
            }
            queue.transmit(now, &Reach { fabric, granted }, PACKETS, |packet| {
                let mut bytes = vec![0; SCRATCH_BYTES];
                packet.encode(&mut bytes).expect("what the engine makes is sound");
                network.packet(*peer, bytes);
            });
        }
        count
    }
}
