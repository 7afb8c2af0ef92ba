//! DPDK's environment and its Ethernet ports, safely.
//!
//! The calls are described in DPDK's programmer's guide: "Environment Abstraction Layer", "Poll Mode Driver" and "Mbuf
//! Library".

use dpdk_sys as ffi;
use embarcadero_roce::{ethernet, packet::Put};
use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::io;
use std::mem::{ManuallyDrop, zeroed};
use std::ops::{Deref, DerefMut};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Most packets taken, or sent, with one call.
pub(super) const BURST: usize = 64;
/// Descriptors of a queue each way.
const DESCRIPTORS: u16 = 1024;
/// Packet buffers of a port, which its queues divide among them.
const BUFFERS: usize = 16384;
/// Fewest packet buffers of a queue: for both full rings, and bursts that are being read or wait at another queue.
const LEAST_BUFFERS: usize = 4096;
/// Time that the former owner of a queue may take to give it back.
const PUT_DOWN: Duration = Duration::from_secs(1);
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

/// Makes an error from DPDK's error number. `what` completes "DPDK cannot ..".
fn error_of(number: i32, what: &str) -> io::Error {
    // SAFETY: takes a number, and returns a string of the thread's own that stays until its next call.
    let text = unsafe { CStr::from_ptr(ffi::rte_strerror(number)) }.to_string_lossy().into_owned();
    io::Error::other(format!("DPDK cannot {what}: {text}"))
}

/// Turns the result of a call into an error: a negative one is an error number.
fn check(result: i32, what: &str) -> io::Result<()> {
    if result < 0 { Err(error_of(-result, what)) } else { Ok(()) }
}

/// Version of DPDK, in its own words.
pub(in super::super::super) fn version() -> String {
    // SAFETY: takes nothing and returns a static string.
    unsafe { CStr::from_ptr(ffi::rte_version()) }.to_string_lossy().into_owned()
}

/// Sets up DPDK for this process, once. Later calls must have the same arguments.
fn start(arguments: &[String]) -> io::Result<()> {
    static STARTED: Mutex<Option<Started>> = Mutex::new(None);
    let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    let started = started.get_or_insert_with(|| Started { arguments: arguments.to_vec(), result: init(arguments) });
    if started.arguments != arguments {
        return Err(io::Error::other("DPDK was set up with other arguments, and can be only once in a process"));
    }
    started.result.clone().map_err(io::Error::other)
}

/// Arguments that DPDK was set up with, and the result.
struct Started {
    arguments: Vec<String>,
    result: Result<(), String>,
}

/// Sets up DPDK.
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

/// Makes a pool of buffers for a queue.
///
/// The pool is a stack: the buffer that was used last, and is still in caches, comes first (the guide, "Stack Mempool
/// Driver"). It has one buffer less than `buffers`, a power of two, which wastes no memory.
fn pool(port: u16, queue: u16, buffers: usize, room: usize) -> io::Result<NonNull<ffi::rte_mempool>> {
    let name = CString::new(format!("embarcadero-{port}-{queue}"))?;
    let (bytes, private_bytes) = (size_of::<ffi::rte_mbuf>() + room, size_of::<ffi::rte_pktmbuf_pool_private>());
    // SAFETY: plain data, for which zero is valid.
    let mut private: ffi::rte_pktmbuf_pool_private = unsafe { zeroed() };
    private.mbuf_data_room_size = room as u16;
    // SAFETY: what `rte_pktmbuf_pool_create` does too, but for its flags: name and data live across the calls, which copy
    // them, and the pool stays as long as the process.
    unsafe {
        let (socket, flags) = (ffi::rte_eth_dev_socket_id(port), ffi::RTE_MEMPOOL_F_NO_SPREAD);
        let (buffers, bytes, private_bytes) = (buffers as u32 - 1, bytes as u32, private_bytes as u32);
        let pool = ffi::rte_mempool_create_empty(name.as_ptr(), buffers, bytes, 0, private_bytes, socket, flags);
        let pool = NonNull::new(pool).ok_or_else(|| error_of(ffi::embarcadero_rte_errno(), "make a pool"))?;
        check(ffi::rte_mempool_set_ops_byname(pool.as_ptr(), c"stack".as_ptr(), null_mut()), "use stacks")?;
        ffi::rte_pktmbuf_pool_init(pool.as_ptr(), (&raw mut private).cast());
        check(ffi::rte_mempool_populate_default(pool.as_ptr()), "fill a pool")?;
        ffi::rte_mempool_obj_iter(pool.as_ptr(), Some(ffi::rte_pktmbuf_init), null_mut());
        Ok(pool)
    }
}

