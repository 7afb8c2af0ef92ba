//! Promise: `doctor` says what it found as documented, and names scripts that exist.

use std::path::Path;

#[test]
fn the_report_has_its_schema_and_measures() {
    let cluster = crate::support::Cluster::start(1, &["--size", "128MiB", "--segment-size", "1MiB"], &[]);
    let region = cluster.region.to_str().unwrap();
    let said = crate::support::run(&["doctor", "--json", "--measure", "--region", region]);
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let report: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    for finding in report["findings"].as_array().unwrap() {
        assert!(finding["name"].is_string() && finding["found"].is_string(), "{finding}");
        let advice = finding["advice"].as_str().unwrap();
        assert!(!finding["ready"].as_bool().unwrap() || advice.is_empty(), "{finding}");
        for (at, _) in advice.match_indices("hw-setup/") {
            let script = advice[at..].split([' ', ',', ';']).next().unwrap();
            assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(script).is_file(), "{finding}");
        }
    }
    let measures = report["measures"].as_array().unwrap();
    for name in ["DRAM: read bandwidth", "region: read bandwidth", "region: latency", "fence", "pause", "clock"] {
        let measure = measures.iter().find(|measure| measure["name"].as_str().unwrap().contains(name)).expect(name);
        assert!(measure["value"].as_f64().unwrap() > 0.0 && measure["unit"].is_string(), "{measure}");
    }
    let client = cluster.client();
    client.create_topic("alive", embarcadero_client::TopicOptions::default()).unwrap();
}
