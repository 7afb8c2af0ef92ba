//! Library of the `embarcadero` command: configuration ([`settings`]), local clusters ([`cluster`]) and the commands
//! ([`command`]).
#![forbid(unsafe_code)]

pub mod cluster;
pub mod command;
pub mod settings;
pub mod version;
