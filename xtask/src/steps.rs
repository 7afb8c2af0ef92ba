//! The stages of each task: those that are cheap and likely to fail come first.

use crate::stages::{Outcome, Stages, execute, execute_both, output, succeeds};
use crate::style::check_style;
use anyhow::{Context, Result, bail};
use std::process::Command;

/// Test programs that the lab runs in its guests.
const LAB_TESTS: [&str; 3] = ["verbs", "transport", "it"];
/// Programs that tests start, and fail without.
const TEST_PROGRAMS: [&str; 4] = ["etcd", "kcat", "unshare", "protoc"];
/// Modules of the system's Python that the client in `tests/interop` imports.
const PYTHON_MODULES: &str = "grpc, google.protobuf";
/// Fuzz targets; `fuzz/Cargo.toml` lists the same ones.
const FUZZ_TARGETS: [&str; 7] = ["frame", "batch_view", "region", "config", "replica", "roce", "ethernet"];

fn sh(command: &str) -> Command {
    let mut sh = Command::new("sh");
    sh.args(["-ec", command]);
    sh
}

/// Runs a stage, or skips it when `program` is missing.
fn needs(program: &str, run: impl FnOnce() -> Result<()>) -> Result<Outcome> {
    if !succeeds("sh", ["-c", &format!("command -v {program}")]) {
        return Ok(Outcome::Skipped(format!("{program} is not installed (hw-setup/deps apply --purpose test)")));
    }
    run().map(|()| Outcome::Ran)
}

fn ran(result: Result<()>) -> Result<Outcome> {
    result.map(|()| Outcome::Ran)
}

/// Checks the rules of `docs/style.md`.
pub(crate) fn style(stages: &Stages) -> Result<Outcome> {
    ran(check_style(stages.root()))
}

/// Writes the generated documents. The tests that check them write them when a variable is set.
pub(crate) fn write_docs(stages: &Stages) -> Result<Outcome> {
    let mut tests = stages.cargo_workspace("test");
    tests.args(["--quiet", "--lib", "--bins", "--test", "it", "--", "is_fresh", "the_schema_is_that_of_the_types"]);
    ran(execute(tests.env("EMBARCADERO_WRITE_DOCS", "1").env("EMBARCADERO_WRITE_SCHEMA", "1")))
}

/// Runs the stages of `cargo xtask check`.
pub(crate) fn check(stages: &mut Stages) -> Result<()> {
    stages.run("rustfmt", |_| ran(execute(Command::new("cargo").args(["fmt", "--all", "--check"]))))?;
    stages.run("style", style)?;
    stages.run("shellcheck", |_| {
        needs("shellcheck", || {
            let scripts = "$(git ls-files scripts hw-setup .ci | xargs grep -lE '^#!.*bash|shellcheck shell=')";
            execute(&mut sh(&format!("shellcheck -x {scripts}")))
        })
    })?;
    stages.run("clippy", |stages| {
        let mut clippy = stages.cargo_workspace("clippy");
        ran(execute(clippy.args(["--all-targets", "--quiet", "--", "-D", "warnings"])))
    })?;
    stages.run("rustdoc", |stages| {
        let mut doc = stages.cargo_workspace("doc");
        ran(execute(doc.args(["--no-deps", "--quiet"]).env("RUSTDOCFLAGS", "-D warnings")))
    })?;
    stages.run("unit tests", |stages| {
        ran(execute(stages.cargo_workspace("test").args(["--quiet", "--lib", "--bins", "--examples"])))
    })
}

/// Checks that this host has what the tests cannot do without, before they take minutes to find out.
pub(crate) fn prerequisites(stages: &mut Stages) -> Result<()> {
    stages.run("what the tests need", |_| {
        let mut missing = Vec::new();
        if !succeeds("sh", ["-c", "[ $(id -u) = 0 ]"]) {
            missing.push("root (tests make network namespaces and mounts)");
        }
        for program in TEST_PROGRAMS {
            if !succeeds("sh", ["-c", &format!("command -v {program}")]) {
                missing.push(program);
            }
        }
        if !succeeds("/usr/bin/python3", ["-c", &format!("import {PYTHON_MODULES}")]) {
            missing.push("Python's grpcio and protobuf");
        }
        if !missing.is_empty() {
            bail!(
                "this host lacks {}; `hw-setup/deps apply --purpose test` installs them, and `cargo xtask check` does \
                 without",
                missing.join(", ")
            );
        }
        Ok(Outcome::Ran)
    })
}

