//! Ties documents to the code: an entry of the deviation register without a marker, a marker without an entry, a file
//! or function that is not there, or a field of a frame that the protocol does not describe is a failure.

use std::collections::BTreeSet;
use std::path::Path;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(directory: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && !["target", ".git", "docs"].contains(&name.as_str()) {
            sources(&path, found);
        } else if name.ends_with(".rs") && !path.ends_with("tests/it/documents.rs") {
            found.push(std::fs::read_to_string(&path).unwrap());
        }
    }
}

fn after<'a>(text: &'a str, prefix: &'a str) -> impl Iterator<Item = u32> + 'a {
    text.match_indices(prefix).filter_map(move |(at, _)| text[at + prefix.len()..].get(..3)?.parse().ok())
}

#[test]
fn register_markers_and_metrics_agree() {
    let register = std::fs::read_to_string(root().join("docs/deviations.md")).unwrap();
    let entries: BTreeSet<u32> = after(&register, "\n## DEV-").collect();
    let rows: BTreeSet<u32> = after(&register, "\n| DEV-").collect();
    let mut files = Vec::new();
    sources(root(), &mut files);
    let markers: BTreeSet<u32> =
        files.iter().flat_map(|text| after(text, "[[DEVIATION_").collect::<Vec<_>>()).collect();
    assert!(entries.is_superset(&(1..=6).collect()), "DEV-001 to DEV-006 are given");
    assert_eq!(entries, markers, "entries of the register and markers in the code differ");
    assert_eq!(entries, rows, "entries of the register and rows of its table differ");
}

#[test]
fn the_protocol_describes_every_field() {
    let text = std::fs::read_to_string(root().join("docs/protocol.md")).unwrap();
    for (kind, name, fields) in embarcadero_wire::FRAMES {
        let row = text.lines().find(|line| line.starts_with(&format!("| {kind} | {name} |"))).expect(name);
        for (field, offset) in fields.iter().filter(|(field, _)| !field.starts_with("reserved")) {
            assert!(row.contains(&format!("`{field}` {offset}")), "{name}: {field} is at {offset}");
        }
    }
}

/// The paths that the one-page maps name exist.
#[test]
fn documents_name_files_that_exist() {
    for document in [
        "README.md",
        "ARCHITECTURE.md",
        "docs/deviations.md",
        "docs/memory-layout.md",
        "docs/replica-files.md",
        "docs/protocol.md",
        "docs/hardware.md",
    ] {
        let text = std::fs::read_to_string(root().join(document)).unwrap();
        for word in text.split('`').skip(1).step_by(2) {
            let path = word.split("::").next().unwrap();
            let is_path =
                path.contains('/') && !path.contains(char::is_whitespace) && !path.starts_with(['/', '-', '@']);
            if is_path && [".rs", ".md", ".yaml", ".proto"].iter().any(|end| path.ends_with(end)) {
                let path = path.trim_start_matches("./");
                assert!(root().join(path).exists(), "{document} names {path}, which does not exist");
                if let Some(name) = word.split("::").nth(1) {
                    let source = std::fs::read_to_string(root().join(path)).unwrap();
                    let function = name.trim_end_matches("()");
                    assert!(source.contains(&format!("fn {function}")), "{document}: no function {function} in {path}");
                }
            }
        }
    }
}
