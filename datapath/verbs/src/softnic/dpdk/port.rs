//! Ethernet ports of DPDK, and their queues.
//!
//! The calls are described in DPDK's programmer's guide, "Poll Mode Driver".

use super::buffers::{BURST, Buffer, Frame, Frames, Pool, Received};
use super::eal::{check, start};
use dpdk_sys as ffi;
use embarcadero_roce::ethernet;
use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::io;
use std::mem::zeroed;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Descriptors of a queue each way.
const DESCRIPTORS: u16 = 1024;
/// Packet buffers of a port, which its queues divide among them.
const BUFFERS: usize = 16384;
/// Fewest packet buffers of a queue: for both full rings, and bursts that are being read or wait at another queue.
const LEAST_BUFFERS: usize = 4096;
/// Bytes of a frame around its packet: header and checksum.
const AROUND_BYTES: usize = ethernet::MAX_HEADER_BYTES + 4;
/// Drivers that refuse a larger MTU than [`MODEST_MTU`], and yet take frames as long as their buffers.
/// (drivers/net/memif/rte_eth_memif.c, drivers/net/af_packet/rte_eth_af_packet.c: `max_rx_pktlen`.)
const MODEST: [&CStr; 2] = [c"net_memif", c"net_af_packet"];
/// Largest MTU that the [`MODEST`] drivers accept, bytes.
const MODEST_MTU: u16 = 1500;
/// Least bytes for a frame in a buffer.
///
/// With the 64 bytes that a pool adds and the 128 bytes of an `rte_mbuf`, they make a page. A pool puts no buffer across
/// pages, and AF_XDP's driver expects buffers without gaps (drivers/net/af_xdp/rte_eth_af_xdp.c, `xdp_umem_configure`,
/// before 24.07).
const LEAST_ROOM: usize = 4096 - 64 - 128;
/// Bytes that DPDK keeps free before a frame (RTE_PKTMBUF_HEADROOM).
const HEADROOM: usize = 128;
/// Bytes of a cache line, to which DPDK aligns buffers (RTE_CACHE_LINE_SIZE).
const CACHE_LINE: usize = 64;

/// Started port of DPDK.
pub(crate) struct EthPort {
    id: u16,
    pub(super) mac: [u8; 6],
    /// Bytes that a frame carries.
    pub mtu: usize,
    queues: Vec<QueueState>,
}

/// State of a queue.
struct QueueState {
    pool: Pool,
    /// True while the queue is in use.
    taken: AtomicBool,
}

// SAFETY: the calls of the control path may be made from any thread; those of a queue go through [`Queues`], of which
// there is one a queue.
unsafe impl Send for EthPort {}
// SAFETY: as above.
unsafe impl Sync for EthPort {}

impl EthPort {
    /// Sets DPDK up, and starts the port `name`, or the first.
    ///
    /// With several queues, the port chooses one for each flow of UDP (the guide, "Receive Side Scaling"). Ports that
    /// cannot do that choose by their own rules.
    ///
    /// # Errors
    /// The error that DPDK reports, or that the port has fewer queues.
    pub(crate) fn open(arguments: &[String], name: Option<&str>, mtu: u16, queues: u16) -> io::Result<Self> {
        start(arguments)?;
        let id = find(name)?;
        let info = information(id)?;
        configure(id, &info, mtu, queues)?;
        let room = (HEADROOM + AROUND_BYTES + usize::from(mtu)).max(LEAST_ROOM).next_multiple_of(CACHE_LINE);
        let buffers = (BUFFERS / usize::from(queues).next_power_of_two()).max(LEAST_BUFFERS);
        let queues = (0..queues)
            .map(|queue| {
                let pool = Pool::new(id, queue, buffers, room)?;
                set_up_queue(id, queue, pool)?;
                Ok(QueueState { pool, taken: AtomicBool::new(false) })
            })
            .collect::<io::Result<_>>()?;
        // SAFETY: the port and its queues are configured.
        check(unsafe { ffi::rte_eth_dev_start(id) }, "start the port")?;
        let mut mac = ffi::rte_ether_addr { addr_bytes: [0; 6] };
        // SAFETY: the address lives across the call.
        check(unsafe { ffi::rte_eth_macaddr_get(id, &raw mut mac) }, "learn the port's address")?;
        Ok(Self { id, mac: mac.addr_bytes, mtu: mtu.into(), queues })
    }

