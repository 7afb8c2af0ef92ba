//! Choice of a broker's segment allocator, and the caller's side of the leader allocator.

use crate::caller::Caller;
use embarcadero_control::v1::control_client::ControlClient;
use embarcadero_control::v1::{AllocateSegmentRequest, ReleaseSegmentRequest};
use embarcadero_cxl::broker_table::{BrokerInfo, read_broker};
use embarcadero_cxl::layout::{AllocatorKind, LeaderArea};
use embarcadero_cxl::leadership::{latest_claimant, read_leader_at, with_leader};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::segment::{
    BitmapAllocator, PartitionAllocator, PoolError, SegmentAllocator, SegmentCount, segments_of,
};
use embarcadero_cxl::{Fabric, Native, Row};
use embarcadero_wire::{Incarnation, Term};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tonic::Code;
use tonic::transport::Channel;

/// Returns the allocator that the region's superblock names, for the broker `info`, which calls others as `caller`.
///
/// # Errors
/// [`io::Error`] when the runtime of remote calls cannot be made.
pub(crate) fn allocator(
    region: &Region<Native>,
    info: &BrokerInfo,
    caller: Caller,
) -> io::Result<Arc<dyn SegmentAllocator>> {
    Ok(match region.geometry().allocator {
        AllocatorKind::Bitmap => Arc::new(BitmapAllocator::new(region.clone())),
        AllocatorKind::Partitioned => Arc::new(PartitionAllocator::of_broker(region.clone(), info.id)),
        AllocatorKind::Leader => Arc::new(LeaderAllocator::new(region.clone(), info.incarnation, caller)?),
    })
}

/// Longest time for a call to the leader, and for the connection to it. After it a connection whose other end is gone is
/// made anew, which needs no keep-alive: nothing would answer that between calls.
const CALL_LIMIT: Duration = Duration::from_secs(2);

/// Runtime of the calls, and the connection to the leader with the term under which it leads.
type Calls = (tokio::runtime::Runtime, Option<(Term, ControlClient<Channel>)>);

// [[DEVIATION_005]] (B): the paper gives each broker one contiguous log.
/// Allocator that asks the leader for segments. At the leader itself it takes them from the pool.
pub(crate) struct LeaderAllocator<F> {
    region: Region<F>,
    /// This broker.
    caller: Caller,
    incarnation: Incarnation,
    /// Pool of the region as this broker found it when it claimed a term, and that term. No other broker allocates from
    /// it under that term.
    own: Mutex<Option<(Term, PartitionAllocator<F>)>>,
    calls: Mutex<Calls>,
}

impl<F: Fabric> LeaderAllocator<F> {
    /// Returns an allocator that is not connected yet, for a process of this incarnation.
    ///
    /// # Errors
    /// [`io::Error`] when the runtime of the calls cannot be made.
    pub(crate) fn new(region: Region<F>, incarnation: Incarnation, caller: Caller) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { region, caller, incarnation, own: Mutex::new(None), calls: Mutex::new((runtime, None)) })
    }

    /// Returns the term under which this process is the leader, or is taking over.
    fn own_term(&self) -> Option<Term> {
        // The latest claimant rather than the active leader: it needs segments to take over.
        let (broker, term) = latest_claimant(&self.region)?;
        let leader = read_leader_at(&self.region, LeaderArea(broker)).used()?;
        let own = (term, self.caller.broker, self.incarnation);
        ((leader.term, leader.broker, leader.incarnation) == own).then_some(term)
    }

    /// Does something with the pool itself if this process is the leader, or is taking over.
    fn with_own<R>(&self, act: impl FnOnce(&PartitionAllocator<F>) -> R) -> Option<R> {
        // Held meanwhile: two copies of the pool's bits would undo each other's changes.
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        let term = self.own_term()?;
        // Others may have led since an earlier term, and changed the bits.
        let (_, pool) = match own.take() {
            Some((known, pool)) if known == term => own.insert((term, pool)),
            _ => own.insert((term, PartitionAllocator::of_leader(self.region.clone()))),
        };
        Some(act(pool))
    }

    /// Sends a request to the leader. The connection is kept for the next request unless the call failed.
    fn call<R>(
        &self,
        request: impl AsyncFnOnce(&mut ControlClient<Channel>) -> Result<R, tonic::Status>,
    ) -> Result<R, PoolError> {
        let leader = settled(with_leader(&self.region, |area| read_leader_at(&self.region, area))?)?;
        let info = settled(read_broker(&self.region, leader.broker))?;
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let (runtime, client) = &mut *calls;
        runtime.block_on(async {
            let mut connected = match client.take() {
                Some((term, connected)) if term == leader.term => connected,
                _ => {
                    let endpoint = tonic::transport::Endpoint::try_from(format!("http://{}", info.control))
                        .map_err(|error| PoolError::Unreachable(error.into()))?
                        .connect_timeout(CALL_LIMIT)
                        .timeout(CALL_LIMIT);
                    let channel = endpoint.connect().await.map_err(|error| PoolError::Unreachable(error.into()))?;
                    ControlClient::new(channel)
                }
            };
            let result = request(&mut connected).await;
            if result.as_ref().err().is_none_or(|status| status.code() == Code::ResourceExhausted) {
                *client = Some((leader.term, connected));
            }
            result.map_err(|status| match status.code() {
                Code::ResourceExhausted => PoolError::Exhausted { segments: self.region.geometry().segment_count },
                // The transport's own errors are of unknown code.
                Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
                    PoolError::Unreachable(status.into())
                }
                _ => PoolError::Refused(status.into()),
            })
        })
    }
}

