//! Ports of devices.

/// Port of a device that can be used, and one of its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalPort {
    /// Number of the port, from 1.
    pub number: u8,
    /// Index of the address in the port's table.
    pub gid_index: u8,
    /// Global address of the port.
    pub gid: [u8; 16],
    /// LID (InfiniBand); 0 on Ethernet.
    pub lid: u16,
    /// Path MTU in force, bytes.
    pub mtu: u32,
    /// True when the link is Ethernet (RoCE), false when it is InfiniBand.
    pub ethernet: bool,
    /// Bytes of the longest message.
    pub max_message_bytes: u32,
    /// Times that the port's queue pairs send an unanswered packet again before they fail; 7 if nobody changes it.
    ///
    /// Devices of the host take at most 7. A NIC in software takes up to 255, which is minutes of silence.
    pub retries: u8,
}