/// Started port of DPDK.
pub(in super::super) struct EthPort {
    id: u16,
    pub(super) mac: [u8; 6],
    /// Bytes that a frame carries.
    pub mtu: usize,
    queues: Vec<QueueState>,
}

/// State of a queue.
struct QueueState {
    pool: Pool,
    /// Whether the queue is in use.
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
    pub fn open(arguments: &[String], name: Option<&str>, mtu: u16, queues: u16) -> io::Result<Self> {
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
        // SAFETY: plain data, for which zero is valid.
        let (mut options, mut info): (ffi::rte_eth_conf, ffi::rte_eth_dev_info) = unsafe { (zeroed(), zeroed()) };
        // SAFETY: the port is there; the information lives across the call, and its driver's name is a static string.
        let driver = unsafe {
            check(ffi::rte_eth_dev_info_get(id, &raw mut info), "look at the port")?;
            CStr::from_ptr(info.driver_name)
        };
        let most = info.max_rx_queues.min(info.max_tx_queues);
        if queues > most {
            return Err(io::Error::other(format!("dpdk.queues is {queues}, but the port has no more than {most}")));
        }
        options.rxmode.mtu = if MODEST.contains(&driver) { mtu.min(MODEST_MTU) } else { mtu }.into();
        // SAFETY: takes nothing.
        let flows = unsafe { ffi::embarcadero_rss_udp() } & info.flow_type_rss_offloads;
        if queues > 1 && flows != 0 {
            options.rxmode.mq_mode = ffi::RTE_ETH_MQ_RX_RSS;
            options.rx_adv_conf.rss_conf.rss_hf = flows;
        }
        // SAFETY: the options live across the call, which copies them.
        check(unsafe { ffi::rte_eth_dev_configure(id, queues, queues, &raw const options) }, "configure the port")?;
        let room = (HEADROOM + AROUND_BYTES + usize::from(mtu)).max(LEAST_ROOM).next_multiple_of(64);
        let buffers = (BUFFERS / usize::from(queues).next_power_of_two()).max(LEAST_BUFFERS);
        let mut states = Vec::new();
        for queue in 0..queues {
            let pool = pool(id, queue, buffers, room)?;
            // SAFETY: the port is configured and not started; the pool stays as long as the process, and no options are given.
            unsafe {
                let (socket, none) = (ffi::rte_eth_dev_socket_id(id).cast_unsigned(), std::ptr::null());
                let receives = ffi::rte_eth_rx_queue_setup(id, queue, DESCRIPTORS, socket, none, pool.as_ptr());
                check(receives, "make a receive queue")?;
                let sends = ffi::rte_eth_tx_queue_setup(id, queue, DESCRIPTORS, socket, std::ptr::null());
                check(sends, "make a send queue")?;
            }
            states.push(QueueState { pool: Pool(pool), taken: AtomicBool::new(false) });
        }
        // SAFETY: the port and its queues are configured.
        check(unsafe { ffi::rte_eth_dev_start(id) }, "start the port")?;
        let mut mac = ffi::rte_ether_addr { addr_bytes: [0; 6] };
        // SAFETY: the address lives across the call.
        check(unsafe { ffi::rte_eth_macaddr_get(id, &raw mut mac) }, "learn the port's address")?;
        Ok(Self { id, mac: mac.addr_bytes, mtu: mtu.into(), queues: states })
    }

