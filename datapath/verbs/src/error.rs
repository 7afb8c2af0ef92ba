//! Reasons why no device can be used.

use std::io;
use std::net::IpAddr;

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
