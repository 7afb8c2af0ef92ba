//! Says whether the host's rdma-core was bound: `cfg(rdma)`, or else why not.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(rdma)");
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("DEP_IBVERBS_BOUND").is_some() {
        println!("cargo::rustc-cfg=rdma");
    }
    let why = std::env::var("DEP_IBVERBS_MISSING").unwrap_or_else(|_| "built without cargo feature rdma".to_owned());
    println!("cargo::rustc-env=EMBARCADERO_NO_RDMA={why}");
}