/// Returns the contents of a row that tells who the leader is, or where.
fn settled<T>(row: Row<T>) -> Result<T, PoolError> {
    match row {
        Row::Used(contents) => Ok(contents),
        Row::Unused | Row::Unsettled => Err(PoolError::UnknownLeader),
        Row::Damaged(damage) => Err(PoolError::Damaged(Box::new(damage))),
    }
}

impl<F: Fabric> SegmentAllocator for LeaderAllocator<F> {
    fn allocate(&self) -> Result<u32, PoolError> {
        if let Some(taken) = self.with_own(PartitionAllocator::allocate) {
            return taken;
        }
        let Caller { broker, call_key } = self.caller;
        let request = AllocateSegmentRequest { broker: broker.0, call_key };
        let segment = self.call(async |client| Ok(client.allocate_segment(request).await?.into_inner().segment))?;
        let segments = self.region.geometry().segment_count;
        if segment >= segments {
            return Err(PoolError::NoSuchSegment { segment, segments });
        }
        Ok(segment)
    }

    fn release(&self, segment: u32) -> Result<(), PoolError> {
        if let Some(released) = self.with_own(|own| own.release(segment)) {
            return released;
        }
        let Caller { broker, call_key } = self.caller;
        let request = ReleaseSegmentRequest { segment, broker: broker.0, call_key };
        self.call(async |client| client.release_segment(request).await.map(drop))
    }

    fn count(&self) -> SegmentCount {
        self.with_own(PartitionAllocator::count).unwrap_or_else(|| segments_of(&self.region, self.caller.broker))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topics::tests::region_with;
    use embarcadero_cxl::leadership::{LeaderInfo, claim_term, publish_leader};
    use embarcadero_wire::BrokerId;

    /// A takeover fails after its claim. Another broker leads meanwhile, and takes segments.
    #[test]
    fn a_broker_that_claims_again_looks_again_which_segments_are_taken() {
        let (region, incarnation) = (region_with(AllocatorKind::Leader), Incarnation(1));
        let [first, second] = [0, 1].map(|id| {
            let caller = Caller::draw(&region, BrokerId(id));
            LeaderAllocator::new(region.clone(), incarnation, caller).unwrap()
        });
        let claim = |allocator: &LeaderAllocator<Native>, term| {
            let broker = allocator.caller.broker;
            claim_term(&region, LeaderArea(broker), term);
            publish_leader(&region, &LeaderInfo { term, broker, incarnation, broker_mask: 3, pinning_mask: 3 });
        };
        claim(&first, Term(1));
        assert_eq!(first.allocate().unwrap(), 0);
        first.release(0).unwrap();
        claim(&second, Term(2));
        assert_eq!(second.allocate().unwrap(), 0);
        claim(&first, Term(3));
        assert_eq!(first.allocate().unwrap(), 1, "it is handed out twice");
        assert!(matches!(first.allocate(), Err(PoolError::Exhausted { .. })));
        first.release(0).unwrap();
        assert_eq!(first.allocate().unwrap(), 0);
    }
}
