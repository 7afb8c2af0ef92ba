//! DPDK's environment and its Ethernet ports, safely. (Its programmer's guide, "Environment Abstraction Layer", "Poll Mode
//! Driver" and "Mbuf Library", says what the calls do.)

use crate::transport::roce::packet::Put;
use dpdk_sys as ffi;
use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::io;
use std::mem::zeroed;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Packets taken, or sent, with one call.
pub(super) const BURST: usize = 64;
/// Descriptors of a queue.
const DESCRIPTORS: u16 = 1024;
/// Packet buffers: those of both queues, and of a burst each way; a power of two less one wastes no memory.
const BUFFERS: u32 = 16383;
/// What a frame has around its packet: header, one VLAN tag, checksum.
const AROUND_BYTES: usize = 14 + 4 + 4;
/// Drivers that let no more than this be configured, and take what their buffers hold (drivers/net/memif/rte_eth_memif.c,
/// drivers/net/af_packet/rte_eth_af_packet.c: `max_rx_pktlen`).
const MODEST: [&CStr; 2] = [c"net_memif", c"net_af_packet"];
const MODEST_MTU: u16 = 1500;
/// With what a pool keeps for a buffer, 64 bytes and its rte_mbuf, this makes a page. A pool puts no buffer across pages, and
/// AF_XDP's driver expects them without gaps (drivers/net/af_xdp/rte_eth_af_xdp.c, `xdp_umem_configure`, before 24.07).
const LEAST_ROOM: usize = 4096 - 64 - 128;
/// Room that DPDK keeps before a frame (RTE_PKTMBUF_HEADROOM).
const HEADROOM: usize = 128;

fn error_of(number: i32, what: &str) -> io::Error {
    // SAFETY: takes a number, and returns a string of the thread's own that stays until its next call.
    let text = unsafe { CStr::from_ptr(ffi::rte_strerror(number)) }.to_string_lossy().into_owned();
    io::Error::other(format!("DPDK cannot {what}: {text}"))
}

fn check(result: i32, what: &str) -> io::Result<()> {
    if result < 0 { Err(error_of(-result, what)) } else { Ok(()) }
}

/// As DPDK says it.
pub(in super::super::super) fn version() -> String {
    // SAFETY: takes nothing and returns a static string.
    unsafe { CStr::from_ptr(ffi::rte_version()) }.to_string_lossy().into_owned()
}

/// Sets up DPDK for this process, which can be done once; later calls must say the same.
fn start(arguments: &[String]) -> io::Result<()> {
    static STARTED: Mutex<Option<Started>> = Mutex::new(None);
    let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    let started = started.get_or_insert_with(|| Started { arguments: arguments.to_vec(), result: init(arguments) });
    if started.arguments != arguments {
        return Err(io::Error::other("DPDK was set up with other arguments, and can be only once in a process"));
    }
    started.result.clone().map_err(io::Error::other)
}

/// How DPDK was set up, and what came of it.
struct Started {
    arguments: Vec<String>,
    result: Result<(), String>,
}

fn init(arguments: &[String]) -> Result<(), String> {
    let all = ["embarcadero"].into_iter().chain(arguments.iter().map(String::as_str));
    let all: Vec<CString> = all.map(CString::new).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    // It pins the thread that calls it, and keeps the strings: hence a thread of its own, and strings that stay.
    let all: &'static [CString] = Vec::leak(all);
    let thread = std::thread::Builder::new().name("dpdk-init".to_owned()).spawn(move || {
        let mut pointers: Vec<_> = all.iter().map(|argument| argument.as_ptr().cast_mut()).collect();
        pointers.push(null_mut());
        // SAFETY: as many strings as stated, with an end, which stay; the call is made once in this process.
        let result = unsafe { ffi::rte_eal_init(all.len() as i32, pointers.as_mut_ptr()) };
        // SAFETY: reads a number of this thread.
        if result < 0 { Err(unsafe { ffi::embarcadero_rte_errno() }) } else { Ok(()) }
    });
    let result = thread.map_err(|error| error.to_string())?.join().map_err(|_| "DPDK ended its thread".to_owned())?;
    result.map_err(|number| format!("{} (arguments: {})", error_of(number, "be set up"), arguments.join(" ")))
}

