//! Packet buffers of DPDK, and frames in them.
//!
//! The calls are described in DPDK's programmer's guide, "Mbuf Library".

use super::eal::{check, error_of};
use dpdk_sys as ffi;
use embarcadero_roce::packet::Put;
use std::ffi::CString;
use std::io;
use std::mem::{ManuallyDrop, zeroed};
use std::ops::{Deref, DerefMut};
use std::ptr::{NonNull, null_mut};

/// Most packets taken, or sent, with one call.
pub(super) const BURST: usize = 64;

/// Pool of packet buffers, which stays as long as the process.
#[derive(Clone, Copy)]
pub(super) struct Pool(NonNull<ffi::rte_mempool>);

// SAFETY: it can be used from any thread.
unsafe impl Send for Pool {}

impl Pool {
    /// Makes a pool of buffers for a queue of a port. Each has `room` bytes.
    ///
    /// The pool is a stack: the buffer that was used last, and is still in caches, comes first (the guide, "Stack Mempool
    /// Driver"). It has one buffer less than `buffers`, a power of two, which wastes no memory.
    pub(super) fn new(port: u16, queue: u16, buffers: usize, room: usize) -> io::Result<Self> {
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
            Ok(Self(pool))
        }
    }

    /// The pool as DPDK's calls take it.
    pub(super) fn as_ptr(self) -> *mut ffi::rte_mempool {
        self.0.as_ptr()
    }
}

/// Maker of the frames that a queue sends.
pub(super) struct Frames {
    pool: Pool,
    /// Free buffers, taken out of the pool together under one lock.
    spare: Vec<Buffer>,
}

impl Frames {
    /// Makes frames in buffers of a pool.
    pub(super) fn new(pool: Pool) -> Self {
        Self { pool, spare: Vec::with_capacity(BURST) }
    }

    /// Makes an empty frame; `None` without a free buffer.
    pub(super) fn empty(&mut self) -> Option<Frame> {
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
            let result = unsafe { ffi::rte_pktmbuf_alloc_bulk(self.pool.as_ptr(), buffers.as_mut_ptr(), count as u32) };
            if result == 0 {
                self.spare.extend(buffers[..count].iter().filter_map(|buffer| NonNull::new(*buffer)).map(Buffer));
                return;
            }
        }
    }
}

/// Packet buffer that this value owns.
pub(super) struct Buffer(NonNull<ffi::rte_mbuf>);

// SAFETY: nobody else has it; its pool can be used from any thread.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Takes the ownership of a buffer that nobody else has.
    pub(super) fn new(buffer: NonNull<ffi::rte_mbuf>) -> Self {
        Self(buffer)
    }

    /// Gives up the ownership.
    pub(super) fn into_raw(self) -> *mut ffi::rte_mbuf {
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
    pub(super) fn of(buffer: Buffer) -> Option<Self> {
        let mbuf = buffer.0.as_ptr();
        // SAFETY: the buffer is ours.
        unsafe {
            let start = NonNull::new(ffi::embarcadero_mbuf_data(mbuf).cast())?;
            let len = ffi::embarcadero_mbuf_data_len(mbuf).into();
            ffi::embarcadero_mbuf_next(mbuf).is_null().then_some(Self { buffer, start, len })
        }
    }

    /// VLAN tag that the port took out of the frame.
    pub(super) fn tag(&self) -> Option<u16> {
        let mbuf = self.buffer.0.as_ptr();
        // SAFETY: the buffer is ours.
        unsafe {
            let stripped = ffi::embarcadero_mbuf_flags(mbuf) & u64::from(ffi::RTE_MBUF_F_RX_VLAN_STRIPPED) != 0;
            stripped.then(|| ffi::embarcadero_mbuf_vlan_tci(mbuf))
        }
    }
}

impl Received {
    /// Gives up the frame, and the ownership of its buffer.
    pub(super) fn into_raw(self) -> *mut ffi::rte_mbuf {
        self.buffer.into_raw()
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
    pub(super) fn room(&self) -> usize {
        self.room - self.len
    }

    /// Notes the frame's length in its buffer, and returns the buffer, which the frame still owns.
    pub(super) fn finish(&mut self) -> *mut ffi::rte_mbuf {
        let buffer = self.buffer.0.as_ptr();
        // SAFETY: the buffer is ours, and has the bytes.
        unsafe { ffi::embarcadero_mbuf_set_len(buffer, self.len as u16) };
        buffer
    }

    /// Turns it into a frame that came.
    pub(super) fn looped(self) -> Received {
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