    /// Makes the port take frames to groups, by which IPv6 looks for neighbours. Devices without this setting take them
    /// always.
    ///
    /// # Errors
    /// The error that DPDK reports.
    pub fn take_groups(&self) -> io::Result<()> {
        // SAFETY: the port is started.
        match unsafe { ffi::rte_eth_allmulticast_enable(self.id) } {
            result if result == -libc::ENOTSUP => Ok(()),
            result => check(result, "take frames to groups"),
        }
    }

    /// Number of queues each way.
    pub fn queues(&self) -> u16 {
        self.queues.len() as u16
    }

    /// Stops and starts the port.
    ///
    /// # Errors
    /// The error that DPDK reports.
    pub fn restart(&self) -> io::Result<()> {
        // SAFETY: the port is started and configured.
        unsafe {
            check(ffi::rte_eth_dev_stop(self.id), "stop the port")?;
            check(ffi::rte_eth_dev_start(self.id), "start the port")
        }
    }

    /// Whether the link of the port is up.
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

/// Receive queue and send queue of one number. One thread uses them at a time.
pub(super) struct Queues {
    port: Arc<EthPort>,
    index: u16,
}

impl Queues {
    /// Takes the queues of a number into use. If their former owner is about to give them back, it waits for that.
    ///
    /// # Errors
    /// The queues are still in use after a second.
    pub fn of(port: &Arc<EthPort>, index: u16) -> io::Result<Self> {
        let begun = Instant::now();
        while port.queues[usize::from(index)].taken.swap(true, Ordering::Acquire) {
            if begun.elapsed() > PUT_DOWN {
                return Err(io::Error::other(format!("queue {index} of the port is in use")));
            }
            std::thread::yield_now();
        }
        Ok(Self { port: Arc::clone(port), index })
    }

    /// Number of the queues.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Hands a burst of frames to `each`, and returns the number that came.
    ///
    /// Buffers that `each` returns go back to their pool together. One by one, each would wait for a lock, and so for
    /// stores past the caches. Frames in several buffers are longer than the MTU, and are dropped.
    pub fn receive(&mut self, mut each: impl FnMut(Received) -> Option<Received>) -> usize {
        let mut buffers = [null_mut(); BURST];
        // SAFETY: the port is started, the queue is ours, and as many places are there as stated.
        let count = unsafe { ffi::embarcadero_rx_burst(self.port.id, self.index, buffers.as_mut_ptr(), BURST as u16) };
        let mut done = 0;
        for index in 0..usize::from(count) {
            let received = NonNull::new(buffers[index]).and_then(|buffer| Received::of(Buffer(buffer)));
            if let Some(frame) = received.and_then(&mut each) {
                buffers[done] = frame.buffer.into_raw();
                done += 1;
            }
        }
        // SAFETY: the first ones are ours, and freed once.
        unsafe { ffi::rte_pktmbuf_free_bulk(buffers.as_mut_ptr(), done as u32) };
        count.into()
    }

    /// Maker of frames to be sent at these queues.
    pub fn frames(&self) -> Frames {
        Frames { pool: self.port.queues[usize::from(self.index)].pool, spare: Vec::with_capacity(BURST) }
    }

