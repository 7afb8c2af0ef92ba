//! The control plane's messages and services, generated from `proto/control.proto`, and etcd's, from `proto/etcd.proto`.
#![forbid(unsafe_code)]

/// Version 1 of the control protocol.
#[allow(clippy::all, missing_docs)]
pub mod v1 {
    tonic::include_proto!("embarcadero.control.v1");
}

/// Clients of etcd's v3 API, as far as membership uses it.
#[allow(clippy::all, missing_docs)]
pub mod etcd {
    tonic::include_proto!("etcdserverpb");
}
