//! Landing windows of one publisher, as the broker grants them.

use super::chain::Chain;
use super::device::{RdmaDevice, RemoteAccess};
use super::{WANTS_WINDOW, WINDOWS_PER_PUBLISHER};
use crate::connection::{Landing, TransportError, WindowPlacement};
use crate::window::Window;
use embarcadero_cxl::{Fabric, Native, RegionOffset};
use embarcadero_verbs::{ProtectionDomain, RemoteRange, Work};
use embarcadero_wire::batch::ALIGN_BYTES;
use embarcadero_wire::{BatchHeader, ErrorCode, FRAME_BYTES, Frame, WindowGrant};
use std::collections::VecDeque;
use std::sync::Arc;

/// Bounds of the memory that publishers hold as landing windows.
#[derive(Clone, Copy, Debug)]
pub struct WindowBounds {
    /// Bytes of a window, unless the publisher's batches need more.
    window_bytes: u64,
    /// Bytes of the largest batch that the broker takes.
    max_batch_bytes: u64,
    /// Bytes of the largest window that is granted ahead of need.
    ahead_bytes: u64,
}

/// Landing windows that one publisher may hold at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WindowShare {
    /// Bytes of each.
    pub(super) window_bytes: u64,
    /// Number of windows.
    pub(super) windows: usize,
}

impl WindowBounds {
    /// Bounds in a region with segments of `segment_bytes`. Windows have `window_bytes`, but at most a quarter of a segment.
    /// Batches have at most `max_batch_bytes`, and fit into a segment.
    #[must_use]
    pub fn new(window_bytes: u64, max_batch_bytes: u64, segment_bytes: u64) -> Self {
        let ahead_bytes = segment_bytes / 4;
        let max_batch_bytes = max_batch_bytes.min(segment_bytes);
        Self { window_bytes: window_bytes.min(ahead_bytes), max_batch_bytes, ahead_bytes }
    }

    /// Share of a publisher that says how large its batches get. Those that the broker refuses anyway need no window. What a
    /// publisher holds without sending anything is at most half a segment, or one window for its largest batch.
    pub(super) fn share_of(&self, batch_bytes: u64) -> WindowShare {
        let largest = batch_bytes.min(self.max_batch_bytes).next_multiple_of(ALIGN_BYTES);
        let window_bytes = self.window_bytes.max(largest);
        let windows = if window_bytes <= self.ahead_bytes { WINDOWS_PER_PUBLISHER } else { 1 };
        WindowShare { window_bytes, windows }
    }
}

/// Landing window that is open to the publisher.
struct OpenWindow {
    // First, so that it is dropped first: nothing can be written any more once the window is given back.
    access: RemoteAccess,
    window: Window,
    number: u32,
    /// True once its window grant was sent.
    announced: bool,
}

/// Landing windows that are open to one publisher. Once they are dropped, the device refuses every write of the peer.
pub(super) struct LandingWindows {
    windows: VecDeque<OpenWindow>,
    domain: Arc<ProtectionDomain>,
    device: Arc<RdmaDevice>,
    share: WindowShare,
    /// Number of the window that is granted next.
    next_number: u32,
    /// True while the publisher has a batch and no window for it.
    wanted: bool,
}

impl LandingWindows {
    /// Publisher without windows, which is granted those of its `share`.
    pub(super) fn new(device: &Arc<RdmaDevice>, domain: &Arc<ProtectionDomain>, share: WindowShare) -> Self {
        Self {
            windows: VecDeque::with_capacity(share.windows),
            domain: Arc::clone(domain),
            device: Arc::clone(device),
            share,
            next_number: 0,
            wanted: false,
        }
    }

