//! Cluster of broker processes on this host that share one region.

use crate::settings::parse_bytes;
use anyhow::{Context, Result, bail};
use clap::Args;
use embarcadero_client::{Client, ClientConfig, ClientError, TransportKind};
use embarcadero_cxl::RegionError;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::{AllocatorKind, Geometry};
use embarcadero_cxl::region::{Creation, RegionFile};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

#[derive(Args, Clone)]
#[allow(missing_docs)] // clap would use it as the command's help
pub struct ClusterArgs {
    /// Number of broker processes, 1 to 32.
    #[arg(long, short = 'n', default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=32))]
    pub brokers: u32,
    /// Path of the region. It is created if it does not exist, and then destroyed at the end, unless all brokers have ended
    /// by themselves. On a device it is created if the device begins with zeros.
    #[arg(long, default_value = "/dev/shm/embarcadero")]
    pub region: PathBuf,
    /// Size of the region, if it is created.
    #[arg(long, value_parser = parse_bytes, default_value = "1GiB")]
    pub size: u64,
    /// Segment size of the region, if it is created: a power of two from 1MiB to 16GiB.
    #[arg(long, value_parser = parse_bytes, default_value = "16MiB")]
    pub segment_size: u64,
    /// Control port of the first broker; the other brokers take free ports.
    #[arg(long, default_value_t = 7000)]
    pub port: u16,
    /// Broker configuration file (YAML).
    #[arg(long, short)]
    pub config: Option<PathBuf>,
    /// Transport that the brokers offer to clients.
    #[arg(long)]
    pub transport: Option<TransportKind>,
    /// Cores for the brokers' polling threads, as in 1,2,3; the scheduler chooses if not given.
    #[arg(long, value_delimiter = ',')]
    pub cores: Vec<usize>,
    /// Directory for replica files. Without it brokers keep replicas only if the configuration says so.
    #[arg(long)]
    pub replicas: Option<PathBuf>,
    /// Environment variables with settings for the brokers.
    #[arg(skip)]
    pub environment: Vec<(String, String)>,
    /// File to write the first broker's control endpoint to, once all brokers serve.
    #[arg(long)]
    pub ready_file: Option<PathBuf>,
}

/// Broker process; stopped when dropped.
pub struct BrokerProcess {
    child: Child,
    /// Endpoint of the control service, `host:port`.
    pub control: String,
}

impl BrokerProcess {
    /// Starts the broker with this index in the cluster and waits until it serves.
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

    /// Returns the process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills the process, as `kill -9` does, and waits for its end.
    ///
    /// # Errors
    /// The system cannot kill the process or wait for it.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("cannot kill a broker")?;
        self.child.wait().map(drop).context("cannot wait for a broker")
    }

    /// Sends SIGTERM and waits for the process to end; kills it after 5 s.
    pub fn stop(&mut self) {
        if let Ok(Some(_)) = self.child.try_wait() {
            return;
        }
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            // An error means that the process has ended.
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

/// Returns the number of brokers that the one at `control` knows. Connects `client` first, if it is not connected.
fn joined(client: &mut Option<Client>, control: &str) -> Result<usize, ClientError> {
    let client = match client {
        Some(client) => client,
        None => client.insert(Client::connect(ClientConfig::at(control))?),
    };
    Ok(client.cluster()?.brokers.len())
}

/// Running cluster. When dropped it stops its brokers and destroys the region, if it created that.
pub struct Cluster {
    /// Processes that run; the first one listens on the configured port.
    pub brokers: Vec<BrokerProcess>,
    region: Option<PathBuf>,
}

impl Cluster {
    /// Creates the region if there is none, starts the brokers, and waits until all of them serve. The wait has no limit: a
    /// busy host is slow, and only a broker that ends is a failure.
    ///
    /// # Errors
    /// The region cannot be created, a broker does not start, or one ends before all have joined. Brokers that did start
    /// are stopped.
    pub fn start(args: &ClusterArgs) -> Result<Self> {
        Self::start_unless(args, &mut || false)
    }

    /// Does what [`Cluster::start`] does, until `stopped` returns true.
    ///
    /// # Errors
    /// Those of [`Cluster::start`], and `stopped` returned true while brokers were joining.
    pub(crate) fn start_unless(args: &ClusterArgs, stopped: &mut dyn FnMut() -> bool) -> Result<Self> {
        let mut cluster = Self { brokers: Vec::new(), region: None };
        // A device always exists. If it was never used, or its region was destroyed, it begins with zeros.
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
        cluster.await_all(stopped)?;
        Ok(cluster)
    }

    /// Waits until the first broker knows all brokers of the cluster. Says every 10 s what is still missing.
    fn await_all(&mut self, stopped: &mut dyn FnMut() -> bool) -> Result<()> {
        let count = self.brokers.len();
        let control = self.control();
        let mut client = None;
        let mut said = Instant::now();
        loop {
            let missing = match joined(&mut client, &control) {
                Ok(joined) if joined >= count => return Ok(()),
                Ok(joined) => format!("{joined} of {count} brokers joined"),
                // A broker on a busy host answers late: asked again.
                Err(error) => format!("the broker at {control} does not answer: {error}"),
            };
            if let Some((pid, status)) = self.take_ended().first() {
                bail!("the broker with pid {pid} ended ({status}) before all brokers had joined");
            }
            if stopped() {
                bail!("stopped before all brokers had joined");
            }
            if said.elapsed() > Duration::from_secs(10) {
                eprintln!("still waiting: {missing}");
                said = Instant::now();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Control endpoint of the first broker, `host:port`; empty if no broker runs.
    pub fn control(&self) -> String {
        self.brokers.first().map(|broker| broker.control.clone()).unwrap_or_default()
    }
}

impl Cluster {
    /// Removes the brokers whose processes have ended. Returns their process ids and exit statuses.
    pub(crate) fn take_ended(&mut self) -> Vec<(u32, ExitStatus)> {
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

    /// Keeps the region, if it would be destroyed at the end. Returns its path then.
    pub(crate) fn keep_region(&mut self) -> Option<PathBuf> {
        self.region.take()
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
