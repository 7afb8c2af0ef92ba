//! Completion queues of libibverbs.

use super::call::{check, set_nonblocking};
use super::device::Context;
use crate::outcome::{Completion, HardwareFailure, Outcome, WorkError};
use rdma_sys as ffi;
use std::ffi::CStr;
use std::io;
use std::mem::zeroed;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// Most completions taken by one call.
const POLLED: usize = 32;

/// Makes the error of a failed completion. `status` is an `ibv_wc_status`.
fn failure(status: u32, vendor: u32) -> WorkError {
    let kind = match status {
        ffi::IBV_WC_WR_FLUSH_ERR => HardwareFailure::Flushed,
        ffi::IBV_WC_REM_ACCESS_ERR => HardwareFailure::RemoteAccess,
        ffi::IBV_WC_RETRY_EXC_ERR => HardwareFailure::NoAnswer,
        _ => HardwareFailure::Other,
    };
    // SAFETY: takes a number and returns a static string, also for numbers that it does not know.
    let text = unsafe { CStr::from_ptr(ffi::ibv_wc_status_str(status)) };
    WorkError::Hardware { kind, text, vendor }
}

/// Completion queue and its channel, which queue pairs share.
pub(super) struct RawQueue {
    queue: NonNull<ffi::ibv_cq>,
    channel: NonNull<ffi::ibv_comp_channel>,
    _context: Arc<Context>,
}

// SAFETY: libibverbs serialises calls on a queue and its channel.
unsafe impl Send for RawQueue {}
// SAFETY: as above.
unsafe impl Sync for RawQueue {}

impl RawQueue {
    pub(super) fn raw(&self) -> *mut ffi::ibv_cq {
        self.queue.as_ptr()
    }
}

impl Drop for RawQueue {
    fn drop(&mut self) {
        // SAFETY: queue pairs hold this, so none uses it any more; every event was acknowledged as it was taken; each is
        // given back once, the queue before its channel.
        unsafe {
            ffi::ibv_destroy_cq(self.queue.as_ptr());
            ffi::ibv_destroy_comp_channel(self.channel.as_ptr());
        }
    }
}

/// Completion queue. One thread polls it.
pub(crate) struct CompletionQueue {
    raw: Arc<RawQueue>,
    /// Scratch memory for one call.
    polled: Box<[ffi::ibv_wc; POLLED]>,
    /// True while an event may wait in the channel.
    armed: bool,
}

// SAFETY: `polled` is scratch memory; its pointers are never followed.
unsafe impl Send for CompletionQueue {}

impl CompletionQueue {
    /// Makes a queue for `depth` completions.
    ///
    /// # Errors
    /// The error that the library reports.
    pub(crate) fn new(context: &Arc<Context>, depth: u32) -> io::Result<Self> {
        // SAFETY: the context is open.
        let channel = unsafe { ffi::ibv_create_comp_channel(context.raw()) };
        let channel = NonNull::new(channel).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: context and channel live; no user data is attached.
        let queue = unsafe {
            let depth = depth.cast_signed();
            ffi::ibv_create_cq(context.raw(), depth, std::ptr::null_mut(), channel.as_ptr(), 0)
        };
        let Some(queue) = NonNull::new(queue) else {
            let error = io::Error::last_os_error();
            // SAFETY: made above, and nothing uses it.
            unsafe { ffi::ibv_destroy_comp_channel(channel.as_ptr()) };
            return Err(error);
        };
        let raw = Arc::new(RawQueue { queue, channel, _context: Arc::clone(context) });
        // SAFETY: plain data, for which zero is valid.
        let queue = Self { raw, polled: Box::new(unsafe { zeroed() }), armed: false };
        let descriptor = queue.descriptor();
        set_nonblocking(descriptor)?;
        Ok(queue)
    }

    pub(super) fn handle(&self) -> &Arc<RawQueue> {
        &self.raw
    }

    /// Descriptor that becomes readable when a completion comes after [`CompletionQueue::arm`].
    #[must_use]
    pub(crate) fn descriptor(&self) -> RawFd {
        // SAFETY: the channel lives.
        unsafe { self.raw.channel.as_ref() }.fd
    }

    /// Hands at most 32 completions to `each`, and returns their number. Does not allocate.
    ///
    /// # Errors
    /// The error of `ibv_poll_cq`: the device is gone.
    #[inline]
    pub(crate) fn poll(&mut self, mut each: impl FnMut(Completion)) -> io::Result<usize> {
        // SAFETY: the array has as many places as stated.
        let count = unsafe { ffi::ibv_poll_cq(self.raw.raw(), POLLED as i32, self.polled.as_mut_ptr()) };
        let Ok(count) = usize::try_from(count) else {
            return Err(io::Error::other(format!("the completion queue cannot be polled ({count})")));
        };
        for work in self.polled.iter().take(count) {
            each(completion(work));
        }
        Ok(count)
    }

    /// Makes [`CompletionQueue::descriptor`] readable at the next completion.
    ///
    /// # Errors
    /// The error of `ibv_req_notify_cq`.
    pub(crate) fn arm(&mut self) -> io::Result<()> {
        self.clear();
        self.armed = true;
        // SAFETY: the queue lives.
        check(unsafe { ffi::ibv_req_notify_cq(self.raw.raw(), 0) })
    }

    /// Takes all events, so that the descriptor is not readable any more.
    fn clear(&mut self) {
        if !std::mem::take(&mut self.armed) {
            return;
        }
        let (mut queue, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the channel lives and does not block; the library fills in both pointers when it returns 0.
        while unsafe { ffi::ibv_get_cq_event(self.raw.channel.as_ptr(), &raw mut queue, &raw mut context) } == 0 {
            // SAFETY: one event was taken from this queue, the only one of its channel.
            unsafe { ffi::ibv_ack_cq_events(queue, 1) };
        }
    }
}

/// Translates a completion.
fn completion(work: &ffi::ibv_wc) -> Completion {
    let outcome = if work.status != ffi::IBV_WC_SUCCESS {
        Outcome::Failed(failure(work.status, work.vendor_err))
    } else if work.opcode == ffi::IBV_WC_RECV_RDMA_WITH_IMM {
        // SAFETY: a completion of this kind has immediate data.
        let immediate = u32::from_be(unsafe { work.__bindgen_anon_1.imm_data });
        Outcome::Written { bytes: work.byte_len, immediate }
    } else if work.opcode & ffi::IBV_WC_RECV != 0 {
        Outcome::Message { bytes: work.byte_len }
    } else {
        Outcome::Sent
    };
    Completion { queue_pair: work.qp_num, id: work.wr_id, outcome }
}
