//! Queue pairs of a NIC in software.

use super::memory::{Domain, Window};
use super::ports::PortHandle;
use super::receives::Receives;
use super::side::Side;
use crate::peer::{PeerAddress, RNR_RETRIES, RNR_TIMER};
use crate::port::LocalPort;
use crate::range::LocalRange;
use crate::work::{DOORBELL, Request};
use embarcadero_roce::packet::LOW_24_BITS;
use embarcadero_roce::psn::Psn;
use embarcadero_roce::{Attributes, Nanos, PathMtu};
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

/// Most packets under way, as for Linux's soft-RoCE (rxe_param.h, RXE_MAX_UNACKED_PSNS).
const WINDOW: u32 = 128;
/// Shortest wait for an answer, nanoseconds: longer than most paths and polling threads take.
///
/// After 7 doublings, the usual [`LocalPort::retries`], a peer is given up. That takes about a second, or longer if its
/// answers took longer before.
const TIMEOUT: Nanos = 4_000_000;
/// First UDP port of flows: the dynamic ports, which no service has (RFC 6335, 6).
const FIRST_FLOW_PORT: u16 = 0xc000;
/// Bits of a UDP port that tell flows apart.
const FLOW_MASK: u16 = 0x3fff;

/// UDP port that a queue pair sends from, by which switches tell flows apart (IBTA annex A17.9.3).
fn flow_port(number: u32) -> u16 {
    FIRST_FLOW_PORT | (number ^ number >> 10) as u16 & FLOW_MASK
}

/// Queue pair of a NIC in software. Types that know its state wrap it.
pub(crate) struct Pair {
    port: PortHandle,
    domain: Domain,
    address: PeerAddress,
    retries: u8,
}

impl Pair {
    /// Makes a queue pair of the completion queue `queue` at `port`.
    pub(super) fn new(
        port: &PortHandle,
        queue: u32,
        domain: &Domain,
        local: &LocalPort,
        shared: Option<&Arc<Receives>>,
    ) -> io::Result<Self> {
        let number = port.add(|number| Side::new(number, queue, domain.number, shared.cloned()))?;
        let first_psn = rand::random::<u32>() & LOW_24_BITS;
        let address = PeerAddress { gid: local.gid, lid: 0, queue_pair: number, first_psn, mtu: local.mtu };
        Ok(Self { port: port.clone(), domain: domain.clone(), address, retries: local.retries })
    }

    /// Connects both halves.
    ///
    /// # Errors
    /// `InvalidInput`: the peer's address is of another family, or its path MTU is below 256 bytes.
    pub(crate) fn receive_from(&self, peer: &PeerAddress) -> io::Result<()> {
        let nic = self.port.identity();
        let to = Ipv6Addr::from(peer.gid);
        let to = to.to_ipv4_mapped().map_or(IpAddr::V6(to), IpAddr::V4);
        let path_mtu = PathMtu::of_payload(self.address.mtu.min(peer.mtu) as usize);
        let (true, Some(path_mtu)) = (to.is_ipv4() == nic.address.is_ipv4(), path_mtu) else {
            let text = format!("{} cannot reach {to} with packets of {} bytes", nic.name, peer.mtu);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        let number = self.number();
        let attributes = Attributes {
            local: nic.address,
            peer: to,
            number,
            peer_number: peer.queue_pair & LOW_24_BITS,
            source_port: flow_port(number),
            path_mtu,
            send_psn: Psn::new(self.address.first_psn),
            receive_psn: Psn::new(peer.first_psn),
            timeout: TIMEOUT,
            retries: self.retries,
            not_ready_retries: RNR_RETRIES,
            rnr_timer: RNR_TIMER,
            window: WINDOW,
            line_rate: nic.line_rate,
        };
        self.port.with(number, |side, _| {
            side.connect(attributes);
            Ok(())
        })?;
        self.port.seek(to);
        Ok(())
    }

    #[allow(clippy::unnecessary_wraps, clippy::unused_self, reason = "devices of the host have to be told")]
    pub(crate) fn send(&self) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn address(&self) -> PeerAddress {
        self.address
    }

    pub(crate) fn number(&self) -> u32 {
        self.address.queue_pair
    }

    pub(crate) fn number_packets_from(&mut self, psn: u32) {
        self.address.first_psn = psn;
    }

    /// Sends an unanswered packet again `times` times before the queue pair fails.
    pub(crate) fn send_again(&mut self, times: u8) {
        self.retries = times;
    }

    pub(crate) fn post_receive(&self, id: u64, into: LocalRange) -> io::Result<()> {
        let buffer = self.domain.keys.local(self.domain.number, into)?;
        self.port.with(self.number(), |side, _| {
            side.post_receive(id, buffer);
            Ok(())
        })
    }

    /// Posts requests, sends what window and rate allow, and returns the number of requests taken.
    pub(crate) fn post<'a>(
        &self,
        requests: impl Iterator<Item = io::Result<Request<'a, Window>>>,
    ) -> io::Result<usize> {
        let taken = self.port.with(self.number(), |side, completions| {
            let mut taken = 0;
            for request in requests.take(DOORBELL) {
                match request.and_then(|request| side.post(&request, &self.domain, completions)) {
                    Ok(true) => taken += 1,
                    Err(error) if taken == 0 => return Err(error),
                    _ => break,
                }
            }
            Ok(taken)
        })?;
        self.port.send();
        Ok(taken)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // Once it is gone, no packet finds it.
        self.port.remove(self.number());
    }
}
