//! Devices that work is posted to.

use crate::either::either;
use crate::error::VerbsError;
#[cfg(rdma)]
use crate::ibverbs;
use crate::port::LocalPort;
use crate::softnic;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

/// Opened device.
pub struct Context {
    pub(crate) device: Device,
}

/// Device of either kind.
pub(crate) enum Device {
    #[cfg(rdma)]
    Hardware(Arc<ibverbs::Context>),
    Software(Arc<softnic::Nic>),
}

impl Context {
    fn of(device: Device) -> Arc<Self> {
        Arc::new(Self { device })
    }

    /// Opens the host's device `name`, or the first with an active port, and chooses an address of the port.
    ///
    /// RoCE v2 over IPv4 is preferred, then RoCE v2 over IPv6, then any other address.
    ///
    /// # Errors
    /// [`VerbsError`], which names what is missing.
    #[cfg_attr(not(rdma), allow(unused_variables))]
    pub fn find(name: Option<&str>) -> Result<(Arc<Self>, LocalPort), VerbsError> {
        #[cfg(rdma)]
        return ibverbs::Context::find(name).map(|(device, port)| (Self::of(Device::Hardware(device)), port));
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
        softnic::Nic::open(address).map(|(nic, port)| (Self::of(Device::Software(nic)), port))
    }

    /// Opens a NIC in software at a port of DPDK. DPDK is set up once in a process.
    ///
    /// # Errors
    /// [`VerbsError`], which names what is missing.
    #[cfg_attr(not(feature = "dpdk"), allow(unused_variables))]
    pub fn dpdk(config: &softnic::DpdkConfig) -> Result<(Arc<Self>, LocalPort), VerbsError> {
        #[cfg(feature = "dpdk")]
        return softnic::Nic::open_dpdk(config).map(|(nic, port)| (Self::of(Device::Software(nic)), port));
        #[cfg(not(feature = "dpdk"))]
        Err(VerbsError::NotBuilt { what: "DPDK", why: "built without cargo feature dpdk" })
    }

    /// Name, as in /sys/class/infiniband. A NIC in software is named `roce-` or `dpdk-` and its address.
    #[must_use]
    pub fn name(&self) -> &str {
        either!(&self.device, Device, device => device.name())
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
        match &self.device {
            #[cfg(rdma)]
            Device::Hardware(device) => device.take_event(),
            Device::Software(_) => None,
        }
    }

    /// Returns true while the device works. Once it has announced its breakdown or removal, nothing completes any more.
    #[must_use]
    pub fn is_present(&self) -> bool {
        match &self.device {
            #[cfg(rdma)]
            Device::Hardware(device) => device.is_present(),
            Device::Software(_) => true,
        }
    }

    /// Returns true when the device works and its port `port` is up.
    #[must_use]
    #[cfg_attr(not(rdma), allow(unused_variables))]
    pub fn is_active(&self, port: u8) -> bool {
        match &self.device {
            #[cfg(rdma)]
            Device::Hardware(device) => device.is_active(port),
            Device::Software(nic) => nic.is_active(),
        }
    }

    /// Returns true when peers' writes are in memory once they complete. Hardware may leave them in this host's caches
    /// (Intel, "Data Direct I/O Technology").
    pub fn writes_past_caches(&self) -> bool {
        match &self.device {
            #[cfg(rdma)]
            Device::Hardware(_) => false,
            Device::Software(_) => true,
        }
    }

    /// Most entries of a completion queue.
    ///
    /// # Errors
    /// The error that the library reports.
    pub fn max_completions(&self) -> io::Result<u32> {
        match &self.device {
            #[cfg(rdma)]
            Device::Hardware(device) => device.max_completions(),
            // Its queues grow.
            Device::Software(_) => Ok(u32::MAX),
        }
    }

    /// Returns true when the device has type-2 memory windows.
    ///
    /// # Errors
    /// The error that the library reports.
    pub(crate) fn has_memory_windows(&self) -> io::Result<bool> {
        match &self.device {
            #[cfg(rdma)]
            Device::Hardware(device) => device.has_memory_windows(),
            Device::Software(_) => Ok(true),
        }
    }
}
