//! Binds the DPDK of the host that builds.

use std::env;
use std::path::{Path, PathBuf};
use std::process::exit;

/// Says in one sentence what to install, and stops the build.
fn missing(what: &str) -> ! {
    println!(
        "cargo::error={what} is missing: install libdpdk-dev libclang-dev (Debian, Ubuntu) or dpdk-devel clang-devel (RHEL), or build without feature dpdk"
    );
    exit(1);
}

/// What DPDK's headers need (its pkg-config file says so too, but the crate hands on only some flags).
const FLAGS: [&str; 3] = ["-include", "rte_config.h", "-march=corei7"];

fn main() {
    println!("cargo::rerun-if-changed=wrapper.h");
    for variable in ["PKG_CONFIG_PATH", "LIBCLANG_PATH", "BINDGEN_EXTRA_CLANG_ARGS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let library = pkg_config::Config::new().statik(false).atleast_version("22.11").probe("libdpdk");
    let Ok(library) = library else { missing("libdpdk, 22.11 or later,") };
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let inlines = out.join("inlines");
    let bindings = bindgen::Builder::default()
        .header("wrapper.h")
        .clang_args(library.include_paths.iter().map(|path| format!("-I{}", path.display())))
        .clang_args(FLAGS)
        .allowlist_item("rte_(eal|eth|errno|lcore|mempool|mbuf|pktmbuf|ether|version|socket|strerror|exit|thread)_.*")
        .allowlist_item("(RTE_(ETH|ETHER|MBUF|MEMPOOL|PKTMBUF|LCORE)|embarcadero)_.*")
        .allowlist_function("rte_(eal|eth|version|strerror|socket_id|errno).*")
        // Packed and aligned at once, which Rust has not.
        .opaque_type("rte_l2tpv2_.*|rte_arp_.*|rte_ether_hdr|rte_gtp_.*|rte_flow_.*")
        .blocklist_type("pthread_.*|__pthread.*|timespec|iovec|FILE|_IO_.*")
        .raw_line("use libc::{FILE, iovec, pthread_attr_t, pthread_mutex_t, pthread_t, timespec};")
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .generate_comments(false)
        .wrap_static_fns(true)
        .wrap_static_fns_path(&inlines)
        .wrap_static_fns_suffix("__inline")
        .generate();
    let bindings = match bindings {
        Ok(bindings) => bindings,
        Err(error) => missing(&format!("a header or libclang ({error})")),
    };
    if let Err(error) = bindings.write_to_file(out.join("bindings.rs")) {
        println!("cargo::error=cannot write the bindings: {error}");
        exit(1);
    }
    let mut inlines_library = cc::Build::new();
    inlines_library.file(inlines.with_extension("c")).include(Path::new(env!("CARGO_MANIFEST_DIR")));
    inlines_library.includes(&library.include_paths).warnings(false);
    for flag in FLAGS {
        inlines_library.flag(flag);
    }
    inlines_library.compile("dpdk_inlines");
}
