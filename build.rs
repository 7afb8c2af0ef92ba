//! Records commit, target and native libraries of this build, for `embarcadero --version --verbose` and `doctor`.

use std::path::Path;
use std::process::Command;

/// Databases of the package managers, and directories of pkg-config; as in `sys/bindings`, which says why.
const PACKAGES: [&str; 7] = [
    "/var/lib/dpkg/status",
    "/var/lib/rpm",
    "/usr/lib/sysimage/rpm",
    "/usr/lib/pkgconfig",
    "/usr/lib64/pkgconfig",
    "/usr/local/lib/pkgconfig",
    "/usr/local/lib/x86_64-linux-gnu/pkgconfig",
];

/// Standard output of a program; none if it cannot be run or fails.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Name and version of a native library, or a note that this host lacks it. After such a note cargo runs this again once a
/// package was installed.
fn library(name: &str) -> String {
    if let Some(version) = output("pkg-config", &["--modversion", name]) {
        return format!("{name} {version}");
    }
    let there: Vec<&str> = PACKAGES.into_iter().filter(|path| Path::new(path).exists()).collect();
    let watched = if there.is_empty() { &PACKAGES[..1] } else { &there[..] };
    watched.iter().for_each(|path| println!("cargo:rerun-if-changed={path}"));
    format!("{name} not found")
}

fn main() {
    println!("cargo:rerun-if-changed=.git/HEAD");
    println!("cargo:rerun-if-changed=.git/refs/heads");
    println!("cargo:rerun-if-env-changed=PKG_CONFIG_PATH");
    println!("cargo:rerun-if-env-changed=PKG_CONFIG_LIBDIR");
    let commit = output("git", &["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo:rustc-env=EMBARCADERO_COMMIT={commit}");
    println!("cargo:rustc-env=EMBARCADERO_TARGET={}", std::env::var("TARGET").unwrap_or_default());
    println!("cargo:rustc-env=EMBARCADERO_PROFILE={}", std::env::var("PROFILE").unwrap_or_default());
    let libraries = ["libibverbs", "librdmacm", "libdpdk"].map(library).join("; ");
    println!("cargo:rustc-env=EMBARCADERO_LIBRARIES={libraries}");
}
