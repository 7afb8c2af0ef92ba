//! Ethernet below the packets: frames, VLAN tags (IEEE 802.1Q), and who has which address, by ARP (RFC 826) or neighbour
//! discovery (RFC 4861).

use super::Nanos;
use super::packet::internet_checksum;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Address of an Ethernet port.
pub type Mac = [u8; 6];

/// Most bytes of a frame before its packet: both addresses, a tag, and what follows.
pub const MAX_HEADER_BYTES: usize = 18;

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const TAG: u16 = 0x8100;
const IPV6: u16 = 0x86dd;
/// Of a tag, what names the VLAN; the rest is priority.
const VLAN_MASK: u16 = 0x0fff;
const BROADCAST: Mac = [0xff; 6];
/// How often a neighbour is asked for at most.
const ASK_EVERY: Nanos = 10_000_000;
/// Neighbours that are remembered at most.
const NEIGHBOURS: usize = 4096;

/// Where a station is.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Of its port.
    pub mac: Mac,
    /// Its own.
    pub address: IpAddr,
    /// Bits of the address that its neighbours share: 0 to 32, or 128.
    pub prefix_length: u8,
    /// Where packets to others go, of the same family.
    pub gateway: Option<IpAddr>,
    /// Its frames have this tag, 1 to 4094; others are not its.
    pub vlan: Option<u16>,
}

impl Place {
    /// Who gets a packet to `to`.
    fn next(&self, to: IpAddr) -> Option<IpAddr> {
        let near = match (self.address, to) {
            (IpAddr::V4(own), IpAddr::V4(to)) => {
                let apart = u32::from(own) ^ u32::from(to);
                apart.checked_shr(32 - u32::from(self.prefix_length)).unwrap_or(0) == 0
            }
            (IpAddr::V6(own), IpAddr::V6(to)) => {
                let apart = u128::from(own) ^ u128::from(to);
                to.is_unicast_link_local() || apart.checked_shr(128 - u32::from(self.prefix_length)).unwrap_or(0) == 0
            }
            _ => return None,
        };
        if near { Some(to) } else { self.gateway }
    }

    /// What a frame to `to` begins with.
    fn header(&self, to: Mac, kind: u16) -> Header {
        let mut header = Header { bytes: [0; MAX_HEADER_BYTES], len: 0 };
        header.put(&to);
        header.put(&self.mac);
        if let Some(vlan) = self.vlan {
            header.put(&TAG.to_be_bytes());
            header.put(&vlan.to_be_bytes());
        }
        header.put(&kind.to_be_bytes());
        header
    }

    fn frame(&self, to: Mac, kind: u16, bytes: &[u8]) -> Vec<u8> {
        [self.header(to, kind).as_ref(), bytes].concat()
    }
}

/// What a frame begins with.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    bytes: [u8; MAX_HEADER_BYTES],
    len: usize,
}

impl Header {
    fn put(&mut self, field: &[u8]) {
        self.bytes[self.len..self.len + field.len()].copy_from_slice(field);
        self.len += field.len();
    }
}

impl AsRef<[u8]> for Header {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// A question or an answer about an IPv4 address: whether it answers, of whom, and whose.
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
}

/// A neighbour solicitation, or the advertisement that answers one (RFC 4861, 4.3 and 4.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Discovery {
    answers: bool,
    from: Ipv6Addr,
    to: Ipv6Addr,
    /// Who is asked for, or answers.
    target: Ipv6Addr,
    /// Of the sender, if it says so.
    mac: Option<Mac>,
}

impl Discovery {
    const IP_BYTES: usize = 40;
    /// Until the options.
    const LEAST_BYTES: usize = 24;
    const PROTOCOL: u8 = 58;
    const SOLICITATION: u8 = 135;
    const ADVERTISEMENT: u8 = 136;
    /// Who has another has forwarded it.
    const HOP_LIMIT: u8 = 255;
    /// Flags of an advertisement: it was asked for, and what was known is to be replaced.
    const SOLICITED: u8 = 0x40;
    const OVERRIDE: u8 = 0x20;

    /// Option that has the sender's address: source, target.
    const fn option(answers: bool) -> u8 {
        if answers { 2 } else { 1 }
    }

    /// The checksum over a message and what stands for its IP header (RFC 8200, 8.1); 0 if it has the right one.
    fn checksum(addresses: &[u8], message: &[u8]) -> u16 {
        let lengths = (message.len() as u32).to_be_bytes();
        internet_checksum(&[addresses, &lengths, &[0, 0, 0, Self::PROTOCOL], message].concat())
    }

