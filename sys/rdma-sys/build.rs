//! Binds the rdma-core of the host that builds.

use std::env;
use std::path::{Path, PathBuf};
use std::process::exit;

/// Says in one sentence what to install, and stops the build.
fn missing(what: &str, package: &str) -> ! {
    println!(
        "cargo::error={what} is missing: install {package} (Debian, Ubuntu) or rdma-core-devel (RHEL), or build with --no-default-features"
    );
    exit(1);
}

fn main() {
    println!("cargo::rerun-if-changed=wrapper.h");
    for variable in ["PKG_CONFIG_PATH", "LIBCLANG_PATH", "BINDGEN_EXTRA_CLANG_ARGS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let mut includes = Vec::new();
    for (library, package) in [("libibverbs", "libibverbs-dev"), ("librdmacm", "librdmacm-dev")] {
        match pkg_config::Config::new().statik(false).probe(library) {
            Ok(found) => includes.extend(found.include_paths),
            Err(_) => missing(library, package),
        }
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let inlines = out.join("inlines");
    let bindings = bindgen::Builder::default()
        .header("wrapper.h")
        .clang_args(includes.iter().map(|path| format!("-I{}", path.display())))
        .allowlist_item("(ibv|_ibv|___ibv|rdma|IBV|RDMA|embarcadero)_.*")
        .blocklist_type("pthread_.*|__pthread.*|sockaddr.*|timespec|in6?_addr|sa_family_t|socklen_t")
        .raw_line("use libc::{in_addr, in6_addr, pthread_cond_t, pthread_mutex_t, sa_family_t, sockaddr, sockaddr_in, sockaddr_in6, sockaddr_storage, socklen_t, timespec};")
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .wrap_static_fns(true)
        .wrap_static_fns_path(&inlines)
        .wrap_static_fns_suffix("__inline")
        .generate();
    let bindings = match bindings {
        Ok(bindings) => bindings,
        Err(error) => missing(&format!("a header or libclang ({error})"), "libibverbs-dev librdmacm-dev libclang-dev"),
    };
    if let Err(error) = bindings.write_to_file(out.join("bindings.rs")) {
        println!("cargo::error=cannot write the bindings: {error}");
        exit(1);
    }
    cc::Build::new()
        .file(inlines.with_extension("c"))
        .include(Path::new(env!("CARGO_MANIFEST_DIR")))
        .includes(&includes)
        .warnings(false)
        .compile("rdma_inlines");
}
