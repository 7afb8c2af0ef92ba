//! `embarcadero region`.

use super::inspect::Report;
use crate::settings::parse_bytes;
use anyhow::Result;
use clap::{Subcommand, ValueEnum};
use embarcadero_broker::replica::restore::{Plan, RestoreError, find_media};
use embarcadero_cxl::LINE_BYTES;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::{AllocatorKind, DEFAULT_LEADERS, Geometry, RegionRole};
use embarcadero_cxl::region::{Creation, Flushed, RegionError, RegionFile};
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(Clone, Copy, ValueEnum)]
pub enum Allocator {
    /// One bitmap for all brokers; needs coherent memory.
    Bitmap,
    /// One bitmap per broker, for its share of the segments.
    Partitioned,
    /// The leader allocates segments, by RPC.
    Leader,
}

impl From<Allocator> for AllocatorKind {
    fn from(allocator: Allocator) -> Self {
        match allocator {
            Allocator::Bitmap => Self::Bitmap,
            Allocator::Partitioned => Self::Partitioned,
            Allocator::Leader => Self::Leader,
        }
    }
}

#[derive(Subcommand)]
pub enum RegionCommand {
    /// Create a region: a file on tmpfs or hugetlbfs, or on a device-dax node.
    Create {
        /// Path of the region.
        #[arg(long, default_value = "/dev/shm/embarcadero")]
        path: PathBuf,
        /// Size of the region, for example 4GiB.
        #[arg(long, value_parser = parse_bytes, default_value = "1GiB")]
        size: u64,
        /// Size of a segment, a power of two from 1MiB to 16GiB.
        #[arg(long, value_parser = parse_bytes, default_value = "16MiB")]
        segment_size: u64,
        /// Segment allocator.
        #[arg(long, value_enum, default_value = "bitmap")]
        allocator: Allocator,
        /// Highest number of brokers, 1 to 32.
        #[arg(long, default_value_t = 32)]
        max_brokers: u32,
        /// Number of brokers that can be the leader: those with the lowest ids. 4 if not given, or all if there are fewer.
        #[arg(long)]
        max_leaders: Option<u32>,
        /// Highest number of topics, 1 to 32.
        #[arg(long, default_value_t = 32)]
        max_topics: u32,
        /// Highest number of publisher sessions, 1 to 4096.
        #[arg(long, default_value_t = 1024)]
        max_sessions: u32,
        /// Batchlog entries per topic and broker, a power of two from 16.
        #[arg(long, default_value_t = 1024)]
        batchlog_slots: u32,
        /// Path of a mirror to create as well, on another unit of memory. Leaders write their metadata to both.
        #[arg(long)]
        mirror: Option<PathBuf>,
        /// Size of the mirror: its tables, and for each leader 64 bytes per batch that the region keeps.
        #[arg(long, value_parser = parse_bytes, default_value = "64MiB")]
        mirror_size: u64,
        /// Do not allocate the region's pages now.
        #[arg(long)]
        sparse: bool,
        /// NUMA node to allocate the pages on, such as that of CXL memory used as system-ram.
        #[arg(long)]
        numa_node: Option<u32>,
        /// Overwrite a region that the device already holds.
        #[arg(long)]
        force: bool,
    },
    /// Print all structures of a region, which may be in use.
    Inspect {
        /// Path of the region.
        #[arg(long, default_value = "/dev/shm/embarcadero")]
        path: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Rebuild topics in an empty region from replica files, after the region or the whole cluster was lost.
    Restore {
        /// Path of the empty region, made by region create.
        #[arg(long, default_value = "/dev/shm/embarcadero")]
        path: PathBuf,
        /// Directories with the replica files of all brokers.
        #[arg(long, required_unless_present = "mirror", num_args = 1..)]
        from: Vec<PathBuf>,
        /// Path of the lost region's mirror. With it every missing message is known.
        #[arg(long)]
        mirror: Option<PathBuf>,
        /// UUID of the lost region, if there are files of several regions.
        #[arg(long)]
        uuid: Option<uuid::Uuid>,
        /// Restore even if messages are in none of the files; their offsets stay empty.
        #[arg(long)]
        accept_loss: bool,
        /// Only print what would be restored.
        #[arg(long)]
        dry_run: bool,
    },
    /// Write what this host's caches hold of a region back to memory, and drop it from them, before a broker id moves to
    /// another host.
    Flush {
        /// Path of the region, or of its mirror. It may be in use.
        #[arg(long, default_value = "/dev/shm/embarcadero")]
        path: PathBuf,
    },
    /// Destroy a region.
    Destroy {
        /// Path of the region.
        #[arg(long, default_value = "/dev/shm/embarcadero")]
        path: PathBuf,
        /// Destroy the region even while brokers use it.
        #[arg(long)]
        force: bool,
    },
}

pub fn run(command: RegionCommand) -> Result<()> {
    match command {
        RegionCommand::Create {
            path,
            size,
            segment_size,
            allocator,
            max_brokers,
            max_leaders,
            max_topics,
            max_sessions,
            batchlog_slots,
            mirror,
            mirror_size,
            sparse,
            numa_node,
            force,
        } => {
            let tables = Geometry::with_segments_of(segment_size, allocator.into());
            let max_leaders = max_leaders.unwrap_or(DEFAULT_LEADERS.min(max_brokers));
            let role = if mirror.is_some() { RegionRole::Mirrored } else { RegionRole::Single };
            let geometry =
                Geometry { max_brokers, max_leaders, max_topics, max_sessions, batchlog_slots, role, ..tables }
                    .fit(size)?;
            let of_mirror = mirror.as_ref().map(|_| geometry.of_mirror(mirror_size)).transpose()?;
            let creation = Creation { reserve: !sparse, numa_node, force, uuid: None };
            let file = RegionFile::create(&path, &geometry, FlushMethod::None, creation)?;
            if let (Some(mirror), Some(of_mirror)) = (&mirror, of_mirror) {
                let creation = Creation { reserve: !sparse, numa_node: None, force, uuid: Some(file.region().uuid()) };
                if let Err(error) = RegionFile::create(mirror, &of_mirror, FlushMethod::None, creation) {
                    file.destroy(true)?;
                    return Err(error.into());
                }
            }
            println!(
                "created {} ({}, {} segments of {} bytes)",
                path.display(),
                file.region().uuid(),
                geometry.segment_count,
                geometry.segment_bytes
            );
            if let Some(mirror) = mirror {
                println!("created its mirror {}", mirror.display());
            }
            Ok(())
        }
        RegionCommand::Inspect { path, json } => {
            let file = RegionFile::open(&path, FlushMethod::None)?;
            let report = Report::read(file.region());
            if json {
                println!("{}", serde_json::to_string_pretty(&report)?);
            } else {
                // The same structure as the JSON, easier to read.
                print!("{}", serde_yaml::to_string(&report)?);
            }
            Ok(())
        }
        RegionCommand::Restore { path, from, mirror, uuid, accept_loss, dry_run } => {
            let mirror = mirror.map(|mirror| RegionFile::open(&mirror, FlushMethod::None)).transpose()?;
            let plan = Plan::read(find_media(&from)?, mirror.as_ref().map(RegionFile::region), uuid)?;
            restore(&path, &plan, RestoreOptions { accept_loss, dry_run })
        }
        RegionCommand::Flush { path } => {
            let file = RegionFile::open(&path, FlushMethod::None)?;
            let begun = Instant::now();
            let Flushed { bytes, method } = file.flush_out()?;
            let (lines, seconds) = (bytes / LINE_BYTES, begun.elapsed().as_secs_f64());
            println!("flushed {lines} lines ({bytes} bytes) of {} by {method} in {seconds:.3} s", path.display());
            Ok(())
        }
        RegionCommand::Destroy { path, force } => {
            RegionFile::open(&path, FlushMethod::None)?.destroy(force)?;
            println!("destroyed {}", path.display());
            Ok(())
        }
    }
}

struct RestoreOptions {
    /// True to restore although messages are lost.
    accept_loss: bool,
    /// True to print what would be restored, and no more.
    dry_run: bool,
}

fn restore(path: &Path, plan: &Plan, options: RestoreOptions) -> Result<()> {
    for damage in &plan.damage {
        eprintln!("{damage}");
    }
    let mut total = 0;
    println!("region {}:", plan.region);
    for topic in &plan.topics {
        let (batches, bytes) = topic.size();
        total += bytes;
        let left = topic.unacknowledged;
        println!(
            "topic {}: {batches} batches, {bytes} bytes; {left} that were not acknowledged are left out",
            topic.config.name
        );
    }
    if let Some(losses) = plan.losses() {
        if !options.accept_loss {
            return Err(RestoreError::Lost(losses).into());
        }
        println!("lost:\n{losses}");
    }
    if options.dry_run {
        return Ok(());
    }
    let file = RegionFile::open(path, FlushMethod::None)?;
    let bar = indicatif::ProgressBar::new(total)
        .with_style(indicatif::ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes} ({bytes_per_sec})")?);
    plan.write(file.region(), |bytes| bar.inc(bytes))?;
    bar.finish();
    // Brokers of other hosts read it too. A CPU that cannot flush shares no memory that needs it.
    match file.flush_out() {
        Ok(_) | Err(RegionError::NoFlush) => {}
        Err(error) => return Err(error.into()),
    }
    println!("restored to {}", path.display());
    Ok(())
}