    /// Reads a packet from its IP header on, by the rules of sections 7.1.1 and 7.1.2.
    fn decode(packet: &[u8]) -> Option<Self> {
        let header: &[u8; Self::IP_BYTES] = packet.first_chunk()?;
        let address = |bytes: &[u8]| bytes.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets));
        let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let message = packet[Self::IP_BYTES..].get(..len)?;
        // Options are of eight bytes each.
        if len < Self::LEAST_BYTES || !len.is_multiple_of(8) {
            return None;
        }
        let answers = match message[..2] {
            [Self::SOLICITATION, 0] => false,
            [Self::ADVERTISEMENT, 0] => true,
            _ => return None,
        };
        let ip_is_right = header[0] >> 4 == 6 && header[6] == Self::PROTOCOL && header[7] == Self::HOP_LIMIT;
        if !ip_is_right || Self::checksum(&header[8..], message) != 0 {
            return None;
        }
        let (from, to, target) = (address(&header[8..])?, address(&header[24..])?, address(&message[8..])?);
        let mut mac = None;
        let mut options = &message[Self::LEAST_BYTES..];
        while let [kind, units, ..] = *options {
            let (option, rest) = options.split_at_checked(8 * usize::from(units)).filter(|_| units > 0)?;
            if kind == Self::option(answers) {
                mac = option[2..].first_chunk().copied();
            }
            options = rest;
        }
        let to_everybody = answers && to.is_multicast() && message[4] & Self::SOLICITED != 0;
        let of_nobody = !answers && from.is_unspecified() && mac.is_some();
        (!target.is_multicast() && !to_everybody && !of_nobody).then_some(Self { answers, from, to, target, mac })
    }

    fn encode(&self) -> Vec<u8> {
        let mut message = vec![0; Self::LEAST_BYTES];
        message[0] = if self.answers { Self::ADVERTISEMENT } else { Self::SOLICITATION };
        if self.answers {
            message[4] = Self::OVERRIDE | if self.to.is_multicast() { 0 } else { Self::SOLICITED };
        }
        message[8..24].copy_from_slice(&self.target.octets());
        if let Some(mac) = self.mac {
            message.extend([Self::option(self.answers), 1]);
            message.extend(mac);
        }
        let addresses = [self.from.octets(), self.to.octets()].concat();
        let checksum = Self::checksum(&addresses, &message);
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        let len = (message.len() as u16).to_be_bytes();
        let first = [0x60, 0, 0, 0, len[0], len[1], Self::PROTOCOL, Self::HOP_LIMIT];
        [&first[..], &addresses, &message].concat()
    }
}