    /// Makes the port take frames to groups, by which IPv6 looks for neighbours. Devices without this setting take them
    /// always.
    ///
    /// # Errors
    /// The error that DPDK reports.
    pub(crate) fn take_groups(&self) -> io::Result<()> {
        // SAFETY: the port is started.
        match unsafe { ffi::rte_eth_allmulticast_enable(self.id) } {
            result if result == -libc::ENOTSUP => Ok(()),
            result => check(result, "take frames to groups"),
        }
    }

    /// Number of queues each way.
    pub(crate) fn queues(&self) -> u16 {
        self.queues.len() as u16
    }

    /// Stops and starts the port.
    ///
    /// # Errors
    /// The error that DPDK reports.
    pub(crate) fn restart(&self) -> io::Result<()> {
        // SAFETY: the port is started and configured.
        unsafe {
            check(ffi::rte_eth_dev_stop(self.id), "stop the port")?;
            check(ffi::rte_eth_dev_start(self.id), "start the port")
        }
    }

    /// Returns true when the link of the port is up.
    pub(crate) fn is_up(&self) -> bool {
        // SAFETY: the port is started.
        unsafe { ffi::embarcadero_link_is_up(self.id) != 0 }
    }
}

impl Drop for EthPort {
    fn drop(&mut self) {
        // SAFETY: the port is started, and nobody has its queues.
        unsafe {
            ffi::rte_eth_dev_stop(self.id);
            ffi::rte_eth_dev_close(self.id);
        }
    }
}

/// Finds the port `name`, or the first port.
fn find(name: Option<&str>) -> io::Result<u16> {
    let mut id = 0;
    match name {
        Some(name) => {
            let c_name = CString::new(name)?;
            // SAFETY: name and number live across the call.
            let result = unsafe { ffi::rte_eth_dev_get_port_by_name(c_name.as_ptr(), &raw mut id) };
            check(result, &format!("find port {name}"))?;
        }
        // SAFETY: takes nothing.
        None if unsafe { ffi::rte_eth_dev_count_avail() } == 0 => {
            return Err(io::Error::other("DPDK has no port: bind a NIC (hw-setup/dpdk), or name a --vdev in dpdk.eal"));
        }
        None => {}
    }
    Ok(id)
}

/// Gets the capabilities of a port.
fn information(id: u16) -> io::Result<ffi::rte_eth_dev_info> {
    // SAFETY: plain data, for which zero is valid.
    let mut info: ffi::rte_eth_dev_info = unsafe { zeroed() };
    // SAFETY: the port is there, and the information lives across the call.
    check(unsafe { ffi::rte_eth_dev_info_get(id, &raw mut info) }, "look at the port")?;
    Ok(info)
}

/// Configures a port for `queues` queues each way, and frames that carry `mtu` bytes.
fn configure(id: u16, info: &ffi::rte_eth_dev_info, mtu: u16, queues: u16) -> io::Result<()> {
    let most = info.max_rx_queues.min(info.max_tx_queues);
    if queues > most {
        return Err(io::Error::other(format!("dpdk.queues is {queues}, but the port has no more than {most}")));
    }
    // SAFETY: the driver's name is a static string.
    let driver = unsafe { CStr::from_ptr(info.driver_name) };
    // SAFETY: plain data, for which zero is valid.
    let mut options: ffi::rte_eth_conf = unsafe { zeroed() };
    options.rxmode.mtu = if MODEST.contains(&driver) { mtu.min(MODEST_MTU) } else { mtu }.into();
    // SAFETY: takes nothing.
    let flows = unsafe { ffi::embarcadero_rss_udp() } & info.flow_type_rss_offloads;
    if queues > 1 && flows != 0 {
        options.rxmode.mq_mode = ffi::RTE_ETH_MQ_RX_RSS;
        options.rx_adv_conf.rss_conf.rss_hf = flows;
    }
    // SAFETY: the options live across the call, which copies them.
    check(unsafe { ffi::rte_eth_dev_configure(id, queues, queues, &raw const options) }, "configure the port")
}

