//! A host's end of an Ethernet: takes frames, answers questions, and finds the way to peers.

use super::arp::Arp;
use super::discovery::{ALL_NODES, Discovery, PROTOCOL, group, solicited_node};
use super::frame::{BROADCAST, Header, Mac, Place, SENDER, UNTAGGED_BYTES, VLAN_MASK, kind};
use super::neighbours::Neighbours;
use crate::packet::IPV6_PROTOCOL_AT;
use crate::time::Nanos;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Result of taking a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken<'a> {
    /// The frame carries this packet, for [`crate::packet::decode`].
    Packet(&'a [u8]),
    /// The frame asked for this station: the frame in here answers, and is to be sent.
    Answer(Vec<u8>),
    /// The frame carries no packet and needs no answer.
    Nothing,
}

/// Next hop of a packet.
#[derive(Debug)]
pub enum NextHop {
    /// A known neighbour: this header goes before the packet.
    Known(Header),
    /// A neighbour whose Ethernet address is unknown. A frame, if there is one, asks for it and is to be sent.
    Unresolved(Option<Vec<u8>>),
    /// No neighbour: the address is in another network, and there is no gateway.
    Unreachable,
}

/// Host's end of an Ethernet, as one queue of its port sees it.
#[derive(Debug)]
pub struct Station<N> {
    place: Place,
    neighbours: N,
    /// Copy of the known neighbours.
    known: HashMap<IpAddr, Mac>,
    /// Number of changes after which the copy was made.
    changes: u64,
}

impl<N: AsRef<Neighbours>> Station<N> {
    /// Makes a station whose neighbours other stations share.
    #[must_use]
    pub fn new(place: Place, neighbours: N) -> Self {
        Self { place, neighbours, known: HashMap::new(), changes: 0 }
    }

