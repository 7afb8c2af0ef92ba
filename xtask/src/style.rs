//! Rules of `docs/style.md` that a program can check.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Words with which no documentation comment begins, nor the text below one of its headings: it would lean on another text, or
/// avoid its noun.
const BANNED_OPENINGS: [&str; 16] = [
    "What", "The same", "Of", "Its", "Who", "Whether", "As", "It", "For", "How", "There", "Where", "While", "Without",
    "Here", "Also",
];
/// Most words of a sentence.
const SENTENCE_WORDS: usize = 25;

/// Documentation comment, and the place where it begins.
struct Comment {
    file: PathBuf,
    line: usize,
    text: String,
}

/// Checks every documentation comment of the project's Rust files.
pub(crate) fn check_style(root: &Path) -> Result<()> {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "*.rs"])
        .current_dir(root)
        .output()?;
    let files = String::from_utf8(listed.stdout).context("file names are UTF-8")?;
    let mut faults = Vec::new();
    for file in files.lines().map(|file| root.join(file)).filter(|file| file.exists()) {
        let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        for comment in comments(&file, &text) {
            faults.extend(faults_of(&comment).into_iter().map(|fault| {
                let place = comment.file.strip_prefix(root).unwrap_or(&comment.file).display().to_string();
                format!("{place}:{}: {fault}", comment.line)
            }));
        }
    }
    if faults.is_empty() {
        return Ok(());
    }
    faults.iter().for_each(|fault| eprintln!("{fault}"));
    bail!("{} faults of style (docs/style.md has the rules)", faults.len())
}

/// Finds the documentation comments of a file.
fn comments(file: &Path, text: &str) -> Vec<Comment> {
    let mut found: Vec<Comment> = Vec::new();
    let mut inside: Option<&str> = None;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim_start();
        let marker = ["///", "//!"].into_iter().find(|marker| line.starts_with(marker) && !line.starts_with("////"));
        match (marker, inside) {
            (Some(marker), Some(before)) if marker == before => {
                if let Some(comment) = found.last_mut() {
                    comment.text.push('\n');
                    comment.text.push_str(line[3..].trim());
                }
            }
            (Some(_), _) => {
                found.push(Comment { file: file.to_owned(), line: number + 1, text: line[3..].trim().to_owned() });
            }
            (None, _) => {}
        }
        inside = marker;
    }
    found
}

/// Lists the faults of a comment.
fn faults_of(comment: &Comment) -> Vec<String> {
    let mut faults = Vec::new();
    let prose = prose(&comment.text);
    for beginning in std::iter::once(prose.as_str()).chain(below_headings(&comment.text)) {
        for opening in BANNED_OPENINGS {
            if beginning.strip_prefix(opening).is_some_and(|rest| rest.starts_with([' ', ',', ':'])) {
                faults.push(format!("begins with {opening:?}: begin with a noun phrase or a verb"));
            }
        }
    }
    for sentence in sentences(&prose) {
        let words = sentence.split_whitespace().filter(|word| word.contains(char::is_alphanumeric)).count();
        if words > SENTENCE_WORDS {
            let begins: String = sentence.chars().take(50).collect();
            faults.push(format!("a sentence of {words} words, {SENTENCE_WORDS} at most: {begins:?}"));
        }
    }
    faults
}

/// Returns the lines that follow headings, such as `# Errors`.
fn below_headings(text: &str) -> impl Iterator<Item = &str> {
    let mut after_heading = false;
    text.lines().filter(move |line| {
        let first = after_heading && !line.is_empty() && !line.starts_with('#');
        after_heading = line.starts_with("# ") || line.starts_with("## ") || (after_heading && line.is_empty());
        first
    })
}

/// Returns the text of a comment without code, tables and headings. Paragraphs and list items end with a blank line.
fn prose(text: &str) -> String {
    let mut prose = String::new();
    let mut in_code = false;
    for line in text.lines() {
        if line.starts_with("```") {
            in_code = !in_code;
            continue;
        }
        if in_code || line.starts_with(['#', '|']) {
            prose.push_str("\n\n");
            continue;
        }
        let item = line.starts_with("- ")
            || line.starts_with("* ")
            || line.split_once(". ").is_some_and(|(n, _)| n.parse::<u32>().is_ok());
        if item || line.is_empty() {
            prose.push_str("\n\n");
        }
        prose.push_str(line);
        prose.push('\n');
    }
    prose.trim().to_owned()
}

/// Splits a text into sentences. Code in backticks counts as one word.
fn sentences(prose: &str) -> Vec<String> {
    let mut plain = String::new();
    for (index, part) in prose.split('`').enumerate() {
        plain.push_str(if index % 2 == 1 { "code" } else { part });
    }
    let mut sentences = Vec::new();
    for paragraph in plain.split("\n\n") {
        let mut sentence = String::new();
        for word in paragraph.split_whitespace() {
            sentence.push_str(word);
            sentence.push(' ');
            let ends = word.trim_end_matches([')', '"', '\'']).ends_with(['.', '?', '!']);
            let abbreviation = ["e.g.", "i.e.", "etc.", "al.", "vol."].iter().any(|short| word.ends_with(short));
            if ends && !abbreviation {
                sentences.push(std::mem::take(&mut sentence));
            }
        }
        sentences.push(sentence);
    }
    sentences.retain(|sentence| !sentence.trim().is_empty());
    sentences
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(text: &str) -> Vec<String> {
        comments(Path::new("a.rs"), text).iter().flat_map(faults_of).collect()
    }

    #[test]
    fn openings_that_lean_on_something_are_found() {
        assert!(faults("/// Takes a batch.\nfn take() {}\n/// Number of batches.\n").is_empty());
        assert_eq!(faults("/// What a broker is told.\n").len(), 1);
        assert_eq!(faults("/// The same, by anyone.\n").len(), 1);
        assert_eq!(faults("/// Takes a batch.\n///\n/// # Panics\n/// As there.\n").len(), 1);
        assert_eq!(faults("/// How many.\n///\n/// # Errors\n///\n/// It fails.\n").len(), 2);
        assert!(faults("/// Taken.\n///\n/// # Errors\n/// A refusal. It is final.\n").is_empty());
        assert!(faults("/// Offset of the first batch.\n/// Of no use.\n").is_empty(), "in the middle it is fine");
    }

    #[test]
    fn long_sentences_are_found_and_code_is_not_prose() {
        let long = "word ".repeat(SENTENCE_WORDS + 1);
        assert_eq!(faults(&format!("/// {long}.\n")).len(), 1);
        assert!(faults(&format!("/// ```\n/// {long}\n/// ```\n")).is_empty());
        assert!(faults(&format!("/// Short; `{long}` is code.\n")).is_empty());
        let list = "/// - one two three\n".repeat(20);
        assert!(faults(&format!("/// A list:\n{list}")).is_empty());
    }
}