/// Runs the stages of `cargo xtask test` that follow those of `check`.
pub(crate) fn test(stages: &mut Stages) -> Result<()> {
    stages.run("examples in documents", |stages| {
        ran(execute(stages.cargo_workspace("test").args(["--quiet", "--doc"])))
    })?;
    stages.run("transports and protocols", |stages| {
        let mut tests = stages.cargo_workspace("test");
        ran(execute(tests.args(["--test", "transport", "--test", "roce", "--test", "verbs", "--test", "protocol"])))
    })?;
    stages.run("whole systems", |stages| {
        let mut tests = stages.cargo_workspace("test");
        ran(execute(tests.args(["--test", "it", "--test", "bench"]).envs(stages.budget.variables())))
    })?;
    stages.run("simulators", |stages| {
        let mut tests = stages.cargo_workspace("test");
        let programs = ["client", "fabric_schedules", "rack", "bitmap_schedules", "session_model", "allocations"];
        tests.args(programs.iter().flat_map(|program| ["--test", program]));
        tests.envs(stages.budget.variables()).args(["--", "--nocapture"]);
        if stages.budget.mutation == 0 {
            tests.args(["--skip", "is_needed", "--skip", "are_noticed"]);
        }
        ran(execute(&mut tests))
    })
}

/// Runs the stages of `cargo xtask all` that are cheaper than the tests, and so come before them.
pub(crate) fn before_tests(stages: &mut Stages) -> Result<()> {
    stages.run("the set-up scripts", |_| {
        needs("bats", || execute(Command::new("bats").args(["--print-output-on-failure", "tests/hw-setup/flags.bats"])))
    })?;
    stages.run("licences, bans and sources", |_| {
        needs("cargo-deny", || {
            let checks = ["deny", "--log-level", "error", "check", "licenses", "bans", "sources"];
            execute(Command::new("cargo").args(checks))
        })
    })?;
    stages.run("clippy without RDMA devices", |_| {
        let mut clippy = Command::new("cargo");
        clippy.args(["clippy", "--locked", "--release", "--workspace", "--all-targets", "--no-default-features"]);
        ran(execute(clippy.args(["--quiet", "--", "-D", "warnings"])))
    })?;
    stages.run("a host without rdma-core, and one without libclang", bare_host)
}

/// Runs the stages of `cargo xtask all` that follow the tests, except the lab.
pub(crate) fn everything_else(stages: &mut Stages) -> Result<()> {
    stages.run("instructions of the hot functions", |stages| {
        needs("gungraun-runner", || {
            execute(stages.cargo_workspace("bench").args(["--quiet", "--bench", "instructions"]))
        })
    })?;
    stages.run("fuzz targets", fuzz)?;
    // The tests before have built the programs that the scripts run, with the features of this run.
    stages.run("the README's quick start", |_| {
        let mut quickstart = Command::new("scripts/quickstart");
        ran(execute(quickstart.args(["--program", "target/release/embarcadero"])))
    })?;
    stages.run("beside peers", |_| {
        if !succeeds("sh", ["-c", "PATH=$PATH:/usr/sbin; command -v nats-server || command -v redis-server"]) {
            return Ok(Outcome::Skipped("no server is installed (hw-setup/deps apply --purpose compare)".to_owned()));
        }
        ran(execute(Command::new("scripts/compare").args(["--runs", "1", "--seconds", "0.5"])))
    })?;
    stages.run("RoCEv2 over DPDK beside testpmd and TCP", |stages| {
        let ready = succeeds("sh", ["-c", "[ $(id -u) = 0 ] && [ $(nproc) -gt 1 ]"]);
        let tools = succeeds("sh", ["-c", "command -v dpdk-testpmd && command -v iperf3"]);
        if !stages.has_dpdk() || !ready || !tools {
            return Ok(Outcome::Skipped("needs root, two cores, DPDK with testpmd, and iperf3".to_owned()));
        }
        ran(execute(Command::new("scripts/bench-dpdk").args(["--runs", "1", "--seconds", "0.5"])))
    })
}

