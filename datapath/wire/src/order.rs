//! Orders that a topic can promise.

use crate::codes;
use serde::{Deserialize, Serialize};
use std::fmt;

codes! {
    /// Order that a topic promises.
    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Order: u8 {
        /// No promise.
        None = 1,
        /// Each broker's messages in the order in which it received them.
        Broker = 2,
        /// One order that all subscribers read. The sequencer never waits.
        Total = 3,
        /// Total, and each session's messages in submission order, without gaps or duplicates.
        Strong = 4,
    }
}

impl Order {
    /// Returns true when the sequencer assigns one global order.
    #[must_use]
    pub const fn is_global(self) -> bool {
        matches!(self, Self::Total | Self::Strong)
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Broker => "broker",
            Self::Total => "total",
            Self::Strong => "strong",
        })
    }
}

impl std::str::FromStr for Order {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "broker" => Ok(Self::Broker),
            "total" => Ok(Self::Total),
            "strong" => Ok(Self::Strong),
            _ => Err(format!("order is {text:?}; it must be none, broker, total or strong")),
        }
    }
}
