//! Records commit, target and native libraries of this build, for `embarcadero --version --verbose` and `doctor`.

#[path = "sys/bindings/src/packages.rs"]
mod packages;

use packages::watch_packages;
use std::process::Command;

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
    watch_packages();
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
