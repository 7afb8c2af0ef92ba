//! Reliable connected queue pairs (RC) of libibverbs.

use super::call::check;
use super::completion::{CompletionQueue, RawQueue};
use super::memory::{MemoryWindow, ProtectionDomain};
use crate::peer::{PeerAddress, RETRIES, RNR_RETRIES, RNR_TIMER};
use crate::port::LocalPort;
use crate::range::{LocalRange, RemoteRange};
use crate::work::{DOORBELL, Request, Work};
use embarcadero_roce::packet::LOW_24_BITS;
use rdma_sys as ffi;
use std::io;
use std::mem::zeroed;
use std::ptr::NonNull;
use std::sync::Arc;

/// Receives without buffers that queue pairs share.
pub(crate) struct SharedReceiveQueue {
    queue: NonNull<ffi::ibv_srq>,
    _domain: Arc<ProtectionDomain>,
}

// SAFETY: libibverbs serialises calls on a queue.
unsafe impl Send for SharedReceiveQueue {}
// SAFETY: as above.
unsafe impl Sync for SharedReceiveQueue {}

impl SharedReceiveQueue {
    /// Makes a queue of `depth` receives, all of them posted.
    ///
    /// # Errors
    /// The error that the library reports.
    pub(crate) fn new(domain: &Arc<ProtectionDomain>, depth: u32) -> io::Result<Arc<Self>> {
        // SAFETY: plain data, for which zero is valid.
        let mut options: ffi::ibv_srq_init_attr = unsafe { zeroed() };
        options.attr.max_wr = depth;
        options.attr.max_sge = 1;
        // SAFETY: domain and options live across the call.
        let queue = unsafe { ffi::ibv_create_srq(domain.raw(), &raw mut options) };
        let queue = NonNull::new(queue).ok_or_else(io::Error::last_os_error)?;
        let queue = Arc::new(Self { queue, _domain: Arc::clone(domain) });
        queue.post(depth as usize)?;
        Ok(queue)
    }

    /// Posts `count` more receives. Does not allocate.
    ///
    /// # Errors
    /// The error of `ibv_post_srq_recv`.
    pub(crate) fn post(&self, count: usize) -> io::Result<()> {
        // SAFETY: plain data, for which zero is valid: no buffers, no next.
        let mut receive: ffi::ibv_recv_wr = unsafe { zeroed() };
        let mut failed = std::ptr::null_mut();
        for _ in 0..count {
            // SAFETY: queue and request live across the call.
            check(unsafe { ffi::ibv_post_srq_recv(self.queue.as_ptr(), &raw mut receive, &raw mut failed) })?;
        }
        Ok(())
    }
}

impl Drop for SharedReceiveQueue {
    fn drop(&mut self) {
        // SAFETY: queue pairs hold this, so none uses it any more; it is given back once.
        unsafe { ffi::ibv_destroy_srq(self.queue.as_ptr()) };
    }
}

/// Depths of a queue pair's own queues.
#[derive(Clone, Copy)]
pub(crate) struct Depths {
    /// Most work requests under way.
    pub send: u32,
    /// Most receives posted, in a receive queue of the queue pair's own.
    pub receive: u32,
    /// Most bytes that a request carries in itself.
    pub inline_bytes: u32,
}

/// Queue pair. Types that know its state wrap it.
pub(crate) struct QueuePair {
    pair: NonNull<ffi::ibv_qp>,
    port: LocalPort,
    first_psn: u32,
    retries: u8,
    _domain: Arc<ProtectionDomain>,
    _queue: Arc<RawQueue>,
    _shared: Option<Arc<SharedReceiveQueue>>,
}

// SAFETY: libibverbs serialises calls on a queue pair.
unsafe impl Send for QueuePair {}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: it came from `ibv_create_qp` and is given back once. The NIC touches no memory for it afterwards.
        unsafe { ffi::ibv_destroy_qp(self.pair.as_ptr()) };
    }
}

/// Code of the time that an answer may take: 4.096 us * 2^14 = 67 ms (IBTA 1.4, 9.7.6.1.3).
const TIMEOUT: u8 = 14;

