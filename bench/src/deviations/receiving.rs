//! DEV-003: the network thread receives into the region, beside the paper's pool of receivers.
//!
//! The pool allocates memory for each message, receives from the socket to the heap, and copies from there to the region.

use super::args::DeviationArgs;
use super::comparison::{Better, Comparison};
use crate::args::BenchArgs;
use crate::ceiling::connected;
use crate::cores::pin;
use anyhow::{Context, Result};
use crossbeam_channel::bounded;
use embarcadero_broker::blog::{Blog, BlogId, RESERVATION_ATOMICS};
use embarcadero_cxl::cache::FlushSupport;
use embarcadero_cxl::layout::AllocatorKind;
use embarcadero_cxl::segment::PartitionAllocator;
use embarcadero_cxl::{Fabric, Native, Region, RegionOffset, Site};
use embarcadero_os::poller::wait_any;
use embarcadero_sim::testbed::{TOPIC, region};
use embarcadero_transport::tcp::receive_into;
use embarcadero_wire::BrokerId;
use std::io::{ErrorKind, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

const MESSAGE_BYTES: usize = 1024;
const MESSAGES: usize = 512;
const BATCH_BYTES: u64 = (MESSAGE_BYTES * MESSAGES) as u64;

/// Number of bytes received, and of the atomic operations and write-backs on the way.
#[derive(Default)]
struct Received {
    bytes: u64,
    atomics: u64,
    flushes: u64,
}

/// Blog of a broker, from which room is reserved as brokers do. Every received batch is forgotten at once.
struct Log {
    blog: Blog<Native>,
    received: u64,
}

impl Log {
    fn new(region: &Region<Native>) -> Self {
        let (topic, incarnation) = TOPIC;
        let id = BlogId { topic, incarnation, broker: BrokerId(0) };
        let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), id.broker));
        Self { blog: Blog::new(region.clone(), id, 0, pool), received: 0 }
    }

    fn reserve(&self, bytes: u64) -> Result<RegionOffset> {
        if let Ok(at) = self.blog.reserve(bytes) {
            return Ok(at);
        }
        self.blog.retired().into_iter().for_each(|retired| self.blog.release(retired.segment));
        self.blog.reserve(bytes).context("the log has no room")
    }

    fn publish(&mut self, at: RegionOffset) {
        self.blog.published(at, self.received);
        self.received += 1;
    }
}

fn into_region(region: &Region<Native>, stream: &TcpStream) -> Result<Received> {
    let (mut log, mut done) = (Log::new(region), Received::default());
    let fabric = region.fabric();
    loop {
        let at = log.reserve(BATCH_BYTES)?;
        let mut filled = 0;
        while filled < BATCH_BYTES {
            match receive_into(stream, fabric, at.add(filled), BATCH_BYTES - filled, &mut []) {
                Ok(0) => return Ok(done),
                Ok(more) => filled += more as u64,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    wait_any(&[(stream.as_raw_fd(), false)], Duration::from_millis(100))?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        fabric.flush(at, BATCH_BYTES, Site::PayloadFlush);
        fabric.fence(Site::BatchEntryFence);
        log.publish(at);
        done.bytes += BATCH_BYTES;
        done.atomics += RESERVATION_ATOMICS;
        done.flushes += 1;
    }
}

/// Fills messages from the socket. Returns false at its end.
fn read_messages(stream: &mut TcpStream, messages: &mut [Box<[u8]>]) -> Result<bool> {
    let mut slices: Vec<IoSliceMut> = messages.iter_mut().map(|message| IoSliceMut::new(message)).collect();
    let mut left = slices.as_mut_slice();
    while !left.is_empty() {
        match stream.read_vectored(left)? {
            0 => return Ok(false),
            read => IoSliceMut::advance_slices(&mut left, read),
        }
    }
    Ok(true)
}

fn by_pool(region: &Region<Native>, mut stream: TcpStream, core: Option<usize>) -> Result<Received> {
    /// Number of messages that one read fills.
    const AT_A_TIME: usize = 64;
    let (messages, queue) = bounded::<Box<[u8]>>(MESSAGES * 4);
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || -> Result<Received> {
            pin(core)?;
            let (mut log, mut done) = (Log::new(region), Received::default());
            let fabric = region.fabric();
            for message in queue {
                let at = log.reserve(MESSAGE_BYTES as u64)?;
                fabric.write_bytes(at, &message);
                fabric.flush(at, MESSAGE_BYTES as u64, Site::PayloadFlush);
                fabric.fence(Site::BatchEntryFence);
                log.publish(at);
                done.bytes += MESSAGE_BYTES as u64;
                done.atomics += RESERVATION_ATOMICS;
                done.flushes += 1;
            }
            Ok(done)
        });
        loop {
            let mut read: Vec<Box<[u8]>> = (0..AT_A_TIME).map(|_| vec![0; MESSAGE_BYTES].into()).collect();
            if !read_messages(&mut stream, &mut read)? {
                break;
            }
            for message in read {
                messages.send(message).context("the receiver is gone")?;
            }
        }
        drop(messages);
        receiver.join().map_err(|_| anyhow::anyhow!("the receiver died"))?
    })
}

/// Receives for `seconds` in one of the two ways. Returns bytes per second, and the counts.
fn receive(args: &BenchArgs, pooled: bool, seconds: f64) -> Result<(f64, Received)> {
    let method = FlushSupport::detect().best().context("this CPU has no flush instruction")?;
    let region = region(AllocatorKind::Partitioned, method, |native| native)?;
    let (mut near, far) = connected()?;
    let cores = args.cores();
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || -> Result<()> {
            pin(cores.near)?;
            let batch = vec![b'm'; BATCH_BYTES as usize];
            let begun = Instant::now();
            while begun.elapsed().as_secs_f64() < seconds {
                near.write_all(&batch)?;
            }
            Ok(())
        });
        let receiver = scope.spawn(move || -> Result<(f64, Received)> {
            pin(cores.far)?;
            let begun = Instant::now();
            let received = if pooled { by_pool(&region, far, cores.far)? } else { into_region(&region, &far)? };
            Ok((received.bytes as f64 / begun.elapsed().as_secs_f64(), received))
        });
        sender.join().map_err(|_| anyhow::anyhow!("the sender died"))??;
        receiver.join().map_err(|_| anyhow::anyhow!("the receiver died"))?
    })
}

pub(super) fn compare(args: &DeviationArgs) -> Result<Vec<Comparison>> {
    let mut rate = Comparison::new("DEV-003", "bytes received into the region", "B/s", (Better::More, 1.05));
    let what = "atomic operations and write-backs per batch of 512 messages";
    let mut work = Comparison::new("DEV-003", what, "", (Better::Less, 0.01));
    for _ in 0..args.bench.runs {
        let (paper, by_pool) = receive(&args.bench, true, args.bench.seconds)?;
        let (ours, direct) = receive(&args.bench, false, args.bench.seconds)?;
        rate.add(paper, ours);
        let a_batch = |done: &Received| (done.atomics + done.flushes) as f64 / (done.bytes / BATCH_BYTES) as f64;
        work.add(a_batch(&by_pool), a_batch(&direct));
    }
    Ok(vec![rate, work])
}
