//! Ceilings: the figures that the machine reaches without Embarcadero.
//!
//! The ceilings are raw TCP into the same kind of region, raw verbs, a ping-pong of each, memory, and the disk.

mod verbs;

pub(crate) use verbs::{ping_pong as verbs_ping_pong, write as verbs_write};

use crate::args::{BenchArgs, REGION_BYTES, RETENTION_BYTES, SEGMENT_BYTES};
use crate::cores::{CorePair, pin};
use crate::histogram;
use crate::report::Row;
use anyhow::{Context, Result};
use embarcadero_cxl::cache::{FlushMethod, FlushSupport};
use embarcadero_cxl::layout::{AllocatorKind, Geometry};
use embarcadero_cxl::region::{Creation, RegionFile};
use embarcadero_cxl::{Fabric, LINE_BYTES, Mapping, Native, RegionOffset, Site};
use embarcadero_os::buffer::Buffer;
use embarcadero_transport::tcp::{SocketOptions, prepare, receive_into};
use hdrhistogram::Histogram;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Connects two sockets over loopback, prepared as brokers and clients prepare theirs.
pub(crate) fn connected() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen")?;
    let near = TcpStream::connect(listener.local_addr()?).context("cannot connect")?;
    let (far, _) = listener.accept()?;
    for stream in [&near, &far] {
        prepare(stream, SocketOptions::default())?;
    }
    Ok((near, far))
}

/// Measures TCP into a region like a broker's, bytes per second: one thread sends from a buffer, another receives.
///
/// The result is the better of two receivers, one that sleeps between batches and one that polls without rest.
pub(crate) fn tcp_receive_into_region(cores: CorePair, batch_bytes: usize, seconds: f64) -> Result<f64> {
    let receive = |busy| -> Result<f64> {
        let receiver = std::thread::spawn(move || receive(cores, batch_bytes, seconds / 2.0, busy));
        receiver.join().map_err(|_| anyhow::anyhow!("the receiver died"))?
    };
    Ok(receive(false)?.max(receive(true)?))
}

