//! Connection of a queue pair to its peer.

/// Address of a queue pair, which a peer needs to connect. It travels over the control channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    /// Global address of the port.
    pub gid: [u8; 16],
    /// LID of the port (InfiniBand); 0 on Ethernet.
    pub lid: u16,
    /// Number of the queue pair.
    pub queue_pair: u32,
    /// Sequence number of the first packet that it sends, 24 bits.
    pub first_psn: u32,
    /// Path MTU in force at the port, bytes.
    pub mtu: u32,
}

/// Times that an unanswered packet is sent again.
pub(crate) const RETRIES: u8 = 7;
/// Times that a packet is sent again while the peer has no receive: 7 stands for "without end" (IBTA 1.4, 9.7.5.2.8).
pub(crate) const RNR_RETRIES: u8 = 7;
/// Code of the time that the peer waits for a receive of this side: 12 stands for 0.64 ms (IBTA 1.4, 9.7.5.2.8).
pub(crate) const RNR_TIMER: u8 = 12;
