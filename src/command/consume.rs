//! `embarcadero consume`.

use crate::settings::Connect;
use anyhow::{Result, bail};
use clap::Args;
use embarcadero_client::{Batch, ClientError, Message, Start};
use std::io::{BufWriter, ErrorKind, Write};
use std::time::Duration;

#[derive(Args)]
pub struct ConsumeArgs {
    /// Name of the topic.
    topic: String,
    #[command(flatten)]
    connect: Connect,
    /// Start of the stream: an offset, earliest, latest, or @ and a time in microseconds since 1970.
    #[arg(long, default_value = "earliest", value_parser = parse_start)]
    from: Start,
    /// Wait for more messages when all have been read.
    #[arg(long, short = 'F')]
    follow: bool,
    /// Stop after this many messages.
    #[arg(long)]
    count: Option<u64>,
    /// Write a 4-byte little-endian length before each message instead of a newline after it.
    #[arg(long)]
    length_prefixed: bool,
    /// Write the message's offset and a tab before each message.
    #[arg(long)]
    offsets: bool,
}

fn parse_start(text: &str) -> Result<Start, String> {
    let number = |text: &str| text.parse().map_err(|_| format!("{text:?} is not earliest, latest, an offset or @time"));
    match (text, text.strip_prefix('@')) {
        ("earliest", _) => Ok(Start::Earliest),
        ("latest", _) => Ok(Start::Latest),
        (_, Some(time)) => Ok(Start::Timestamp(number(time)?)),
        _ => Ok(Start::Offset(number(text)?)),
    }
}

struct Output<W: Write> {
    writer: W,
    left: u64,
    length_prefixed: bool,
    offsets: bool,
}

impl<W: Write> Output<W> {
    fn message(&mut self, message: &Message<'_>) -> std::io::Result<()> {
        if self.offsets {
            write!(self.writer, "{}\t", message.offset)?;
        }
        if self.length_prefixed {
            self.writer.write_all(&(message.payload.len() as u32).to_le_bytes())?;
        }
        self.writer.write_all(message.payload)?;
        if !self.length_prefixed {
            self.writer.write_all(b"\n")?;
        }
        self.left -= 1;
        Ok(())
    }

    fn batch(&mut self, batch: &Batch<'_>) -> std::io::Result<()> {
        for message in batch.messages() {
            if self.left == 0 {
                return Ok(());
            }
            self.message(&message)?;
        }
        Ok(())
    }
}

/// Messages that could not be read. Reading goes on behind them.
#[derive(Default)]
struct Unreadable(u64);

impl Unreadable {
    /// Tells of messages that cannot be read. Any other error is returned.
    fn skip(&mut self, error: ClientError) -> Result<()> {
        let ClientError::Corrupt { offset, end, .. } = error else { return Err(error.into()) };
        tracing::error!("{error}");
        self.0 += end - offset;
        Ok(())
    }
}

pub fn run(args: &ConsumeArgs) -> Result<()> {
    let client = args.connect.client()?;
    let mut subscriber = client.subscriber(&args.topic, args.from)?;
    let mut output = Output {
        writer: BufWriter::with_capacity(1 << 20, std::io::stdout().lock()),
        left: args.count.unwrap_or(u64::MAX),
        length_prefixed: args.length_prefixed,
        offsets: args.offsets,
    };
    let (mut result, mut unreadable) = (Ok(()), Unreadable::default());
    if !args.follow && args.count.is_none() {
        let mut drain = || {
            subscriber.drain_batches(|batch| {
                if result.is_ok() {
                    result = output.batch(&batch);
                }
            })
        };
        while let Err(error) = drain() {
            unreadable.skip(error)?;
        }
    } else {
        while output.left > 0 && result.is_ok() {
            match subscriber.next_batch(Duration::from_millis(200)) {
                Ok(Some(batch)) => result = output.batch(&batch),
                // While no messages come, a reader of the pipe must see all earlier ones.
                Ok(None) => result = output.writer.flush(),
                Err(error) => unreadable.skip(error)?,
            }
        }
    }
    match result.and_then(|()| output.writer.flush()) {
        Ok(()) if unreadable.0 > 0 => bail!("{} messages could not be read", unreadable.0),
        Ok(()) => Ok(()),
        // The reader of the pipe has closed it, as `head` does.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        Err(error) => bail!("cannot write: {error}"),
    }
}
