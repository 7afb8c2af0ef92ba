//! Fuzzes a queue pair: no sequence of packets makes it panic or write outside the window of its peer.
#![no_main]

use embarcadero_roce::packet::{Reth, SCRATCH_BYTES, decode};
use embarcadero_roce::psn::Psn;
use embarcadero_roce::{Access, Attributes, Memory, NoAccess, Operation, PathMtu, QueuePair, Receive, Work};
use libfuzzer_sys::fuzz_target;
use std::net::IpAddr;

/// Memory of which peers may read and write bytes 256 to 767, with key 0.
struct Window([u8; 1024]);

impl Memory for Window {
    fn check(&self, _: u32, remote: Reth, _: Access) -> Result<(), NoAccess> {
        let end = remote.address.checked_add(remote.bytes.into()).ok_or(NoAccess)?;
        if remote.rkey == 0 && remote.address >= 256 && end <= 768 { Ok(()) } else { Err(NoAccess) }
    }

    fn write(&mut self, queue_pair: u32, rkey: u32, address: u64, bytes: &[u8]) -> Result<(), NoAccess> {
        self.check(queue_pair, Reth { address, rkey, bytes: bytes.len() as u32 }, Access::Write)?;
        self.0[address as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, queue_pair: u32, remote: Reth, into: &mut Vec<u8>) -> Result<(), NoAccess> {
        self.check(queue_pair, remote, Access::Read)?;
        into.extend_from_slice(&self.0[remote.address as usize..][..remote.bytes as usize]);
        Ok(())
    }
}

const NOBODY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);

fuzz_target!(|bytes: &[u8]| {
    let _ = decode(&mut bytes.to_vec());
    // The fuzzer would not find the checksum: each piece of the input becomes a packet with a correct one.
    let attributes = Attributes {
        local: NOBODY,
        peer: NOBODY,
        number: 0,
        peer_number: 0,
        source_port: 0,
        path_mtu: PathMtu::Mtu256,
        send_psn: Psn::new(0),
        receive_psn: Psn::new(0),
        timeout: 1000,
        retries: 2,
        not_ready_retries: 7,
        rnr_timer: 1,
        window: 16,
        line_rate: 1e9,
    };
    let mut pair = QueuePair::new(attributes);
    let mut memory = Window([0xee; 1024]);
    let _ =
        pair.post(Work { id: 0, operation: Operation::Read { address: 0, rkey: 0, bytes: 600 }, payload: Vec::new() });
    let _ = pair.post(Work { id: 1, operation: Operation::Send { immediate: None }, payload: vec![0; 600] });
    for id in 0..2 {
        pair.post_receive(Receive { id, buffer: vec![0; 300] });
    }
    for (now, piece) in (0..).step_by(300).zip(bytes.chunks(24)) {
        let mut headers = [0; 24];
        headers[..piece.len()].copy_from_slice(piece);
        let lengths = [0, 1, 88, 256, 257];
        let payload = vec![0x11; lengths[usize::from(headers[23]) % lengths.len()]];
        if let Some(packet) = packet::of(&headers, &payload) {
            pair.receive(&packet, now, &mut memory);
        }
        pair.transmit(now, &memory, 8, |packet| {
            let mut bytes = vec![0; SCRATCH_BYTES];
            assert!(packet.encode(&mut bytes).is_ok() && decode(&mut bytes) == Ok(*packet));
        });
        while pair.poll().is_some() {}
    }
    let outside = memory.0[..256].iter().chain(&memory.0[768..]);
    assert!(outside.copied().all(|byte| byte == 0xee));
});

mod packet {
    use super::NOBODY;
    use embarcadero_roce::packet::{Aeth, Ecn, Opcode, Packet, Reth, Syndrome};
    use embarcadero_roce::psn::Psn;

    /// Packet from the peer with the header fields that `bytes` encode; none if the opcode is unknown.
    pub fn of<'a>(bytes: &[u8; 24], payload: &'a [u8]) -> Option<Packet<'a>> {
        let opcode = Opcode::from_code(bytes[0])?;
        let syndromes =
            [Syndrome::Ack(31), Syndrome::RnrNak(1), Syndrome::PsnSequenceError, Syndrome::RemoteAccessError, Syndrome::InvalidRequest];
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Some(Packet {
            from: NOBODY,
            to: NOBODY,
            source_port: 0,
            ecn: if bytes[1] & 2 == 0 { Ecn::Capable0 } else { Ecn::Congested },
            opcode,
            solicited: false,
            wants_ack: bytes[1] & 1 == 0,
            queue_pair: 0,
            psn: Psn::new(u32::from(bytes[2]).wrapping_sub(8)),
            reth: opcode.has_reth().then(|| Reth {
                address: u64::from(word(4)) << (bytes[3] & 32) | u64::from(bytes[3]),
                rkey: u32::from(bytes[8] & 1),
                bytes: word(9) >> (bytes[13] & 31),
            }),
            aeth: opcode.has_aeth().then(|| Aeth {
                syndrome: syndromes[usize::from(bytes[14]) % syndromes.len()],
                messages: word(15) >> 8,
            }),
            immediate: opcode.has_immediate().then(|| word(19)),
            payload,
        })
    }
}
