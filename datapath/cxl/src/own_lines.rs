//! Lines that a broker writes, and what a host's caches have of them from before.

use crate::fabric::Fabric;
use crate::layout::LeaderArea;
use crate::region::Region;
use crate::site::{Guard, Site};
use embarcadero_wire::BrokerId;

/// Drops what this host's caches have of the lines that a broker writes, in a region or in a mirror. What is dirty among
/// them is written back first.
///
/// A process that starts under the id calls it before it writes any of these lines in part, and after the broker table
/// names it. The id may have run on another host since this host cached a line. To store a word of such a line would write
/// the rest of the old line back, over what the id wrote there since.
pub fn refresh_own_lines<F: Fabric>(region: &Region<F>, broker: BrokerId) {
    let fabric = region.fabric();
    // A mirror has the brokers that can lead.
    let is_there = broker.0 < region.geometry().max_brokers;
    if fabric.is_coherent() || !is_there || !fabric.keeps(Guard::FreshOwnLines) {
        return;
    }
    for (at, bytes) in region.layout().written_by(broker) {
        fabric.invalidate(at, bytes, Site::BrokerSlotRead);
    }
}

/// Drops what this host's caches have of a leader's area, as its broker takes over.
///
/// An earlier process of the broker may have stood still on another host until a moment ago. It may have led on after
/// this process started and read the area. Call it after the claim, before anything is written into the area.
pub(crate) fn refresh_leader_area<F: Fabric>(region: &Region<F>, area: LeaderArea) {
    let fabric = region.fabric();
    if !fabric.is_coherent() && fabric.keeps(Guard::FreshOwnLines) {
        let layout = region.layout();
        fabric.invalidate(layout.leader_area(area), layout.leader.bytes, Site::TakeoverRead);
    }
}
