//! Filter in the kernel that gives each queue its own packets.

use super::numbers::PAIRS;
use embarcadero_roce::packet::{
    DESTINATION_AT, FRAGMENT_MASK, IPV4_BYTES, IPV4_FIRST, IPV4_FRAGMENT_AT, IPV4_PROTOCOL_AT, IPV4_TO_AT, IPV6_BYTES,
    IPV6_PROTOCOL_AT, IPV6_TO_AT, LOW_24_BITS, UDP, UDP_BYTES, UDP_PORT, UDP_TO_AT,
};
use libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_B, BPF_H, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
use socket2::SockFilter;
use std::net::IpAddr;

/// Condition on a field of a packet.
struct Rule {
    /// Width of the field: `BPF_B`, `BPF_H` or `BPF_W`, for 1, 2 or 4 bytes.
    width: u32,
    /// Offset of the field.
    at: usize,
    /// Bits of the field that count.
    mask: u32,
    /// Value of those bits.
    value: u32,
}

impl Rule {
    /// Instructions of a rule: load the field, mask it, and compare.
    const INSTRUCTIONS: usize = 3;

    const fn new(width: u32, at: usize, mask: u32, value: u32) -> Self {
        Self { width, at, mask, value }
    }

    /// Condition on a whole field.
    const fn whole(width: u32, at: usize, value: u32) -> Self {
        Self::new(width, at, u32::MAX, value)
    }
}

/// Makes a filter that keeps packets of RoCEv2 to `address` for the [`PAIRS`] queue pairs from `first` on.
///
/// The filter sees packets from their IP header on (Linux, Documentation/networking/filter.rst).
pub(super) fn only_for(address: IpAddr, first: u32) -> Vec<SockFilter> {
    let mut rules = Vec::new();
    let (protocol_at, to_at, to, udp_at) = match address {
        IpAddr::V4(address) => {
            // Without options, and no fragment.
            rules.push(Rule::whole(BPF_B, 0, IPV4_FIRST.into()));
            rules.push(Rule::new(BPF_H, IPV4_FRAGMENT_AT, FRAGMENT_MASK.into(), 0));
            (IPV4_PROTOCOL_AT, IPV4_TO_AT, address.octets().to_vec(), IPV4_BYTES)
        }
        IpAddr::V6(address) => (IPV6_PROTOCOL_AT, IPV6_TO_AT, address.octets().to_vec(), IPV6_BYTES),
    };
    rules.push(Rule::whole(BPF_B, protocol_at, UDP.into()));
    for (index, word) in to.as_chunks::<4>().0.iter().enumerate() {
        rules.push(Rule::whole(BPF_W, to_at + size_of_val(word) * index, u32::from_be_bytes(*word)));
    }
    rules.push(Rule::whole(BPF_H, udp_at + UDP_TO_AT, UDP_PORT.into()));
    rules.push(Rule::new(BPF_W, udp_at + UDP_BYTES + DESTINATION_AT, LOW_24_BITS & !(PAIRS - 1), first));
    program(&rules)
}

/// Makes the program that keeps packets which obey all rules.
fn program(rules: &[Rule]) -> Vec<SockFilter> {
    let mut program = Vec::with_capacity(Rule::INSTRUCTIONS * rules.len() + 2);
    for (index, rule) in rules.iter().enumerate() {
        // A rule that fails jumps over those behind it, and over the instruction that keeps the packet.
        let jump = Rule::INSTRUCTIONS * (rules.len() - index - 1) + 1;
        program.push(SockFilter::new((BPF_LD | rule.width | BPF_ABS) as u16, 0, 0, rule.at as u32));
        program.push(SockFilter::new((BPF_ALU | BPF_AND | BPF_K) as u16, 0, 0, rule.mask));
        program.push(SockFilter::new((BPF_JMP | BPF_JEQ | BPF_K) as u16, 0, jump as u8, rule.value));
    }
    // Keeps all bytes of the packet, or none.
    program.push(SockFilter::new(BPF_RET as u16, 0, 0, u32::MAX));
    program.push(SockFilter::new(BPF_RET as u16, 0, 0, 0));
    program
}
