//! What carries packets: the kernel's sockets, or a queue of a port of DPDK.

#[cfg(feature = "dpdk")]
use super::dpdk::Ethernet;
use super::socket::Sockets;
use embarcadero_roce::Nanos;
use embarcadero_roce::packet::Packet;
#[cfg(doc)]
use embarcadero_roce::packet::decode;
use socket2::Socket;
use std::io;
use std::net::IpAddr;
use std::os::fd::RawFd;

/// Queue pairs that a port can have: of the 24 bits of their numbers, the other bits stand for the port.
pub(super) const PAIRS: u32 = 1 << 12;

pub(super) enum Wire {
    Kernel(Sockets),
    #[cfg(feature = "dpdk")]
    Dpdk(Box<Ethernet>),
}

macro_rules! on {
    ($value:expr, $wire:ident => $result:expr) => {
        match $value {
            Self::Kernel($wire) => $result,
            #[cfg(feature = "dpdk")]
            Self::Dpdk($wire) => $result,
        }
    };
}

impl Wire {
    /// The number of its first queue pair, of [`PAIRS`].
    pub fn first(&self) -> u32 {
        match self {
            Self::Kernel(sockets) => sockets.first,
            #[cfg(feature = "dpdk")]
            Self::Dpdk(ethernet) => ethernet.first(),
        }
    }

    /// Readable when there are packets; `None` where they have to be looked for.
    pub fn descriptor(&self) -> Option<RawFd> {
        match self {
            Self::Kernel(sockets) => Some(sockets.descriptor()),
            #[cfg(feature = "dpdk")]
            Self::Dpdk(_) => None,
        }
    }

    /// The same, to keep.
    pub fn waiter(&self) -> io::Result<Option<Socket>> {
        match self {
            Self::Kernel(sockets) => sockets.waiter().map(Some),
            #[cfg(feature = "dpdk")]
            Self::Dpdk(_) => Ok(None),
        }
    }

    /// Takes a burst of packets, as [`decode`] takes them; how many came, for whomever.
    #[cfg_attr(not(feature = "dpdk"), allow(unused_variables))]
    pub fn receive(&mut self, now: Nanos, each: impl FnMut(&mut [u8])) -> io::Result<usize> {
        match self {
            Self::Kernel(sockets) => sockets.receive(each),
            #[cfg(feature = "dpdk")]
            Self::Dpdk(ethernet) => Ok(ethernet.receive(now, each)),
        }
    }

    /// A peer was named: whoever has to be asked for on the way to him is asked now, so that the first packet is not lost: it
    /// may be a refusal, which ends the queue pair and is not sent again.
    #[cfg_attr(not(feature = "dpdk"), allow(unused_variables))]
    pub fn seek(&mut self, to: IpAddr, now: Nanos) {
        match self {
            // The kernel keeps a packet meanwhile.
            Self::Kernel(_) => {}
            #[cfg(feature = "dpdk")]
            Self::Dpdk(ethernet) => ethernet.seek(to, now),
        }
    }

    /// Packets that can be staged now.
    pub fn room(&self) -> usize {
        on!(self, wire => wire.room())
    }

    pub fn has_room(&self) -> bool {
        self.room() > 0
    }

    /// Puts a packet to those that the next flush sends. There must be room.
    pub fn stage(&mut self, packet: &Packet<'_>) {
        on!(self, wire => wire.stage(packet));
    }

    /// True when nothing is staged.
    pub fn is_flushed(&self) -> bool {
        on!(self, wire => wire.is_flushed())
    }

    /// Sends what is staged. What there is no room for stays; what cannot be sent is lost, as on any wire.
    pub fn flush(&mut self) {
        on!(self, wire => wire.flush());
    }
}