impl QueuePair {
    /// Makes a queue pair of a port, in the INIT state.
    ///
    /// # Errors
    /// The error that the library reports.
    pub(crate) fn new(
        domain: &Arc<ProtectionDomain>,
        queue: &CompletionQueue,
        port: &LocalPort,
        depths: Depths,
        shared: Option<&Arc<SharedReceiveQueue>>,
    ) -> io::Result<Self> {
        // SAFETY: plain data, for which zero is valid.
        let mut init: ffi::ibv_qp_init_attr = unsafe { zeroed() };
        init.send_cq = queue.handle().raw();
        init.recv_cq = queue.handle().raw();
        init.srq = shared.map_or(std::ptr::null_mut(), |shared| shared.queue.as_ptr());
        init.qp_type = ffi::IBV_QPT_RC;
        init.cap.max_send_wr = depths.send;
        init.cap.max_recv_wr = if shared.is_some() { 0 } else { depths.receive };
        init.cap.max_send_sge = 1;
        init.cap.max_recv_sge = 1;
        init.cap.max_inline_data = depths.inline_bytes;
        // SAFETY: domain, queues and options live across the call.
        let pair = unsafe { ffi::ibv_create_qp(domain.raw(), &raw mut init) };
        let pair = NonNull::new(pair).ok_or_else(io::Error::last_os_error)?;
        let pair = Self {
            pair,
            port: *port,
            first_psn: rand::random::<u32>() & LOW_24_BITS,
            retries: port.retries.min(RETRIES),
            _domain: Arc::clone(domain),
            _queue: Arc::clone(queue.handle()),
            _shared: shared.map(Arc::clone),
        };
        // SAFETY: plain data, for which zero is valid.
        let mut change: ffi::ibv_qp_attr = unsafe { zeroed() };
        change.qp_state = ffi::IBV_QPS_INIT;
        change.port_num = port.number;
        change.qp_access_flags = ffi::IBV_ACCESS_LOCAL_WRITE | ffi::IBV_ACCESS_REMOTE_WRITE;
        pair.modify(
            &mut change,
            ffi::IBV_QP_STATE | ffi::IBV_QP_PKEY_INDEX | ffi::IBV_QP_PORT | ffi::IBV_QP_ACCESS_FLAGS,
        )?;
        Ok(pair)
    }

    /// Connects the receiving half: READY TO RECEIVE. The path MTU is the smaller of both ends'.
    ///
    /// # Errors
    /// The error that the library reports.
    pub(crate) fn receive_from(&self, peer: &PeerAddress) -> io::Result<()> {
        let port = self.port;
        // SAFETY: plain data, for which zero is valid.
        let mut change: ffi::ibv_qp_attr = unsafe { zeroed() };
        change.qp_state = ffi::IBV_QPS_RTR;
        change.path_mtu = mtu_code(port.mtu.min(peer.mtu));
        change.dest_qp_num = peer.queue_pair;
        change.rq_psn = peer.first_psn & 0xff_ffff;
        change.min_rnr_timer = RNR_TIMER;
        change.ah_attr.port_num = port.number;
        change.ah_attr.dlid = peer.lid;
        change.ah_attr.is_global = u8::from(port.ethernet);
        change.ah_attr.grh.dgid.raw = peer.gid;
        change.ah_attr.grh.sgid_index = port.gid_index;
        change.ah_attr.grh.hop_limit = 64;
        self.modify(
            &mut change,
            ffi::IBV_QP_STATE
                | ffi::IBV_QP_AV
                | ffi::IBV_QP_PATH_MTU
                | ffi::IBV_QP_DEST_QPN
                | ffi::IBV_QP_RQ_PSN
                | ffi::IBV_QP_MAX_DEST_RD_ATOMIC
                | ffi::IBV_QP_MIN_RNR_TIMER,
        )
    }

    /// Connects the sending half: READY TO SEND.
    ///
    /// # Errors
    /// The error that the library reports.
    pub(crate) fn send(&self) -> io::Result<()> {
        // SAFETY: plain data, for which zero is valid.
        let mut change: ffi::ibv_qp_attr = unsafe { zeroed() };
        change.qp_state = ffi::IBV_QPS_RTS;
        change.timeout = TIMEOUT;
        change.retry_cnt = self.retries;
        change.rnr_retry = RNR_RETRIES;
        change.sq_psn = self.first_psn;
        self.modify(
            &mut change,
            ffi::IBV_QP_STATE
                | ffi::IBV_QP_TIMEOUT
                | ffi::IBV_QP_RETRY_CNT
                | ffi::IBV_QP_RNR_RETRY
                | ffi::IBV_QP_SQ_PSN
                | ffi::IBV_QP_MAX_QP_RD_ATOMIC,
        )
    }

