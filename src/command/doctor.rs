//! `embarcadero doctor`: reports what this host has, what it lacks, and how to get it.

mod measure;

use anyhow::Result;
use clap::Args;
use embarcadero_cxl::cache::FlushSupport;
use embarcadero_verbs::{CompletionQueue, Context, DeviceReport, SurveyError, dpdk_version, survey};
use measure::{Measure, measure};
use serde::Serialize;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub struct DoctorArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Measure memory too, and the time of a flush, a pause and a reading of the clock.
    #[arg(long)]
    measure: bool,
    /// Path of a region to measure as well. It may be in use; it is only read.
    #[arg(long, requires = "measure")]
    region: Option<PathBuf>,
}

/// Output of `doctor --json`, which docs/operating/hardware.md describes.
#[derive(Serialize)]
struct Report {
    findings: Vec<Finding>,
    measures: Vec<Measure>,
}

#[derive(Serialize)]
struct Finding {
    name: &'static str,
    ready: bool,
    found: String,
    /// Remedy, or the consequence if there is none; empty if `ready`.
    advice: String,
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn entries(path: &str) -> Vec<String> {
    let Ok(directory) = std::fs::read_dir(path) else { return Vec::new() };
    let mut names: Vec<_> = directory.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn finding(name: &'static str, ready: bool, found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { name, ready, found: found.into(), advice: if ready { String::new() } else { advice.into() } }
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn memlock() -> Finding {
    let limits = read("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find(|line| line.starts_with("Max locked memory")).unwrap_or_default();
    let soft = line.split_whitespace().nth(3).unwrap_or("unknown");
    let advice = "RDMA locks the whole region in memory: hw-setup/rdma apply, and log in again; for systemd: hw-setup/services apply";
    finding("memlock", soft == "unlimited", soft, advice)
}

fn rdma_devices() -> Finding {
    const NAME: &str = "RDMA devices";
    let describe = |report: &DeviceReport| {
        let ports = report.ports.iter().map(|port| {
            let gids: Vec<_> =
                port.gids.iter().map(|gid| format!("gid {} {} {}", gid.index, gid.kind, gid.address)).collect();
            let numbers = format!("port {} {} {} mtu {}", port.number, port.link_layer, port.state, port.mtu);
            format!("{numbers}, {}", list(&gids))
        });
        let windows = if report.memory_windows { "type-2 memory windows" } else { "no type-2 memory windows" };
        let ports = ports.collect::<Vec<_>>().join("; ");
        let node = report.numa_node.map_or("unknown".to_owned(), |node| node.to_string());
        format!("{} (firmware {}, NUMA node {node}, {windows}): {ports}", report.name, report.firmware)
    };
    match survey() {
        Err(error @ SurveyError::NotBuilt(_)) => {
            finding(NAME, false, error.to_string(), "hw-setup/deps apply, and build again")
        }
        Err(error) => finding(NAME, false, "none", error.to_string()),
        Ok(devices) if devices.is_empty() => {
            let advice = "soft-RoCE makes one of any network interface: hw-setup/soft-roce apply";
            finding(NAME, false, "none", advice)
        }
        Ok(devices) => {
            let active = |report: &DeviceReport| report.ports.iter().any(|port| port.state == "active");
            let ready = devices.iter().any(|(_, report)| report.as_ref().is_ok_and(active));
            let found = devices.iter().map(|(name, report)| match report {
                Ok(report) => describe(report),
                Err(error) => format!("{name}: cannot be opened: {error}"),
            });
            let advice = "no port is active, or this user may not open /dev/infiniband/uverbs*: hw-setup/rdma check";
            finding(NAME, ready, found.collect::<Vec<_>>().join("; "), advice)
        }
    }
}

/// Tries to open a NIC in software, as `transport: roce` does.
fn nic_in_software() -> Finding {
    const NAME: &str = "NIC in software (transport: roce)";
    let opened = Context::software(None).and_then(|(context, port)| {
        CompletionQueue::new(&context, 1).map_err(context.error("open the sockets"))?;
        Ok(format!("{} mtu {}", context.name(), port.mtu))
    });
    match opened {
        Ok(found) => finding(NAME, true, found, ""),
        Err(error) => finding(
            NAME,
            false,
            error.to_string(),
            "run as root or with CAP_NET_RAW; for systemd: hw-setup/services apply --transport roce",
        ),
    }
}

fn dpdk() -> Finding {
    let version = dpdk_version();
    let found = version.clone().unwrap_or_else(|| "not in this build".to_owned());
    finding(
        "DPDK",
        version.is_some(),
        found,
        "optional: hw-setup/deps apply --purpose dpdk, and build with --features dpdk",
    )
}

fn findings() -> Vec<Finding> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let flush = FlushSupport::detect();
    let hugepages = read("/proc/meminfo")
        .and_then(|text| {
            text.lines().find(|line| line.starts_with("HugePages_Total"))?.split_whitespace().nth(1).map(str::to_owned)
        })
        .unwrap_or_else(|| "0".to_owned());
    let shmem = read("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_else(|| "not built".to_owned());
    let dax = entries("/sys/bus/dax/devices");
    let libraries = env!("EMBARCADERO_LIBRARIES");
    vec![
        finding(
            "cores",
            cores >= 4,
            cores.to_string(),
            "with fewer than 4 cores a broker runs all its stages in one thread, and threads do not spin",
        ),
        finding(
            "flush instructions",
            flush.best().is_some(),
            flush.names(),
            "use cxl.coherence: host or fabric; without flushes hosts without coherent memory cannot share a region",
        ),
        finding(
            "shared memory",
            Path::new("/dev/shm").is_dir(),
            "/dev/shm",
            "mount a tmpfs on /dev/shm, or create regions elsewhere with --path",
        ),
        finding(
            "transparent huge pages on tmpfs",
            shmem.contains("[advise]") || shmem.contains("[always]") || shmem.contains("[within_size]"),
            shmem,
            "hw-setup/tune apply --what thp",
        ),
        finding(
            "hugetlb pages",
            hugepages != "0",
            hugepages,
            "optional, for regions on hugetlbfs and for DPDK: hw-setup/hugepages apply",
        ),
        memlock(),
        finding(
            "dax devices",
            !dax.is_empty(),
            list(&dax),
            "regions on tmpfs work without one; with a CXL device: hw-setup/cxl apply",
        ),
        rdma_devices(),
        nic_in_software(),
        finding(
            "native libraries at build time",
            !libraries.contains("not found"),
            libraries,
            "verbs needs libibverbs and librdmacm, dpdk needs libdpdk: hw-setup/deps apply --purpose dpdk, and build again",
        ),
        dpdk(),
    ]
}

pub fn run(args: &DoctorArgs) -> Result<()> {
    let measures = if args.measure { measure(args.region.as_deref())? } else { Vec::new() };
    let report = Report { findings: findings(), measures };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    for finding in report.findings {
        println!("{} {}: {}", if finding.ready { "ok  " } else { "note" }, finding.name, finding.found);
        if !finding.advice.is_empty() {
            println!("       {}", finding.advice);
        }
    }
    for Measure { name, value, unit } in report.measures {
        println!("     {name}: {value:.1} {unit}");
    }
    Ok(())
}