/// Sets up the receive queue and the send queue of a number.
fn set_up_queue(id: u16, queue: u16, pool: Pool) -> io::Result<()> {
    // SAFETY: the port is configured and not started; the pool stays as long as the process, and no options are given.
    unsafe {
        let (socket, none) = (ffi::rte_eth_dev_socket_id(id).cast_unsigned(), std::ptr::null());
        let receives = ffi::rte_eth_rx_queue_setup(id, queue, DESCRIPTORS, socket, none, pool.as_ptr());
        check(receives, "make a receive queue")?;
        let sends = ffi::rte_eth_tx_queue_setup(id, queue, DESCRIPTORS, socket, std::ptr::null());
        check(sends, "make a send queue")
    }
}

/// Receive queue and send queue of one number. One thread uses them at a time.
pub(super) struct Queues {
    port: Arc<EthPort>,
    index: u16,
}

impl Queues {
    /// Takes the queues of a number into use. If their former owner is being dropped, it waits for that.
    ///
    /// The caller ensures that nobody else keeps them: else this does not return.
    pub(super) fn of(port: &Arc<EthPort>, index: u16) -> Self {
        // SYNC: pairs with the release in `drop`.
        while port.queues[usize::from(index)].taken.swap(true, Ordering::Acquire) {
            std::thread::yield_now();
        }
        Self { port: Arc::clone(port), index }
    }

    /// Number of the queues.
    pub(super) fn index(&self) -> u16 {
        self.index
    }

    /// Hands a burst of frames to `each`, and returns the number that came.
    ///
    /// Buffers that `each` returns go back to their pool together. One by one, each would wait for a lock, and so for
    /// stores past the caches. Frames in several buffers are longer than the MTU, and are dropped.
    pub(super) fn receive(&mut self, mut each: impl FnMut(Received) -> Option<Received>) -> usize {
        let mut buffers = [null_mut(); BURST];
        // SAFETY: the port is started, the queue is ours, and as many places are there as stated.
        let count = unsafe { ffi::embarcadero_rx_burst(self.port.id, self.index, buffers.as_mut_ptr(), BURST as u16) };
        let mut done = 0;
        for index in 0..usize::from(count) {
            let received = NonNull::new(buffers[index]).and_then(|buffer| Received::of(Buffer::new(buffer)));
            if let Some(frame) = received.and_then(&mut each) {
                buffers[done] = frame.into_raw();
                done += 1;
            }
        }
        // SAFETY: the first ones are ours, and freed once.
        unsafe { ffi::rte_pktmbuf_free_bulk(buffers.as_mut_ptr(), done as u32) };
        count.into()
    }

    /// Maker of frames to be sent at these queues.
    pub(super) fn frames(&self) -> Frames {
        Frames::new(self.port.queues[usize::from(self.index)].pool)
    }

    /// Sends a burst of the first frames, and removes those that the port took. Returns their number.
    pub(super) fn send(&mut self, frames: &mut VecDeque<Frame>) -> usize {
        let mut buffers = [null_mut(); BURST];
        let count = frames.len().min(BURST);
        for (place, frame) in buffers.iter_mut().zip(frames.iter_mut()) {
            *place = frame.finish();
        }
        // SAFETY: the port is started and the queue ours; what it takes is its own, and is forgotten here.
        let taken = unsafe { ffi::embarcadero_tx_burst(self.port.id, self.index, buffers.as_mut_ptr(), count as u16) };
        frames.drain(..usize::from(taken)).for_each(std::mem::forget);
        taken.into()
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        // SYNC: pairs with the acquire in `of`.
        self.port.queues[usize::from(self.index)].taken.store(false, Ordering::Release);
    }
}