/// Makes buffers for a port, of which the one that was used last comes first, while it is in caches (the guide, "Stack
/// Mempool Driver").
fn pool(port: u16, room: usize) -> io::Result<NonNull<ffi::rte_mempool>> {
    let name = CString::new(format!("embarcadero-{port}"))?;
    let (bytes, private_bytes) = (size_of::<ffi::rte_mbuf>() + room, size_of::<ffi::rte_pktmbuf_pool_private>());
    // SAFETY: plain data, for which zero is valid.
    let mut private: ffi::rte_pktmbuf_pool_private = unsafe { zeroed() };
    private.mbuf_data_room_size = room as u16;
    // SAFETY: what `rte_pktmbuf_pool_create` does too, but for its flags: name and data live across the calls, which copy
    // them, and the pool stays as long as the process.
    unsafe {
        let (socket, flags) = (ffi::rte_eth_dev_socket_id(port), ffi::RTE_MEMPOOL_F_NO_SPREAD);
        let pool =
            ffi::rte_mempool_create_empty(name.as_ptr(), BUFFERS, bytes as u32, 0, private_bytes as u32, socket, flags);
        let pool = NonNull::new(pool).ok_or_else(|| error_of(ffi::embarcadero_rte_errno(), "make a pool"))?;
        check(ffi::rte_mempool_set_ops_byname(pool.as_ptr(), c"stack".as_ptr(), null_mut()), "use stacks")?;
        ffi::rte_pktmbuf_pool_init(pool.as_ptr(), (&raw mut private).cast());
        check(ffi::rte_mempool_populate_default(pool.as_ptr()), "fill a pool")?;
        ffi::rte_mempool_obj_iter(pool.as_ptr(), Some(ffi::rte_pktmbuf_init), null_mut());
        Ok(pool)
    }
}

/// A started port with one queue each way.
pub(in super::super) struct EthPort {
    id: u16,
    pool: NonNull<ffi::rte_mempool>,
    pub(super) mac: [u8; 6],
    /// Bytes that a frame carries.
    pub mtu: usize,
    taken: AtomicBool,
}

// SAFETY: the calls of the control path may be made from any thread; those of a queue go through [`Queues`], of which
// there is one.
unsafe impl Send for EthPort {}
// SAFETY: as above.
unsafe impl Sync for EthPort {}

