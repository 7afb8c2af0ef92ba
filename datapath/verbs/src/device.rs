//! The device that work is posted to.

#[cfg(rdma)]
use super::ibverbs;
use super::{either, softnic};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

/// Why there is no device to use.
#[derive(Debug, thiserror::Error)]
pub enum VerbsError {
    /// The build cannot speak to any.
    #[error("this build has no {what}: {why}")]
    NotBuilt {
        /// What it lacks.
        what: &'static str,
        /// The reason.
        why: &'static str,
    },
    /// What has no default is missing in the configuration.
    #[error("{0} is not set")]
    Unset(&'static str),
    /// A setting cannot be.
    #[error(transparent)]
    OutOfBounds(#[from] embarcadero_wire::OutOfBounds),
    /// The kernel has none.
    #[error("this host has no RDMA device; soft-RoCE makes one of any network interface: hw-setup/soft-roce apply")]
    NoDevice,
    /// None of that name.
    #[error("there is no RDMA device {name}; there are: {present}")]
    NotFound {
        /// As configured.
        name: String,
        /// What there is.
        present: String,
    },
    /// None of them can be used.
    #[error("RDMA device {name} has no active port with an address: bring its interface up")]
    PortDown {
        /// Which.
        name: String,
    },
    /// A NIC in software has no address to be reached at.
    #[error("no interface of this host that is up has {}", .0.map_or("an address".to_owned(), |address| format!("the address {address}")))]
    NoAddress(Option<IpAddr>),
    /// The library, or the kernel, refuses.
    #[error("cannot {action} of RDMA device {name}: {source}{}", hint(.source))]
    Call {
        /// Which device.
        name: String,
        /// What was tried.
        action: &'static str,
        /// What it said.
        source: io::Error,
    },
}

/// What to do about an error number.
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

/// A port that can be used, and which of its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalPort {
    /// Number, from 1.
    pub number: u8,
    /// Index of the address in the port's table.
    pub gid_index: u8,
    /// The address.
    pub gid: [u8; 16],
    /// LID (InfiniBand); 0 on Ethernet.
    pub lid: u16,
    /// Path MTU in force, bytes.
    pub mtu: u32,
    /// RoCE rather than InfiniBand.
    pub ethernet: bool,
    /// Largest message, bytes.
    pub max_message_bytes: u32,
}

/// An opened device.
pub enum Context {
    /// One of the host's.
    #[cfg(rdma)]
    Hardware(Arc<ibverbs::Context>),
    /// This process.
    Software(Arc<softnic::Nic>),
}

impl Context {
    /// Opens the host's device of that name, or the first with an active port, and chooses the port's address: RoCE v2
    /// over IPv4, else over IPv6, else whatever there is.
    ///
    /// # Errors
    /// [`VerbsError`], naming what is missing.
    #[cfg_attr(not(rdma), allow(unused_variables))]
    pub fn find(name: Option<&str>) -> Result<(Arc<Self>, LocalPort), VerbsError> {
        #[cfg(rdma)]
        return ibverbs::Context::find(name).map(|(context, port)| (Arc::new(Self::Hardware(context)), port));
        #[cfg(not(rdma))]
        Err(VerbsError::NotBuilt { what: "RDMA devices", why: env!("EMBARCADERO_NO_RDMA") })
    }

    /// A NIC in software, at that address of this host, or at the first that other hosts can reach (else at a loopback
    /// one).
    ///
    /// # Errors
    /// [`VerbsError`], naming what is missing.
    pub fn software(address: Option<IpAddr>) -> Result<(Arc<Self>, LocalPort), VerbsError> {
        softnic::Nic::open(address).map(|(nic, port)| (Arc::new(Self::Software(nic)), port))
    }

    /// A NIC in software at a port of DPDK. DPDK is set up once in a process.
    ///
    /// # Errors
    /// [`VerbsError`], naming what is missing.
    #[cfg_attr(not(feature = "dpdk"), allow(unused_variables))]
    pub fn dpdk(config: &softnic::DpdkConfig) -> Result<(Arc<Self>, LocalPort), VerbsError> {
        #[cfg(feature = "dpdk")]
        return softnic::Nic::open_dpdk(config).map(|(nic, port)| (Arc::new(Self::Software(nic)), port));
        #[cfg(not(feature = "dpdk"))]
        Err(VerbsError::NotBuilt { what: "DPDK", why: "built without cargo feature dpdk" })
    }

    /// Name, as in /sys/class/infiniband; of a NIC in software `roce-` or `dpdk-` and its address.
    #[must_use]
    pub fn name(&self) -> &str {
        either!(self, device => device.name())
    }

    /// An error of a call on this device, with what to do about it.
    pub fn error(&self, action: &'static str) -> impl FnOnce(io::Error) -> VerbsError + use<> {
        let name = self.name().to_owned();
        move |source| VerbsError::Call { name, action, source }
    }

    /// Takes something that the device announces, in words: a port that goes down, or that it breaks down itself
    /// (`ibv_get_async_event(3)`).
    #[must_use]
    pub fn take_event(&self) -> Option<String> {
        match self {
            #[cfg(rdma)]
            Self::Hardware(device) => device.take_event(),
            Self::Software(_) => None,
        }
    }

    /// False once the device has announced that it breaks down or is removed: then nothing completes any more.
    #[must_use]
    pub fn is_present(&self) -> bool {
        match self {
            #[cfg(rdma)]
            Self::Hardware(device) => device.is_present(),
            Self::Software(_) => true,
        }
    }

    /// Whether the device is there and a port of it is up.
    #[must_use]
    #[cfg_attr(not(rdma), allow(unused_variables))]
    pub fn is_active(&self, port: u8) -> bool {
        match self {
            #[cfg(rdma)]
            Self::Hardware(device) => device.is_active(port),
            Self::Software(nic) => nic.is_active(),
        }
    }

    /// Whether what peers write into a region is in its memory once it is complete. Hardware may leave it in this host's
    /// caches (Intel, "Data Direct I/O Technology").
    pub fn writes_past_caches(&self) -> bool {
        match self {
            #[cfg(rdma)]
            Self::Hardware(_) => false,
            Self::Software(_) => true,
        }
    }

    /// Whether it has type-2 memory windows.
    ///
    /// # Errors
    /// What the library reports.
    pub fn has_memory_windows(&self) -> io::Result<bool> {
        match self {
            #[cfg(rdma)]
            Self::Hardware(device) => device.has_memory_windows(),
            Self::Software(_) => Ok(true),
        }
    }
}