/// Directory for builds as on a host without rdma-core or libclang.
const BARE: &str = "target/bare";
/// Shell commands that run a topic over TCP with the program of [`BARE`].
const BARE_TOPIC: &str = r#"
program=target/bare/debug/embarcadero work=$(mktemp -d)
"$program" cluster --brokers 2 --port 0 --size 448MiB --region "/dev/shm/embarcadero-bare-$$" --ready-file "$work/ready" >"$work/log" &
cluster=$!
trap 'kill $cluster; wait $cluster || true; rm -rf "$work"' EXIT
while kill -0 $cluster && [ ! -s "$work/ready" ]; do sleep 0.1; done
EMBARCADERO_BROKERS=$(cat "$work/ready")
export EMBARCADERO_BROKERS
seq 1000 >"$work/in"
"$program" topic create bare --order strong
"$program" produce bare --file "$work/in"
"$program" consume bare >"$work/out"
"$program" verify bare
cmp "$work/in" "$work/out"
"#;

/// Cargo command that finds no rdma-core or no libclang: pkg-config and bindgen search only where `variable` says.
fn bare_cargo(command: &str, package: &str, target: &str, variable: &str) -> Command {
    let mut cargo = Command::new("cargo");
    cargo.args([command, "--locked", "--package", package, "--target-dir", target]);
    cargo.env(variable, "/nonexistent").env_remove("PKG_CONFIG_PATH").env_remove("EMBARCADERO_REQUIRE_RDMA");
    cargo
}

/// Checks that a build without rdma-core or libclang succeeds, says what is missing, and works over TCP.
fn bare_host(_: &Stages) -> Result<Outcome> {
    for (variable, missing) in [("PKG_CONFIG_LIBDIR", "libibverbs"), ("LIBCLANG_PATH", "libclang")] {
        // A folder of their own: the program below is not built again because a variable changed here.
        let check = || bare_cargo("check", "rdma-sys", "target/bare/bindings", variable);
        let said = check().output().context("cannot run cargo")?;
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        if !said.status.success() || !text.contains(missing) {
            bail!("without {missing} the build must succeed with a warning that names it; it printed: {text}");
        }
        let required = check().env("EMBARCADERO_REQUIRE_RDMA", "1").output().context("cannot run cargo")?;
        if required.status.success() {
            bail!("EMBARCADERO_REQUIRE_RDMA is set, and a build without {missing} succeeds");
        }
    }
    // A debug build takes less time than a release build, and the topic is small.
    execute(bare_cargo("build", "embarcadero", BARE, "PKG_CONFIG_LIBDIR").arg("--quiet"))?;
    for arguments in [&["--version", "--verbose"][..], &["doctor"]] {
        // The exit code of `doctor` says whether the host is ready, which does not matter here.
        let said = Command::new(format!("{BARE}/debug/embarcadero")).args(arguments).output();
        let said = said.context("cannot run the program that was built without rdma-core")?;
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        if !text.contains("libibverbs is missing") {
            bail!("`embarcadero {}` must say that libibverbs is missing; it printed: {text}", arguments.join(" "));
        }
    }
    ran(execute(&mut sh(BARE_TOPIC)))
}

fn fuzz(stages: &Stages) -> Result<Outcome> {
    if !succeeds("cargo", ["+nightly", "fuzz", "--version"]) {
        return Ok(Outcome::Skipped("needs a nightly toolchain and cargo-fuzz".to_owned()));
    }
    for target in FUZZ_TARGETS {
        let time = format!("-max_total_time={}", stages.budget.fuzz_s);
        let mut fuzz = Command::new("cargo");
        fuzz.args(["+nightly", "fuzz", "run", target, "--"]).args([&time, "-verbosity=0", "-print_final_stats=0"]);
        execute(&mut fuzz)?;
    }
    Ok(Outcome::Ran)
}

