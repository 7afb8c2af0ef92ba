//! What the `embarcadero` command is made of: its configuration ([`settings`]), local clusters ([`cluster`]), and the
//! commands ([`command`]).
#![forbid(unsafe_code)]

pub mod cluster;
pub mod command;
pub mod settings;
pub mod version;
