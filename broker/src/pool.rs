//! Which segment allocator a broker uses, and the caller's side of the leader allocator.

use embarcadero_control::v1::control_client::ControlClient;
use embarcadero_control::v1::{AllocateSegmentRequest, ReleaseSegmentRequest};
use embarcadero_cxl::headship::{latest_claimant, read_headship, read_headship_at};
use embarcadero_cxl::layout::{AllocatorKind, Seat};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::segment::{BitmapAllocator, PartitionAllocator, PoolError, SegmentAllocator};
use embarcadero_cxl::tables::{BrokerInfo, read_broker};
use embarcadero_cxl::{Fabric, Native};
use embarcadero_wire::{BrokerId, Incarnation, Term};
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tonic::Code;
use tonic::transport::Channel;

/// The allocator that the region's superblock names, for this broker.
///
/// # Errors
/// No runtime for remote calls can be made.
pub fn allocator(region: &Region<Native>, info: &BrokerInfo) -> io::Result<Arc<dyn SegmentAllocator>> {
    Ok(match region.geometry().allocator {
        AllocatorKind::Bitmap => Arc::new(BitmapAllocator::new(region.clone())),
        AllocatorKind::Partitioned => Arc::new(PartitionAllocator::of_broker(region.clone(), info.id)),
        AllocatorKind::Leader => Arc::new(LeaderAllocator::new(region.clone(), info)?),
    })
}

/// How long a call to the leader may take.
const CALL: Duration = Duration::from_secs(2);

/// Where calls run, and the connection to the head of an epoch.
type Calls = (tokio::runtime::Runtime, Option<(Term, ControlClient<Channel>)>);

/// DEV-005 (B): asks the head for segments; at the head, gives them.
pub struct LeaderAllocator<F> {
    region: Region<F>,
    broker: BrokerId,
    incarnation: Incarnation,
    /// From when this broker is the head: then no other allocates any more.
    own: OnceLock<PartitionAllocator<F>>,
    calls: Mutex<Calls>,
}

impl<F: Fabric> LeaderAllocator<F> {
    /// A caller that has not called yet.
    ///
    /// # Errors
    /// No runtime can be made.
    pub fn new(region: Region<F>, info: &BrokerInfo) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let BrokerInfo { id: broker, incarnation, .. } = *info;
        Ok(Self { region, broker, incarnation, own: OnceLock::new(), calls: Mutex::new((runtime, None)) })
    }

    /// The allocator itself, if this broker is the head.
    fn own(&self) -> Option<&PartitionAllocator<F>> {
        // From when it takes over, as it needs segments for that.
        let (broker, epoch) = latest_claimant(&self.region)?;
        let head = read_headship_at(&self.region, Seat(broker))?;
        let is_head = (head.epoch, head.broker, head.incarnation) == (epoch, self.broker, self.incarnation);
        is_head.then(|| self.own.get_or_init(|| PartitionAllocator::of_leader(self.region.clone())))
    }

    fn call<R>(
        &self,
        request: impl AsyncFnOnce(&mut ControlClient<Channel>) -> Result<R, tonic::Status>,
    ) -> Result<R, PoolError> {
        let unreachable = |error: &dyn std::fmt::Display| PoolError::Unreachable(error.to_string());
        let head = read_headship(&self.region).ok_or_else(|| unreachable(&"the region has no head"))?;
        let info = read_broker(&self.region, head.broker).ok_or_else(|| unreachable(&"the head has no address"))?;
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let (runtime, client) = &mut *calls;
        runtime.block_on(async {
            let mut connected = match client.take() {
                Some((epoch, connected)) if epoch == head.epoch => connected,
                _ => {
                    let endpoint = tonic::transport::Endpoint::try_from(format!("http://{}", info.control))
                        .map_err(|error| unreachable(&error))?
                        .connect_timeout(CALL)
                        .timeout(CALL);
                    ControlClient::new(endpoint.connect().await.map_err(|error| unreachable(&error))?)
                }
            };
            let result = request(&mut connected).await;
            if result.as_ref().err().is_none_or(|status| status.code() == Code::ResourceExhausted) {
                *client = Some((head.epoch, connected));
            }
            result.map_err(|status| match status.code() {
                Code::ResourceExhausted => PoolError::Exhausted { segments: self.region.geometry().segment_count },
                _ => unreachable(&status),
            })
        })
    }
}

impl<F: Fabric> SegmentAllocator for LeaderAllocator<F> {
    fn allocate(&self) -> Result<u32, PoolError> {
        if let Some(own) = self.own() {
            return own.allocate();
        }
        let request = AllocateSegmentRequest { broker: self.broker.0 };
        self.call(async |client| Ok(client.allocate_segment(request).await?.into_inner().segment))
    }

    fn release(&self, segment: u32) -> Result<(), PoolError> {
        if let Some(own) = self.own() {
            return own.release(segment);
        }
        let request = ReleaseSegmentRequest { segment, broker: self.broker.0 };
        self.call(async |client| client.release_segment(request).await.map(drop))
    }
}
