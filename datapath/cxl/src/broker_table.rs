//! Broker table: the address of every broker, and counters by which others see that it lives.

use crate::fabric::{Fabric, RegionOffset};
use crate::layout::{BrokerLine, PulseLine, ReplicaState};
use crate::region::Region;
use crate::row::{Damage, Row};
use crate::site::Site;
use bytemuck::Zeroable;
use embarcadero_wire::{BrokerId, Incarnation};
use serde::Serialize;
use std::mem::offset_of;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

const INCARNATION: u64 = offset_of!(BrokerLine, incarnation) as u64;
const LOCK_NODE: u64 = offset_of!(BrokerLine, lock_node) as u64;
const HEARTBEAT: u64 = offset_of!(PulseLine, heartbeat) as u64;
const PUBLISHED: u64 = offset_of!(PulseLine, batches_published) as u64;
const REPLICA: u64 = offset_of!(PulseLine, replica) as u64;
const CALL_KEY: u64 = offset_of!(PulseLine, call_key) as u64;

/// Broker, as the table shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BrokerInfo {
    /// Slot.
    pub id: BrokerId,
    /// Count of the processes that ran under this id.
    pub incarnation: Incarnation,
    /// Address for publishers and subscribers.
    pub data: SocketAddr,
    /// Address of the control service.
    pub control: SocketAddr,
    /// Process id on the broker's own host.
    pub process_id: u32,
    /// False once the broker left in order.
    pub running: bool,
    /// File or device node that has the lock on the broker's id: [`crate::region::RegionFile::lock_node`].
    pub lock_node: u64,
}

/// Writes this broker's row.
pub fn publish_broker<F: Fabric>(region: &Region<F>, info: &BrokerInfo) {
    let line = BrokerLine {
        data_address: octets(info.data.ip()),
        control_address: octets(info.control.ip()),
        data_port: info.data.port(),
        control_port: info.control.port(),
        incarnation: info.incarnation,
        process_id: info.process_id,
        running: u32::from(info.running),
        lock_node: info.lock_node,
        ..BrokerLine::zeroed()
    };
    region.fabric().publish_versioned(region.layout().broker(info.id), &line, Site::BrokerSlotFlush);
}

/// Reads the incarnation of a broker's last process, also one that died while it wrote its row; [`Incarnation::NONE`]
/// before the first.
pub fn last_incarnation<F: Fabric>(region: &Region<F>, broker: BrokerId) -> Incarnation {
    let word = region.fabric().observe(region.layout().broker(broker).add(INCARNATION & !7), Site::BrokerSlotRead);
    Incarnation((word >> (INCARNATION % 8 * 8)) as u32)
}

/// Reads the file or device node that has the lock on a broker's id; 0 before its first process. Tells it also if the
/// broker died while it wrote its row.
pub fn last_lock_node<F: Fabric>(region: &Region<F>, broker: BrokerId) -> u64 {
    region.fabric().observe(region.layout().broker(broker).add(LOCK_NODE), Site::BrokerSlotRead)
}

/// Reads a broker's row. A broker id that the region does not have is unused.
pub fn read_broker<F: Fabric>(region: &Region<F>, broker: BrokerId) -> Row<BrokerInfo> {
    if broker.0 >= region.geometry().max_brokers {
        return Row::Unused;
    }
    let at = region.layout().broker(broker);
    region.fabric().observe_versioned::<BrokerLine, ()>(at, Site::BrokerSlotRead, |_| ()).decode(|(line, ())| {
        if line.running > 1 {
            return Err(Damage { structure: "BrokerLine", at, what: "running", value: line.running.into() });
        }
        Ok(BrokerInfo {
            id: broker,
            incarnation: line.incarnation,
            data: SocketAddr::new(address(line.data_address), line.data_port),
            control: SocketAddr::new(address(line.control_address), line.control_port),
            process_id: line.process_id,
            running: line.running == 1,
            lock_node: line.lock_node,
        })
    })
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(four) => four.to_ipv6_mapped().octets(),
        IpAddr::V6(six) => six.octets(),
    }
}

