//! Packets in Ethernet frames, and the neighbours that they go to (ARP, RFC 826).

use super::super::DpdkConfig;
use super::eal::{BURST, EthPort, Frame, Pool, Queues};
use crate::transport::roce::Nanos;
use crate::transport::roce::packet::{MAX_HEADER_BYTES, MAX_TRAILER_BYTES, Packet, Put};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

const HEADER_BYTES: usize = 14;
const IPV4: [u8; 2] = 0x0800u16.to_be_bytes();
const ARP: [u8; 2] = 0x0806u16.to_be_bytes();
const BROADCAST: [u8; 6] = [0xff; 6];
/// How often a neighbour is asked for at most.
const ASK_EVERY: Nanos = 10_000_000;
/// Neighbours that are remembered at most.
const NEIGHBOURS: usize = 4096;

type Mac = [u8; 6];

/// A question or an answer about an address: whether it answers, of whom, and whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Arp {
    answers: bool,
    from: (Mac, Ipv4Addr),
    to: (Mac, Ipv4Addr),
}

impl Arp {
    /// Ethernet, IPv4, and the lengths of their addresses.
    const KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 28] = bytes.first_chunk()?;
        let address = |at: usize| Some(Ipv4Addr::from(*bytes[at..].first_chunk::<4>()?));
        let mac = |at: usize| bytes[at..].first_chunk::<6>().copied();
        let answers = match bytes[6..8] {
            [0, 1] => false,
            [0, 2] => true,
            _ => return None,
        };
        let arp = Self { answers, from: (mac(8)?, address(14)?), to: (mac(18)?, address(24)?) };
        (bytes[..6] == Self::KIND).then_some(arp)
    }

    fn encode(&self) -> [u8; 28] {
        let mut bytes = [0; 28];
        bytes[..6].copy_from_slice(&Self::KIND);
        bytes[7] = 1 + u8::from(self.answers);
        bytes[8..14].copy_from_slice(&self.from.0);
        bytes[14..18].copy_from_slice(&self.from.1.octets());
        bytes[18..24].copy_from_slice(&self.to.0);
        bytes[24..].copy_from_slice(&self.to.1.octets());
        bytes
    }

    fn frame(&self, pool: Pool, to: Mac) -> Option<Frame> {
        let mut frame = begin(pool, to, self.from.0, ARP)?;
        frame.put(&self.encode());
        Some(frame)
    }
}

/// Where packets go next.
struct Route {
    address: Ipv4Addr,
    mask: u32,
    gateway: Option<Ipv4Addr>,
}

impl Route {
    fn next(&self, to: Ipv4Addr) -> Option<Ipv4Addr> {
        let near = u32::from(to) & self.mask == u32::from(self.address) & self.mask;
        if near { Some(to) } else { self.gateway }
    }
}

/// A port of DPDK at an address.
pub(in super::super) struct Ethernet {
    queues: Queues,
    mac: Mac,
    route: Route,
    neighbours: HashMap<Ipv4Addr, Mac>,
    asked: HashMap<Ipv4Addr, Nanos>,
    now: Nanos,
    outgoing: VecDeque<Frame>,
    /// Packets from here to here, which no port gives back, and those of them that are being looked at.
    looped: Vec<Vec<u8>>,
    looking: Vec<Vec<u8>>,
}

impl Ethernet {
    /// # Errors
    /// Another has the port's queues.
    pub fn new(port: &Arc<EthPort>, address: Ipv4Addr, config: &DpdkConfig) -> io::Result<Self> {
        let mask = u32::MAX.checked_shl(32 - u32::from(config.prefix_length)).unwrap_or(0);
        Ok(Self {
            queues: Queues::of(port)?,
            mac: port.mac,
            route: Route { address, mask, gateway: config.gateway },
            neighbours: HashMap::new(),
            asked: HashMap::new(),
            now: 0,
            outgoing: VecDeque::with_capacity(2 * BURST),
            looped: Vec::new(),
            looking: Vec::new(),
        })
    }

