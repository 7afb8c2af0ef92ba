//! Records commit, target and native libraries of this build, for `embarcadero --version --verbose` and `doctor`.

use std::process::Command;

/// Standard output of a program; none if it cannot be run or fails.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Name and version of a native library, or a note that this host lacks it.
fn library(name: &str) -> String {
    match output("pkg-config", &["--modversion", name]) {
        Some(version) => format!("{name} {version}"),
        None => format!("{name} not found"),
    }
}

fn main() {
    println!("cargo:rerun-if-changed=.git/HEAD");
    println!("cargo:rerun-if-changed=.git/refs/heads");
    println!("cargo:rerun-if-env-changed=PKG_CONFIG_PATH");
    let commit = output("git", &["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo:rustc-env=EMBARCADERO_COMMIT={commit}");
    println!("cargo:rustc-env=EMBARCADERO_TARGET={}", std::env::var("TARGET").unwrap_or_default());
    println!("cargo:rustc-env=EMBARCADERO_PROFILE={}", std::env::var("PROFILE").unwrap_or_default());
    let libraries = ["libibverbs", "librdmacm", "libdpdk"].map(library).join("; ");
    println!("cargo:rustc-env=EMBARCADERO_LIBRARIES={libraries}");
}
