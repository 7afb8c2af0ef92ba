//! Promise: documents agree with the code. Files, functions, links and commands that they name exist, the protocol
//! describes every field, the deviation register matches its markers, and generated pages are fresh.
//!
//! `EMBARCADERO_WRITE_DOCS=1` writes the generated pages; `cargo xtask docs` sets it.

use crate::support::{PROGRAM, region_path};
use clap::{CommandFactory, Parser};
use clap_markdown::MarkdownOptions;
use embarcadero::cli::Cli;
use embarcadero_broker::BrokerConfig;
use embarcadero_client::ClientConfig;
use embarcadero_cxl::layout::STRUCTURES;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Collects the files below a directory whose names end in `extension`, relative to the root.
fn files(directory: &str, extension: &str, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(root().join(directory)).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if directory.is_empty() { name.clone() } else { format!("{directory}/{name}") };
        if entry.path().is_dir() {
            if !["target", "build"].contains(&name.as_str()) && !name.starts_with('.') {
                files(&path, extension, found);
            }
        } else if name.ends_with(extension) {
            found.push(path);
        }
    }
}

/// Every document of the project.
fn documents() -> Vec<String> {
    let mut found = Vec::new();
    files("", ".md", &mut found);
    assert!(found.len() > 20, "{found:?}");
    found
}

/// Lab notes are true of their day: files that they name may be gone.
fn is_lab_note(document: &str) -> bool {
    document.starts_with("docs/performance/lab-notes/")
}

/// Code blocks of a language.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let fences: Vec<&str> = text.split("```").collect();
    fences.iter().skip(1).step_by(2).filter_map(|block| block.strip_prefix(&format!("{language}\n"))).collect()
}

fn after<'a>(text: &'a str, prefix: &'a str) -> impl Iterator<Item = u32> + 'a {
    text.match_indices(prefix).filter_map(move |(at, _)| text[at + prefix.len()..].get(..3)?.parse().ok())
}

#[test]
fn register_markers_and_metrics_agree() {
    let register = read("docs/deviations.md");
    let entries: BTreeSet<u32> = after(&register, "\n## DEV-").collect();
    let rows: BTreeSet<u32> = after(&register, "\n| DEV-").collect();
    let mut sources = Vec::new();
    files("", ".rs", &mut sources);
    let mut markers = BTreeSet::new();
    for source in sources.iter().filter(|source| *source != "tests/it/documents.rs") {
        markers.extend(after(&read(source), "[[DEVIATION_"));
    }
    assert!(entries.is_superset(&(1..=6).collect()), "DEV-001 to DEV-006 are given");
    assert_eq!(entries, markers, "entries of the register and markers in the code differ");
    assert_eq!(entries, rows, "entries of the register and rows of its table differ");
}

#[test]
fn the_protocol_describes_every_field() {
    let text = read("docs/reference/protocol.md");
    for (kind, name, fields) in embarcadero_wire::FRAMES {
        let row = text.lines().find(|line| line.starts_with(&format!("| {kind} | {name} |"))).expect(name);
        for (field, offset) in fields.iter().filter(|(field, _)| !field.starts_with("reserved")) {
            assert!(row.contains(&format!("`{field}` {offset}")), "{name}: {field} is at {offset}");
        }
    }
    for code in embarcadero_wire::ErrorCode::ALL {
        assert!(text.contains(&format!("\n| {} | {code:?} |", code.code())), "{code:?} is not described");
    }
    assert!(text.contains(&format!("Wire version {}.", embarcadero_wire::WIRE_VERSION)));
}

#[test]
fn documents_name_files_and_functions_that_exist() {
    for document in documents().iter().filter(|document| !is_lab_note(document)) {
        for word in read(document).split('`').skip(1).step_by(2) {
            let path = word.split("::").next().unwrap();
            let is_path = path.contains('/')
                && !path.contains(|character: char| character.is_whitespace() || character == '*')
                && !path.starts_with(['/', '-', '@']);
            if !is_path
                || ![".rs", ".md", ".yaml", ".proto", ".json", ".py", ".bats"].iter().any(|end| path.ends_with(end))
            {
                continue;
            }
            let path = path.trim_start_matches("./");
            assert!(root().join(path).exists(), "{document} names {path}, which does not exist");
            if let Some(name) = word.split("::").nth(1) {
                let function = name.trim_end_matches("()");
                assert!(read(path).contains(&format!("fn {function}")), "{document}: no function {function} in {path}");
            }
        }
    }
}

/// Anchor of a heading, as forges make it.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|character| character.is_alphanumeric() || [' ', '-', '_'].contains(character));
    kept.collect::<String>().replace(' ', "-")
}