/// Where all listen who have an address that ends so (RFC 4291, 2.7.1, solicited-node address).
fn askable(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

/// Where frames to a group go (RFC 2464, 7).
fn group(address: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = address.octets();
    [0x33, 0x33, a, b, c, d]
}

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Who has which address; the stations at the queues of one port share it.
#[derive(Debug, Default)]
pub struct Neighbours {
    table: Mutex<Table>,
    /// How often it changed.
    changes: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    known: HashMap<IpAddr, Mac>,
    /// Who was asked for, and when.
    asked: HashMap<IpAddr, Nanos>,
}

/// Strangers can fill what is remembered: then all is forgotten, and asked for again where it is needed.
fn remember<T>(map: &mut HashMap<IpAddr, T>, address: IpAddr, what: T) -> Option<T> {
    if map.len() >= NEIGHBOURS {
        map.clear();
    }
    map.insert(address, what)
}

impl Neighbours {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody said where he is. Who says so unasked is not heard, but if he asks for us.
    fn heard(&self, address: IpAddr, mac: Mac, asks: bool) {
        let mut table = self.lock();
        if (table.asked.remove(&address).is_some() || asks) && remember(&mut table.known, address, mac) != Some(mac) {
            self.changes.fetch_add(1, Ordering::Release);
        }
    }

    /// Whether it is time to ask for somebody.
    fn asks(&self, address: IpAddr, now: Nanos) -> bool {
        let mut table = self.lock();
        let asks = table.asked.get(&address).is_none_or(|last| now >= last + ASK_EVERY);
        if asks {
            remember(&mut table.asked, address, now);
        }
        asks
    }
}

/// What a frame was.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken<'a> {
    /// It has a packet for [`super::packet::decode`].
    Packet(&'a [u8]),
    /// It asked for us: this frame answers.
    Answer(Vec<u8>),
    /// Nothing that needs an answer.
    Nothing,
}

/// Where a packet goes.
#[derive(Debug)]
pub enum Hop {
    /// To a neighbour, with this before it.
    Known(Header),
    /// The neighbour is not known; if there is a frame, it asks for him.
    Unknown(Option<Vec<u8>>),
    /// There is no way.
    Nowhere,
}

/// A host's end of an Ethernet, as one of its queues sees it.
#[derive(Debug)]
pub struct Station<N> {
    place: Place,
    neighbours: N,
    /// A copy of what the neighbours were after so many changes.
    known: HashMap<IpAddr, Mac>,
    changes: u64,
}

impl<N: AsRef<Neighbours>> Station<N> {
    /// A station with neighbours that others share.
    #[must_use]
    pub fn new(place: Place, neighbours: N) -> Self {
        Self { place, neighbours, known: HashMap::new(), changes: 0 }
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.place.address
    }

    /// Takes a frame from its header on; `tag` is one that the port took out of it.
    #[must_use]
    pub fn take<'a>(&self, frame: &'a [u8], tag: Option<u16>) -> Taken<'a> {
        let Some(([.., high, low], mut packet)) = frame.split_first_chunk::<14>() else { return Taken::Nothing };
        let (mut kind, mut tag) = (u16::from_be_bytes([*high, *low]), tag);
        if kind == TAG && tag.is_none() {
            let Some((&[a, b, c, d], rest)) = packet.split_first_chunk() else { return Taken::Nothing };
            (tag, kind, packet) = (Some(u16::from_be_bytes([a, b])), u16::from_be_bytes([c, d]), rest);
        }
        // VLAN 0 says a priority alone.
        if tag.map_or(0, |tag| tag & VLAN_MASK) != self.place.vlan.unwrap_or(0) {
            return Taken::Nothing;
        }
        match (kind, self.place.address) {
            (ARP, IpAddr::V4(own)) => self.arp(own, packet),
            (IPV6, IpAddr::V6(own)) if packet.get(6) == Some(&Discovery::PROTOCOL) => {
                self.discovery(own, packet, frame)
            }
            (IPV4, IpAddr::V4(_)) | (IPV6, IpAddr::V6(_)) => Taken::Packet(packet),
            _ => Taken::Nothing,
        }
    }

    fn arp(&self, own: Ipv4Addr, packet: &[u8]) -> Taken<'static> {
        let Some(arp) = Arp::decode(packet).filter(|arp| arp.to.1 == own) else { return Taken::Nothing };
        self.neighbours.as_ref().heard(arp.from.1.into(), arp.from.0, !arp.answers);
        if arp.answers {
            return Taken::Nothing;
        }
        let answer = Arp { answers: true, from: (self.place.mac, own), to: arp.from };
        Taken::Answer(self.place.frame(arp.from.0, ARP, &answer.encode()))
    }

    fn discovery(&self, own: Ipv6Addr, packet: &[u8], frame: &[u8]) -> Taken<'static> {
        let Some(said) = Discovery::decode(packet) else { return Taken::Nothing };
        if said.answers {
            if let Some(mac) = said.mac {
                self.neighbours.as_ref().heard(said.target.into(), mac, false);
            }
            return Taken::Nothing;
        }
        let sender = frame.get(6..12).and_then(|mac| mac.first_chunk().copied());
        let Some(sender) = said.mac.or(sender).filter(|_| said.target == own) else { return Taken::Nothing };
        // Who looks whether an address is free has none yet: all are told (RFC 4861, 7.2.4).
        let (to, mac) = if said.from.is_unspecified() { (ALL_NODES, group(ALL_NODES)) } else { (said.from, sender) };
        if to == said.from {
            self.neighbours.as_ref().heard(said.from.into(), sender, true);
        }
        let answer = Discovery { answers: true, from: own, to, target: own, mac: Some(self.place.mac) };
        Taken::Answer(self.place.frame(mac, IPV6, &answer.encode()))
    }

    /// Where a packet to `to` goes.
    pub fn hop(&mut self, to: IpAddr, now: Nanos) -> Hop {
        let kind = if to.is_ipv4() { IPV4 } else { IPV6 };
        // Packets to here go out and come in by no port.
        if to == self.place.address {
            return Hop::Known(self.place.header(self.place.mac, kind));
        }
        let Some(next) = self.place.next(to) else { return Hop::Nowhere };
        let neighbours = self.neighbours.as_ref();
        let changes = neighbours.changes.load(Ordering::Acquire);
        if changes != self.changes {
            self.changes = changes;
            self.known.clone_from(&neighbours.lock().known);
        }
        match self.known.get(&next) {
            Some(mac) => Hop::Known(self.place.header(*mac, kind)),
            None => Hop::Unknown(self.ask(next, now)),
        }
    }

    /// A frame that asks for the neighbour to whom packets to `to` go, known or not; none if he was asked for just now.
    #[must_use]
    pub fn ask(&self, to: IpAddr, now: Nanos) -> Option<Vec<u8>> {
        let next = self.place.next(to).filter(|next| *next != self.place.address)?;
        if self.neighbours.as_ref().asks(next, now) { self.question(next) } else { None }
    }

    /// A frame that asks for a neighbour of the same family.
    fn question(&self, target: IpAddr) -> Option<Vec<u8>> {
        let mac = self.place.mac;
        match (self.place.address, target) {
            (IpAddr::V4(own), IpAddr::V4(target)) => {
                let question = Arp { answers: false, from: (mac, own), to: ([0; 6], target) };
                Some(self.place.frame(BROADCAST, ARP, &question.encode()))
            }
            (IpAddr::V6(from), IpAddr::V6(target)) => {
                let to = askable(target);
                let question = Discovery { answers: false, from, to, target, mac: Some(mac) };
                Some(self.place.frame(group(to), IPV6, &question.encode()))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn place(last: u8, vlan: Option<u16>) -> Place {
        let gateway = Some(IpAddr::from([10, 0, 0, 254]));
        Place { mac: [2, 0, 0, 0, 0, last], address: [10, 0, 0, last].into(), prefix_length: 24, gateway, vlan }
    }

    fn over_ipv6(last: u8, vlan: Option<u16>) -> Place {
        let address = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0x1234, last.into());
        Place { address: address.into(), prefix_length: 64, gateway: None, ..place(last, vlan) }
    }

    fn station(place: Place) -> Station<Arc<Neighbours>> {
        Station::new(place, Arc::default())
    }

    #[test]
    fn what_is_not_near_goes_to_the_gateway() {
        let four = place(1, None);
        assert_eq!(four.next([10, 0, 0, 7].into()), Some([10, 0, 0, 7].into()));
        assert_eq!(four.next([10, 0, 1, 7].into()), four.gateway);
        assert_eq!(Place { prefix_length: 0, ..four }.next([11, 0, 1, 7].into()), Some([11, 0, 1, 7].into()));
        assert_eq!(Place { prefix_length: 32, ..four }.next([10, 0, 0, 7].into()), four.gateway);
        let six = over_ipv6(1, None);
        let near: IpAddr = "fd00::9".parse().unwrap();
        assert_eq!(six.next(near), Some(near));
        assert_eq!(six.next("fd01::9".parse().unwrap()), None);
        assert_eq!(six.next([10, 0, 0, 7].into()), None);
        assert!(six.next("fe80::9".parse().unwrap()).is_some());
    }

    #[test]
    fn neighbours_find_each_other() {
        for place in [place, over_ipv6] {
            for vlan in [None, Some(7)] {
                let (mut near, far) = (station(place(1, vlan)), station(place(2, vlan)));
                let Hop::Unknown(Some(question)) = near.hop(far.address(), 5) else { panic!("known") };
                assert!(matches!(near.hop(far.address(), 6), Hop::Unknown(None)), "asked twice at once");
                assert_eq!(near.take(&question, None), Taken::Nothing, "it is not asked for");
                let Taken::Answer(answer) = far.take(&question, None) else { panic!("no answer") };
                assert_eq!(near.take(&answer, None), Taken::Nothing);
                let Hop::Known(header) = near.hop(far.address(), 7) else { panic!("unknown") };
                let frame = [header.as_ref(), &[1, 2, 3]].concat();
                assert_eq!(frame[..6], far.place.mac);
                assert_eq!(far.take(&frame, None), Taken::Packet(&[1, 2, 3]));
                // One that is elsewhere now is found there, once he is asked for again.
                let moved = station(Place { mac: [4; 6], ..far.place });
                let question = near.ask(far.address(), ASK_EVERY + 5).expect("he may be asked for again");
                let Taken::Answer(answer) = moved.take(&question, None) else { panic!("no answer") };
                assert_eq!(near.take(&answer, None), Taken::Nothing);
                let Hop::Known(header) = near.hop(far.address(), ASK_EVERY + 6) else { panic!("unknown") };
                assert_eq!(header.as_ref()[..6], moved.place.mac);
                // Who was asked has learnt of the asker.
                let mut far = far;
                assert!(matches!(far.hop(near.address(), 8), Hop::Known(_)));
                // Others are in another network.
                let other = if vlan.is_none() { Some(8) } else { None };
                assert_eq!(station(place(2, other)).take(&question, None), Taken::Nothing);
                assert_eq!(station(place(2, Some(9))).take(&frame, None), Taken::Nothing);
            }
        }
    }

    #[test]
    fn a_tag_counts_as_well_where_the_port_took_it_out() {
        let untagged = place(1, None).header([2; 6], IPV4);
        let frame = [untagged.as_ref(), &[1, 2, 3]].concat();
        let tagged = station(place(2, Some(7)));
        assert_eq!(tagged.take(&frame, Some(0x6007)), Taken::Packet(&[1, 2, 3]));
        assert_eq!(tagged.take(&frame, Some(8)), Taken::Nothing);
        assert_eq!(tagged.take(&frame, None), Taken::Nothing);
        // A priority alone is no VLAN.
        assert_eq!(station(place(2, None)).take(&frame, Some(0x6000)), Taken::Packet(&[1, 2, 3]));
    }

    #[test]
    fn who_is_not_asked_is_not_heard() {
        for place in [place, over_ipv6] {
            let (mut near, far) = (station(place(1, None)), station(place(2, None)));
            let question = far.question(near.address()).unwrap();
            let Taken::Answer(answer) = near.take(&question, None) else { panic!("no answer") };
            let mut third = station(place(3, None));
            assert_eq!(third.take(&answer, None), Taken::Nothing);
            assert!(matches!(third.hop(near.address(), 0), Hop::Unknown(Some(_))));
            assert!(matches!(near.hop(third.address(), 0), Hop::Unknown(Some(_))));
        }
    }

    /// A host that looks whether its address is free has none to answer to.
    #[test]
    fn an_address_that_is_taken_is_told_to_all() {
        let IpAddr::V6(own) = over_ipv6(1, None).address else { panic!("not IPv6") };
        let [from, to] = [Ipv6Addr::UNSPECIFIED, askable(own)];
        let question = Discovery { answers: false, from, to, target: own, mac: None };
        let frame = over_ipv6(9, None).frame(group(to), IPV6, &question.encode());
        let Taken::Answer(answer) = station(over_ipv6(1, None)).take(&frame, None) else { panic!("no answer") };
        assert_eq!(answer[..6], [0x33, 0x33, 0, 0, 0, 1]);
        let said = Discovery::decode(&answer[14..]).unwrap();
        assert_eq!((said.to, said.target, said.mac), (ALL_NODES, own, Some([2, 0, 0, 0, 0, 1])));
    }

    #[test]
    fn strangers_cannot_fill_what_is_remembered() {
        let near = station(place(1, None));
        for number in 0..3 * NEIGHBOURS as u32 {
            let from = ([2; 6], Ipv4Addr::from(number));
            let question = Arp { answers: false, from, to: ([0; 6], Ipv4Addr::new(10, 0, 0, 1)) };
            let frame = place(9, None).frame(BROADCAST, ARP, &question.encode());
            assert!(matches!(near.take(&frame, None), Taken::Answer(_)));
            assert!(near.neighbours.lock().known.len() <= NEIGHBOURS);
        }
    }

    proptest! {
        #[test]
        fn arp_is_read_as_it_was_made(answers: bool, from: (Mac, u32), to: (Mac, u32)) {
            let arp = Arp { answers, from: (from.0, from.1.into()), to: (to.0, to.1.into()) };
            prop_assert_eq!(Arp::decode(&arp.encode()), Some(arp));
        }

        #[test]
        fn discovery_is_read_as_it_was_made(
            answers: bool, from: u128, to: u128, target in 0..0xff_u128 << 120, mac: Option<Mac>, damage in 0usize..640,
        ) {
            let mac = mac.filter(|_| from != 0);
            let said = Discovery { answers, from: from.into(), to: to.into(), target: target.into(), mac };
            let mut bytes = said.encode();
            prop_assert_eq!(Discovery::decode(&bytes), Some(said));
            // A bit that is wrong is noticed, but in class, flow and what follows.
            if let Some(byte) = bytes.get_mut(damage / 8).filter(|_| !(4..32).contains(&damage)) {
                *byte ^= 0x80 >> (damage % 8);
                prop_assert_eq!(Discovery::decode(&bytes), None);
            }
        }

        #[test]
        fn any_bytes_are_read_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _ = (Arp::decode(&bytes), Discovery::decode(&bytes));
            let _ = station(place(1, Some(7))).take(&bytes, None);
            let _ = station(over_ipv6(1, None)).take(&bytes, None);
        }
    }
}