fn address(octets: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(octets).to_canonical()
}

/// Records the state of this broker's replica.
pub fn publish_replica_state<F: Fabric>(region: &Region<F>, broker: BrokerId, state: ReplicaState) {
    let at = region.layout().pulse(broker).add(REPLICA);
    let fabric = region.fabric();
    fabric.store(at, state.code());
    fabric.flush(at, 8, Site::PulseFlush);
    fabric.fence(Site::PulseFlush);
}

/// Reads the state of a broker's replica.
///
/// # Errors
/// [`Damage`] when it is no [`ReplicaState`].
pub fn read_replica_state<F: Fabric>(region: &Region<F>, broker: BrokerId) -> Result<ReplicaState, Damage> {
    let at = region.layout().pulse(broker).add(REPLICA);
    let value = region.fabric().observe(at, Site::PulseRead);
    ReplicaState::from_code(value).ok_or(Damage { structure: "PulseLine", at, what: "replica", value })
}

/// Writes the secret by which this broker's calls to other brokers are known. Each process draws its own.
pub fn publish_call_key<F: Fabric>(region: &Region<F>, broker: BrokerId, key: u64) {
    let at = region.layout().pulse(broker).add(CALL_KEY);
    let fabric = region.fabric();
    // An earlier process of this broker wrote the line, perhaps on another host.
    fabric.invalidate(at, 8, Site::PulseRead);
    fabric.store(at, key);
    fabric.flush(at, 8, Site::PulseFlush);
    fabric.fence(Site::PulseFlush);
}

/// Reads the secret by which a broker's calls are known. `None` if the broker never ran, or the region does not have it.
pub fn read_call_key<F: Fabric>(region: &Region<F>, broker: BrokerId) -> Option<u64> {
    if broker.0 >= region.geometry().max_brokers {
        return None;
    }
    let key = region.fabric().observe(region.layout().pulse(broker).add(CALL_KEY), Site::PulseRead);
    (key != 0).then_some(key)
}

/// This broker's counters, by which others see that it lives and that there are batches to order.
pub struct Pulse<F> {
    region: Region<F>,
    at: RegionOffset,
    heartbeat: u64,
    published: u64,
}

impl<F: Fabric> Pulse<F> {
    /// Continues from the counters in the table, so that they never shrink.
    pub fn new(region: Region<F>, broker: BrokerId) -> Self {
        let at = region.layout().pulse(broker);
        let fabric = region.fabric();
        let heartbeat = fabric.observe(at.add(HEARTBEAT), Site::PulseRead);
        let published = fabric.load(at.add(PUBLISHED));
        Self { region, at, heartbeat, published }
    }

    /// Shows that this broker is alive.
    pub fn beat(&mut self) {
        self.heartbeat += 1;
        self.write(HEARTBEAT, self.heartbeat);
    }

    /// Shows that there are `batches` more to order.
    #[inline]
    pub fn announce(&mut self, batches: u64) {
        self.published += batches;
        self.write(PUBLISHED, self.published);
    }

    #[inline]
    fn write(&self, word: u64, value: u64) {
        let fabric = self.region.fabric();
        fabric.store(self.at.add(word), value);
        fabric.flush(self.at.add(word), 8, Site::PulseFlush);
        fabric.fence(Site::PulseFlush);
    }
}

/// Reads a broker's counters: its heartbeat, and the batches that it published.
#[inline]
pub fn read_pulse<F: Fabric>(region: &Region<F>, broker: BrokerId) -> (u64, u64) {
    let (fabric, at) = (region.fabric(), region.layout().pulse(broker));
    let heartbeat = fabric.observe(at.add(HEARTBEAT), Site::PulseRead);
    (heartbeat, fabric.load(at.add(PUBLISHED)))
}
