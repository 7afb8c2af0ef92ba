//! Ceilings of RDMA, at a device of the host or a NIC in software.

use crate::args::{BenchArgs, SMALL_RETENTION_BYTES};
use crate::cores::pin;
use crate::{histogram, memif};
use anyhow::{Context as _, Result, bail};
use embarcadero_client::TransportKind;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::{Mapping, Native, RegionOffset};
use embarcadero_os::buffer::Buffer;
use embarcadero_verbs::{
    CompletionQueue, Context, DpdkConfig, LocalPort, MemoryRegion, Outcome, ProtectionDomain, QueuePair,
    QueuePairOptions, RemoteRange, Request, Sending, SharedReceiveQueue, VerbsError, Work,
};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Most requests under way.
const DEPTH: u32 = 128;
/// Number of requests posted together, of which the last has a completion.
const CHAIN: usize = 8;

/// One of two ends, which write from a buffer into each other's memory, which is like a region's.
struct End {
    pair: QueuePair<Sending>,
    queue: CompletionQueue,
    receives: Arc<SharedReceiveQueue>,
    from: MemoryRegion,
    _into: MemoryRegion,
    to: RemoteRange,
    /// Bytes of the other end's memory.
    span: u64,
    /// Offset of the next write in the other end's memory.
    next: u64,
    posted: u64,
    done: u64,
    /// Number of complete WRITEs of the other end.
    arrived: u64,
}

/// Ports that share memory. They stay open: on closing the second, their driver would free the shared memory twice.
static SHARING: Mutex<Vec<(Arc<Context>, LocalPort)>> = Mutex::new(Vec::new());

/// Devices of both ends, which may be one.
fn devices(args: &BenchArgs) -> Result<[(Arc<Context>, LocalPort); 2]> {
    // The end that receives listens.
    let open = |[near, far]: [DpdkConfig; 2]| {
        let far = Context::dpdk(&far)?;
        Ok::<_, VerbsError>([Context::dpdk(&near)?, far])
    };
    let one = match (args.transport, &args.devices) {
        (TransportKind::Dpdk, Some(devices)) => return Ok(open(devices.pair())?),
        (TransportKind::Dpdk, None) => {
            let ends = open(memif::pair())?;
            SHARING.lock().unwrap_or_else(PoisonError::into_inner).extend(ends.clone());
            return Ok(ends);
        }
        (TransportKind::Roce, _) => Context::software(Some(Ipv4Addr::LOCALHOST.into()))?,
        _ => Context::find(None)?,
    };
    Ok([one.clone(), one])
}

fn ends(args: &BenchArgs, bytes: usize, span: u64) -> Result<(End, End)> {
    let [near, far] = devices(args)?;
    let half = |(context, port): (Arc<Context>, LocalPort)| -> Result<_> {
        let domain = ProtectionDomain::new(&context).context("cannot make a protection domain")?;
        let receives = SharedReceiveQueue::new(&domain, 2 * DEPTH)?;
        let buffer = Buffer::zeroed(bytes)?;
        let from = MemoryRegion::local(&domain, &buffer).context("cannot register a buffer")?;
        let memory = Mapping::anonymous(span).context("cannot map memory")?;
        memory.prefault().context("cannot map memory")?;
        let memory = Native::new(memory, FlushMethod::None)?;
        let into = MemoryRegion::writable(&domain, &(&memory, RegionOffset(0), span));
        let into = into.context("cannot register memory")?;
        let queue = CompletionQueue::new(&context, 4 * DEPTH)?;
        let options =
            QueuePairOptions { send_depth: DEPTH, receive_depth: 0, inline_bytes: 64, shared: Some(&receives) };
        let pair = QueuePair::new(&domain, &queue, &port, &options).context("cannot make a queue pair")?;
        Ok((pair, queue, receives, from, into))
    };
    let (near, far) = (half(near)?, half(far)?);
    let (near_address, far_address) = (near.0.address(), far.0.address());
    let (near_memory, far_memory) = (near.4.remote(0, span), far.4.remote(0, span));
    let end = |(pair, queue, receives, from, into): (QueuePair<_>, _, _, _, _), peer, to| -> Result<End> {
        let pair = pair.receive_from(&peer)?.send()?;
        Ok(End { pair, queue, receives, from, _into: into, to, span, next: 0, posted: 0, done: 0, arrived: 0 })
    };
    Ok((end(near, far_address, far_memory)?, end(far, near_address, near_memory)?))
}

