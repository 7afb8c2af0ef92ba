//! Attributes of a connection.

use crate::packet::{Ecn, Opcode, Packet};
use crate::path::PathMtu;
use crate::psn::Psn;
use crate::time::Nanos;
use std::net::IpAddr;

/// Attributes of a connection: agreed with the peer, and this side's patience (IBTA 11.2.5.2, modify queue pair).
#[derive(Clone, Debug)]
pub struct Attributes {
    /// Address of this side.
    pub local: IpAddr,
    /// Address of the peer, of the same family. Packets from other addresses are dropped.
    pub peer: IpAddr,
    /// Number of this queue pair, 24 bits.
    pub number: u32,
    /// Number of the peer's queue pair, 24 bits.
    pub peer_number: u32,
    /// UDP port that packets are sent from.
    pub source_port: u16,
    /// Payload bytes of a full packet.
    pub path_mtu: PathMtu,
    /// Number of the first packet that this side sends.
    pub send_psn: Psn,
    /// Number of the first packet that the peer sends.
    pub receive_psn: Psn,
    /// Shortest wait for an answer, nanoseconds. A slow path makes it longer, and each sending again doubles it, to a
    /// second at most.
    pub timeout: Nanos,
    /// Times that an unanswered packet is sent again before the queue pair fails.
    pub retries: u8,
    /// Times that a packet is sent again while the peer has no receive posted; 7 means without end.
    pub not_ready_retries: u8,
    /// Time for which a peer waits for a receive of this side, in the code of IBTA 9.7.5.2.8 (table of timer
    /// values), 0 to 31.
    pub rnr_timer: u8,
    /// Most packets under way; rxe has 128 (rxe_param.h, RXE_MAX_UNACKED_PSNS).
    pub window: u32,
    /// Bytes per second of the port. Congestion notifications lower the rate from there.
    pub line_rate: f64,
}

impl Attributes {
    /// Makes a packet to the peer, without extended headers and payload.
    pub(super) fn packet(&self, opcode: Opcode, psn: Psn) -> Packet<'static> {
        Packet {
            from: self.local,
            to: self.peer,
            source_port: self.source_port,
            ecn: Ecn::Capable0,
            opcode,
            solicited: false,
            wants_ack: false,
            queue_pair: self.peer_number,
            psn,
            reth: None,
            aeth: None,
            immediate: None,
            payload: &[],
        }
    }
}
