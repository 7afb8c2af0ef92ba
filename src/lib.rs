//! Parts of the `embarcadero` command: its command line ([`cli`]), its configuration ([`settings`]), local clusters
//! ([`cluster`]), and the commands ([`command`]).
#![forbid(unsafe_code)]

pub mod cli;
pub mod cluster;
pub mod command;
pub mod settings;
pub mod version;
