//! Durable writes through io_uring: a write and the `fdatasync` behind it in one system call.

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const WRITE: u64 = 1;
const SYNC: u64 = 2;

/// A ring with one write under way at a time.
pub struct Uring {
    ring: IoUring,
}

impl Uring {
    /// Sets up a ring, where the kernel has io_uring and allows it.
    ///
    /// # Errors
    /// The error of `io_uring_setup`: `ENOSYS`, or `EPERM` where it is turned off.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::new(2)?;
        let mut known = io_uring::Probe::new();
        ring.submitter().register_probe(&mut known)?;
        let needed = [opcode::Write::CODE, opcode::Fsync::CODE];
        if needed.iter().any(|code| !known.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self { ring })
    }

    /// Writes all of `bytes` to the file `to` from byte `at` on, and returns once they are on disk.
    ///
    /// `durable` is the descriptor that is synchronised: the same file, which may be opened with other flags.
    ///
    /// # Errors
    /// The error of the system call. Part of the bytes may have been written.
    pub fn write_durable(&mut self, to: BorrowedFd, durable: BorrowedFd, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut written = 0;
        loop {
            let rest = &bytes[written..];
            let (wrote, synced) = self.step(to, durable, at + written as u64, rest)?;
            // The kernel ends a chain behind a write that was short, and cancels what follows.
            written += wrote;
            if written == bytes.len() {
                return synced;
            }
            if wrote == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
    }

    /// Submits one write and one `fdatasync`. Returns the number of bytes written, and the outcome of the `fdatasync`.
    fn step(
        &mut self,
        to: BorrowedFd,
        durable: BorrowedFd,
        at: u64,
        bytes: &[u8],
    ) -> io::Result<(usize, io::Result<()>)> {
        let len = u32::try_from(bytes.len()).unwrap_or(1 << 30).min(1 << 30);
        let write = opcode::Write::new(Fd(to.as_raw_fd()), bytes.as_ptr(), len).offset(at).build();
        let sync = opcode::Fsync::new(Fd(durable.as_raw_fd())).flags(FsyncFlags::DATASYNC).build();
        let chain = [write.flags(squeue::Flags::IO_LINK).user_data(WRITE), sync.user_data(SYNC)];
        // SAFETY: the bytes and both descriptors are borrowed until both completions have come, below.
        unsafe { self.ring.submission().push_multiple(&chain) }.map_err(io::Error::other)?;
        let (mut wrote, mut synced) = (None, None);
        while wrote.is_none() || synced.is_none() {
            // The kernel may read the bytes until it says that it is done: an interrupted wait goes on.
            let submitted = self.ring.submit_and_wait(1);
            for completion in self.ring.completion() {
                let result = completion.result();
                let result = if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result as usize) };
                match completion.user_data() {
                    WRITE => wrote = Some(result),
                    _ => synced = Some(result.map(drop)),
                }
            }
            if submitted.is_err() {
                // Interrupted, or short of memory. The kernel has the bytes, or the ring still names them: neither lets this
                // return.
                std::thread::yield_now();
            }
        }
        let wrote = wrote.unwrap_or(Ok(0))?;
        Ok((wrote, synced.unwrap_or(Ok(()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, SeekFrom};
    use std::os::fd::AsFd;

    fn ring() -> Option<Uring> {
        match Uring::new() {
            Ok(ring) => Some(ring),
            Err(error) => {
                println!("SKIPPED: no io_uring here: {error}");
                None
            }
        }
    }

    #[test]
    fn what_was_written_is_there() {
        let Some(mut ring) = ring() else { return };
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..100_000u32).map(|at| at as u8).collect();
        for at in [0, 5000] {
            ring.write_durable(file.as_fd(), file.as_fd(), at, &bytes).unwrap();
        }
        file.seek(SeekFrom::Start(5000)).unwrap();
        let mut found = Vec::new();
        file.read_to_end(&mut found).unwrap();
        assert!(found == bytes);
    }

    #[test]
    fn errors_are_the_kernels_and_the_ring_goes_on() {
        let Some(mut ring) = ring() else { return };
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = ring.write_durable(full.as_fd(), full.as_fd(), 0, b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        // A pipe cannot be synced.
        let (_reader, writer) = io::pipe().unwrap();
        let file = tempfile::tempfile().unwrap();
        let error = ring.write_durable(file.as_fd(), writer.as_fd(), 0, b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        ring.write_durable(file.as_fd(), file.as_fd(), 0, b"x").unwrap();
    }
}
