//! NIC in software: an address, and the link that it is attached to.

#[cfg(feature = "dpdk")]
use super::config::DpdkConfig;
#[cfg(feature = "dpdk")]
use super::dpdk::{EthPort, Ethernet};
use super::identity::Identity;
use super::memory::Domain;
use super::ports::Ports;
use super::socket::{self, Sockets};
use super::wire::Wire;
use crate::error::VerbsError;
use crate::peer::RETRIES;
use crate::port::LocalPort;
use embarcadero_roce::PathMtu;
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::net::if_::InterfaceFlags;
use socket2::Socket;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
#[cfg(feature = "dpdk")]
use std::sync::{Mutex, PoisonError, Weak};

/// Bytes of the longest message. Its packets are far fewer than packet numbers.
const MAX_MESSAGE_BYTES: u32 = 1 << 30;
/// Bytes per second of a port that does not report its rate (10 Gbit/s).
const LINE_RATE: f64 = 1.25e9;

/// NIC in software.
pub(crate) struct Nic {
    identity: Arc<Identity>,
    link: Link,
}

/// Link that a NIC is attached to.
enum Link {
    /// Interface of the kernel. The socket has UDP port 4791, so that the kernel does not answer for it.
    Kernel { interface: String, _port: Socket },
    /// Port of DPDK, whose queues the completion queues share.
    #[cfg(feature = "dpdk")]
    Dpdk { port: Arc<EthPort>, config: DpdkConfig, shared: Mutex<Weak<Ports>> },
}

/// NICs at ports of DPDK. They stay until the process ends, because a closed port cannot be opened again (DPDK's
/// `rte_eth_dev_close`).
#[cfg(feature = "dpdk")]
static ATTACHED: Mutex<Vec<(Arc<Nic>, LocalPort)>> = Mutex::new(Vec::new());

/// Closes the ports that nobody uses, so that drivers leave the kernel's interfaces as they were. `atexit(3)` calls it.
#[cfg(feature = "dpdk")]
extern "C" fn detach() {
    let mut attached = ATTACHED.lock().unwrap_or_else(PoisonError::into_inner);
    attached.retain(|(nic, _)| Arc::strong_count(nic) > 1);
}

/// IP address of an interface, if it has one.
fn address_of(interface: &InterfaceAddress) -> Option<IpAddr> {
    let address = interface.address.as_ref()?;
    let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
}

fn is_up(interface: &InterfaceAddress) -> bool {
    interface.flags.contains(InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING)
}

/// Bytes per second of an interface; `None` where it does not report them.
/// (Linux, Documentation/ABI/testing/sysfs-class-net, "speed").
fn line_rate(interface: &str) -> Option<f64> {
    let megabits: i32 =
        std::fs::read_to_string(format!("/sys/class/net/{interface}/speed")).ok()?.trim().parse().ok()?;
    (megabits > 0).then_some(f64::from(megabits) * 125e3)
}

impl Nic {
    /// Opens a NIC at the address `wanted`, or at the first that other hosts can reach.
    ///
    /// # Errors
    /// [`VerbsError`], which names what is missing.
    pub(crate) fn open(wanted: Option<IpAddr>) -> Result<(Arc<Self>, LocalPort), VerbsError> {
        let refuse = |action, source: io::Error| VerbsError::Call { name: "roce".to_owned(), action, source };
        let interfaces = getifaddrs().map_err(|error| refuse("list the addresses", error.into()))?;
        // Addresses that other hosts reach come before the loopback's, IPv4 before IPv6.
        let found = interfaces
            .filter(is_up)
            .filter_map(|interface| address_of(&interface).map(|address| (interface, address)))
            .filter(|(_, address)| match (wanted, address) {
                (Some(wanted), _) => wanted == *address,
                // A link-local address says nothing without an interface.
                (None, IpAddr::V6(address)) => !address.is_unicast_link_local(),
                (None, IpAddr::V4(_)) => true,
            })
            .min_by_key(|(_, address)| (address.is_loopback(), address.is_ipv6()));
        let Some((interface, address)) = found else { return Err(VerbsError::NoAddress(wanted)) };
        let name = format!("roce-{address}");
        let call = |action, source| VerbsError::Call { name: name.clone(), action, source };
        let interface = interface.interface_name;
        let port = socket::take_port(address).map_err(|error| call("take UDP port 4791", error))?;
        let bytes = socket::link_mtu(&port, &interface).map_err(|error| call("learn the MTU", error))?;
        let small = || call("use the interface", io::Error::other(format!("{interface} carries only {bytes} bytes")));
        let mtu = PathMtu::of_link(bytes).ok_or_else(small)?;
        let line_rate = line_rate(&interface).unwrap_or(LINE_RATE);
        Ok(Self::at(name, Link::Kernel { interface, _port: port }, address, mtu, line_rate))
    }