impl EthPort {
    /// Sets DPDK up and starts the port of that name, or the first.
    ///
    /// # Errors
    /// What DPDK reports.
    pub fn open(arguments: &[String], name: Option<&str>, mtu: u16) -> io::Result<Self> {
        start(arguments)?;
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
                return Err(io::Error::other(
                    "DPDK has no port: bind a NIC (hw-setup/dpdk), or name a --vdev in dpdk.eal",
                ));
            }
            None => {}
        }
        let pool = pool(id, (HEADROOM + AROUND_BYTES + usize::from(mtu)).max(LEAST_ROOM).next_multiple_of(64))?;
        // SAFETY: plain data, for which zero is valid.
        let (mut options, mut info): (ffi::rte_eth_conf, ffi::rte_eth_dev_info) = unsafe { (zeroed(), zeroed()) };
        // SAFETY: the port is there; the information lives across the call, and its driver's name is a static string.
        let driver = unsafe {
            check(ffi::rte_eth_dev_info_get(id, &raw mut info), "look at the port")?;
            CStr::from_ptr(info.driver_name)
        };
        options.rxmode.mtu = if MODEST.contains(&driver) { mtu.min(MODEST_MTU) } else { mtu }.into();
        // SAFETY: the options live across the call, which copies them.
        check(unsafe { ffi::rte_eth_dev_configure(id, 1, 1, &raw const options) }, "configure the port")?;
        // SAFETY: the port is configured and not started; the pool stays as long as the process, and no options are given.
        unsafe {
            let socket = ffi::rte_eth_dev_socket_id(id).cast_unsigned();
            let receives = ffi::rte_eth_rx_queue_setup(id, 0, DESCRIPTORS, socket, std::ptr::null(), pool.as_ptr());
            check(receives, "make a receive queue")?;
            check(ffi::rte_eth_tx_queue_setup(id, 0, DESCRIPTORS, socket, std::ptr::null()), "make a send queue")?;
            check(ffi::rte_eth_dev_start(id), "start the port")?;
        }
        let mut mac = ffi::rte_ether_addr { addr_bytes: [0; 6] };
        // SAFETY: the address lives across the call.
        check(unsafe { ffi::rte_eth_macaddr_get(id, &raw mut mac) }, "learn the port's address")?;
        Ok(Self { id, pool, mac: mac.addr_bytes, mtu: mtu.into(), taken: AtomicBool::new(false) })
    }

    /// Stops and starts it.
    ///
    /// # Errors
    /// What DPDK reports.
    pub fn restart(&self) -> io::Result<()> {
        // SAFETY: the port is started and configured.
        unsafe {
            check(ffi::rte_eth_dev_stop(self.id), "stop the port")?;
            check(ffi::rte_eth_dev_start(self.id), "start the port")
        }
    }

    /// Whether its link is up.
    pub fn is_up(&self) -> bool {
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

/// The two queues of a port, which one thread uses at a time.
pub(super) struct Queues {
    port: Arc<EthPort>,
}

impl Queues {
    /// # Errors
    /// Another has them.
    pub fn of(port: &Arc<EthPort>) -> io::Result<Self> {
        if port.taken.swap(true, Ordering::Acquire) {
            return Err(io::Error::other("the queues of the port are in use"));
        }
        Ok(Self { port: Arc::clone(port) })
    }

    /// Takes a burst of frames. Those of several buffers are longer than we said frames may be, and are dropped.
    pub fn receive(&mut self, mut each: impl FnMut(&[u8])) {
        let mut buffers = [null_mut(); BURST];
        // SAFETY: the port is started, and as many places are there as stated.
        let count = unsafe { ffi::embarcadero_rx_burst(self.port.id, 0, buffers.as_mut_ptr(), BURST as u16) };
        for buffer in &buffers[..usize::from(count)] {
            // SAFETY: the buffer is ours from here on; its segment has as many bytes as it says, and it is freed once,
            // after they were looked at.
            unsafe {
                if ffi::embarcadero_mbuf_next(*buffer).is_null() {
                    let len = usize::from(ffi::embarcadero_mbuf_data_len(*buffer));
                    each(std::slice::from_raw_parts(ffi::embarcadero_mbuf_data(*buffer).cast::<u8>(), len));
                }
                ffi::rte_pktmbuf_free(*buffer);
            }
        }
    }

    /// Where frames to be sent are made.
    pub fn pool(&self) -> Pool {
        Pool(self.port.pool)
    }

    /// Sends a burst of the first frames, and takes those away that the port took; how many.
    pub fn send(&mut self, frames: &mut VecDeque<Frame>) -> usize {
        let mut buffers = [null_mut(); BURST];
        let count = frames.len().min(BURST);
        for (place, frame) in buffers.iter_mut().zip(frames.iter()) {
            // SAFETY: the buffer is ours, and has the bytes.
            unsafe { ffi::embarcadero_mbuf_set_len(frame.buffer.as_ptr(), frame.len as u16) };
            *place = frame.buffer.as_ptr();
        }
        // SAFETY: the port is started; what it takes is its own, and is forgotten here.
        let taken = unsafe { ffi::embarcadero_tx_burst(self.port.id, 0, buffers.as_mut_ptr(), count as u16) };
        frames.drain(..usize::from(taken)).for_each(std::mem::forget);
        taken.into()
    }
}

/// Packet buffers, which stay as long as the process.
#[derive(Clone, Copy)]
pub(super) struct Pool(NonNull<ffi::rte_mempool>);

impl Pool {
    /// An empty frame, if there is a buffer.
    pub fn frame(self) -> Option<Frame> {
        // SAFETY: the pool lives as long as the process; a buffer that it gives has room for its first byte.
        unsafe {
            let buffer = NonNull::new(ffi::rte_pktmbuf_alloc(self.0.as_ptr()))?;
            let start = NonNull::new(ffi::embarcadero_mbuf_data(buffer.as_ptr()).cast())?;
            let room = ffi::rte_pktmbuf_tailroom(buffer.as_ptr()).into();
            Some(Frame { buffer, start, room, len: 0 })
        }
    }
}

/// A frame that is being made, in its buffer.
pub(super) struct Frame {
    buffer: NonNull<ffi::rte_mbuf>,
    start: NonNull<u8>,
    room: usize,
    len: usize,
}

// SAFETY: it owns its buffer; pools can be used from any thread.
unsafe impl Send for Frame {}

impl Frame {
    /// Bytes that can still be put.
    pub fn room(&self) -> usize {
        self.room - self.len
    }
}

impl Put for Frame {
    fn put(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.room());
        // SAFETY: there is room behind those that it has, in a buffer that is ours.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.as_ptr().add(self.len), bytes.len()) };
        self.len += bytes.len();
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        // SAFETY: it is ours, and freed once.
        unsafe { ffi::rte_pktmbuf_free(self.buffer.as_ptr()) };
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        self.port.taken.store(false, Ordering::Release);
    }
}
