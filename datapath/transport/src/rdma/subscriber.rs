//! Subscriber's end of a queue pair: deliveries arrive in a ring.

use super::client::{Arrival, ClientPair, RdmaClient, violation};
use super::ring::RingReader;
use crate::link::{Item, LinkError};
use crate::options::LinkOptions;
use crate::tcp::decode_header;
use embarcadero_os::Buffer;
use embarcadero_verbs::{MemoryRegion, ProtectionDomain, RemoteRange, Work};
use embarcadero_wire::{FRAME_BYTES, Frame, RdmaConnect, WireError};
use std::io;
use std::net::TcpStream;
use std::os::fd::RawFd;
use std::sync::Arc;

/// Queue pair of a subscriber, with the ring in which deliveries arrive.
pub(crate) struct RdmaSubscriber {
    pair: ClientPair,
    ring: Buffer,
    _ring_region: MemoryRegion,
    reader: RingReader,
    _client: Arc<RdmaClient>,
}

impl RdmaSubscriber {
    /// Connects a queue pair beside `socket`.
    pub(crate) fn connect(client: &Arc<RdmaClient>, socket: &mut TcpStream, options: &LinkOptions) -> io::Result<Self> {
        // Its own domain: the key to the ring is of no use to other brokers.
        let domain = ProtectionDomain::new(client.domain.context())?;
        let bytes = options.ring_bytes as u64;
        let ring = Buffer::zeroed(options.ring_bytes)?;
        let region = MemoryRegion::writable(&domain, &ring)?;
        let to = region.remote(0, bytes);
        let request = RdmaConnect {
            ring_address: to.address,
            ring_rkey: to.key,
            ring_bytes: bytes as u32,
            ..RdmaConnect::blank()
        };
        let pair = ClientPair::connect(client, &domain, socket, options.timeout, request)?;
        let reader = RingReader::new(bytes);
        Ok(Self { pair, ring, _ring_region: region, reader, _client: Arc::clone(client) })
    }

    /// Bytes of the ring.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.ring
    }

    /// Takes the next item, and gives back the room of the one before.
    pub(crate) fn take(&mut self) -> Result<Item, LinkError> {
        self.pair.poll()?;
        if let Some(released) = self.reader.due_release().filter(|_| self.pair.sends.room() > 0) {
            let nowhere = RemoteRange { address: 0, key: 0 };
            self.pair.post(std::iter::once(Work::Write(None, nowhere, Some(released))))?;
            self.reader.released();
        }
        let (line, bytes) = match self.pair.next() {
            None => return Ok(Item::Nothing),
            Some(Arrival::Frame(frame)) => return Ok(Item::Frame(frame)),
            Some(Arrival::Written(line, bytes)) => (line, bytes),
        };
        let misplaced = || violation(format!("a delivery of {bytes} bytes came at line {line} of the ring"));
        let range = self.reader.take(line, FRAME_BYTES as u64 + u64::from(bytes)).ok_or_else(misplaced)?;
        let (frame, batch) = self.ring[range.clone()].split_first_chunk().ok_or_else(misplaced)?;
        let Frame::Deliver(deliver) = Frame::decode(frame)? else {
            return Err(WireError::Kind { found: frame[4] }.into());
        };
        let header = decode_header(batch.first_chunk().ok_or_else(misplaced)?);
        Ok(Item::Batch(deliver, header, range.start + 2 * FRAME_BYTES..range.end))
    }

    /// Makes [`RdmaSubscriber::descriptor`] readable when something comes.
    pub(crate) fn arm(&mut self) -> io::Result<()> {
        self.pair.arm()
    }

    /// Descriptor of the completion queue.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.pair.descriptor()
    }
}
