//! Fuzzes configurations: any text is a valid configuration or an error, never a panic.
#![no_main]

use embarcadero_broker::BrokerConfig;
use embarcadero_client::ClientConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(config) = serde_yaml::from_str::<BrokerConfig>(text) {
        let _ = config.validate();
    }
    if let Ok(config) = serde_yaml::from_str::<ClientConfig>(text) {
        let _ = config.validate();
    }
});
