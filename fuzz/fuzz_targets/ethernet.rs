//! Fuzzes the Ethernet station: no sequence of frames makes it panic, or accept or answer a frame of another VLAN.
#![no_main]

use embarcadero_roce::ethernet::{NextHop, Neighbours, Place, Station, Taken};
use libfuzzer_sys::fuzz_target;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fuzz_target!(|bytes: &[u8]| {
    let addresses: [(IpAddr, u8); 2] =
        [(Ipv4Addr::new(10, 0, 0, 1).into(), 24), (Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).into(), 64)];
    for ((address, prefix_length), vlan) in addresses.into_iter().flat_map(|at| [(at, None), (at, Some(7))]) {
        let place = Place { mac: MAC, address, prefix_length, gateway: None, vlan };
        let mut station = Station::new(place, Arc::<Neighbours>::default());
        // Each piece of the input is a frame. For some the port has removed the VLAN tag, and passes it beside the frame.
        for (now, piece) in (0..).step_by(5_000_000).zip(bytes.chunks(96)) {
            let frame = with_checksum(piece);
            let stripped = frame.last().filter(|last| **last >= 0xf0).map(|last| u16::from(*last & 7));
            let tagged = frame.get(12..14) == Some(&[0x81, 0]) && stripped.is_none();
            let tag = if tagged { frame.get(14..16).map(|tag| u16::from_be_bytes([tag[0], tag[1]])) } else { stripped };
            match station.take(&frame, stripped) {
                Taken::Nothing => {}
                Taken::Packet(packet) => {
                    assert!(frame.ends_with(packet));
                    assert_eq!(tag.map_or(0, |tag| tag & 0xfff), vlan.unwrap_or(0));
                }
                Taken::Answer(answer) => {
                    assert_eq!(tag.map_or(0, |tag| tag & 0xfff), vlan.unwrap_or(0));
                    assert_eq!(answer[6..12], MAC);
                    assert!(answer.len() <= 18 + 40 + 32, "an answer is no longer than its question");
                    // Another station must be able to take the answer.
                    let far = Place { mac: [2, 0, 0, 0, 0, 2], ..place };
                    let _ = Station::new(far, Arc::<Neighbours>::default()).take(&answer, None);
                }
            }
            let to = match address {
                IpAddr::V4(_) => IpAddr::from([10, 0, 0, frame.first().copied().unwrap_or(2)]),
                IpAddr::V6(_) => {
                    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, frame.first().copied().unwrap_or(2).into()).into()
                }
            };
            match station.hop(to, now) {
                NextHop::Known(header) => assert_eq!(header.as_ref()[6..12], MAC),
                NextHop::Unresolved(question) => assert!(question.is_none_or(|frame| frame[6..12] == MAC)),
                NextHop::Unreachable => panic!("a neighbour has a way"),
            }
        }
    }
});

/// Frame with a correct checksum if it looks like neighbour discovery. The fuzzer would not find that checksum.
fn with_checksum(piece: &[u8]) -> Vec<u8> {
    let mut frame = piece.to_vec();
    let at = if frame.get(12..14) == Some(&[0x81, 0]) { 18 } else { 14 };
    if frame.get(at + 6) == Some(&58) && frame.len() >= at + 40 + 4 {
        let len = frame.len() - at - 40;
        frame[at + 4..at + 6].copy_from_slice(&(len as u16).to_be_bytes());
        frame[at + 42..at + 44].fill(0);
        let words =
            frame[at + 8..].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
        let sum = words.sum::<u32>() + len as u32 + 58;
        let folded = (sum & 0xffff) + (sum >> 16);
        let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
        frame[at + 42..at + 44].copy_from_slice(&checksum.to_be_bytes());
    }
    frame
}
