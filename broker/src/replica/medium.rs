//! Where replica files live: a directory.

use super::format::BLOCK;
use embarcadero_os::buffer::Buffer;
use embarcadero_os::uring::Uring;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// A flat set of files.
pub trait Medium: Send + Sync {
    /// Names of the files, in no order. None when nothing was ever created.
    ///
    /// # Errors
    /// What the system reports.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Makes a file that is not there yet. Its name is durable when this returns.
    ///
    /// # Errors
    /// What the system reports.
    fn create(&self, name: &str) -> io::Result<Box<dyn MediumFile>>;

    /// Opens a file.
    ///
    /// # Errors
    /// What the system reports.
    fn open(&self, name: &str) -> io::Result<Box<dyn MediumFile>>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the system reports.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// How it is named in messages.
    fn name(&self) -> String;
}

/// An open file.
pub trait MediumFile: Send {
    /// Bytes in it.
    ///
    /// # Errors
    /// What the system reports.
    fn bytes(&self) -> io::Result<u64>;

    /// Writes all of a buffer; position and length are multiples of [`super::format::BLOCK`].
    ///
    /// # Errors
    /// What the system reports.
    fn write(&mut self, at: u64, from: &Buffer) -> io::Result<()>;

    /// Reads into all of `into`.
    ///
    /// # Errors
    /// What the system reports; the end of the file counts as an error.
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()>;

    /// Returns once all that was written is durable (`fdatasync`).
    ///
    /// # Errors
    /// What the system reports. What was written since the last success may be lost then, whatever a later call says.
    fn sync(&mut self) -> io::Result<()>;

    /// As `write` and then `sync`.
    ///
    /// # Errors
    /// Those of the two.
    fn write_durable(&mut self, at: u64, from: &Buffer) -> io::Result<()> {
        self.write(at, from)?;
        self.sync()
    }

    /// Makes durable what is in it, and has later reads come from the disk: what an earlier process wrote may be in the
    /// page cache only, and after a failed write-back the page cache says nothing about the disk.
    ///
    /// # Errors
    /// What the system reports.
    fn settle(&mut self) -> io::Result<()>;

    /// Cuts it off, durably.
    ///
    /// # Errors
    /// What the system reports.
    fn truncate(&mut self, bytes: u64) -> io::Result<()>;
}

/// A directory of a file system. It comes to be with its first file.
pub struct Directory {
    path: PathBuf,
    direct: bool,
    ring: Option<Arc<Mutex<Uring>>>,
}

impl Directory {
    /// The directory at `path`; `direct` writes past the page cache.
    #[must_use]
    pub fn new(path: PathBuf, direct: bool) -> Self {
        Self { path, direct, ring: None }
    }

    /// Writes through `ring` from now on, if there is one.
    #[must_use]
    pub fn through(self, ring: Option<Arc<Mutex<Uring>>>) -> Self {
        Self { ring, ..self }
    }

    /// Makes the directory if need be, and tries whether a block can be written and made durable in it.
    ///
    /// # Errors
    /// What the system reports; for a file system without direct I/O, `EINVAL`.
    pub fn probe(&self) -> io::Result<()> {
        let name = format!(".probe-{}", std::process::id());
        let _ = self.remove(&name);
        let mut file = self.create(&name)?;
        let written = Buffer::zeroed(BLOCK).and_then(|block| file.write(0, &block)).and_then(|()| file.sync());
        self.remove(&name).and(written)
    }

    fn open_with(&self, name: &str, options: &mut OpenOptions) -> io::Result<DirectoryFile> {
        let path = self.path.join(name);
        let file = options.read(true).write(true).open(&path)?;
        let direct = if self.direct {
            Some(OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&path)?)
        } else {
            None
        };
        Ok(DirectoryFile { file, direct, ring: self.ring.clone() })
    }
}

/// Makes what is in a directory durable (fsync(2), "NOTES").
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

impl Medium for Directory {
    fn list(&self) -> io::Result<Vec<String>> {
        let entries = match std::fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn MediumFile>> {
        if !self.path.is_dir() {
            std::fs::create_dir_all(&self.path)?;
            self.path.ancestors().skip(1).take(3).filter(|path| path.is_dir()).try_for_each(sync_directory)?;
        }
        let file = self.open_with(name, OpenOptions::new().create_new(true))?;
        sync_directory(&self.path)?;
        Ok(Box::new(file))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn MediumFile>> {
        Ok(Box::new(self.open_with(name, &mut OpenOptions::new())?))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

struct DirectoryFile {
    file: File,
    /// The same file, past the page cache.
    direct: Option<File>,
    ring: Option<Arc<Mutex<Uring>>>,
}

impl MediumFile for DirectoryFile {
    fn write_durable(&mut self, at: u64, from: &Buffer) -> io::Result<()> {
        let Some(ring) = &self.ring else {
            self.write(at, from)?;
            return self.sync();
        };
        let to = self.direct.as_ref().unwrap_or(&self.file);
        let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.write_durable(to.as_fd(), self.file.as_fd(), at, from)
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn write(&mut self, at: u64, from: &Buffer) -> io::Result<()> {
        self.direct.as_ref().unwrap_or(&self.file).write_all_at(from, at)
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, at)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn settle(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        Ok(rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed)?)
    }

    fn truncate(&mut self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)?;
        self.file.sync_all()
    }
}