#[test]
fn links_lead_somewhere() {
    for document in documents() {
        let text = read(&document);
        let directory = root().join(&document).parent().unwrap().to_owned();
        for (at, _) in text.match_indices("](") {
            let link = text[at + 2..].split(')').next().unwrap();
            if link.contains("://") {
                continue;
            }
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { root().join(&document) } else { directory.join(path) };
            assert!(target.exists(), "{document} links to {link}, which does not exist");
            if !heading.is_empty() {
                let target = std::fs::read_to_string(&target).unwrap();
                let mut anchors = target.lines().filter(|line| line.starts_with('#'));
                assert!(
                    anchors.any(|line| anchor(line.trim_start_matches('#')) == heading),
                    "{document} links to {link}, which has no such heading"
                );
            }
        }
    }
}

/// The commands of a shell line: what is between pipes and redirections, and what `scripts/lab run` runs.
fn commands(line: &str) -> Vec<Vec<&str>> {
    let line = line.split(" #").next().unwrap_or(line);
    let mut found = vec![Vec::new()];
    for word in line.split_whitespace() {
        match word {
            "|" | "&" | "--" | "&&" => found.push(Vec::new()),
            "<" | ">" => break,
            _ => found.last_mut().unwrap().push(word),
        }
    }
    for command in &mut found {
        while command.first().is_some_and(|word| word.contains('=') && word.starts_with("EMBARCADERO_")) {
            command.remove(0);
        }
    }
    found.retain(|command| !command.is_empty());
    found
}

#[test]
fn commands_in_documents_exist() {
    let tasks = read("xtask/src/main.rs").to_lowercase();
    let mut checked = 0;
    for document in documents() {
        let text = read(&document);
        for line in blocks(&text, "sh").iter().flat_map(|block| block.lines()) {
            for command in commands(line) {
                let program = command[0];
                checked += 1;
                if program == "embarcadero" || program.ends_with("/embarcadero") {
                    let parsed = Cli::try_parse_from(&command);
                    assert!(parsed.is_ok(), "{document}: {line}: {}", parsed.err().unwrap());
                } else if ["scripts/", "./scripts/", "hw-setup/"].iter().any(|folder| program.starts_with(folder)) {
                    assert!(root().join(program).is_file(), "{document}: {line}: there is no {program}");
                } else if command.starts_with(&["cargo", "xtask"]) {
                    assert!(tasks.contains(&format!("task::{}", command[2])), "{document}: no {line}");
                }
            }
        }
    }
    assert!(checked > 50, "only {checked} commands were found");
}

/// The first page runs as it is written, on a region and ports of the test's own.
#[test]
fn the_first_log_works() {
    let text = read("docs/start/first-log.md");
    let block = blocks(&text, "sh")[0];
    let directory = tempfile::tempdir().unwrap();
    let (ready, region) = (directory.path().join("ready"), region_path());
    let (ready, region) = (ready.display(), region.display());
    let mut script = block.to_owned();
    for (written, run) in [
        (
            "--ready-file /tmp/embarcadero.ready &\n",
            format!(
                "--ready-file /tmp/embarcadero.ready --port 0 --size 448MiB --region {region} >/dev/null &
                 cluster=$!
                 trap 'kill $cluster; wait $cluster || true' EXIT\n"
            ),
        ),
        ("embarcadero topic create", format!("export EMBARCADERO_BROKERS=$(cat {ready})\nembarcadero topic create")),
        ("region inspect", format!("region inspect --path {region}")),
        ("/tmp/embarcadero.ready", ready.to_string()),
    ] {
        assert!(script.contains(written), "{written}: {block}");
        script = script.replace(written, &run);
    }
    let programs = PathBuf::from(PROGRAM).parent().unwrap().display().to_string();
    let ran = Command::new("sh")
        .args(["-ec", &script])
        .env("PATH", format!("{programs}:{}", std::env::var("PATH").unwrap()))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (output, errors) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{output}{errors}");
    let expected: String = (1..=1000).map(|number| format!("{number}\n")).collect();
    assert!(output.contains(&expected), "{output}{errors}");
}

/// Checks that a generated page is fresh; writes it first where `EMBARCADERO_WRITE_DOCS` is set.
fn check_generated(path: &str, text: &str) {
    if std::env::var_os("EMBARCADERO_WRITE_DOCS").is_some() {
        std::fs::write(root().join(path), text).unwrap();
    }
    let found = std::fs::read_to_string(root().join(path)).unwrap_or_default();
    assert!(found == text, "{path} is not up to date: `cargo xtask docs` writes it");
}

