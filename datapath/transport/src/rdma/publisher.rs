//! Publisher's end of a queue pair: batches are written from their buffers into the broker's landing windows.

use super::client::{Arrival, ClientPair, RdmaClient, violation};
use super::{WANTS_WINDOW, WINDOWS_PER_PUBLISHER};
use crate::link::LinkError;
use crate::options::LinkOptions;
use crate::send_buffer::SendBuffer;
use crate::window::RemoteWindow;
use embarcadero_verbs::{DOORBELL, LocalRange, RemoteRange, Work};
use embarcadero_wire::batch::BatchBuilder;
use embarcadero_wire::{Frame, RdmaConnect};
use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::os::fd::RawFd;
use std::sync::Arc;

/// Queue pair of a publisher, with the landing windows that it was granted.
pub(crate) struct RdmaPublisher {
    pair: ClientPair,
    client: Arc<RdmaClient>,
    windows: VecDeque<RemoteWindow>,
    /// Number of the window that comes next.
    next_window: u32,
    /// True once the broker was told that there is no window.
    asked: bool,
    /// Batches to post with the next call to the device: source, destination and number of the window.
    staged: Vec<(LocalRange, RemoteRange, u32)>,
    /// Numbers of the requests that read batches; `None` with acknowledgements.
    reading: Option<VecDeque<u64>>,
}

impl RdmaPublisher {
    /// Connects a queue pair beside `socket`.
    pub(crate) fn connect(client: &Arc<RdmaClient>, socket: &mut TcpStream, options: &LinkOptions) -> io::Result<Self> {
        let request = RdmaConnect { batch_bytes: options.batch_bytes as u32, ..RdmaConnect::blank() };
        let mut pair = ClientPair::connect(client, &client.domain, socket, options.timeout, request)?;
        if !options.acknowledged {
            pair.sends.signal_all();
        }
        Ok(Self {
            pair,
            client: Arc::clone(client),
            windows: VecDeque::with_capacity(WINDOWS_PER_PUBLISHER),
            next_window: 0,
            asked: false,
            staged: Vec::with_capacity(DOORBELL),
            reading: (!options.acknowledged).then(VecDeque::new),
        })
    }

    /// Appends the frames that have come, and keeps the window grants among them.
    pub(crate) fn poll(&mut self, frames: &mut Vec<Frame>) -> Result<(), LinkError> {
        self.pair.poll()?;
        while let Some(arrival) = self.pair.next() {
            match arrival {
                Arrival::Frame(Frame::WindowGrant(grant)) => {
                    if grant.number & WANTS_WINDOW != 0 {
                        return Err(violation("the broker numbers a window beyond the last number").into());
                    }
                    self.asked = false;
                    self.next_window = (grant.number + 1) & !WANTS_WINDOW;
                    let to = RemoteRange { address: grant.address, key: grant.rkey };
                    self.windows.push_back(RemoteWindow::new(grant.number, to, grant.bytes.into()));
                }
                Arrival::Frame(frame) => frames.push(frame),
                Arrival::Written(..) => return Err(violation("the broker writes to a publisher").into()),
            }
        }
        Ok(())
    }

    /// Stages a sealed batch, which is read in place until it is acknowledged. Returns false when it has to wait.
    pub(crate) fn stage(&mut self, batch: &mut BatchBuilder<SendBuffer>) -> io::Result<bool> {
        let bytes = batch.bytes().len() as u64;
        if self.staged.len() == DOORBELL {
            self.flush()?;
        }
        // One request stays free to ask for a window with.
        if self.pair.sends.room() < self.staged.len() + 2 {
            return Ok(false);
        }
        while self.windows.front().is_some_and(|window| window.room() < bytes) {
            self.windows.pop_front();
        }
        let Some(window) = self.windows.front_mut() else {
            self.ask_for_window()?;
            return Ok(false);
        };
        let from = batch.buffer_mut().local(&self.client.domain)?;
        let to = window.place(bytes);
        self.staged.push((from, to, window.number));
        Ok(true)
    }

    /// Tells the broker, once, that a batch waits for a window.
    fn ask_for_window(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.asked, true) {
            return Ok(());
        }
        self.flush()?;
        let nowhere = RemoteRange { address: 0, key: 0 };
        self.pair.post(std::iter::once(Work::Write(None, nowhere, Some(WANTS_WINDOW | self.next_window))))
    }

    /// Posts the staged batches.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if self.staged.is_empty() {
            return Ok(());
        }
        let before = self.pair.sends.posted();
        let writes = self.staged.iter().map(|(from, to, number)| Work::Write(Some(*from), *to, Some(*number)));
        self.pair.post(writes)?;
        self.staged.clear();
        if let Some(reading) = &mut self.reading {
            reading.extend(before + 1..=self.pair.sends.posted());
        }
        Ok(())
    }

    /// Number of batches that the device may still read.
    pub(crate) fn in_use(&mut self) -> usize {
        let Some(reading) = &mut self.reading else { return 0 };
        while reading.front().is_some_and(|number| self.pair.sends.is_done(*number)) {
            reading.pop_front();
        }
        reading.len() + self.staged.len()
    }

    /// Makes [`RdmaPublisher::descriptor`] readable when something comes.
    pub(crate) fn arm(&mut self) -> io::Result<()> {
        self.pair.arm()
    }

    /// Descriptor of the completion queue.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.pair.descriptor()
    }
}