    /// Number of the queue pair, 24 bits.
    #[must_use]
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: the queue pair lives.
        unsafe { self.pair.as_ref() }.qp_num
    }

    /// Numbers packets from `psn` on, which has 24 bits.
    pub(crate) fn number_packets_from(&mut self, psn: u32) {
        self.first_psn = psn;
    }

    /// Sends an unanswered packet again `times` times, at most 7 (IBTA 9.7.6.1.3: the retry counter has 3 bits).
    pub(crate) fn send_again(&mut self, times: u8) {
        self.retries = times.min(RETRIES);
    }

    /// Address that a peer needs to connect.
    #[must_use]
    pub(crate) fn address(&self) -> PeerAddress {
        let LocalPort { gid, lid, mtu, .. } = self.port;
        PeerAddress { gid, lid, queue_pair: self.number(), first_psn: self.first_psn, mtu }
    }

    /// Posts a receive into `into`. Does not allocate.
    ///
    /// # Errors
    /// The error of `ibv_post_recv`.
    pub(crate) fn post_receive(&mut self, id: u64, into: LocalRange) -> io::Result<()> {
        let mut range = ffi::ibv_sge { addr: into.address, length: into.len, lkey: into.key };
        let mut receive =
            ffi::ibv_recv_wr { wr_id: id, next: std::ptr::null_mut(), sg_list: &raw mut range, num_sge: 1 };
        let mut failed = std::ptr::null_mut();
        // SAFETY: queue pair and request live across the call, which copies the request.
        check(unsafe { ffi::ibv_post_recv(self.pair.as_ptr(), &raw mut receive, &raw mut failed) })
    }

    /// Posts the first requests, at most [`DOORBELL`], in order with one call. Returns the number taken. Does not allocate.
    ///
    /// # Errors
    /// The error of `ibv_post_send`, if no request was taken or the library does not say how many were.
    pub(crate) fn post<'a>(
        &mut self,
        requests: impl Iterator<Item = io::Result<Request<'a, MemoryWindow>>>,
    ) -> io::Result<usize> {
        // SAFETY: plain data, for which zero is valid.
        let (mut works, mut ranges): ([ffi::ibv_send_wr; DOORBELL], [ffi::ibv_sge; DOORBELL]) = unsafe { zeroed() };
        let mut count = 0;
        for request in requests.take(DOORBELL) {
            ranges[count] = fill(&mut works[count], &request?);
            count += 1;
        }
        for index in 0..count {
            works[index].sg_list = &raw mut ranges[index];
            if index + 1 < count {
                works[index].next = &raw mut works[index + 1];
            }
        }
        let Some(first) = works[..count].first_mut() else { return Ok(0) };
        let mut failed: *mut ffi::ibv_send_wr = std::ptr::null_mut();
        // SAFETY: the chain, its ranges and the inline bytes live across the call, which copies them.
        let result = check(unsafe { ffi::ibv_post_send(self.pair.as_ptr(), first, &raw mut failed) });
        match result {
            Ok(()) => Ok(count),
            Err(error) => match (0..count).find(|index| std::ptr::eq(&raw const works[*index], failed)) {
                Some(taken @ 1..) => Ok(taken),
                Some(0) => Err(error),
                // How many requests the device has taken is then unknown.
                None => Err(io::Error::new(error.kind(), format!("{error}, and the library names no failed request"))),
            },
        }
    }
}

/// Fills in a request, except its links. Returns the memory that it names.
fn fill(work: &mut ffi::ibv_send_wr, request: &Request<'_, MemoryWindow>) -> ffi::ibv_sge {
    let none = ffi::ibv_sge { addr: 0, length: 0, lkey: 0 };
    let inline =
        |bytes: &[u8]| ffi::ibv_sge { addr: bytes.as_ptr().addr() as u64, length: bytes.len() as u32, lkey: 0 };
    work.wr_id = request.id;
    work.send_flags = if request.signaled { ffi::IBV_SEND_SIGNALED } else { 0 };
    let write = |work: &mut ffi::ibv_send_wr, to: RemoteRange, immediate: Option<u32>| {
        work.wr.rdma.remote_addr = to.address;
        work.wr.rdma.rkey = to.key;
        match immediate {
            Some(immediate) => {
                work.opcode = ffi::IBV_WR_RDMA_WRITE_WITH_IMM;
                work.__bindgen_anon_1.imm_data = immediate.to_be();
            }
            None => work.opcode = ffi::IBV_WR_RDMA_WRITE,
        }
    };
    match request.work {
        Work::Send(bytes) => {
            work.opcode = ffi::IBV_WR_SEND;
            work.send_flags |= ffi::IBV_SEND_INLINE;
            work.num_sge = 1;
            inline(bytes)
        }
        Work::WriteInline(bytes, to, immediate) => {
            write(work, to, immediate);
            work.send_flags |= ffi::IBV_SEND_INLINE;
            work.num_sge = 1;
            inline(bytes)
        }
        Work::Write(from, to, immediate) => {
            write(work, to, immediate);
            work.num_sge = i32::from(from.is_some());
            from.map_or(none, |from| ffi::ibv_sge { addr: from.address, length: from.len, lkey: from.key })
        }
        Work::Open(window) => {
            let (raw, key, info) = window.bind();
            work.opcode = ffi::IBV_WR_BIND_MW;
            work.__bindgen_anon_2.bind_mw.mw = raw;
            work.__bindgen_anon_2.bind_mw.rkey = key;
            work.__bindgen_anon_2.bind_mw.bind_info = info;
            work.num_sge = 0;
            none
        }
    }
}

impl QueuePair {
    /// Changes the attributes that `mask` names.
    fn modify(&self, change: &mut ffi::ibv_qp_attr, mask: u32) -> io::Result<()> {
        // SAFETY: queue pair and attributes live across the call; the mask names fields that are filled in.
        check(unsafe { ffi::ibv_modify_qp(self.pair.as_ptr(), change, mask.cast_signed()) })
    }
}

/// Code of a path MTU. `enum ibv_mtu` counts from 1: 256, 512, ... 4096 bytes.
fn mtu_code(bytes: u32) -> u32 {
    (bytes.clamp(256, 4096) / 256).ilog2() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mtu_codes_are_those_of_the_library() {
        assert_eq!([256, 1024, 4096, 5000].map(mtu_code), [ffi::IBV_MTU_256, ffi::IBV_MTU_1024, ffi::IBV_MTU_4096, 5]);
        assert_eq!(mtu_code(1500), ffi::IBV_MTU_1024);
    }
}