#[test]
fn the_commands_page_is_fresh() {
    let options = MarkdownOptions::new().title("Commands".to_owned()).show_footer(false);
    let page = clap_markdown::help_markdown_command_custom(&Cli::command(), &options);
    let lines: Vec<&str> = page.lines().map(str::trim_end).collect();
    check_generated("docs/reference/cli.md", &(lines.join("\n").trim_end().to_owned() + "\n"));
}

/// Type of a setting, in words.
fn type_of(property: &Value, definitions: &Value) -> String {
    if let Some(values) = property["oneOf"].as_array() {
        let values = values.iter().filter_map(|value| value["const"].as_str().map(|value| format!("`{value}`")));
        return values.collect::<Vec<_>>().join(", ");
    }
    if let Some(values) = property["enum"].as_array() {
        let values = values.iter().filter_map(Value::as_str).map(|value| format!("`{value}`"));
        return values.collect::<Vec<_>>().join(", ");
    }
    if let Some(choices) = property["anyOf"].as_array() {
        let choices = choices.iter().filter(|choice| choice["type"] != "null");
        return choices.map(|choice| type_of(choice, definitions)).collect::<Vec<_>>().join(" or ");
    }
    if let Some(name) = property["$ref"].as_str().and_then(|name| name.strip_prefix("#/$defs/")) {
        return type_of(&definitions[name], definitions);
    }
    let types = match &property["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).find(|name| *name != "null"),
        name => name.as_str(),
    };
    match types.unwrap_or_else(|| panic!("a setting without a type: {property}")) {
        "array" => format!("list of {}", type_of(&property["items"], definitions)),
        "boolean" => "`true`, `false`".to_owned(),
        other => other.to_owned(),
    }
}

/// Adds a row for each setting of an object of the schema. `defaults` is the object's own default.
fn add_settings(schema: &Value, defaults: &Value, definitions: &Value, prefix: &str, page: &mut String) {
    for (name, property) in schema["properties"].as_object().unwrap() {
        let reference = property["$ref"].as_str().and_then(|name| name.strip_prefix("#/$defs/"));
        let target = reference.map_or(property, |name| &definitions[name]);
        if target["type"] == "object" {
            add_settings(target, &property["default"], definitions, &format!("{prefix}{name}."), page);
            continue;
        }
        let default = match (&property["default"], &defaults[name]) {
            (Value::Null, Value::Null) => "unset".to_owned(),
            (Value::Null, default) | (default, _) => format!("`{default}`"),
        };
        let description =
            property["description"].as_str().unwrap_or_else(|| panic!("{prefix}{name} has no description"));
        let meaning = description.replace('\n', " ");
        let values = type_of(property, definitions);
        writeln!(page, "| `{prefix}{name}` | {values} | {default} | {meaning} |").unwrap();
    }
}

#[test]
fn the_configuration_page_is_fresh() {
    let mut page = "# Configuration\n\n\
        Every key, its type, its default and its meaning. `cargo xtask docs` writes this page from the types. A dot goes one level \
        down: `cxl.path` is `path` in the section `cxl`.\n[Running](../operating/running.md#configuration) says where settings come \
        from. A value out of bounds is refused with its bounds.\n"
        .to_owned();
    let schemas = [
        ("Broker", serde_json::to_value(schemars::schema_for!(BrokerConfig)).unwrap()),
        ("Client", serde_json::to_value(schemars::schema_for!(ClientConfig)).unwrap()),
    ];
    for (name, schema) in schemas {
        write!(page, "\n## {name}\n\n| key | type | default | meaning |\n|---|---|---|---|\n").unwrap();
        add_settings(&schema, &Value::Null, &schema["$defs"], "", &mut page);
    }
    check_generated("docs/reference/configuration.md", &page);
}

#[test]
fn the_region_layout_page_is_fresh() {
    let path = "docs/reference/region-layout.md";
    let text = read(path);
    let (begin, end) = ("<!-- structures: begin -->\n", "<!-- structures: end -->");
    let (before, rest) = text.split_once(begin).unwrap();
    let (_, after) = rest.split_once(end).unwrap();
    let mut table = "| structure | bytes | fields: name, type, offset |\n|---|---|---|\n".to_owned();
    for (name, bytes, fields) in STRUCTURES {
        let fields = fields.iter().filter(|(field, ..)| !field.starts_with("reserved"));
        let fields: Vec<String> =
            fields.map(|(field, ty, offset)| format!("`{field}`: {} {offset}", ty.replace(" as usize", ""))).collect();
        writeln!(table, "| {name} | {bytes} | {} |", fields.join(", ")).unwrap();
    }
    check_generated(path, &format!("{before}{begin}{table}{end}{after}"));
    assert!(text.contains(&format!("Layout version {}.", embarcadero_cxl::layout::LAYOUT_VERSION)));
}