    /// As [`super::super::wire::Wire::receive`].
    pub fn receive(&mut self, now: Nanos, mut each: impl FnMut(&[u8])) {
        self.now = now;
        std::mem::swap(&mut self.looped, &mut self.looking);
        self.looking.drain(..).for_each(|packet| each(&packet));
        let Self { queues, mac, route, neighbours, asked, outgoing, .. } = self;
        let pool = queues.pool();
        queues.receive(|frame| {
            let Some((header, packet)) = frame.split_first_chunk::<HEADER_BYTES>() else { return };
            if header[12..] == IPV4 {
                each(packet);
            } else if header[12..] == ARP
                && let Some(arp) = Arp::decode(packet)
                && arp.to.1 == route.address
            {
                // Who was asked for, and who asks: he will be answered.
                if asked.remove(&arp.from.1).is_some() || !arp.answers {
                    make_room(neighbours);
                    neighbours.insert(arp.from.1, arp.from.0);
                }
                if !arp.answers && outgoing.len() < BURST {
                    let answer = Arp { answers: true, from: (*mac, route.address), to: arp.from };
                    outgoing.extend(answer.frame(pool, arp.from.0));
                }
            }
        });
    }

    /// Packets that can be staged now.
    pub fn room(&self) -> usize {
        BURST.saturating_sub(self.outgoing.len())
    }

    /// Puts a packet to those that the next flush sends. One to a neighbour that is not known is lost; he is asked for.
    pub fn stage(&mut self, packet: &Packet<'_>) {
        let IpAddr::V4(to) = packet.to else { return };
        if to == self.route.address {
            let mut looped = Vec::new();
            if packet.encode(&mut looped).is_ok() {
                self.looped.push(looped);
            }
            return;
        }
        let Some(next) = self.route.next(to) else { return };
        let Some(neighbour) = self.neighbours.get(&next).copied() else {
            self.ask(next);
            return;
        };
        // Without a buffer it is lost.
        let Some(mut frame) = begin(self.queues.pool(), neighbour, self.mac, IPV4) else { return };
        // What the protocol makes is sound.
        if packet.payload.len() + MAX_HEADER_BYTES + MAX_TRAILER_BYTES <= frame.room()
            && packet.encode(&mut frame).is_ok()
        {
            self.outgoing.push_back(frame);
        }
    }

    fn ask(&mut self, address: Ipv4Addr) {
        let last = self.asked.get(&address).copied();
        if last.is_some_and(|last| self.now < last + ASK_EVERY) {
            return;
        }
        make_room(&mut self.asked);
        self.asked.insert(address, self.now);
        let question = Arp { answers: false, from: (self.mac, self.route.address), to: ([0; 6], address) };
        self.outgoing.extend(question.frame(self.queues.pool(), BROADCAST));
    }

    pub fn is_flushed(&self) -> bool {
        self.outgoing.is_empty()
    }

    /// As [`super::super::wire::Wire::flush`].
    pub fn flush(&mut self) {
        while !self.outgoing.is_empty() && self.queues.send(&mut self.outgoing) > 0 {}
    }
}

/// Strangers can fill what is remembered: then all is forgotten, and asked for again where it is needed.
fn make_room<T>(remembered: &mut HashMap<Ipv4Addr, T>) {
    if remembered.len() >= NEIGHBOURS {
        remembered.clear();
    }
}

/// A frame with its header.
fn begin(pool: Pool, to: Mac, from: Mac, kind: [u8; 2]) -> Option<Frame> {
    let mut frame = pool.frame()?;
    [&to[..], &from, &kind].into_iter().for_each(|field| frame.put(field));
    Some(frame)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_not_near_goes_to_the_gateway() {
        let gateway = Some(Ipv4Addr::new(10, 0, 0, 254));
        let route = Route { address: Ipv4Addr::new(10, 0, 0, 1), mask: 0xffff_ff00, gateway };
        assert_eq!(route.next(Ipv4Addr::new(10, 0, 0, 7)), Some(Ipv4Addr::new(10, 0, 0, 7)));
        assert_eq!(route.next(Ipv4Addr::new(10, 0, 1, 7)), gateway);
    }

    proptest! {
        #[test]
        fn arp_is_read_as_it_was_made(answers: bool, from: (Mac, u32), to: (Mac, u32)) {
            let arp = Arp { answers, from: (from.0, from.1.into()), to: (to.0, to.1.into()) };
            prop_assert_eq!(Arp::decode(&arp.encode()), Some(arp));
        }

        #[test]
        fn any_bytes_are_read_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Arp::decode(&bytes);
        }
    }
}
