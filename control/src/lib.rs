//! The control plane's messages and services, generated from `proto/control.proto`.
#![forbid(unsafe_code)]

/// Version 1 of the control protocol.
#[allow(clippy::all, missing_docs)]
pub mod v1 {
    tonic::include_proto!("embarcadero.control.v1");
}
