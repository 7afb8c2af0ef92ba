//! Carrier of packets: the kernel's sockets, or a queue of a port of DPDK.

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

/// Carrier of packets.
pub(super) enum Wire {
    /// Sockets of the kernel.
    Kernel(Sockets),
    /// Queue of a port of DPDK.
    #[cfg(feature = "dpdk")]
    Dpdk(Box<Ethernet>),
}

/// Evaluates an expression for the carrier, of either kind.
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
    /// Number of the first of its [`PAIRS`] queue pairs.
    pub(super) fn first(&self) -> u32 {
        match self {
            Self::Kernel(sockets) => sockets.first,
            #[cfg(feature = "dpdk")]
            Self::Dpdk(ethernet) => ethernet.first(),
        }
    }

    /// Descriptor that is readable while packets wait; `None` where only polling finds them.
    pub(super) fn descriptor(&self) -> Option<RawFd> {
        match self {
            Self::Kernel(sockets) => Some(sockets.descriptor()),
            #[cfg(feature = "dpdk")]
            Self::Dpdk(_) => None,
        }
    }

    /// Copy of the socket that is readable while packets wait; `None` where only polling finds them.
    pub(super) fn waiter(&self) -> io::Result<Option<Socket>> {
        match self {
            Self::Kernel(sockets) => sockets.waiter().map(Some),
            #[cfg(feature = "dpdk")]
            Self::Dpdk(_) => Ok(None),
        }
    }

    /// Hands a burst of packets to `each`, in the form that [`decode`] takes. Returns the number of packets that came,
    /// which counts those of other ports.
    #[cfg_attr(not(feature = "dpdk"), allow(unused_variables))]
    pub(super) fn receive(&mut self, now: Nanos, each: impl FnMut(&mut [u8])) -> io::Result<usize> {
        match self {
            Self::Kernel(sockets) => sockets.receive(each),
            #[cfg(feature = "dpdk")]
            Self::Dpdk(ethernet) => Ok(ethernet.receive(now, each)),
        }
    }

    /// Looks for the next hop to a new peer, so that the first packet to it is not lost.
    ///
    /// The packet may be a refusal, which ends the queue pair and is not sent again.
    #[cfg_attr(not(feature = "dpdk"), allow(unused_variables))]
    pub(super) fn seek(&mut self, to: IpAddr, now: Nanos) {
        match self {
            // The kernel keeps a packet meanwhile.
            Self::Kernel(_) => {}
            #[cfg(feature = "dpdk")]
            Self::Dpdk(ethernet) => ethernet.seek(to, now),
        }
    }

    /// Number of packets that can be staged now.
    pub(super) fn room(&self) -> usize {
        on!(self, wire => wire.room())
    }

    /// Returns true when a packet can be staged now.
    pub(super) fn has_room(&self) -> bool {
        self.room() > 0
    }

    /// Adds a packet to those that the next flush sends. There must be room.
    pub(super) fn stage(&mut self, packet: &Packet<'_>) {
        on!(self, wire => wire.stage(packet));
    }

    /// Returns true when no packet is staged.
    pub(super) fn is_flushed(&self) -> bool {
        on!(self, wire => wire.is_flushed())
    }

    /// Sends the staged packets. Those without room stay; those that cannot be sent are lost, as on any wire.
    pub(super) fn flush(&mut self) {
        on!(self, wire => wire.flush());
    }
}
