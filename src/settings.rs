//! Configuration: a YAML file, overridden by the environment, overridden by flags.

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use embarcadero_client::{Client, ClientConfig, Transport};
use serde::de::DeserializeOwned;
use serde_yaml::Value;
use std::path::{Path, PathBuf};

/// Variables `EMBARCADERO_<SECTION>_KEY` override a file's keys; `__` goes one level down.
/// `EMBARCADERO_BROKER_CXL__PATH=/dev/dax0.0` sets `cxl.path` of a broker.
pub fn load<T: DeserializeOwned>(file: Option<&Path>, section: &str) -> Result<T> {
    let prefix = format!("EMBARCADERO_{section}_");
    let variables =
        std::env::vars().filter_map(|(name, value)| Some((name.strip_prefix(&prefix)?.to_lowercase(), value)));
    let text = match file {
        Some(file) => std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?,
        None => String::new(),
    };
    parse(&text, variables).with_context(|| match file {
        Some(file) => format!("configuration {}", file.display()),
        None => "configuration from the environment".to_owned(),
    })
}

/// Parses YAML, then lays `overrides` (key path, value) over it.
pub fn parse<T: DeserializeOwned>(text: &str, overrides: impl Iterator<Item = (String, String)>) -> Result<T> {
    let mut overrides = overrides.peekable();
    if overrides.peek().is_none() && !text.trim().is_empty() {
        // Straight from the text, so that an error names its line.
        return Ok(serde_yaml::from_str(text)?);
    }
    let mut root: Value =
        if text.trim().is_empty() { Value::Mapping(serde_yaml::Mapping::new()) } else { serde_yaml::from_str(text)? };
    for (path, value) in overrides {
        let mut place = &mut root;
        for key in path.split("__") {
            if place.is_null() {
                *place = Value::Mapping(serde_yaml::Mapping::new());
            }
            let Value::Mapping(mapping) = place else { bail!("{path}: {key} is below a value that is not a mapping") };
            place = mapping.entry(Value::String(key.to_owned())).or_insert(Value::Null);
        }
        *place = serde_yaml::from_str(&value).unwrap_or(Value::String(value));
    }
    // The error names the key's whole path.
    Ok(serde_path_to_error::deserialize(root)?)
}

/// How bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TransportArg {
    Tcp,
    Verbs,
}

impl TransportArg {
    /// As configuration files say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Verbs => "verbs",
        }
    }
}

impl From<TransportArg> for Transport {
    fn from(argument: TransportArg) -> Self {
        match argument {
            TransportArg::Tcp => Self::Tcp,
            TransportArg::Verbs => Self::Verbs,
        }
    }
}

/// How a command reaches a cluster.
#[derive(Args, Clone)]
pub struct Connect {
    /// Control endpoint of any broker; may be given several times.
    #[arg(long, short = 'b', env = "EMBARCADERO_BROKERS", value_delimiter = ',')]
    pub brokers: Vec<String>,
    /// Client configuration file (YAML).
    #[arg(long)]
    pub client_config: Option<PathBuf>,
    /// How bytes travel (transport).
    #[arg(long)]
    pub transport: Option<TransportArg>,
}

impl Connect {
    pub fn config(&self) -> Result<ClientConfig> {
        let mut config: ClientConfig = load(self.client_config.as_deref(), "CLIENT")?;
        if !self.brokers.is_empty() {
            config.bootstrap.clone_from(&self.brokers);
        }
        config.transport = self.transport.map_or(config.transport, Into::into);
        Ok(config)
    }

    pub fn client(&self) -> Result<Client> {
        Ok(Client::connect(self.config()?)?)
    }
}

/// Parses a size: bytes, or with a suffix KiB, MiB, GiB (also K, M, G).
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1u64 << 30,
        other => return Err(format!("unknown unit {other:?}; use KiB, MiB or GiB")),
    };
    let number: u64 = digits.trim().parse().map_err(|_| format!("{text:?} is not a size"))?;
    number.checked_mul(unit).ok_or_else(|| format!("{text} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use embarcadero_broker::BrokerConfig;
    use proptest::prelude::*;

    #[test]
    fn the_environment_overrides_the_file() {
        let overrides =
            [("cxl__path".to_owned(), "/dev/dax0.0".to_owned()), ("heartbeat_ms".to_owned(), "7".to_owned())];
        let config: BrokerConfig = parse("heartbeat_ms: 5\nid: 3", overrides.into_iter()).unwrap();
        assert_eq!((config.heartbeat_ms, config.id), (7, Some(3)));
        assert_eq!(config.cxl.path, Path::new("/dev/dax0.0"));
    }

    #[test]
    fn errors_name_the_key_and_its_line() {
        let error = parse::<BrokerConfig>("id: 1\nheartbeet_ms: 5", std::iter::empty()).unwrap_err().to_string();
        assert!(error.contains("heartbeet_ms") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn shipped_profiles_are_valid() {
        for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/config")).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name.contains("verbs") && !cfg!(feature = "rdma") {
                continue; // refused, as it says
            }
            if name.starts_with("broker") {
                parse::<BrokerConfig>(&text, std::iter::empty()).unwrap().validate().unwrap();
            } else {
                parse::<ClientConfig>(&text, std::iter::empty()).unwrap().validate().unwrap();
            }
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_fails_cleanly(text in ".{0,200}", key in "[a-z_]{1,20}", value in ".{0,40}") {
            let _ = parse::<BrokerConfig>(&text, std::iter::once((key, value)));
            let _ = parse_bytes(&text);
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_bytes("64KiB"), Ok(65536));
        assert_eq!(parse_bytes("2G"), Ok(2 << 30));
        assert!(parse_bytes("12 parsecs").is_err());
        assert!(parse_bytes("99999999999999999999").is_err());
    }
}
