//! Cost of the RoCEv2 engine of `transport: roce` alone, without socket and without copies to memory.

use crate::report::Row;
use anyhow::{Context, Result, ensure};
use embarcadero_roce::packet::{Ecn, Opcode, Packet, Reth, SCRATCH_BYTES, decode};
use embarcadero_roce::psn::Psn;
use embarcadero_roce::{Access, Attributes, Memory, NoAccess, PathMtu, QueuePair};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

/// Number of packets in a message.
const PACKETS: u32 = 128;
const MTU: PathMtu = PathMtu::Mtu4096;

/// Memory that accepts every write and keeps nothing.
struct Nowhere;

impl Memory for Nowhere {
    fn check(&self, _: u32, _: Reth, _: Access) -> Result<(), NoAccess> {
        Ok(())
    }

    fn write(&mut self, _: u32, _: u32, _: u64, _: &[u8]) -> Result<(), NoAccess> {
        Ok(())
    }

    fn read(&self, _: u32, _: Reth, _: &mut Vec<u8>) -> Result<(), NoAccess> {
        Err(NoAccess)
    }
}

fn responder() -> QueuePair<Vec<u8>> {
    let address = |last| IpAddr::from(Ipv4Addr::new(10, 0, 0, last));
    QueuePair::new(Attributes {
        local: address(1),
        peer: address(2),
        number: 1,
        peer_number: 2,
        source_port: 0xc000,
        path_mtu: MTU,
        send_psn: Psn::new(0),
        receive_psn: Psn::new(0),
        timeout: 1_000_000,
        retries: 7,
        not_ready_retries: 7,
        rnr_timer: 1,
        window: PACKETS,
        line_rate: 1e10,
    })
}

/// Encodes a message whose packets are numbered from `first`, back to back into `bytes`. `ends` gets the end of each.
fn message(first: u32, payload: &[u8], bytes: &mut Vec<u8>, ends: &mut Vec<usize>) -> Result<()> {
    bytes.clear();
    ends.clear();
    for index in 0..PACKETS {
        let opcode = match index {
            0 => Opcode::WriteFirst,
            last if last == PACKETS - 1 => Opcode::WriteLast,
            _ => Opcode::WriteMiddle,
        };
        let remote = Reth { address: 0, rkey: 1, bytes: PACKETS * MTU.bytes() as u32 };
        let packet = Packet {
            from: Ipv4Addr::new(10, 0, 0, 2).into(),
            to: Ipv4Addr::new(10, 0, 0, 1).into(),
            source_port: 0xc000,
            ecn: Ecn::Capable0,
            opcode,
            solicited: false,
            wants_ack: index == PACKETS - 1,
            queue_pair: 1,
            psn: Psn::new(first.wrapping_add(index) & 0xff_ffff),
            reth: (index == 0).then_some(remote),
            aeth: None,
            immediate: None,
            payload,
        };
        bytes.extend([0; SCRATCH_BYTES]);
        packet.encode(bytes).context("a packet cannot be encoded")?;
        ends.push(bytes.len());
    }
    Ok(())
}

/// Seconds per packet of 4096 bytes: to encode it, to check and decode it, and for the responder to execute it.
fn per_packet(seconds: f64) -> Result<[f64; 3]> {
    let payload = vec![0x5a; MTU.bytes()];
    let (mut pair, mut bytes, mut ends) = (responder(), Vec::new(), Vec::new());
    let (mut times, mut messages, begun) = ([Duration::ZERO; 3], 0u32, Instant::now());
    while begun.elapsed().as_secs_f64() < seconds {
        let start = Instant::now();
        message(messages.wrapping_mul(PACKETS), &payload, &mut bytes, &mut ends)?;
        let made = Instant::now();
        let mut packets = Vec::with_capacity(PACKETS as usize);
        let (mut rest, mut from) = (&mut bytes[..], 0);
        for end in &ends {
            let (packet, behind) = rest.split_at_mut(*end - from);
            packets.push(decode(packet)?);
            (rest, from) = (behind, *end);
        }
        let read = Instant::now();
        for packet in &packets {
            pair.receive(packet, 0, &mut Nowhere);
        }
        let answers = pair.transmit(0, &Nowhere, 16, |_| {});
        let done = Instant::now();
        ensure!(answers == 1 && pair.failure().is_none(), "the responder did not take the message");
        for (time, passed) in times.iter_mut().zip([made - start, read - made, done - read]) {
            *time += passed;
        }
        messages += 1;
    }
    Ok(times.map(|time| time.as_secs_f64() / f64::from(messages) / f64::from(PACKETS)))
}

/// Measures encoding, decoding and responding, as one row each.
pub(crate) fn rows(runs: usize, seconds: f64) -> Result<Vec<Row>> {
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..runs {
        for (all, time) in times.iter_mut().zip(per_packet(seconds)?) {
            all.push(time);
        }
    }
    let names = ["engine.encode_4KiB", "engine.decode_4KiB", "engine.respond_4KiB"];
    Ok(names.into_iter().zip(&times).map(|(name, times)| Row::new(name, "s", times)).collect())
}
