//! Packets in Ethernet frames, at the queues of a port of DPDK.

use super::super::config::DpdkConfig;
use super::super::numbers::PAIRS;
use super::buffers::{BURST, Frame, Frames, Received};
use super::port::{EthPort, Queues};
use embarcadero_roce::Nanos;
use embarcadero_roce::ethernet::{Neighbours, NextHop, Place, Station, Taken};
use embarcadero_roce::packet::{self, MAX_HEADER_BYTES, MAX_TRAILER_BYTES, Packet, Put, SCRATCH_BYTES};
use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Most frames that wait at a queue after they came at another. More are lost, as on any wire.
const STRAYS: usize = 1024;

/// Queue of a port of DPDK at an address.
///
/// The port chooses a queue by a packet's flow, not by its queue pair. A packet that comes at another queue than its queue
/// pair's is handed over.
pub(in super::super) struct Ethernet {
    queues: Queues,
    frames: Frames,
    station: Station<Arc<Neighbours>>,
    now: Nanos,
    outgoing: VecDeque<Frame>,
    /// Frames for this queue that came at another, or that this port sent to itself.
    strays: Receiver<Received>,
    /// Senders of strays to each queue, this one included: no port gives back what it sends to itself.
    owners: Vec<SyncSender<Received>>,
}

impl Ethernet {
    /// Makes all queues of a port at an address. Nobody else may have them.
    pub(crate) fn all(port: &Arc<EthPort>, address: IpAddr, config: &DpdkConfig) -> Vec<Self> {
        let (gateway, vlan) = (config.gateway, config.vlan);
        let place = Place { mac: port.mac, address, prefix_length: config.prefix_length_at(address), gateway, vlan };
        let neighbours = Arc::<Neighbours>::default();
        let (owners, strays): (Vec<_>, Vec<_>) = (0..port.queues()).map(|_| sync_channel(STRAYS)).unzip();
        let of = |(index, strays)| {
            let queues = Queues::of(port, index);
            Self {
                frames: queues.frames(),
                queues,
                station: Station::new(place, Arc::clone(&neighbours)),
                now: 0,
                outgoing: VecDeque::with_capacity(2 * BURST),
                strays,
                owners: owners.clone(),
            }
        };
        (0..).zip(strays).map(of).collect()
    }

    /// Number of the first queue pair. No other port has the address, so the numbers follow from the queue's index.
    pub(crate) fn first(&self) -> u32 {
        (u32::from(self.queues.index()) + 1) * PAIRS
    }

    /// Hands a burst of packets to `each`, each behind scratch bytes. Returns the number of frames that came.
    pub(crate) fn receive(&mut self, now: Nanos, mut each: impl FnMut(&mut [u8])) -> usize {
        self.now = now;
        let first = self.first();
        let Self { queues, frames, station, outgoing, strays, owners, .. } = self;
        let mut came = 0;
        for mut stray in strays.try_iter().take(BURST) {
            came += 1;
            if let Taken::Packet(packet) = station.take(&stray, stray.tag()) {
                let bytes = packet.len();
                each(with_scratch(&mut stray, bytes));
            }
        }
        came + queues.receive(|mut frame| {
            match station.take(&frame, frame.tag()) {
                Taken::Packet(packet) => match packet::queue_pair(packet).and_then(|number| owner(owners, number)) {
                    Some((of, owner)) if of != first => {
                        // With no room there it is lost.
                        let _ = owner.try_send(frame);
                        return None;
                    }
                    _ => {
                        let bytes = packet.len();
                        each(with_scratch(&mut frame, bytes));
                    }
                },
                Taken::Answer(answer) if outgoing.len() < BURST => outgoing.extend(frame_of(frames, &answer)),
                Taken::Answer(_) | Taken::Nothing => {}
            }
            Some(frame)
        })
    }

    /// Asks for the neighbour that packets to `to` go to.
    pub(crate) fn seek(&mut self, to: IpAddr, now: Nanos) {
        let question = self.station.ask(to, now);
        self.outgoing.extend(question.and_then(|question| frame_of(&mut self.frames, &question)));
        self.flush();
    }

    /// Number of packets that can be staged now.
    pub(crate) fn room(&self) -> usize {
        BURST.saturating_sub(self.outgoing.len())
    }

    /// Adds a packet to those that the next flush sends. A packet to an unknown neighbour is lost, and asks for it.
    pub(crate) fn stage(&mut self, packet: &Packet<'_>) {
        let header = match self.station.hop(packet.to, self.now) {
            NextHop::Known(header) => header,
            NextHop::Unresolved(question) => {
                self.outgoing.extend(question.and_then(|question| frame_of(&mut self.frames, &question)));
                return;
            }
            NextHop::Unreachable => return,
        };
        // Without a buffer it is lost.
        let Some(mut frame) = frame_of(&mut self.frames, header.as_ref()) else { return };
        // Packets that the protocol makes are sound.
        if packet.payload.len() + MAX_HEADER_BYTES + MAX_TRAILER_BYTES > frame.room()
            || packet.encode(&mut frame).is_err()
        {
            return;
        }
        if packet.to != self.station.address() {
            self.outgoing.push_back(frame);
        } else if let Some((_, owner)) = owner(&self.owners, packet.queue_pair) {
            let _ = owner.try_send(frame.looped());
        }
    }

    /// Returns true when no frame is staged.
    pub(crate) fn is_flushed(&self) -> bool {
        self.outgoing.is_empty()
    }

    /// Sends the staged frames, as far as the port has room.
    pub(crate) fn flush(&mut self) {
        while !self.outgoing.is_empty() && self.queues.send(&mut self.outgoing) > 0 {}
    }
}

/// Packet of `packet_bytes` bytes at the end of a frame, behind scratch bytes that are part of the frame's header.
fn with_scratch(frame: &mut [u8], packet_bytes: usize) -> &mut [u8] {
    let before = frame.len() - packet_bytes - SCRATCH_BYTES;
    &mut frame[before..]
}

/// Queue that has a queue pair: the number of its first queue pair, and the sender of strays to it.
fn owner(owners: &[SyncSender<Received>], number: u32) -> Option<(u32, &SyncSender<Received>)> {
    let index = (number / PAIRS).checked_sub(1)?;
    Some((number / PAIRS * PAIRS, owners.get(index as usize)?))
}

/// Makes a frame that begins with `bytes`; `None` without a free buffer.
fn frame_of(frames: &mut Frames, bytes: &[u8]) -> Option<Frame> {
    let mut frame = frames.empty().filter(|frame| bytes.len() <= frame.room())?;
    frame.put(bytes);
    Some(frame)
}