    /// Sends a burst of the first frames, and removes those that the port took. Returns their number.
    pub fn send(&mut self, frames: &mut VecDeque<Frame>) -> usize {
        let mut buffers = [null_mut(); BURST];
        let count = frames.len().min(BURST);
        for (place, frame) in buffers.iter_mut().zip(frames.iter()) {
            // SAFETY: the buffer is ours, and has the bytes.
            unsafe { ffi::embarcadero_mbuf_set_len(frame.buffer.0.as_ptr(), frame.len as u16) };
            *place = frame.buffer.0.as_ptr();
        }
        // SAFETY: the port is started and the queue ours; what it takes is its own, and is forgotten here.
        let taken = unsafe { ffi::embarcadero_tx_burst(self.port.id, self.index, buffers.as_mut_ptr(), count as u16) };
        frames.drain(..usize::from(taken)).for_each(std::mem::forget);
        taken.into()
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        self.port.queues[usize::from(self.index)].taken.store(false, Ordering::Release);
    }
}

/// Pool of packet buffers, which stays as long as the process.
#[derive(Clone, Copy)]
struct Pool(NonNull<ffi::rte_mempool>);

// SAFETY: it can be used from any thread.
unsafe impl Send for Pool {}

/// Maker of the frames that a queue sends.
pub(super) struct Frames {
    pool: Pool,
    /// Free buffers, taken out of the pool together under one lock.
    spare: Vec<Buffer>,
}

impl Frames {
    /// Makes an empty frame; `None` without a free buffer.
    pub fn empty(&mut self) -> Option<Frame> {
        if self.spare.is_empty() {
            self.refill();
        }
        let buffer = self.spare.pop()?;
        // SAFETY: a buffer that a pool gives has room for its first byte.
        unsafe {
            let start = NonNull::new(ffi::embarcadero_mbuf_data(buffer.0.as_ptr()).cast())?;
            let room = ffi::rte_pktmbuf_tailroom(buffer.0.as_ptr()).into();
            Some(Frame { buffer, start, room, len: 0 })
        }
    }

    /// Takes buffers for a burst out of the pool, or one if there are fewer.
    #[inline(never)]
    fn refill(&mut self) {
        let mut buffers = [null_mut(); BURST];
        for count in [BURST, 1] {
            // SAFETY: the pool lives as long as the process, and as many places are there as stated.
            let result =
                unsafe { ffi::rte_pktmbuf_alloc_bulk(self.pool.0.as_ptr(), buffers.as_mut_ptr(), count as u32) };
            if result == 0 {
                self.spare.extend(buffers[..count].iter().filter_map(|buffer| NonNull::new(*buffer)).map(Buffer));
                return;
            }
        }
    }
}

/// Packet buffer that this value owns.
struct Buffer(NonNull<ffi::rte_mbuf>);

// SAFETY: nobody else has it; its pool can be used from any thread.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Gives up the ownership.
    fn into_raw(self) -> *mut ffi::rte_mbuf {
        ManuallyDrop::new(self).0.as_ptr()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: it is ours, and freed once.
        unsafe { ffi::rte_pktmbuf_free(self.0.as_ptr()) };
    }
}

/// Frame that came.
pub(super) struct Received {
    buffer: Buffer,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its buffer, into which it points.
unsafe impl Send for Received {}

impl Received {
    /// Takes the frame in a buffer; `None` if it continues in another buffer.
    fn of(buffer: Buffer) -> Option<Self> {
        let mbuf = buffer.0.as_ptr();
        // SAFETY: the buffer is ours.
        unsafe {
            let start = NonNull::new(ffi::embarcadero_mbuf_data(mbuf).cast())?;
            let len = ffi::embarcadero_mbuf_data_len(mbuf).into();
            ffi::embarcadero_mbuf_next(mbuf).is_null().then_some(Self { buffer, start, len })
        }
    }

    /// VLAN tag that the port took out of the frame.
    pub fn tag(&self) -> Option<u16> {
        let mbuf = self.buffer.0.as_ptr();
        // SAFETY: the buffer is ours.
        unsafe {
            let stripped = ffi::embarcadero_mbuf_flags(mbuf) & u64::from(ffi::RTE_MBUF_F_RX_VLAN_STRIPPED) != 0;
            stripped.then(|| ffi::embarcadero_mbuf_vlan_tci(mbuf))
        }
    }
}

impl Deref for Received {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the buffer is ours, and has the bytes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Received {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: the buffer is ours alone, and has the bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// Frame that is being made, in its buffer.
pub(super) struct Frame {
    buffer: Buffer,
    start: NonNull<u8>,
    room: usize,
    len: usize,
}

// SAFETY: it owns its buffer, into which it points.
unsafe impl Send for Frame {}

impl Frame {
    /// Number of bytes that can be appended.
    pub fn room(&self) -> usize {
        self.room - self.len
    }

    /// Turns it into a frame that came.
    pub fn looped(self) -> Received {
        Received { buffer: self.buffer, start: self.start, len: self.len }
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
