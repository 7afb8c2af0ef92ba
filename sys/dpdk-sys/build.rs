//! Build script: binds the DPDK of the host that builds.

use sys_bindings::{Library, Missing};

const DPDK: Library<'_> = Library {
    names: &["libdpdk"],
    version: "22.11",
    // As DPDK's pkg-config file says, of which the crate hands on only some flags.
    flags: &["-include", "rte_config.h", "-march=corei7"],
    packages: "libdpdk-dev libclang-dev (Debian, Ubuntu) or dpdk-devel clang-devel (RHEL), or build without feature dpdk",
};

fn main() {
    let bound = DPDK.bind(|builder| {
        builder
            .allowlist_item(
                "rte_(eal|eth|errno|lcore|mempool|mbuf|pktmbuf|ether|version|socket|strerror|exit|thread)_.*",
            )
            .allowlist_item("(RTE_(ETH|ETHER|MBUF|MEMPOOL|PKTMBUF|LCORE)|embarcadero)_.*")
            .allowlist_function("rte_(eal|eth|version|strerror|socket_id|errno).*")
            // Packed and aligned at once, which Rust has not.
            .opaque_type("rte_l2tpv2_.*|rte_arp_.*|rte_ether_hdr|rte_gtp_.*|rte_flow_.*")
            .blocklist_type("pthread_.*|__pthread.*|timespec|iovec|FILE|_IO_.*")
            .raw_line("use libc::{FILE, iovec, pthread_attr_t, pthread_mutex_t, pthread_t, timespec};")
            .generate_comments(false)
    });
    if let Err(Missing(why)) = bound {
        println!("cargo::error={why}");
    }
}
