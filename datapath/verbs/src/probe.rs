//! Probe of a device's behaviour, as opposed to the capabilities that it reports.

use crate::completion::CompletionQueue;
use crate::device::Context;
use crate::memory::{MemoryRegion, MemoryWindow, ProtectionDomain};
use crate::outcome::Outcome;
use crate::port::LocalPort;
use crate::queue_pair::{QueuePair, QueuePairOptions, Request, SharedReceiveQueue, Work};
use embarcadero_os::buffer::Buffer;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time that only a broken device takes. A working one answers within milliseconds, or reports a failure within seconds.
const PATIENCE: Duration = Duration::from_secs(60);
const PAGE: usize = 4096;

/// Returns true when the device keeps a peer inside a memory window, which is found out by a trial.
///
/// The trial opens a window over the first of two pages, and writes to the second from another queue pair of this process.
///
/// Soft-RoCE fails this, up to Linux 6.1 at least. Its responder checks the bounds of the region under the window, not
/// those of the window (`check_rkey` in drivers/infiniband/sw/rxe/rxe_resp.c).
///
/// # Errors
/// The error that the library reports; `TimedOut` if the device does not complete a request within 60 s, or its own
/// packets get lost.
pub fn windows_are_enforced(context: &Arc<Context>, port: &LocalPort) -> io::Result<bool> {
    if !context.has_memory_windows()? {
        return Ok(false);
    }
    let domain = ProtectionDomain::new(context)?;
    let memory = Buffer::zeroed(2 * PAGE)?;
    let region = MemoryRegion::for_windows(&domain, &memory)?;
    let receives = SharedReceiveQueue::new(&domain, 1)?;
    let (mut near_queue, mut far_queue) = (CompletionQueue::new(context, 16)?, CompletionQueue::new(context, 16)?);
    let options = |shared| QueuePairOptions { send_depth: 4, receive_depth: 1, inline_bytes: 64, shared };
    let mut near = QueuePair::new(&domain, &near_queue, port, &options(None))?;
    // Both ends are in this process, however slow it is: silence is no reason to give up.
    near.send_again(u8::MAX);
    let far = QueuePair::new(&domain, &far_queue, port, &options(Some(&receives)))?;
    let (near_address, far_address) = (near.address(), far.address());
    let mut near = near.receive_from(&far_address)?.send()?;
    let mut far = far.receive_from(&near_address)?.send()?;
    let window = MemoryWindow::new(&region, 0, PAGE as u64)?;
    let request = |work| [Request { id: 0, signaled: true, work }];
    far.post(&request(Work::Open(&window)))?;
    if wait(&mut far_queue)? != Outcome::Sent {
        return Ok(false);
    }
    near.post(&request(Work::WriteInline(&[1; 64], window.remote().offset(PAGE as u64), None)))?;
    match wait(&mut near_queue)? {
        // It says nothing about windows.
        Outcome::Failed(error) if error.is_no_answer() => Err(io::Error::new(io::ErrorKind::TimedOut, error)),
        Outcome::Failed(error) if error.is_remote_access() => Ok(memory.iter().all(|byte| *byte == 0)),
        _ => Ok(false),
    }
}

fn wait(queue: &mut CompletionQueue) -> io::Result<Outcome> {
    let begun = Instant::now();
    let mut outcome = None;
    while begun.elapsed() < PATIENCE {
        queue.poll(|completion| outcome = Some(completion.outcome))?;
        if let Some(outcome) = outcome {
            return Ok(outcome);
        }
        std::thread::yield_now();
    }
    let text = format!("the device did not complete a request within {} s", PATIENCE.as_secs());
    Err(io::Error::new(io::ErrorKind::TimedOut, text))
}
