//! `embarcadero verify`: reads a topic and checks the guarantees of its order.

use crate::settings::Connect;
use anyhow::{Result, bail};
use clap::Args;
use embarcadero_client::{Batch, BrokerId, ClientError, ClientId, Order, Start};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Args)]
pub struct VerifyArgs {
    /// Name of the topic.
    topic: String,
    #[command(flatten)]
    connect: Connect,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Sequence numbers read of one session.
#[derive(Default)]
struct SessionSeen {
    /// Sequence number that must come next (strong order).
    due: Option<u64>,
    /// All sequence numbers so far (other orders).
    sequences: BTreeSet<u64>,
}

#[derive(Default)]
struct Check {
    order: Option<Order>,
    batches: u64,
    messages: u64,
    bytes: u64,
    without_checksum: u64,
    sessions: BTreeMap<(Option<BrokerId>, ClientId), SessionSeen>,
    last_ordered_us: BTreeMap<Option<BrokerId>, u64>,
    faults: Vec<String>,
}

impl Check {
    fn batch(&mut self, batch: &Batch<'_>) {
        self.batches += 1;
        self.messages += batch.message_count() as u64;
        self.bytes += batch.messages().map(|message| message.payload.len() as u64).sum::<u64>();
        // The subscriber checks checksums and that offsets have no gaps.
        if !batch.has_checksum {
            self.without_checksum += 1;
        }
        let last = self.last_ordered_us.entry(batch.stream).or_default();
        if batch.ordered_us < *last {
            self.faults.push(format!("time goes back at offset {}", batch.first_offset));
        }
        *last = batch.ordered_us;
        let session = self.sessions.entry((batch.stream, batch.client_id)).or_default();
        let sequence = batch.sequence;
        let at = batch.first_offset;
        if self.order == Some(Order::Strong) {
            if let Some(due) = session.due.filter(|due| *due != sequence) {
                let kind = if sequence < due { "duplicate or out of order" } else { "gap" };
                let client = batch.client_id.0;
                self.faults
                    .push(format!("{kind}: client {client:#x} has sequence {sequence} at offset {at}, {due} was due"));
            }
            session.due = Some(sequence + 1);
        } else if !session.sequences.insert(sequence) {
            self.faults.push(format!("duplicate: client {:#x} sequence {sequence} at offset {at}", batch.client_id.0));
        }
    }
}

pub fn run(args: &VerifyArgs) -> Result<()> {
    let client = args.connect.client()?;
    let mut subscriber = client.subscriber(&args.topic, Start::Earliest)?;
    let mut check = Check { order: Some(subscriber.topic().order), ..Check::default() };
    while let Err(error) = subscriber.drain_batches(|batch| check.batch(&batch)) {
        let ClientError::Corrupt { .. } = error else { return Err(error.into()) };
        check.faults.push(error.to_string());
    }
    if args.json {
        println!(
            "{}",
            json!({
                "messages": check.messages, "batches": check.batches, "bytes": check.bytes,
                "clients": check.sessions.len(), "batches_without_checksum": check.without_checksum,
                "faults": check.faults,
            })
        );
    } else {
        println!(
            "{}: {} messages in {} batches of {} clients, {} bytes; {} batches carry no body checksum",
            args.topic,
            check.messages,
            check.batches,
            check.sessions.len(),
            check.bytes,
            check.without_checksum
        );
    }
    if !check.faults.is_empty() {
        bail!("{} faults, the first: {}", check.faults.len(), check.faults.first().map_or("", String::as_str));
    }
    if !args.json {
        println!("order, gaps, duplicates, checksums: ok");
    }
    Ok(())
}
