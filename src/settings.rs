//! Configuration: a YAML file, overridden by the environment, overridden by flags.

use anyhow::{Context, Result, bail};
use clap::Args;
use embarcadero_client::{Client, ClientConfig, TransportKind};
use embarcadero_wire::OutOfBounds;
use serde::de::DeserializeOwned;
use serde_yaml::Value;
use std::path::{Path, PathBuf};

/// Loads a configuration from a YAML file, if one is given, and from the environment.
///
/// Variables `EMBARCADERO_<SECTION>_<KEY>` override keys of the file; `__` separates the levels of a key. For example,
/// `EMBARCADERO_BROKER_CXL__PATH=/dev/dax0.0` sets a broker's `cxl.path`.
///
/// # Errors
/// The file cannot be read, or a key or value is not valid; the error names the file and the key.
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

/// Parses YAML and replaces the values that `overrides` names, as pairs of key path and value.
///
/// # Errors
/// A key is unknown, or a value has the wrong type.
pub fn parse<T: DeserializeOwned>(text: &str, overrides: impl Iterator<Item = (String, String)>) -> Result<T> {
    let mut root = Value::Mapping(serde_yaml::Mapping::new());
    if !text.trim().is_empty() {
        // Parsed from the text first, because then an error names the line.
        serde_yaml::from_str::<T>(text)?;
        root = serde_yaml::from_str(text)?;
    }
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
    // This way an error names the whole path of the key.
    Ok(serde_path_to_error::deserialize(root)?)
}

/// Adds to an error the file and the line that the value comes from, if a file has it.
pub(crate) fn located(file: Option<&Path>, error: OutOfBounds) -> anyhow::Error {
    let text = file.and_then(|file| std::fs::read_to_string(file).ok()).unwrap_or_default();
    let says = |line: &usize| text.lines().nth(line - 1).is_some_and(|line| line.contains(&error.value));
    match (file, line_of(&text, error.key).filter(says)) {
        (Some(file), Some(line)) => {
            anyhow::Error::new(error).context(format!("configuration {}, line {line}", file.display()))
        }
        _ => error.into(),
    }
}

/// Number of the line, from 1, that holds the value of a key such as `cxl.path` in a YAML text.
fn line_of(text: &str, key: &str) -> Option<usize> {
    let mut lines = text.lines().enumerate();
    let mut rest = "";
    let mut found = None;
    for name in key.split('.') {
        let has = |line: &str| line.split(['{', ',']).any(|part| part.trim().split(':').next() == Some(name));
        if !has(rest) {
            let (number, line) = lines.find(|(_, line)| has(line))?;
            (found, rest) = (Some(number + 1), line);
        }
    }
    found
}

/// Arguments with which a command connects to a cluster.
#[derive(Args, Clone)]
pub struct Connect {
    /// Control endpoint of a broker, host:port; may be given several times.
    #[arg(long, short = 'b', env = "EMBARCADERO_BROKERS", value_delimiter = ',')]
    pub brokers: Vec<String>,
    /// Client configuration file (YAML).
    #[arg(long)]
    pub client_config: Option<PathBuf>,
    /// Transport of messages; brokers must offer it.
    #[arg(long)]
    pub transport: Option<TransportKind>,
}

impl Connect {
    /// Configuration of the client: the file, overridden by the environment, overridden by flags.
    ///
    /// # Errors
    /// The file cannot be read, or a value is out of bounds.
    pub fn config(&self) -> Result<ClientConfig> {
        let mut config: ClientConfig = load(self.client_config.as_deref(), "CLIENT")?;
        if !self.brokers.is_empty() {
            config.bootstrap.clone_from(&self.brokers);
        }
        config.transport = self.transport.unwrap_or(config.transport);
        config.validate().map_err(|error| located(self.client_config.as_deref(), error))?;
        Ok(config)
    }

    /// Connects a client.
    ///
    /// # Errors
    /// The configuration is not valid, or no broker answers.
    pub fn client(&self) -> Result<Client> {
        Ok(Client::connect(self.config()?)?)
    }
}

/// Parses a size in bytes, or in units of 1024 with suffix KiB, MiB or GiB (also K, M, G).
///
/// # Errors
/// The text is not a number, its unit is unknown, or the size does not fit 64 bits.
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
    use embarcadero_wire::BrokerId;
    use proptest::prelude::*;

    #[test]
    fn the_environment_overrides_the_file() {
        let overrides =
            [("cxl__path".to_owned(), "/dev/dax0.0".to_owned()), ("heartbeat_ms".to_owned(), "7".to_owned())];
        let config: BrokerConfig = parse("heartbeat_ms: 5\nid: 3", overrides.into_iter()).unwrap();
        assert_eq!((config.heartbeat_ms, config.id), (7, Some(BrokerId(3))));
        assert_eq!(config.cxl.path, Path::new("/dev/dax0.0"));
    }

    #[test]
    fn errors_name_the_key_and_its_line() {
        let error = parse::<BrokerConfig>("id: 1\nheartbeet_ms: 5", std::iter::empty()).unwrap_err().to_string();
        assert!(error.contains("heartbeet_ms") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn values_out_of_bounds_are_located() {
        let text = "id: 1\ncxl:\n  path: /x # cxl\n  flush: clwb\nthreads: { workers: 1, spin_us: 9 }\n";
        assert_eq!(line_of(text, "id"), Some(1));
        assert_eq!(line_of(text, "cxl.flush"), Some(4));
        assert_eq!(line_of(text, "threads.spin_us"), Some(5));
        assert_eq!(line_of(text, "heartbeat_ms"), None);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("broker.yaml");
        std::fs::write(&file, text).unwrap();
        let error = |value| OutOfBounds::new("threads.spin_us", value, "0");
        let at = located(Some(&file), error(9));
        let line = format!("configuration {}, line 5: threads.spin_us is 9; it must be 0", file.display());
        assert_eq!(format!("{at:#}"), line);
        assert_eq!(format!("{:#}", located(Some(&file), error(7))), "threads.spin_us is 7; it must be 0");
    }

    /// The files of `config/schema` are generated from the types: `EMBARCADERO_WRITE_SCHEMA=1` writes them anew.
    #[test]
    fn the_schema_is_that_of_the_types() {
        let schemas =
            [("broker", schemars::schema_for!(BrokerConfig)), ("client", schemars::schema_for!(ClientConfig))];
        for (name, schema) in schemas {
            let path = format!("{}/config/schema/{name}.json", env!("CARGO_MANIFEST_DIR"));
            let text = serde_json::to_string_pretty(&schema).unwrap() + "\n";
            if std::env::var_os("EMBARCADERO_WRITE_SCHEMA").is_some() {
                std::fs::create_dir_all(Path::new(&path).parent().unwrap()).unwrap();
                std::fs::write(&path, &text).unwrap();
            }
            assert!(std::fs::read_to_string(&path).unwrap_or_default() == text, "{path} is not up to date");
        }
    }

    #[test]
    fn shipped_profiles_are_valid() {
        for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/config")).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
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