    /// Offsets in the region of the open windows.
    pub(super) fn offsets(&self) -> impl Iterator<Item = RegionOffset> + '_ {
        self.windows.iter().map(|open| open.window.at())
    }

    /// Closes all windows. When this returns, the device refuses every write of the peer.
    pub(super) fn close(&mut self) {
        self.windows.clear();
    }

    /// Returns true when the publisher is to get a window: it asked for its first, or has used one up since.
    pub(super) fn is_due(&self) -> bool {
        (self.wanted || self.next_number > 0) && self.windows.len() < self.share.windows
    }

    /// Records that the publisher has a batch and no window for it. It has left the windows before number `kept`.
    pub(super) fn want(&mut self, kept: u32) {
        self.wanted = true;
        while self.windows.front().is_some_and(|open| open.announced && open.number < kept) {
            self.windows.pop_front();
        }
    }

    /// Header and place of the batch that a WRITE of `bytes` put into window `number`. `None` when the publisher has left
    /// a window, which this closes: call again.
    ///
    /// # Errors
    /// [`TransportError::Refused`] when no batch of this length can lie there.
    pub(super) fn next_batch(
        &mut self,
        memory: &Native,
        number: u32,
        bytes: u64,
    ) -> Result<Option<(BatchHeader, RegionOffset)>, TransportError> {
        let refuse = |text: String| Err(TransportError::refused(ErrorCode::BadBatch, text));
        let Some(open) = self.windows.front().filter(|open| open.announced) else {
            return refuse(format!("a batch of {bytes} bytes came without a landing window"));
        };
        if open.number != number {
            // The publisher has gone on to its next window.
            if self.windows.get(1).is_none_or(|next| !next.announced || next.number != number) {
                return refuse(format!("a batch names landing window {number}, which is not open"));
            }
            self.windows.pop_front();
            return Ok(None);
        }
        let room = open.window.room();
        if bytes < FRAME_BYTES as u64 || bytes > room {
            return refuse(format!("a batch of {bytes} bytes came; the window has {room}"));
        }
        let at = open.window.next();
        // Its own copy: the peer can still write the window.
        let mut header = [0; FRAME_BYTES];
        memory.with_bytes(at, FRAME_BYTES as u64, |bytes| header.copy_from_slice(bytes));
        let Frame::BatchHeader(header) = Frame::decode(&header)? else {
            return refuse("what was written is no batch".to_owned());
        };
        if u64::from(header.payload_bytes) > bytes || header.batch_bytes() != bytes {
            return refuse(format!("{bytes} bytes were written, the batch's header says {}", header.batch_bytes()));
        }
        Ok(Some((header, at)))
    }

    /// Takes the batch of `bytes` that [`LandingWindows::next_batch`] found.
    ///
    /// # Panics
    /// When no window is open: a batch was found in none.
    pub(super) fn take(&mut self, bytes: u64) {
        assert!(!self.windows.is_empty(), "a batch of {bytes} bytes is taken from no landing window");
        self.windows[0].window.take(bytes);
    }

    /// Grants the windows that the publisher is due, as far as the landing has room.
    ///
    /// # Errors
    /// The landing refuses, or the device has no room.
    pub(super) fn grant_due(&mut self, landing: &mut impl Landing) -> Result<(), TransportError> {
        while self.is_due() {
            let starved = self.wanted && self.windows.is_empty();
            let window = match landing.grant_window(self.share.window_bytes, starved) {
                WindowPlacement::Granted(window) => window,
                WindowPlacement::Wait => return Ok(()),
                WindowPlacement::Refuse(error) => return Err(error),
            };
            self.wanted = false;
            let access = self.device.grant_access(&self.domain, window.at(), window.bytes())?;
            let number = self.next_number;
            self.next_number = (number + 1) & !WANTS_WINDOW;
            self.windows.push_back(OpenWindow { access, window, number, announced: false });
        }
        Ok(())
    }

    /// Returns true while a window grant is to be sent.
    pub(super) fn has_to_announce(&self) -> bool {
        self.windows.iter().any(|open| !open.announced)
    }

    /// Adds to `chain` the window grants that were not sent, each behind the request that opens its window. Returns their
    /// number, for [`LandingWindows::announced`] once the chain is posted.
    pub(super) fn announce<'a>(
        &'a self,
        chain: &mut Chain<'a>,
        frames: &'a mut [[u8; FRAME_BYTES]; WINDOWS_PER_PUBLISHER],
    ) -> usize {
        let mut announced = 0;
        for (open, frame) in self.windows.iter().filter(|open| !open.announced).zip(frames) {
            if chain.room() < 2 {
                break;
            }
            announced += 1;
            let RemoteRange { address, key } = open.access.remote();
            let bytes = open.window.bytes() as u32;
            let grant = WindowGrant { address, rkey: key, number: open.number, bytes, ..WindowGrant::blank() };
            *frame = grant.encode();
            if let RemoteAccess::Window(window) = &open.access {
                chain.push(Work::Open(window), false);
            }
            chain.push(Work::Send(frame), false);
        }
        announced
    }

    /// Records that the first `count` window grants that were not sent have been posted.
    pub(super) fn announced(&mut self, count: usize) {
        self.windows.iter_mut().filter(|open| !open.announced).take(count).for_each(|open| open.announced = true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT_BYTES: u64 = 16 << 20;

    #[test]
    fn what_a_publisher_holds_before_it_sends_anything_is_bounded() {
        let share = |window_bytes, max_batch_bytes, batch_bytes| {
            let share = WindowBounds::new(window_bytes, max_batch_bytes, SEGMENT_BYTES).share_of(batch_bytes);
            (share.window_bytes, share.windows)
        };
        assert_eq!(share(2 << 20, 8 << 20, 1 << 20), (2 << 20, 2));
        assert_eq!(share(2 << 20, 8 << 20, 4 << 20), (4 << 20, 2), "a quarter of a segment");
        assert_eq!(share(2 << 20, 8 << 20, (4 << 20) + 1), ((4 << 20) + ALIGN_BYTES, 1));
        assert_eq!(share(1 << 30, 8 << 20, 1), (SEGMENT_BYTES / 4, 2));
        // What the broker refuses needs no window.
        assert_eq!(share(2 << 20, 1 << 20, SEGMENT_BYTES), (2 << 20, 2));
        for batch_bytes in [8 << 20, SEGMENT_BYTES, u64::from(u32::MAX)] {
            assert_eq!(share(2 << 20, 8 << 20, batch_bytes), (8 << 20, 1));
            assert_eq!(share(2 << 20, 64 << 20, batch_bytes).0, batch_bytes.min(SEGMENT_BYTES));
        }
    }
}
