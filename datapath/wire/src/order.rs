//! The orders that a topic can promise.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Order that a topic promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// No promise.
    None,
    /// Each broker's messages in the order in which it received them.
    Broker,
    /// One order that all subscribers read. The sequencer never waits.
    Total,
    /// Total, and each session's messages in submission order, without gaps or duplicates.
    Strong,
}

impl Order {
    /// True when the sequencer assigns one global order.
    #[must_use]
    pub const fn is_global(self) -> bool {
        matches!(self, Self::Total | Self::Strong)
    }

    /// The number that region and replica files hold.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8 + 1
    }

    /// The order of a number.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::None),
            2 => Some(Self::Broker),
            3 => Some(Self::Total),
            4 => Some(Self::Strong),
            _ => None,
        }
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
            "total" | "weak" => Ok(Self::Total),
            "strong" => Ok(Self::Strong),
            _ => Err(format!("order is {text:?}; it must be none, broker, total or strong")),
        }
    }
}