fn receive(cores: CorePair, batch_bytes: usize, seconds: f64, busy: bool) -> Result<f64> {
    pin(cores.far)?;
    let path = BenchArgs::region().with_extension("ceiling");
    let geometry = Geometry::with_segments_of(SEGMENT_BYTES, AllocatorKind::Bitmap).fit(REGION_BYTES)?;
    let file =
        RegionFile::create(&path, &geometry, FlushMethod::None, Creation { reserve: true, ..Creation::default() })?;
    let _ = std::fs::remove_file(&path);
    let region = file.region();
    let (mut near, far) = connected()?;
    let time = Duration::from_secs_f64(seconds);
    let sender = std::thread::spawn(move || {
        pin(cores.near)?;
        let buffer = vec![b'm'; batch_bytes];
        let begun = Instant::now();
        while begun.elapsed() < time && near.write_all(&buffer).is_ok() {}
        Ok::<(), anyhow::Error>(())
    });
    // As much of the region as the benched topic's retention uses.
    let window = RETENTION_BYTES + 2 * SEGMENT_BYTES;
    let start = region.layout().segments;
    let (mut at, mut bytes) = (0u64, 0u64);
    let begun = Instant::now();
    loop {
        let want = (batch_bytes as u64).min(window - at);
        let place = RegionOffset(start + at);
        match receive_into(&far, region.fabric(), place, want, &mut []) {
            Ok(0) => break,
            Ok(received) => {
                bytes += received as u64;
                at = (at + received as u64) % window;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && busy => std::hint::spin_loop(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let sockets = [(std::os::fd::AsRawFd::as_raw_fd(&far), false)];
                embarcadero_os::poller::wait_any(&sockets, Duration::from_millis(100))?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let rate = bytes as f64 / begun.elapsed().as_secs_f64();
    sender.join().map_err(|_| anyhow::anyhow!("the sender died"))??;
    Ok(rate)
}

fn read_busily(stream: &mut TcpStream, buffer: &mut [u8]) -> std::io::Result<bool> {
    let mut read = 0;
    while read < buffer.len() {
        match stream.read(&mut buffer[read..]) {
            Ok(0) => return Ok(false),
            Ok(more) => read += more,
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Median round trip of `bytes` over TCP, seconds. Both threads poll without rest.
pub(crate) fn tcp_ping_pong(cores: CorePair, bytes: usize, seconds: f64) -> Result<f64> {
    let caller = std::thread::spawn(move || ping_pong(cores, bytes, seconds));
    caller.join().map_err(|_| anyhow::anyhow!("the caller died"))?
}

fn ping_pong(cores: CorePair, bytes: usize, seconds: f64) -> Result<f64> {
    pin(cores.near)?;
    let (mut near, mut far) = connected()?;
    near.set_nonblocking(true)?;
    far.set_nonblocking(true)?;
    let echo = std::thread::spawn(move || {
        pin(cores.far)?;
        let mut buffer = vec![0; bytes];
        while matches!(read_busily(&mut far, &mut buffer), Ok(true)) && far.write_all(&buffer).is_ok() {}
        Ok::<(), anyhow::Error>(())
    });
    let mut histogram = histogram::of_nanoseconds()?;
    let mut buffer = vec![b'p'; bytes];
    let begun = Instant::now();
    while begun.elapsed().as_secs_f64() < seconds {
        let sent = Instant::now();
        near.write_all(&buffer)?;
        read_busily(&mut near, &mut buffer)?;
        histogram.record(sent.elapsed().as_nanos() as u64)?;
    }
    drop(near);
    echo.join().map_err(|_| anyhow::anyhow!("the echo died"))??;
    Ok(histogram.value_at_quantile(0.5) as f64 / 1e9)
}

/// Name of [`nothing_to_do`] in reports, where it is the ceiling of latencies under load.
pub(crate) const NOTHING_TO_DO: &str = "nothing_to_do";
/// Time between two events of [`nothing_to_do`], nanoseconds.
const NOTHING_EVERY: u64 = 1_000;

/// Measures the latency that the machine itself adds: waits of the near core's events, nanoseconds.
///
/// A thread on each core looks at the clock without rest. An event is due every microsecond, and nothing is done for it. It
/// waits for longer than that only while the machine keeps the thread from running.
pub(crate) fn nothing_to_do(cores: CorePair, seconds: f64) -> Result<Histogram<u64>> {
    let look = |core| -> Result<Histogram<u64>> {
        pin(core)?;
        let (mut waits, begun, mut due) = (histogram::of_nanoseconds()?, Instant::now(), 0);
        while (due as f64) < seconds * 1e9 {
            let now = begun.elapsed().as_nanos() as u64;
            while due <= now {
                waits.record(now - due)?;
                due += NOTHING_EVERY;
            }
        }
        Ok(waits)
    };
    std::thread::scope(|scope| {
        let (near, far) = (scope.spawn(|| look(cores.near)), scope.spawn(|| look(cores.far)));
        far.join().map_err(|_| anyhow::anyhow!("the far thread died"))??;
        near.join().map_err(|_| anyhow::anyhow!("the near thread died"))?
    })
}

/// Bytes of memory that one core writes, more than caches hold.
const SPAN: u64 = 256 << 20;

/// Rate at which all of `memory` is written piece by piece, again and again for `seconds`, bytes per second.
fn write_all_of(memory: &Native, piece: u64, seconds: f64, write: impl Fn(RegionOffset)) -> f64 {
    let (begun, mut bytes) = (Instant::now(), 0);
    while begun.elapsed().as_secs_f64() < seconds {
        write(RegionOffset(bytes % (memory.bytes() - memory.bytes() % piece)));
        bytes += piece;
    }
    bytes as f64 / begun.elapsed().as_secs_f64()
}

/// Measures memory and network of this machine.
///
/// For memory, one core copies batches through the caches and past them, and writes back lines that it has dirtied. For
/// the network, it is the round trip.
pub(crate) fn of_the_machine(args: &BenchArgs) -> Result<Vec<Row>> {
    let batch = vec![b'm'; args.write_bytes()];
    let (piece, seconds) = (batch.len() as u64, args.seconds / 4.0);
    let memory = Mapping::anonymous(SPAN.max(piece)).context("cannot map memory")?;
    memory.prefault().context("cannot map memory")?;
    let memory = Native::new(memory, FlushSupport::detect().best().unwrap_or(FlushMethod::None))?;
    let in_far_thread = |write: &(dyn Fn(RegionOffset) + Sync), piece| -> Result<Vec<f64>> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                pin(args.cores().far)?;
                Ok((0..args.runs).map(|_| write_all_of(&memory, piece, seconds, write)).collect())
            });
            thread.join().map_err(|_| anyhow::anyhow!("the writing thread died"))?
        })
    };
    let copied = in_far_thread(&|at| memory.write_bytes(at, &batch), piece)?;
    let streamed = in_far_thread(&|at| memory.write_past_caches(at, &batch), piece)?;
    let flush = |at: RegionOffset| {
        memory.store(at, at.0);
        memory.flush(at, LINE_BYTES, Site::PayloadFlush);
        memory.fence(Site::PayloadFlush);
    };
    let flushed: Vec<f64> = in_far_thread(&flush, LINE_BYTES)?.iter().map(|rate| rate / LINE_BYTES as f64).collect();
    let round_trips =
        (0..args.runs).map(|_| tcp_ping_pong(args.cores(), args.message_bytes, seconds)).collect::<Result<Vec<_>>>()?;
    Ok(vec![
        Row::new("ceiling.memcpy", "B/s", &copied),
        Row::new("ceiling.non_temporal_store", "B/s", &streamed),
        Row::new("ceiling.line_flush_and_fence", "1/s", &flushed),
        Row::new("ceiling.tcp_ping_pong.p50", "s", &round_trips),
    ])
}

/// Measures appends to a file in `directory`, with `fdatasync` after every 4 MiB, bytes per second.
///
/// The result is the better of writes through the page cache and past it.
pub(crate) fn disk_write(directory: &Path, seconds: f64) -> Result<f64> {
    let (buffered, direct) =
        (disk_write_by(directory, 0, seconds)?, disk_write_by(directory, libc::O_DIRECT, seconds)?);
    Ok(buffered.max(direct))
}

fn disk_write_by(directory: &Path, flags: i32, seconds: f64) -> Result<f64> {
    let path = directory.join(".ceiling");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(&path)?;
    let group = Buffer::zeroed(4 << 20)?;
    let begun = Instant::now();
    let mut bytes = 0;
    while begun.elapsed().as_secs_f64() < seconds {
        file.write_all(&group)?;
        file.sync_data()?;
        bytes += group.len();
    }
    let rate = bytes as f64 / begun.elapsed().as_secs_f64();
    std::fs::remove_file(path)?;
    Ok(rate)
}
