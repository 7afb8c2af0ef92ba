//! Media that hold replica files: a directory, or memory in tests.

use super::format::BLOCK;
use embarcadero_os::buffer::Buffer;
use embarcadero_os::uring::Uring;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Flat set of files.
pub trait Medium: Send + Sync {
    /// Returns the names of the files, in no order. The list is empty when no file was ever created.
    ///
    /// # Errors
    /// The error of the system.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Creates a file that does not exist yet. Its name is durable when this returns.
    ///
    /// # Errors
    /// The error of the system.
    fn create(&self, name: &str) -> io::Result<Box<dyn MediumFile>>;

    /// Opens a file.
    ///
    /// # Errors
    /// The error of the system.
    fn open(&self, name: &str) -> io::Result<Box<dyn MediumFile>>;

    /// Removes a file.
    ///
    /// # Errors
    /// The error of the system.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Returns the name of the medium, for messages.
    fn name(&self) -> String;
}

/// Open file.
pub trait MediumFile: Send {
    /// Returns the size of the file, in bytes.
    ///
    /// # Errors
    /// The error of the system.
    fn bytes(&self) -> io::Result<u64>;

    /// Writes a whole buffer. Position and length are multiples of [`super::format::BLOCK`].
    ///
    /// # Errors
    /// The error of the system.
    fn write(&mut self, at: u64, from: &Buffer) -> io::Result<()>;

    /// Fills `into` with the bytes from `at` on.
    ///
    /// # Errors
    /// The error of the system, or `UnexpectedEof` at the end of the file.
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()>;

    /// Makes everything that was written durable (`fdatasync`).
    ///
    /// # Errors
    /// The error of the system. What was written since the last success may then be lost, whatever a later call
    /// returns.
    fn sync(&mut self) -> io::Result<()>;

    /// Writes a whole buffer, and makes it durable.
    ///
    /// # Errors
    /// The errors of [`MediumFile::write`] and [`MediumFile::sync`].
    fn write_durable(&mut self, at: u64, from: &Buffer) -> io::Result<()> {
        self.write(at, from)?;
        self.sync()
    }

    /// Makes durable what is in the file, and has later reads come from the disk. What an earlier process wrote may be
    /// in the page cache only. After a failed write-back, the page cache says nothing about the disk.
    ///
    /// # Errors
    /// The error of the system.
    fn settle(&mut self) -> io::Result<()>;

    /// Cuts the file to `bytes` bytes, durably.
    ///
    /// # Errors
    /// The error of the system.
    fn truncate(&mut self, bytes: u64) -> io::Result<()>;
}

/// Directory of a file system. It is created with its first file.
pub(crate) struct Directory {
    path: PathBuf,
    direct: bool,
    ring: Option<Arc<Mutex<Uring>>>,
}

impl Directory {
    /// Returns the directory at `path`. `direct` writes past the page cache.
    #[must_use]
    pub(crate) fn new(path: PathBuf, direct: bool) -> Self {
        Self { path, direct, ring: None }
    }

    /// Writes through `ring` from now on, if there is one.
    #[must_use]
    pub(crate) fn through(self, ring: Option<Arc<Mutex<Uring>>>) -> Self {
        Self { ring, ..self }
    }

    /// Creates the directory if need be, and tries to make a block in it durable.
    ///
    /// # Errors
    /// The error of the system. For a file system without direct I/O it is `EINVAL`.
    pub(crate) fn probe(&self) -> io::Result<()> {
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

/// Makes the entries of a directory durable. Source: fsync(2), "NOTES".
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
    /// Second descriptor of the file, which writes past the page cache.
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
