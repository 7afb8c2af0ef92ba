//! Client's RDMA device, and the queue pair of each of its connections.

use super::chain::SendQueue;
use super::{SEND_DEPTH, accepting_peer};
use crate::link::LinkError;
use embarcadero_os::Buffer;
use embarcadero_verbs::{
    CompletionQueue, Context, LocalPort, LocalRange, MemoryRegion, Outcome, PeerAddress, ProtectionDomain, QueuePair,
    QueuePairOptions, Sending, Work, WorkError,
};
use embarcadero_wire::{ERROR_TEXT_BYTES, ErrorCode, FRAME_BYTES, Frame, RdmaConnect};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

/// Number of frames that a broker may send before the client looks at the first.
const FRAMES: usize = 512;

/// RDMA device that all connections of a client share.
pub struct RdmaClient {
    port: LocalPort,
    pub(super) domain: Arc<ProtectionDomain>,
}

impl RdmaClient {
    /// Uses a port of an opened device.
    ///
    /// # Errors
    /// The error of `ibv_alloc_pd`.
    pub fn new((context, port): (Arc<Context>, LocalPort)) -> io::Result<Arc<Self>> {
        let domain = ProtectionDomain::new(&context)?;
        Ok(Arc::new(Self { port, domain }))
    }

    /// Returns true while the port is up.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.domain.context().is_active(self.port.number)
    }
}

/// Message or write that arrived on a queue pair.
pub(super) enum Arrival {
    /// A frame.
    Frame(Frame),
    /// An RDMA WRITE: its immediate data, and its length in bytes.
    Written(u32, u32),
}

/// Error of a broker that breaks the protocol.
pub(super) fn violation(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// Exchanges the addresses of both queue pairs over the socket. Waits for each part of the answer for at most `timeout`.
fn handshake(socket: &mut TcpStream, request: &RdmaConnect, timeout: Duration) -> io::Result<PeerAddress> {
    socket.set_read_timeout(Some(timeout))?;
    socket.write_all(&request.encode())?;
    let unanswered = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            let text = format!("the broker did not answer the request for a queue pair within {timeout:?}");
            io::Error::new(io::ErrorKind::TimedOut, text)
        }
        _ => error,
    };
    let mut frame = [0; FRAME_BYTES];
    socket.read_exact(&mut frame).map_err(unanswered)?;
    match Frame::decode(&frame).map_err(io::Error::other)? {
        Frame::RdmaAccept(accept) => {
            accepting_peer(&accept).ok_or_else(|| violation("the broker's LID has more than 16 bits"))
        }
        Frame::ErrorFrame(error) => {
            let mut text = vec![0; (error.text_bytes as usize).min(ERROR_TEXT_BYTES)];
            socket.read_exact(&mut text).map_err(unanswered)?;
            let text = String::from_utf8_lossy(&text).into_owned();
            Err(io::Error::other(LinkError::Refused {
                code: ErrorCode::from_code(error.code),
                text,
                detail: error.detail,
            }))
        }
        other => Err(violation(format!("the broker answers a queue pair with a frame of kind {}", other.kind()))),
    }
}

/// Connected queue pair, and the frames that arrive on it.
pub(super) struct ClientPair {
    pair: QueuePair<Sending>,
    queue: CompletionQueue,
    frames: Buffer,
    _frames_region: MemoryRegion,
    frame_ranges: Vec<LocalRange>,
    arrived: VecDeque<Arrival>,
    pub sends: SendQueue,
    failure: Option<WorkError>,
}