    /// IP address of the station.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.place.address
    }

    /// Takes a frame, from its header on. `tag` is a VLAN tag that the port took out of the frame.
    #[must_use]
    pub fn take<'a>(&self, frame: &'a [u8], tag: Option<u16>) -> Taken<'a> {
        let Some(([.., high, low], mut packet)) = frame.split_first_chunk::<UNTAGGED_BYTES>() else {
            return Taken::Nothing;
        };
        let (mut found, mut tag) = (u16::from_be_bytes([*high, *low]), tag);
        if found == kind::TAG && tag.is_none() {
            let Some((&[a, b, c, d], rest)) = packet.split_first_chunk() else { return Taken::Nothing };
            (tag, found, packet) = (Some(u16::from_be_bytes([a, b])), u16::from_be_bytes([c, d]), rest);
        }
        // VLAN 0 stands for none: the tag has a priority only (IEEE 802.1Q, 9.6).
        if tag.map_or(0, |tag| tag & VLAN_MASK) != self.place.vlan.unwrap_or(0) {
            return Taken::Nothing;
        }
        match (found, self.place.address) {
            (kind::ARP, IpAddr::V4(own)) => self.arp(own, packet),
            (kind::IPV6, IpAddr::V6(own)) if packet.get(IPV6_PROTOCOL_AT) == Some(&PROTOCOL) => {
                self.discovery(own, packet, frame)
            }
            (kind::IPV4, IpAddr::V4(_)) | (kind::IPV6, IpAddr::V6(_)) => Taken::Packet(packet),
            _ => Taken::Nothing,
        }
    }

    /// Takes an ARP message.
    fn arp(&self, own: Ipv4Addr, packet: &[u8]) -> Taken<'static> {
        let Some(arp) = Arp::decode(packet).filter(|arp| arp.to.1 == own) else { return Taken::Nothing };
        self.neighbours.as_ref().learn(arp.from.1.into(), arp.from.0, !arp.answers);
        if arp.answers {
            return Taken::Nothing;
        }
        let answer = Arp { answers: true, from: (self.place.mac, own), to: arp.from };
        Taken::Answer(self.place.frame(arp.from.0, kind::ARP, &answer.encode()))
    }

    /// Takes a message of neighbour discovery, which came in `frame`.
    fn discovery(&self, own: Ipv6Addr, packet: &[u8], frame: &[u8]) -> Taken<'static> {
        let Some(said) = Discovery::decode(packet) else { return Taken::Nothing };
        if said.answers {
            if let Some(mac) = said.mac {
                self.neighbours.as_ref().learn(said.target.into(), mac, false);
            }
            return Taken::Nothing;
        }
        let sender = frame.get(SENDER).and_then(|mac| mac.first_chunk().copied());
        let Some(sender) = said.mac.or(sender).filter(|_| said.target == own) else { return Taken::Nothing };
        // A host that checks whether an address is free has none yet: all are told (RFC 4861, 7.2.4).
        let (to, mac) = if said.from.is_unspecified() { (ALL_NODES, group(ALL_NODES)) } else { (said.from, sender) };
        if to == said.from {
            self.neighbours.as_ref().learn(said.from.into(), sender, true);
        }
        let answer = Discovery { answers: true, from: own, to, target: own, mac: Some(self.place.mac) };
        Taken::Answer(self.place.frame(mac, kind::IPV6, &answer.encode()))
    }

    /// Finds the next hop of a packet to `to`.
    pub fn hop(&mut self, to: IpAddr, now: Nanos) -> NextHop {
        let kind = if to.is_ipv4() { kind::IPV4 } else { kind::IPV6 };
        // Packets to this station leave by no port and come in by none.
        if to == self.place.address {
            return NextHop::Known(self.place.header(self.place.mac, kind));
        }
        let Some(next) = self.place.next(to) else { return NextHop::Unreachable };
        let neighbours = self.neighbours.as_ref();
        let changes = neighbours.changes();
        if changes != self.changes {
            self.changes = changes;
            neighbours.copy_to(&mut self.known);
        }
        match self.known.get(&next) {
            Some(mac) => NextHop::Known(self.place.header(*mac, kind)),
            None => NextHop::Unresolved(self.ask(next, now)),
        }
    }

    /// Makes a frame that asks for the neighbour that packets to `to` go to, known or not.
    /// `None` if there is none, or if it was asked for within the last 10 ms.
    #[must_use]
    pub fn ask(&self, to: IpAddr, now: Nanos) -> Option<Vec<u8>> {
        let next = self.place.next(to).filter(|next| *next != self.place.address)?;
        if self.neighbours.as_ref().asks(next, now) { self.question(next) } else { None }
    }

    /// Makes a frame that asks for a neighbour; `None` if it is of another family.
    fn question(&self, target: IpAddr) -> Option<Vec<u8>> {
        let mac = self.place.mac;
        match (self.place.address, target) {
            (IpAddr::V4(own), IpAddr::V4(target)) => {
                let question = Arp { answers: false, from: (mac, own), to: ([0; 6], target) };
                Some(self.place.frame(BROADCAST, kind::ARP, &question.encode()))
            }
            (IpAddr::V6(from), IpAddr::V6(target)) => {
                let to = solicited_node(target);
                let question = Discovery { answers: false, from, to, target, mac: Some(mac) };
                Some(self.place.frame(group(to), kind::IPV6, &question.encode()))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::neighbours::{ASK_EVERY, MOST};
    use super::super::tests::{over_ipv6, place};
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn station(place: Place) -> Station<Arc<Neighbours>> {
        Station::new(place, Arc::default())
    }

    #[test]
    fn neighbours_find_each_other() {
        for place in [place, over_ipv6] {
            for vlan in [None, Some(7)] {
                let (mut near, far) = (station(place(1, vlan)), station(place(2, vlan)));
                let NextHop::Unresolved(Some(question)) = near.hop(far.address(), 5) else { panic!("known") };
                assert!(matches!(near.hop(far.address(), 6), NextHop::Unresolved(None)), "asked twice at once");
                assert_eq!(near.take(&question, None), Taken::Nothing, "it is not asked for");
                let Taken::Answer(answer) = far.take(&question, None) else { panic!("no answer") };
                assert_eq!(near.take(&answer, None), Taken::Nothing);
                let NextHop::Known(header) = near.hop(far.address(), 7) else { panic!("unknown") };
                let frame = [header.as_ref(), &[1, 2, 3]].concat();
                assert_eq!(frame[..6], far.place.mac);
                assert_eq!(far.take(&frame, None), Taken::Packet(&[1, 2, 3]));
                // A neighbour with a new Ethernet address is found there, once it is asked for again.
                let moved = station(Place { mac: [4; 6], ..far.place });
                let question = near.ask(far.address(), ASK_EVERY + 5).expect("it may be asked for again");
                let Taken::Answer(answer) = moved.take(&question, None) else { panic!("no answer") };
                assert_eq!(near.take(&answer, None), Taken::Nothing);
                let NextHop::Known(header) = near.hop(far.address(), ASK_EVERY + 6) else { panic!("unknown") };
                assert_eq!(header.as_ref()[..6], moved.place.mac);
                // A neighbour that was asked has learnt of the asker.
                let mut far = far;
                assert!(matches!(far.hop(near.address(), 8), NextHop::Known(_)));
                // Others are in another network.
                let other = if vlan.is_none() { Some(8) } else { None };
                assert_eq!(station(place(2, other)).take(&question, None), Taken::Nothing);
                assert_eq!(station(place(2, Some(9))).take(&frame, None), Taken::Nothing);
            }
        }
    }

    #[test]
    fn a_tag_counts_as_well_where_the_port_took_it_out() {
        let untagged = place(1, None).header([2; 6], kind::IPV4);
        let frame = [untagged.as_ref(), &[1, 2, 3]].concat();
        let tagged = station(place(2, Some(7)));
        assert_eq!(tagged.take(&frame, Some(0x6007)), Taken::Packet(&[1, 2, 3]));
        assert_eq!(tagged.take(&frame, Some(8)), Taken::Nothing);
        assert_eq!(tagged.take(&frame, None), Taken::Nothing);
        // A priority alone is no VLAN.
        assert_eq!(station(place(2, None)).take(&frame, Some(0x6000)), Taken::Packet(&[1, 2, 3]));
    }

    #[test]
    fn an_answer_without_a_question_does_not_count() {
        for place in [place, over_ipv6] {
            let (mut near, far) = (station(place(1, None)), station(place(2, None)));
            let question = far.question(near.address()).unwrap();
            let Taken::Answer(answer) = near.take(&question, None) else { panic!("no answer") };
            let mut third = station(place(3, None));
            assert_eq!(third.take(&answer, None), Taken::Nothing);
            assert!(matches!(third.hop(near.address(), 0), NextHop::Unresolved(Some(_))));
            assert!(matches!(near.hop(third.address(), 0), NextHop::Unresolved(Some(_))));
        }
    }

    /// A host that checks whether its address is free has no address to answer to.
    #[test]
    fn an_address_that_is_taken_is_told_to_all() {
        let IpAddr::V6(own) = over_ipv6(1, None).address else { panic!("not IPv6") };
        let [from, to] = [Ipv6Addr::UNSPECIFIED, solicited_node(own)];
        let question = Discovery { answers: false, from, to, target: own, mac: None };
        let frame = over_ipv6(9, None).frame(group(to), kind::IPV6, &question.encode());
        let Taken::Answer(answer) = station(over_ipv6(1, None)).take(&frame, None) else { panic!("no answer") };
        assert_eq!(answer[..6], [0x33, 0x33, 0, 0, 0, 1]);
        let said = Discovery::decode(&answer[14..]).unwrap();
        assert_eq!((said.to, said.target, said.mac), (ALL_NODES, own, Some([2, 0, 0, 0, 0, 1])));
    }

    #[test]
    fn strangers_cannot_fill_what_is_remembered() {
        let near = station(place(1, None));
        for number in 0..3 * MOST as u32 {
            let from = ([2; 6], Ipv4Addr::from(number));
            let question = Arp { answers: false, from, to: ([0; 6], Ipv4Addr::new(10, 0, 0, 1)) };
            let frame = place(9, None).frame(BROADCAST, kind::ARP, &question.encode());
            assert!(matches!(near.take(&frame, None), Taken::Answer(_)));
            let mut known = HashMap::new();
            near.neighbours.copy_to(&mut known);
            assert!(known.len() <= MOST);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _ = station(place(1, Some(7))).take(&bytes, None);
            let _ = station(over_ipv6(1, None)).take(&bytes, None);
        }
    }
}
