//! `embarcadero produce`.

use crate::settings::Connect;
use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use embarcadero_client::{Client, Publisher};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Length limit of a record in bytes, so that a damaged length does not take all memory.
const MAX_RECORD_BYTES: u32 = 64 << 20;

#[derive(Args)]
pub struct ProduceArgs {
    /// Name of the topic.
    topic: String,
    #[command(flatten)]
    connect: Connect,
    /// File to read; standard input if not given.
    #[arg(long, short)]
    file: Option<PathBuf>,
    /// Number of publishers, 1 to 256. Each publishes one contiguous part of the file's lines.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    publishers: u16,
    /// Read records with a 4-byte little-endian length before each, instead of lines.
    #[arg(long)]
    length_prefixed: bool,
    /// Acknowledgement level: 0 none, 1 ordered and visible, 2 durable on replicas' disks.
    #[arg(long)]
    ack: Option<u8>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Reads the next message into `message`, a line without its newline or a record; false at the end of the input.
fn next_message(input: &mut impl BufRead, length_prefixed: bool, message: &mut Vec<u8>) -> Result<bool> {
    message.clear();
    if !length_prefixed {
        if input.read_until(b'\n', message)? == 0 {
            return Ok(false);
        }
        if message.last() == Some(&b'\n') {
            message.pop();
        }
        return Ok(true);
    }
    let mut length = [0; 4];
    match input.read(&mut length)? {
        0 => return Ok(false),
        read => input.read_exact(&mut length[read..]).context("the last record's length is cut short")?,
    }
    let length = u32::from_le_bytes(length);
    if length > MAX_RECORD_BYTES {
        bail!("a record has length {length}; it must be at most {MAX_RECORD_BYTES}");
    }
    message.resize(length as usize, 0);
    input.read_exact(message).context("the last record is cut short")?;
    Ok(true)
}

/// Splits a file into byte ranges of about equal size that begin at the start of a line.
fn split_lines(path: &Path, parts: u64) -> Result<Vec<(u64, u64)>> {
    let mut file = BufReader::new(File::open(path).with_context(|| format!("cannot open {}", path.display()))?);
    let bytes = file.get_ref().metadata()?.len();
    let mut cuts = vec![0];
    for part in 1..parts {
        let previous = cuts.last().copied().unwrap_or(0);
        let wanted = (bytes * part / parts).max(previous);
        file.seek(SeekFrom::Start(wanted))?;
        let mut line = Vec::new();
        let skipped = if wanted == 0 { 0 } else { file.read_until(b'\n', &mut line)? as u64 };
        cuts.push((wanted + skipped).min(bytes));
    }
    cuts.push(bytes);
    Ok(cuts.windows(2).map(|cut| (cut[0], cut[1])).collect())
}

#[derive(Default)]
struct Totals {
    messages: u64,
    bytes: u64,
}

fn publish_all(
    publisher: &Publisher,
    mut input: impl BufRead,
    length_prefixed: bool,
    bar: &ProgressBar,
) -> Result<Totals> {
    let mut totals = Totals::default();
    let mut message = Vec::new();
    let mut shown = 0;
    while next_message(&mut input, length_prefixed, &mut message)? {
        publisher.publish_wait(&message)?;
        totals.messages += 1;
        totals.bytes += message.len() as u64;
        shown += message.len() as u64 + 1;
        if shown >= 1 << 20 {
            bar.inc(shown);
            shown = 0;
        }
    }
    publisher.flush()?;
    bar.inc(shown);
    Ok(totals)
}

pub fn run(args: &ProduceArgs) -> Result<()> {
    let mut config = args.connect.config()?;
    config.ack_level = args.ack.unwrap_or(config.ack_level);
    let client = Client::connect(config)?;
    let parts = match &args.file {
        Some(path) if args.length_prefixed && args.publishers > 1 => {
            bail!("{}: length-prefixed records cannot be split over publishers; use --publishers 1", path.display())
        }
        Some(path) => split_lines(path, args.publishers.into())?,
        None if args.publishers > 1 => bail!("--publishers needs --file: standard input has one reader"),
        None => vec![(0, 0)],
    };
    let total = parts.last().map_or(0, |part| part.1);
    let bar = if total > 0 { ProgressBar::new(total) } else { ProgressBar::new_spinner() };
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
        bar.set_style(style);
    }
    let begun = Instant::now();
    let totals = std::thread::scope(|scope| {
        let work: Vec<_> = parts
            .iter()
            .map(|(start, end)| {
                let (client, bar) = (&client, &bar);
                scope.spawn(move || -> Result<Totals> {
                    let publisher = client.publisher(&args.topic)?;
                    let totals = match &args.file {
                        Some(path) => {
                            let mut file =
                                File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
                            file.seek(SeekFrom::Start(*start))?;
                            let input = BufReader::with_capacity(1 << 20, file.take(end - start));
                            publish_all(&publisher, input, args.length_prefixed, bar)?
                        }
                        None => publish_all(&publisher, std::io::stdin().lock(), args.length_prefixed, bar)?,
                    };
                    publisher.close()?;
                    Ok(totals)
                })
            })
            .collect();
        let mut sum = Totals::default();
        for part in work {
            let part = part.join().map_err(|_| anyhow!("a publisher's thread panicked; its message is above"))??;
            sum.messages += part.messages;
            sum.bytes += part.bytes;
        }
        Ok::<_, anyhow::Error>(sum)
    })?;
    bar.finish_and_clear();
    let seconds = begun.elapsed().as_secs_f64();
    if args.json {
        println!("{}", json!({ "messages": totals.messages, "bytes": totals.bytes, "seconds": seconds }));
    } else {
        eprintln!(
            "published {} messages, {:.1} MB in {seconds:.2} s ({:.1} MB/s), all acknowledged",
            totals.messages,
            totals.bytes as f64 / 1e6,
            totals.bytes as f64 / 1e6 / seconds
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Cursor, Write};

    proptest! {
        #[test]
        fn any_input_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), length_prefixed: bool) {
            let mut input = Cursor::new(&bytes);
            let mut message = Vec::new();
            let mut total = 0;
            while let Ok(true) = next_message(&mut input, length_prefixed, &mut message) {
                total += message.len();
            }
            prop_assert!(total <= bytes.len());
        }

        #[test]
        fn parts_cover_the_file_and_cut_at_lines(lines in prop::collection::vec("[a-z]{0,30}", 0..40), parts in 1u64..6) {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
            file.write_all(text.as_bytes()).unwrap();
            let cuts = split_lines(file.path(), parts).unwrap();
            prop_assert_eq!(cuts.len() as u64, parts);
            let mut at = 0;
            for (start, end) in cuts {
                prop_assert_eq!(start, at);
                prop_assert!(end == start || text.as_bytes()[end as usize - 1] == b'\n');
                at = end;
            }
            prop_assert_eq!(at, text.len() as u64);
        }
    }
}