impl ClientPair {
    /// Connects a queue pair beside `socket`.
    pub(super) fn connect(
        client: &RdmaClient,
        domain: &Arc<ProtectionDomain>,
        socket: &mut TcpStream,
        timeout: Duration,
        request: RdmaConnect,
    ) -> io::Result<Self> {
        let frames = Buffer::zeroed(FRAMES * FRAME_BYTES)?;
        let region = MemoryRegion::local(domain, &frames)?;
        let frame_ranges: Vec<_> =
            (0..FRAMES).map(|index| region.range((index * FRAME_BYTES) as u64, FRAME_BYTES as u32)).collect();
        let queue = CompletionQueue::new(domain.context(), (FRAMES + SEND_DEPTH as usize) as u32)?;
        let options = QueuePairOptions {
            send_depth: SEND_DEPTH as u32,
            receive_depth: FRAMES as u32,
            inline_bytes: FRAME_BYTES as u32,
            shared: None,
        };
        let mut pair = QueuePair::new(domain, &queue, &client.port, &options)?;
        for (index, range) in frame_ranges.iter().enumerate() {
            pair.post_receive(index as u64, *range)?;
        }
        let PeerAddress { gid, lid, queue_pair, first_psn, mtu } = pair.address();
        let request = RdmaConnect { gid, lid: lid.into(), queue_pair, first_psn, mtu, ..request };
        let peer = handshake(socket, &request, timeout)?;
        Ok(Self {
            pair: pair.receive_from(&peer)?.send()?,
            queue,
            frames,
            _frames_region: region,
            frame_ranges,
            arrived: VecDeque::with_capacity(FRAMES),
            sends: SendQueue::new(),
            failure: None,
        })
    }

    /// Takes completions, and queues what arrived for [`ClientPair::next`].
    pub(super) fn poll(&mut self) -> Result<(), LinkError> {
        let Self { queue, pair, frames, frame_ranges, arrived, sends, failure, .. } = self;
        let mut trouble = Ok(());
        loop {
            let count = queue.poll(|completion| {
                let arrival = match completion.outcome {
                    Outcome::Sent => return sends.completed(completion.id),
                    Outcome::Failed(error) => {
                        failure.get_or_insert(error);
                        return;
                    }
                    Outcome::Written { bytes, immediate } => Ok(Arrival::Written(immediate, bytes)),
                    Outcome::Message { .. } => match frames.as_chunks().0.get(completion.id as usize) {
                        Some(frame) => Frame::decode(frame).map(Arrival::Frame).map_err(LinkError::from),
                        None => Err(violation("the device completes a receive that was not posted").into()),
                    },
                };
                match arrival {
                    Ok(arrival) => arrived.push_back(arrival),
                    Err(error) => trouble = Err(error),
                }
                if let Some(range) = frame_ranges.get(completion.id as usize)
                    && let Err(error) = pair.post_receive(completion.id, *range)
                {
                    trouble = Err(error.into());
                }
            })?;
            if count == 0 {
                break;
            }
        }
        trouble?;
        match self.failure {
            Some(error) => Err(io::Error::other(error).into()),
            None => Ok(()),
        }
    }

    /// Takes the oldest arrival.
    pub(super) fn next(&mut self) -> Option<Arrival> {
        self.arrived.pop_front()
    }

    /// Makes [`ClientPair::descriptor`] readable when something comes. Fails if the device is gone.
    pub(super) fn arm(&mut self) -> io::Result<()> {
        if !self.queue.context().is_present() {
            return Err(io::Error::other("the RDMA device was removed, or broke down"));
        }
        self.queue.arm()
    }

    /// Descriptor of the completion queue.
    pub(super) fn descriptor(&self) -> RawFd {
        self.queue.descriptor()
    }

    /// Posts up to [`embarcadero_verbs::DOORBELL`] requests with one call.
    ///
    /// # Panics
    /// When [`SendQueue::room`] has less room than that.
    pub(super) fn post<'a>(&mut self, works: impl Iterator<Item = Work<'a>>) -> io::Result<()> {
        let mut chain = self.sends.chain();
        works.for_each(|work| {
            chain.push(work, false);
        });
        self.sends.post(&mut self.pair, &chain).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};

    #[test]
    fn the_wait_for_an_answer_is_the_one_that_was_asked_for() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let timeout = Duration::from_millis(100);
        let error = handshake(&mut socket, &RdmaConnect::blank(), timeout).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().ends_with("within 100ms"), "{error}");
        assert_eq!(socket.read_timeout().unwrap(), Some(timeout));
    }
}