/// Paths of the programs of [`LAB_TESTS`], in that order. Builds them.
fn lab_programs(stages: &Stages) -> Result<Vec<String>> {
    let mut build = stages.cargo_workspace("test");
    build.args(LAB_TESTS.iter().flat_map(|test| ["--test", test])).args(["--no-run", "--message-format=short"]);
    let said = build.output().context("cannot run cargo")?;
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    if !said.status.success() {
        bail!("the lab's tests do not build: {text}");
    }
    LAB_TESTS
        .iter()
        .map(|test| {
            let source = [format!("tests/{test}.rs ("), format!("tests/{test}/main.rs (")];
            let line = text.lines().find(|line| source.iter().any(|source| line.contains(source)));
            let path =
                line.and_then(|line| line.rsplit_once('(')).map(|(_, path)| path.trim_end_matches(')').to_owned());
            path.with_context(|| format!("cargo does not say where the test {test} is"))
        })
        .collect()
}

/// Runs the tests that need soft-RoCE, device-dax or two hosts, in QEMU guests.
pub(crate) fn lab(stages: &mut Stages) -> Result<()> {
    if !succeeds("sh", ["-c", "command -v apt-get && [ $(id -u) = 0 ]"]) {
        stages.skip("the lab", "needs root, and apt for its kernel");
        return Ok(());
    }
    let programs = lab_programs(stages)?;
    let [verbs, transport, it] = &programs[..] else { bail!("the lab runs three programs") };
    let ignored = "--ignored --test-threads 1";
    let guests = |options: &[&str], commands: &str| {
        let mut lab = Command::new("scripts/lab");
        lab.arg("run").args(options).args(["--", "sh", "-exc", commands]);
        lab
    };
    stages.run("the lab: set-up scripts, soft-RoCE and an emulated CXL device", |_| {
        let bench = "target/release/embarcadero bench datapath --transport verbs --seconds 1 --runs 1";
        let without_cxl = format!(
            "target/release/embarcadero doctor
             {transport} {ignored}
             {verbs} {ignored}
             {it} {ignored} verbs:: lab::one_guest:: lab::rxe_and_nics_in_software:: dpdk::
             {bench} --sizes 4KiB,64KiB
             {bench} --perftest rxe0"
        );
        let with_cxl = format!("{it} {ignored} lab::cxl::");
        execute(Command::new("scripts/lab").arg("prepare"))?;
        // A guest with CXL memory is emulated in software also where KVM works: scripts/lab says why. Where it does not,
        // one guest saves a boot. The tests with CXL come last: they leave the device as system-ram.
        let commands = if succeeds("scripts/lab", ["kvm"]) {
            execute(&mut guests(&[], &without_cxl))?;
            with_cxl
        } else {
            format!("{without_cxl}\n{with_cxl}")
        };
        // The scripts need a bare guest. It keeps one core busy, and the other guest seldom uses both.
        let scripts = "bats --print-output-on-failure tests/hw-setup/lab.bats";
        ran(execute_both(
            &mut guests(&["--cxl", "512M"], &commands),
            &mut guests(&["--bare", "--cxl", "512M", "--cpus", "1"], scripts),
        ))
    })?;
    stages.run("the lab: two hosts that share CXL memory without coherence", |_| {
        ran(execute(&mut guests(&["--guests", "2", "--cxl", "256M"], &format!("{it} {ignored} lab::two_guests::"))))
    })
}

/// Runs the stages of `cargo xtask long`.
pub(crate) fn long(stages: &mut Stages) -> Result<()> {
    stages.run("chaos, and histories of a second client", |stages| {
        let mut tests = stages.cargo_workspace("test");
        let only = ["--test", "it", "--", "--nocapture", "chaos::", "interop::"];
        ran(execute(tests.args(only).envs(stages.budget.variables())))
    })?;
    for (name, program) in [("the rack", "rack"), ("schedules", "fabric_schedules")] {
        stages.run(name, |stages| {
            let mut tests = stages.cargo_workspace("test");
            let only = ["--test", program, "--", "--nocapture", "breaks_a_promise"];
            ran(execute(tests.args(only).envs(stages.budget.variables())))
        })?;
    }
    stages.run("fuzz targets, an hour in all", fuzz)?;
    let commit = output(Command::new("git").args(["rev-parse", "HEAD"]))?;
    eprintln!("== commit {}", commit.trim());
    Ok(())
}
