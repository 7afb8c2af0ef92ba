//! What the machine can do without us: raw TCP into the same kind of region, and a ping-pong.

use anyhow::{Context, Result};
use embarcadero_datapath::cxl::cache::FlushMethod;
use embarcadero_datapath::cxl::layout::{AllocatorKind, Geometry};
use embarcadero_datapath::cxl::region::RegionFile;
use embarcadero_datapath::transport::tcp::{SocketOptions, prepare, receive_into};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Cores of the two ends; `None` leaves them to the scheduler.
#[derive(Clone, Copy)]
pub struct Pair {
    /// The end that sends.
    pub near: Option<usize>,
    /// The end that receives.
    pub far: Option<usize>,
}

fn connected() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen")?;
    let near = TcpStream::connect(listener.local_addr()?).context("cannot connect")?;
    let (far, _) = listener.accept()?;
    for stream in [&near, &far] {
        prepare(stream, SocketOptions::default())?;
    }
    Ok((near, far))
}

/// One thread sends from a buffer, another receives into a region of the kind that brokers use: bytes a second, the
/// better of a receiver that sleeps between batches and one that polls without rest.
pub fn tcp_receive_into_region(cores: Pair, batch_bytes: usize, seconds: f64) -> Result<f64> {
    let receive = |busy| -> Result<f64> {
        let receiver = std::thread::spawn(move || receive(cores, batch_bytes, seconds / 2.0, busy));
        receiver.join().map_err(|_| anyhow::anyhow!("the receiver died"))?
    };
    Ok(receive(false)?.max(receive(true)?))
}

fn receive(cores: Pair, batch_bytes: usize, seconds: f64, busy: bool) -> Result<f64> {
    super::pin(cores.far)?;
    let path = super::BenchArgs::region().with_extension("ceiling");
    let geometry = Geometry::with_segments_of(super::SEGMENT_BYTES, AllocatorKind::Bitmap).fit(super::REGION_BYTES)?;
    let file = RegionFile::create(&path, &geometry, FlushMethod::None, true, false)?;
    let _ = std::fs::remove_file(&path);
    let region = file.region();
    let (mut near, far) = connected()?;
    let time = Duration::from_secs_f64(seconds);
    let sender = std::thread::spawn(move || {
        super::pin(cores.near)?;
        let buffer = vec![b'm'; batch_bytes];
        let begun = Instant::now();
        while begun.elapsed() < time && near.write_all(&buffer).is_ok() {}
        Ok::<(), anyhow::Error>(())
    });
    // As much of the region as the benched topic's retention uses.
    let window = super::RETENTION_BYTES + 2 * super::SEGMENT_BYTES;
    let start = region.layout().segments;
    let (mut at, mut bytes) = (0u64, 0u64);
    let begun = Instant::now();
    loop {
        let want = (batch_bytes as u64).min(window - at);
        let place = embarcadero_datapath::cxl::RegionOffset(start + at);
        match receive_into(&far, region.fabric(), place, want, &mut []) {
            Ok(0) => break,
            Ok(received) => {
                bytes += received as u64;
                at = (at + received as u64) % window;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && busy => std::hint::spin_loop(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let sockets = [(std::os::fd::AsRawFd::as_raw_fd(&far), false)];
                embarcadero_datapath::transport::tcp::wait_any(&sockets, Duration::from_millis(100))?;
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

/// Two threads throw `bytes` to and fro, both polling without rest: the median, seconds.
pub fn tcp_ping_pong(cores: Pair, bytes: usize, seconds: f64) -> Result<f64> {
    let caller = std::thread::spawn(move || ping_pong(cores, bytes, seconds));
    caller.join().map_err(|_| anyhow::anyhow!("the caller died"))?
}

fn ping_pong(cores: Pair, bytes: usize, seconds: f64) -> Result<f64> {
    super::pin(cores.near)?;
    let (mut near, mut far) = connected()?;
    near.set_nonblocking(true)?;
    far.set_nonblocking(true)?;
    let echo = std::thread::spawn(move || {
        super::pin(cores.far)?;
        let mut buffer = vec![0; bytes];
        while matches!(read_busily(&mut far, &mut buffer), Ok(true)) && far.write_all(&buffer).is_ok() {}
        Ok::<(), anyhow::Error>(())
    });
    let mut histogram = hdrhistogram::Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)?;
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