    /// Opens the NIC at a port of DPDK, of which a process has one.
    ///
    /// # Errors
    /// [`VerbsError`], which names what is missing.
    #[cfg(feature = "dpdk")]
    pub(crate) fn open_dpdk(config: &DpdkConfig) -> Result<(Arc<Self>, LocalPort), VerbsError> {
        let Some(address) = config.address else { return Err(VerbsError::Unset("dpdk.address")) };
        config.validate()?;
        let name = format!("dpdk-{address}");
        let call = |action, source| VerbsError::Call { name: name.clone(), action, source };
        let mut attached = ATTACHED.lock().unwrap_or_else(PoisonError::into_inner);
        for (nic, local) in attached.iter() {
            if let Link::Dpdk { port, config: known, .. } = &nic.link
                && known.port == config.port
            {
                if known != config {
                    let other = || io::Error::other("this process has it open with other settings");
                    return Err(call("open the port", other()));
                }
                // Nobody uses the port, so frames that wait on its broken link can be dropped.
                if Arc::strong_count(nic) == 1 && !port.is_up() {
                    port.restart().map_err(|error| call("start the port again", error))?;
                }
                return Ok((Arc::clone(nic), *local));
            }
        }
        let port = EthPort::open(&config.eal, config.port.as_deref(), config.mtu, config.queues);
        let port = port.map_err(|error| call("open the port", error))?;
        if address.is_ipv6() {
            port.take_groups().map_err(|error| call("look for neighbours", error))?;
        }
        let small = || call("use the port", io::Error::other(format!("dpdk.mtu is {}, too small", config.mtu)));
        let mtu = PathMtu::of_link(port.mtu).ok_or_else(small)?;
        let link = Link::Dpdk { port: Arc::new(port), config: config.clone(), shared: Mutex::new(Weak::new()) };
        let opened = Self::at(name, link, address, mtu, LINE_RATE);
        if attached.is_empty() {
            // SAFETY: the function stays, and does not unwind.
            unsafe { libc::atexit(detach) };
        }
        attached.push(opened.clone());
        Ok(opened)
    }

    fn at(name: String, link: Link, address: IpAddr, mtu: PathMtu, line_rate: f64) -> (Arc<Self>, LocalPort) {
        let gid = match address {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        let local = LocalPort {
            number: 1,
            gid_index: 0,
            gid: Ipv6Addr::octets(&gid),
            lid: 0,
            mtu: mtu.bytes() as u32,
            ethernet: true,
            max_message_bytes: MAX_MESSAGE_BYTES,
            retries: RETRIES,
        };
        (Arc::new(Self { identity: Arc::new(Identity::new(name, address, line_rate)), link }), local)
    }

    pub(crate) fn name(&self) -> &str {
        &self.identity.name
    }

    /// Returns true when the interface is up and still has the address.
    pub(crate) fn is_active(&self) -> bool {
        let name = match &self.link {
            Link::Kernel { interface, .. } => interface,
            #[cfg(feature = "dpdk")]
            Link::Dpdk { port, .. } => return port.is_up(),
        };
        getifaddrs().is_ok_and(|mut interfaces| {
            interfaces.any(|interface| {
                is_up(&interface)
                    && interface.interface_name == *name
                    && address_of(&interface) == Some(self.identity.address)
            })
        })
    }

    pub(crate) fn domain(&self) -> Domain {
        Domain::new(&self.identity.keys)
    }

    /// Ports of which one will drive a new completion queue.
    pub(super) fn ports(self: &Arc<Self>) -> io::Result<Arc<Ports>> {
        match &self.link {
            #[cfg(feature = "dpdk")]
            Link::Dpdk { port, config, shared } => {
                let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(ports) = shared.upgrade() {
                    return Ok(ports);
                }
                // The lock is held and no ports live: if some are being dropped, their queues are soon free.
                let queues = Ethernet::all(port, self.identity.address, config);
                let wires = queues.into_iter().map(|queue| Wire::Dpdk(Box::new(queue))).collect();
                let ports = Ports::new(&self.identity, wires, Arc::clone(self) as _)?;
                *shared = Arc::downgrade(&ports);
                Ok(ports)
            }
            Link::Kernel { .. } => {
                let wire = Wire::Kernel(Sockets::open(self.identity.address)?);
                Ports::new(&self.identity, vec![wire], Arc::clone(self) as _)
            }
        }
    }
}
