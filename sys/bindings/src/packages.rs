//! Building again when a package was installed or removed. The build script of the command includes this file too.

use std::path::Path;

/// Databases of the package managers, and directories of pkg-config.
const PACKAGES: [&str; 7] = [
    "/var/lib/dpkg/status",
    "/var/lib/rpm",
    "/usr/lib/sysimage/rpm",
    "/usr/lib/pkgconfig",
    "/usr/lib64/pkgconfig",
    "/usr/local/lib/pkgconfig",
    "/usr/local/lib/x86_64-linux-gnu/pkgconfig",
];

/// Makes cargo run this build script again once a package was installed or removed.
pub(crate) fn watch_packages() {
    // A path that does not exist would do it too, but then each build compiles this crate and its dependents again. That is
    // most of the workspace, so it is left for hosts that have none of these paths.
    let there: Vec<&str> = PACKAGES.into_iter().filter(|path| Path::new(path).exists()).collect();
    let watched = if there.is_empty() { &PACKAGES[..1] } else { &there[..] };
    watched.iter().for_each(|path| println!("cargo::rerun-if-changed={path}"));
}
