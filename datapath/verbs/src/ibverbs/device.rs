//! RDMA devices of this host, and their ports.

use super::call::{check, set_nonblocking};
use crate::error::VerbsError;
use crate::peer::RETRIES;
use crate::port::LocalPort;
use crate::report::{DeviceReport, Gid, PortReport};
use rdma_sys as ffi;
use std::ffi::CStr;
use std::io;
use std::marker::PhantomData;
use std::mem::zeroed;
use std::net::Ipv6Addr;
use std::os::raw::c_char;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// List of the RDMA devices of this host, as libibverbs sees them.
pub(super) struct DeviceList {
    devices: NonNull<*mut ffi::ibv_device>,
    count: usize,
}

/// RDMA device of a list.
#[derive(Clone, Copy)]
pub(super) struct Device<'a> {
    device: *mut ffi::ibv_device,
    list: PhantomData<&'a DeviceList>,
}

/// Opened device.
pub(crate) struct Context {
    context: NonNull<ffi::ibv_context>,
    name: String,
    /// True once the device has announced its breakdown or removal.
    gone: AtomicBool,
}

// SAFETY: libibverbs serialises calls on a context; the pointer is only passed to it.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// Copies a string out of a field of fixed length.
fn text(bytes: &[c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// NUMA node of a device; `None` where the kernel does not know.
fn numa_node(name: &str) -> Option<u32> {
    std::fs::read_to_string(format!("/sys/class/infiniband/{name}/device/numa_node")).ok()?.trim().parse().ok()
}

impl DeviceList {
    /// Gets the list from the library. It is empty on a kernel without RDMA.
    ///
    /// # Errors
    /// The error that the library reports.
    pub(super) fn new() -> io::Result<Self> {
        let mut count = 0;
        // SAFETY: the library writes the count and returns an array of that many devices, or null and errno.
        let devices = unsafe { ffi::ibv_get_device_list(&raw mut count) };
        match NonNull::new(devices) {
            Some(devices) => Ok(Self { devices, count: count.max(0) as usize }),
            None => {
                let error = io::Error::last_os_error();
                // No RDMA subsystem in the kernel: there is no list to hold, and an empty one needs no memory.
                if error.raw_os_error() == Some(libc::ENOSYS) {
                    Ok(Self { devices: NonNull::dangling(), count: 0 })
                } else {
                    Err(error)
                }
            }
        }
    }

    /// Iterates over the devices.
    pub(super) fn iter(&self) -> impl Iterator<Item = Device<'_>> {
        // SAFETY: the array has `count` devices and lives as long as the list; with none it is not read.
        let devices = unsafe { std::slice::from_raw_parts(self.devices.as_ptr(), self.count) };
        devices.iter().map(|device| Device { device: *device, list: PhantomData })
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        if self.devices != NonNull::dangling() {
            // SAFETY: the array came from `ibv_get_device_list` and is freed once. Opened devices stay open, and
            // `Context` borrows the list anyway.
            unsafe { ffi::ibv_free_device_list(self.devices.as_ptr()) };
        }
    }
}

impl<'a> Device<'a> {
    /// Name, as in /sys/class/infiniband.
    #[must_use]
    pub(super) fn name(&self) -> String {
        // SAFETY: the device is of a list that lives; its name is a string with an end.
        unsafe { CStr::from_ptr(ffi::ibv_get_device_name(self.device)) }.to_string_lossy().into_owned()
    }

    /// Opens the device.
    ///
    /// # Errors
    /// The error that the library reports: most often no right to open /dev/infiniband/uverbsN.
    pub(super) fn open(self) -> io::Result<Arc<Context>> {
        // SAFETY: the device is of a list that lives.
        let context = unsafe { ffi::ibv_open_device(self.device) };
        match NonNull::new(context) {
            Some(context) => {
                let context = Context { context, name: self.name(), gone: AtomicBool::new(false) };
                // SAFETY: the context is open.
                let descriptor = unsafe { context.context.as_ref() }.async_fd;
                set_nonblocking(descriptor)?;
                Ok(Arc::new(context))
            }
            None => Err(io::Error::last_os_error()),
        }
    }
}

impl Context {
    /// Opens the device `name`, or the first with an active port, and chooses an address of the port.
    ///
    /// # Errors
    /// [`VerbsError`], which names what is missing.
    pub(crate) fn find(name: Option<&str>) -> Result<(Arc<Self>, LocalPort), VerbsError> {
        let call = |name: &str, action, source| VerbsError::Call { name: name.to_owned(), action, source };
        let list = DeviceList::new().map_err(|source| call("(any)", "get the list", source))?;
        let names: Vec<String> = list.iter().map(|device| device.name()).collect();
        let wanted = |device: &Device<'_>| name.is_none_or(|name| device.name() == name);
        let mut down = None;
        for device in list.iter().filter(wanted) {
            let context = device.open().map_err(|source| call(&device.name(), "open the context", source))?;
            let port = context.usable_port().map_err(|source| call(&context.name, "read the ports", source))?;
            match port {
                Some(port) => return Ok((context, port)),
                None => down = Some(device.name()),
            }
        }
        Err(match (down, name) {
            (Some(name), _) => VerbsError::PortDown { name },
            (None, Some(name)) if !names.is_empty() => {
                VerbsError::NotFound { name: name.to_owned(), present: names.join(", ") }
            }
            _ => VerbsError::NoDevice,
        })
    }

    /// Name, as in /sys/class/infiniband.
    #[must_use]
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn raw(&self) -> *mut ffi::ibv_context {
        self.context.as_ptr()
    }

    fn device_attributes(&self) -> io::Result<ffi::ibv_device_attr> {
        // SAFETY: plain data, for which zero is valid.
        let mut attributes: ffi::ibv_device_attr = unsafe { zeroed() };
        // SAFETY: the context is open, and the attributes live across the call.
        check(unsafe { ffi::ibv_query_device(self.context.as_ptr(), &raw mut attributes) })?;
        Ok(attributes)
    }

    fn port_attributes(&self, number: u8) -> io::Result<ffi::ibv_port_attr> {
        // SAFETY: plain data, for which zero is valid.
        let mut attributes: ffi::ibv_port_attr = unsafe { zeroed() };
        // SAFETY: the context is open, and the attributes live across the call.
        check(unsafe { ffi::embarcadero_ibv_query_port(self.context.as_ptr(), number, &raw mut attributes) })?;
        Ok(attributes)
    }

    /// Takes the next announcement of the device, in words (`ibv_get_async_event(3)`).
    #[must_use]
    pub(crate) fn take_event(&self) -> Option<String> {
        // SAFETY: plain data, for which zero is valid.
        let mut event: ffi::ibv_async_event = unsafe { zeroed() };
        // SAFETY: the context is open, the event lives across the call, and the descriptor does not block.
        if unsafe { ffi::ibv_get_async_event(self.context.as_ptr(), &raw mut event) } != 0 {
            return None;
        }
        // SAFETY: the event was taken just now, and is given back once.
        unsafe { ffi::ibv_ack_async_event(&raw mut event) };
        if event.event_type == ffi::IBV_EVENT_DEVICE_FATAL {
            self.gone.store(true, Ordering::Relaxed);
        }
        // SAFETY: the library has a constant text for every number.
        let text = unsafe { CStr::from_ptr(ffi::ibv_event_type_str(event.event_type)) };
        Some(text.to_string_lossy().into_owned())
    }

    /// Returns true while the device works: it has not announced its breakdown or removal.
    #[must_use]
    pub(crate) fn is_present(&self) -> bool {
        while self.take_event().is_some() {}
        !self.gone.load(Ordering::Relaxed)
    }

    /// Returns true when the device works and its port `port` is up.
    #[must_use]
    pub(crate) fn is_active(&self, port: u8) -> bool {
        self.is_present() && self.port_attributes(port).is_ok_and(|port| port.state == ffi::IBV_PORT_ACTIVE)
    }

    /// First active port with an address.
    fn usable_port(&self) -> io::Result<Option<LocalPort>> {
        for number in 1..=self.device_attributes()?.phys_port_cnt {
            let attributes = self.port_attributes(number)?;
            if attributes.state != ffi::IBV_PORT_ACTIVE {
                continue;
            }
            let ethernet = u32::from(attributes.link_layer) == ffi::IBV_LINK_LAYER_ETHERNET;
            let port = self.port(number)?;
            let rank = |gid: &&Gid| match (gid.kind, gid.address.to_ipv4_mapped()) {
                ("RoCE v2", Some(_)) => 0,
                ("RoCE v2", None) => 1,
                _ => 2,
            };
            if let Some(gid) = port.gids.iter().min_by_key(rank) {
                return Ok(Some(LocalPort {
                    number,
                    gid_index: gid.index as u8,
                    gid: gid.address.octets(),
                    lid: attributes.lid,
                    mtu: port.mtu,
                    ethernet,
                    max_message_bytes: attributes.max_msg_sz,
                    retries: RETRIES,
                }));
            }
        }
        Ok(None)
    }

    /// Most entries of a completion queue (`max_cqe`).
    ///
    /// # Errors
    /// The error that the library reports.
    pub(crate) fn max_completions(&self) -> io::Result<u32> {
        Ok(self.device_attributes()?.max_cqe.max(0).cast_unsigned())
    }

    /// Returns true when the device has type-2 memory windows.
    ///
    /// # Errors
    /// The error that the library reports.
    pub(crate) fn has_memory_windows(&self) -> io::Result<bool> {
        let windows = ffi::IBV_DEVICE_MEM_WINDOW_TYPE_2A | ffi::IBV_DEVICE_MEM_WINDOW_TYPE_2B;
        Ok(self.device_attributes()?.device_cap_flags & windows != 0)
    }

    /// Reports the device and its capabilities.
    ///
    /// # Errors
    /// The error that the library reports.
    pub(crate) fn report(&self) -> io::Result<DeviceReport> {
        let attributes = self.device_attributes()?;
        Ok(DeviceReport {
            name: self.name.clone(),
            firmware: text(&attributes.fw_ver),
            numa_node: numa_node(&self.name),
            memory_windows: self.has_memory_windows()?,
            ports: (1..=attributes.phys_port_cnt).map(|number| self.port(number)).collect::<io::Result<_>>()?,
        })
    }

    /// Reports the port of that number.
    fn port(&self, number: u8) -> io::Result<PortReport> {
        let attributes = self.port_attributes(number)?;
        let state = match attributes.state {
            ffi::IBV_PORT_DOWN => "down",
            ffi::IBV_PORT_INIT => "init",
            ffi::IBV_PORT_ARMED => "armed",
            ffi::IBV_PORT_ACTIVE => "active",
            ffi::IBV_PORT_ACTIVE_DEFER => "active defer",
            _ => "unknown",
        };
        let link_layer = match u32::from(attributes.link_layer) {
            ffi::IBV_LINK_LAYER_ETHERNET => "Ethernet",
            ffi::IBV_LINK_LAYER_INFINIBAND => "InfiniBand",
            _ => "unknown",
        };
        let gids = (0..attributes.gid_tbl_len.max(0).cast_unsigned()).filter_map(|index| self.gid(number, index));
        // `enum ibv_mtu` counts from 1: 256, 512, ... 4096 bytes.
        let mtu = if (1..=5).contains(&attributes.active_mtu) { 128 << attributes.active_mtu } else { 0 };
        Ok(PortReport { number, state, mtu, link_layer, gids: gids.collect() })
    }

    /// Entry `index` of a port's address table; `None` where it is empty.
    fn gid(&self, port: u8, index: u32) -> Option<Gid> {
        // SAFETY: plain data, for which zero is valid.
        let mut entry: ffi::ibv_gid_entry = unsafe { zeroed() };
        // SAFETY: the context is open, and the entry lives across the call.
        check(unsafe { ffi::ibv_query_gid_ex(self.context.as_ptr(), port.into(), index, &raw mut entry, 0) }).ok()?;
        // SAFETY: a GID is 16 bytes whichever way it is looked at.
        let address = Ipv6Addr::from(unsafe { entry.gid.raw });
        let kind = match entry.gid_type {
            ffi::IBV_GID_TYPE_IB => "IB",
            ffi::IBV_GID_TYPE_ROCE_V1 => "RoCE v1",
            ffi::IBV_GID_TYPE_ROCE_V2 => "RoCE v2",
            _ => "unknown",
        };
        (!address.is_unspecified()).then_some(Gid { index, address, kind })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context came from `ibv_open_device`; what was made of it holds it, so it is closed last, and once.
        unsafe { ffi::ibv_close_device(self.context.as_ptr()) };
    }
}

/// Surveys every device of this host. For a device that cannot be opened, it returns the reason.
pub(crate) fn survey() -> io::Result<Vec<(String, io::Result<DeviceReport>)>> {
    let list = DeviceList::new()?;
    Ok(list.iter().map(|device| (device.name(), device.open().and_then(|context| context.report()))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_survey_sees_what_the_kernel_has() {
        let kernel = std::fs::read_dir("/sys/class/infiniband").map_or(0, Iterator::count);
        let survey = survey().unwrap();
        assert_eq!(survey.len(), kernel);
        for report in survey.into_iter().filter_map(|(_, report)| report.ok()) {
            assert!(!report.ports.is_empty());
            assert!(report.ports.iter().all(|port| port.number > 0 && port.state != "unknown"));
        }
    }
}
