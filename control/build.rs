//! Compiles the control plane's protocol, and the part of etcd's that is used, without needing `protoc` on the host.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for (proto, serve) in [("proto/control.proto", true), ("proto/etcd.proto", false)] {
        println!("cargo:rerun-if-changed={proto}");
        let descriptors = protox::compile([proto], ["proto"])?;
        tonic_prost_build::configure().build_server(serve).compile_fds(descriptors)?;
    }
    Ok(())
}