impl End {
    fn write(&mut self, bytes: usize, count: usize) -> Result<()> {
        let mut chain = [Request { id: 0, signaled: false, work: Work::Send(&[]) }; CHAIN];
        for request in &mut chain[..count] {
            self.posted += 1;
            let work = Work::Write(Some(self.from.range(0, bytes as u32)), self.to.offset(self.next), Some(0));
            self.next += bytes as u64;
            if self.next + bytes as u64 > self.span {
                self.next = 0;
            }
            *request = Request { id: self.posted, signaled: false, work };
        }
        chain[count - 1].signaled = true;
        if self.pair.post(&chain[..count])? < count {
            bail!("the device took only part of a chain of requests");
        }
        Ok(())
    }

    fn poll(&mut self) -> Result<()> {
        let (mut received, mut failure) = (0, None);
        self.queue.poll(|completion| match completion.outcome {
            Outcome::Sent => self.done = self.done.max(completion.id),
            Outcome::Failed(error) => failure = Some(error),
            _ => received += 1,
        })?;
        self.receives.post(received)?;
        self.arrived += received as u64;
        match failure {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }
}

/// Measures WRITEs with immediate data, bytes per second. One thread writes, another takes the completions.
pub(crate) fn write(args: &BenchArgs, bytes: usize) -> Result<f64> {
    let (cores, seconds) = (args.cores(), args.seconds);
    // As much memory as the benched topic's retention uses.
    let (mut near, mut far) = ends(args, bytes, SMALL_RETENTION_BYTES.max(bytes as u64))?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let ordering = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            pin(cores.far)?;
            while !stop.load(ordering) {
                let before = far.arrived;
                far.poll()?;
                if far.arrived == before {
                    std::thread::yield_now();
                }
            }
            Ok::<(), anyhow::Error>(())
        });
        let sender = scope.spawn(|| {
            pin(cores.near)?;
            let begun = Instant::now();
            let time = Duration::from_secs_f64(seconds);
            while begun.elapsed() < time {
                while near.posted - near.done <= u64::from(DEPTH) - CHAIN as u64 {
                    near.write(bytes, CHAIN)?;
                }
                let before = near.done;
                near.poll()?;
                if near.done == before {
                    std::thread::yield_now();
                }
            }
            while near.done < near.posted {
                near.poll()?;
            }
            Ok::<f64, anyhow::Error>((near.posted * bytes as u64) as f64 / begun.elapsed().as_secs_f64())
        });
        let rate = sender.join().map_err(|_| anyhow::anyhow!("the sender died"))?;
        stop.store(true, ordering);
        receiver.join().map_err(|_| anyhow::anyhow!("the receiver died"))??;
        rate
    })
}

/// Median of half the round trip of `bytes`, seconds. Two threads write to each other in turn, and both poll.
pub(crate) fn ping_pong(args: &BenchArgs, bytes: usize) -> Result<f64> {
    let (cores, seconds) = (args.cores(), args.seconds);
    let (mut near, mut far) = ends(args, bytes, bytes as u64)?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let ordering = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| {
            pin(cores.far)?;
            let mut answered = 0;
            while !stop.load(ordering) {
                far.poll()?;
                if far.arrived > answered {
                    answered += 1;
                    far.write(bytes, 1)?;
                }
            }
            Ok::<(), anyhow::Error>(())
        });
        let caller = scope.spawn(|| {
            pin(cores.near)?;
            let mut histogram = histogram::of_nanoseconds()?;
            let begun = Instant::now();
            while begun.elapsed().as_secs_f64() < seconds {
                let sent = Instant::now();
                let expected = near.arrived + 1;
                near.write(bytes, 1)?;
                while near.arrived < expected {
                    near.poll()?;
                }
                histogram.record(sent.elapsed().as_nanos() as u64)?;
            }
            Ok::<f64, anyhow::Error>(histogram.value_at_quantile(0.5) as f64 / 2e9)
        });
        let latency = caller.join().map_err(|_| anyhow::anyhow!("the caller died"))?;
        stop.store(true, ordering);
        echo.join().map_err(|_| anyhow::anyhow!("the echo died"))??;
        latency
    })
}
