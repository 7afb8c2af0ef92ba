//! Devices that work is posted to.

#[cfg(rdma)]
use super::ibverbs;
use super::{either, softnic};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

/// Reason why no device can be used.
#[derive(Debug, thiserror::Error)]
pub enum VerbsError {
    /// The build lacks the code for such devices.
    #[error("this build has no {what}: {why}")]
    NotBuilt {
        /// Kind of device that the build lacks.
        what: &'static str,
        /// Reason that the build lacks it.
        why: &'static str,
    },
    /// A setting without a default is missing.
    #[error("{0} is not set")]
    Unset(&'static str),
    /// A setting is out of its bounds.
    #[error(transparent)]
    OutOfBounds(#[from] embarcadero_wire::OutOfBounds),
    /// The host has no RDMA device.
    #[error("this host has no RDMA device; soft-RoCE makes one of any network interface: hw-setup/soft-roce apply")]
    NoDevice,
    /// The host has no RDMA device of that name.
    #[error("there is no RDMA device {name}; there are: {present}")]
    NotFound {
        /// Name in the configuration.
        name: String,
        /// Names of the host's devices.
        present: String,
    },
    /// The RDMA device has no port that can be used.
    #[error("RDMA device {name} has no active port with an address: bring its interface up")]
    PortDown {
        /// Name of the device.
        name: String,
    },
    /// No interface has an address for a NIC in software.
    #[error("no interface of this host that is up has {}", .0.map_or("an address".to_owned(), |address| format!("the address {address}")))]
    NoAddress(Option<IpAddr>),
    /// The library or the kernel refuses a call.
    #[error("cannot {action} of RDMA device {name}: {source}{}", hint(.source))]
    Call {
        /// Name of the device.
        name: String,
        /// Action that failed, as a phrase.
        action: &'static str,
        /// Error that the library or the kernel reports.
        source: io::Error,
    },
}

/// Advice for an error number.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            "; raise the locked-memory limit (hw-setup/rdma apply and a new login, or LimitMEMLOCK=infinity in a unit)"
        }
        Some(libc::EOPNOTSUPP) => {
            "; memory on fsdax cannot be registered: put the region on a device-dax node, tmpfs or hugetlbfs"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "; this user may not: /dev/infiniband/uverbs* is to be opened, or (transport: roce) CAP_NET_RAW is needed"
        }
        Some(libc::EADDRINUSE) => "; the kernel's soft-RoCE has UDP port 4791: use its device (transport: verbs)",
        _ => "",
    }
}

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
    /// Whether the link is Ethernet (RoCE) rather than InfiniBand.
    pub ethernet: bool,
    /// Bytes of the longest message.
    pub max_message_bytes: u32,
}

/// Opened device.
pub enum Context {
    /// RDMA device of the host.
    #[cfg(rdma)]
    Hardware(Arc<ibverbs::Context>),
    /// NIC in software.
    Software(Arc<softnic::Nic>),
}

impl Context {
    /// Opens the host's device `name`, or the first with an active port, and chooses an address of the port.
    ///
    /// RoCE v2 over IPv4 is preferred, then RoCE v2 over IPv6, then any other address.
    ///
    /// # Errors
    /// [`VerbsError`], which names what is missing.
    #[cfg_attr(not(rdma), allow(unused_variables))]
    pub fn find(name: Option<&str>) -> Result<(Arc<Self>, LocalPort), VerbsError> {
        #[cfg(rdma)]
        return ibverbs::Context::find(name).map(|(context, port)| (Arc::new(Self::Hardware(context)), port));
        #[cfg(not(rdma))]
        Err(VerbsError::NotBuilt { what: "RDMA devices", why: env!("EMBARCADERO_NO_RDMA") })
    }

    /// Opens a NIC in software at an address of this host.
    ///
    /// Without `address` it takes the first address that other hosts can reach, or else a loopback address.
    ///
    /// # Errors
    /// [`VerbsError`], which names what is missing.
    pub fn software(address: Option<IpAddr>) -> Result<(Arc<Self>, LocalPort), VerbsError> {
        softnic::Nic::open(address).map(|(nic, port)| (Arc::new(Self::Software(nic)), port))
    }

    /// Opens a NIC in software at a port of DPDK. DPDK is set up once in a process.
    ///
    /// # Errors
    /// [`VerbsError`], which names what is missing.
    #[cfg_attr(not(feature = "dpdk"), allow(unused_variables))]
    pub fn dpdk(config: &softnic::DpdkConfig) -> Result<(Arc<Self>, LocalPort), VerbsError> {
        #[cfg(feature = "dpdk")]
        return softnic::Nic::open_dpdk(config).map(|(nic, port)| (Arc::new(Self::Software(nic)), port));
        #[cfg(not(feature = "dpdk"))]
        Err(VerbsError::NotBuilt { what: "DPDK", why: "built without cargo feature dpdk" })
    }

    /// Name, as in /sys/class/infiniband. A NIC in software is named `roce-` or `dpdk-` and its address.
    #[must_use]
    pub fn name(&self) -> &str {
        either!(self, device => device.name())
    }

    /// Makes the error of a call on this device, with advice.
    pub fn error(&self, action: &'static str) -> impl FnOnce(io::Error) -> VerbsError + use<> {
        let name = self.name().to_owned();
        move |source| VerbsError::Call { name, action, source }
    }

    /// Takes the next announcement of the device, in words: a port that goes down, or the device's own breakdown
    /// (`ibv_get_async_event(3)`).
    #[must_use]
    pub fn take_event(&self) -> Option<String> {
        match self {
            #[cfg(rdma)]
            Self::Hardware(device) => device.take_event(),
            Self::Software(_) => None,
        }
    }

    /// Whether the device works. Once it has announced its breakdown or removal, nothing completes any more.
    #[must_use]
    pub fn is_present(&self) -> bool {
        match self {
            #[cfg(rdma)]
            Self::Hardware(device) => device.is_present(),
            Self::Software(_) => true,
        }
    }

    /// Whether the device works and its port `port` is up.
    #[must_use]
    #[cfg_attr(not(rdma), allow(unused_variables))]
    pub fn is_active(&self, port: u8) -> bool {
        match self {
            #[cfg(rdma)]
            Self::Hardware(device) => device.is_active(port),
            Self::Software(nic) => nic.is_active(),
        }
    }

    /// Whether peers' writes are in memory once they complete. Hardware may leave them in this host's caches (Intel,
    /// "Data Direct I/O Technology").
    pub fn writes_past_caches(&self) -> bool {
        match self {
            #[cfg(rdma)]
            Self::Hardware(_) => false,
            Self::Software(_) => true,
        }
    }

    /// Whether the device has type-2 memory windows.
    ///
    /// # Errors
    /// The error that the library reports.
    pub fn has_memory_windows(&self) -> io::Result<bool> {
        match self {
            #[cfg(rdma)]
            Self::Hardware(device) => device.has_memory_windows(),
            Self::Software(_) => Ok(true),
        }
    }
}
