//! Build script: binds the rdma-core of the host that builds, if there is one.

use sys_bindings::{Library, Missing};

const RDMA_CORE: Library<'_> = Library {
    names: &["libibverbs", "librdmacm"],
    version: "1.8",
    flags: &[],
    packages: "libibverbs-dev librdmacm-dev libclang-dev (Debian, Ubuntu) or rdma-core-devel clang-devel (RHEL)",
};

fn main() {
    println!("cargo::rustc-check-cfg=cfg(bound)");
    println!("cargo::rerun-if-env-changed=EMBARCADERO_REQUIRE_RDMA");
    let bound = RDMA_CORE.bind(|builder| {
        builder
            .allowlist_item("(ibv|_ibv|___ibv|rdma|IBV|RDMA|embarcadero)_.*")
            .blocklist_type("pthread_.*|__pthread.*|sockaddr.*|timespec|in6?_addr|sa_family_t|socklen_t")
            .raw_line("use libc::{in_addr, in6_addr, pthread_cond_t, pthread_mutex_t, sa_family_t, sockaddr, sockaddr_in, sockaddr_in6, sockaddr_storage, socklen_t, timespec};")
    });
    match bound {
        Ok(()) => {
            println!("cargo::rustc-cfg=bound");
            println!("cargo::metadata=bound=yes");
        }
        Err(Missing(why)) if std::env::var_os("EMBARCADERO_REQUIRE_RDMA").is_some() => println!("cargo::error={why}"),
        Err(Missing(why)) => {
            println!("cargo::warning=built without RDMA devices: {why}");
            println!("cargo::metadata=missing={why}");
        }
    }
}
