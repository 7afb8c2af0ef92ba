//! Promise: the crates lie in floors, and none uses one above it.

use serde_json::Value;
use std::collections::BTreeMap;
use std::process::Command;

/// Crates of the product, bottom to top.
const FLOORS: [&[&str]; 9] = [
    &["sys-bindings", "dpdk-sys", "rdma-sys", "embarcadero-wire", "embarcadero-control", "embarcadero-roce"],
    &["embarcadero-os"],
    &["embarcadero-cxl"],
    &["embarcadero-verbs"],
    &["embarcadero-transport"],
    &["embarcadero-broker", "embarcadero-client"],
    &["embarcadero"],
    &["embarcadero-sim"],
    &["embarcadero-bench"],
];
/// Crates that only tests and measurements use.
const NOT_IN_THE_PRODUCT: [&str; 3] = ["embarcadero-sim", "embarcadero-bench", "xtask"];

/// Lists each crate of the workspace with the crates of the workspace that it depends on.
fn dependencies() -> BTreeMap<String, Vec<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let said = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline", "--locked"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let metadata: Value = serde_json::from_slice(&said.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let names: Vec<&str> = packages.iter().map(|package| package["name"].as_str().unwrap()).collect();
    let of = |package: &Value| {
        let all = package["dependencies"].as_array().unwrap().iter();
        let used = all.filter(|dependency| dependency["kind"] != "dev");
        let used = used.map(|dependency| dependency["name"].as_str().unwrap().to_owned());
        used.filter(|name| names.contains(&name.as_str())).collect()
    };
    packages.iter().map(|package| (package["name"].as_str().unwrap().to_owned(), of(package))).collect()
}

#[test]
fn no_crate_uses_one_above_it() {
    let floor = |name: &str| FLOORS.iter().position(|crates| crates.contains(&name));
    for (name, uses) in dependencies() {
        if name == "xtask" {
            assert!(uses.is_empty(), "xtask uses {uses:?}");
            continue;
        }
        let own = floor(&name).unwrap_or_else(|| panic!("{name} has no floor: add it to FLOORS"));
        for used in uses {
            let below = floor(&used).unwrap_or_else(|| panic!("{used} has no floor"));
            let same_floor = own == 0 && below == 0 && used == "sys-bindings";
            assert!(below < own || same_floor, "{name} uses {used}, which is not below it");
        }
    }
}

#[test]
fn the_product_has_no_simulator_and_no_bench() {
    let all = dependencies();
    let mut reached = vec!["embarcadero".to_owned()];
    let mut next = 0;
    while let Some(name) = reached.get(next).cloned() {
        next += 1;
        for used in &all[&name] {
            assert!(!NOT_IN_THE_PRODUCT.contains(&used.as_str()), "{name} uses {used}");
            if !reached.contains(used) {
                reached.push(used.clone());
            }
        }
    }
    assert!(reached.len() > 8, "{reached:?}");
}
