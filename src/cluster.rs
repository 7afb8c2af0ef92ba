//! Clusters of broker processes on this host, sharing one region.

use crate::settings::parse_bytes;
use anyhow::{Context, Result, bail};
use clap::Args;
use embarcadero_client::{Client, ClientConfig, TransportKind};
use embarcadero_cxl::RegionError;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::{AllocatorKind, Geometry};
use embarcadero_cxl::region::{Creation, RegionFile};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

#[derive(Args, Clone)]
#[allow(missing_docs)] // clap would take it for the command's help
pub struct ClusterArgs {
    /// Broker processes, 1 to 32.
    #[arg(long, short = 'n', default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=32))]
    pub brokers: u32,
    /// Region; made if it does not exist (on a device: if it begins with zeros), and then destroyed at the end.
    #[arg(long, default_value = "/dev/shm/embarcadero")]
    pub region: PathBuf,
    /// Size of a region that is made.
    #[arg(long, value_parser = parse_bytes, default_value = "1GiB")]
    pub size: u64,
    /// Segment size of a region that is made.
    #[arg(long, value_parser = parse_bytes, default_value = "16MiB")]
    pub segment_size: u64,
    /// Control port of the first broker; the others take free ones.
    #[arg(long, default_value_t = 7000)]
    pub port: u16,
    /// Broker configuration file (YAML).
    #[arg(long, short)]
    pub config: Option<PathBuf>,
    /// What brokers offer to clients (transport).
    #[arg(long)]
    pub transport: Option<TransportKind>,
    /// Cores for the brokers' polling threads, in turn; the scheduler's choice if not given.
    #[arg(long, value_delimiter = ',')]
    pub cores: Vec<usize>,
    /// Directory for the brokers' replicas; without it they replicate nothing (unless the configuration says so).
    #[arg(long)]
    pub replicas: Option<PathBuf>,
    /// Settings of the brokers, as environment variables.
    #[arg(skip)]
    pub environment: Vec<(String, String)>,
    /// Write the first broker's control endpoint to this file once all brokers serve.
    #[arg(long)]
    pub ready_file: Option<PathBuf>,
}

/// A broker process; killed when dropped.
pub struct BrokerProcess {
    child: Child,
    /// Control endpoint, `host:port`.
    pub control: String,
}

impl BrokerProcess {
    /// Starts a broker and waits until it serves.
    fn start(index: u32, args: &ClusterArgs) -> Result<Self> {
        let port = if index == 0 { args.port } else { 0 };
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut command = Command::new(program);
        command.arg("broker").arg("--region").arg(&args.region).arg("--control").arg(format!("127.0.0.1:{port}"));
        if let Some(config) = &args.config {
            command.arg("--config").arg(config);
        }
        // Spinning pays only where every polling thread has a core.
        command.env("EMBARCADERO_BROKER_THREADS__POLLERS_ON_HOST", args.brokers.to_string());
        if let Some(transport) = args.transport {
            command.env("EMBARCADERO_BROKER_TRANSPORT", transport.name());
        }
        if let Some(directory) = &args.replicas {
            command.env("EMBARCADERO_BROKER_REPLICA__PATH", directory);
        }
        command.envs(args.environment.iter().cloned());
        if !args.cores.is_empty() {
            let mut cores = args.cores.clone();
            cores.rotate_left(index as usize % args.cores.len());
            command.env("EMBARCADERO_BROKER_THREADS__CORES", format!("{cores:?}"));
        }
        let mut child = command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().context("cannot start a broker")?;
        let mut line = String::new();
        if let Some(output) = child.stdout.take() {
            BufReader::new(output).read_line(&mut line).context("cannot hear from a broker")?;
        }
        let Ok(said) = serde_json::from_str::<serde_json::Value>(&line) else {
            let status = child.wait()?;
            bail!("a broker did not start ({status})");
        };
        let control = said["control"].as_str().unwrap_or_default().to_owned();
        Ok(Self { child, control })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills it, as `kill -9` does.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("cannot kill a broker")?;
        self.child.wait().map(drop).context("cannot wait for a broker")
    }

    /// Asks the broker to stop and waits for it.
    pub fn stop(&mut self) {
        if let Ok(Some(_)) = self.child.try_wait() {
            return;
        }
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            // One that is gone has stopped.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for BrokerProcess {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A running cluster; brokers stop and a region that it made goes when it is dropped.
pub struct Cluster {
    /// Its processes; the first has the configured port.
    pub brokers: Vec<BrokerProcess>,
    region: Option<PathBuf>,
}

impl Cluster {
    /// Makes the region if there is none, starts the brokers, and waits until all of them serve.
    ///
    /// # Errors
    /// A broker does not start; what was started is stopped.
    pub fn start(args: &ClusterArgs) -> Result<Self> {
        let mut cluster = Self { brokers: Vec::new(), region: None };
        // A device is always there; one that was never used, or whose region was destroyed, begins with zeros.
        let opened = || RegionFile::open(&args.region, FlushMethod::None);
        if !args.region.exists() || matches!(opened(), Err(RegionError::NotARegion { found: 0 })) {
            let geometry = Geometry::with_segments_of(args.segment_size, AllocatorKind::Bitmap).fit(args.size)?;
            RegionFile::create(
                &args.region,
                &geometry,
                FlushMethod::None,
                Creation { reserve: true, ..Creation::default() },
            )?;
            cluster.region = Some(args.region.clone());
        }
        for index in 0..args.brokers {
            cluster.brokers.push(BrokerProcess::start(index, args)?);
        }
        let client = Client::connect(ClientConfig::at(cluster.control()))?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while client.cluster()?.brokers.len() < args.brokers as usize {
            if Instant::now() > deadline {
                bail!("not all brokers joined in 10 s");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(cluster)
    }

    /// Control endpoint of the first broker.
    pub fn control(&self) -> String {
        self.brokers.first().map(|broker| broker.control.clone()).unwrap_or_default()
    }
}

impl Cluster {
    /// Takes out the brokers that have ended by themselves: their process ids, and how each ended.
    pub fn take_ended(&mut self) -> Vec<(u32, ExitStatus)> {
        let mut ended = Vec::new();
        self.brokers.retain_mut(|broker| match broker.child.try_wait() {
            Ok(Some(status)) => {
                ended.push((broker.id(), status));
                false
            }
            _ => true,
        });
        ended
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        while let Some(mut broker) = self.brokers.pop() {
            broker.stop();
        }
        if let Some(region) = self.region.take()
            && let Err(error) = RegionFile::open(&region, FlushMethod::None).and_then(|file| file.destroy(true))
        {
            eprintln!("cannot destroy {}: {error}", region.display());
        }
    }
}
