//! Kafka's protocol (kafka.apache.org, "Kafka protocol guide"), which Redpanda speaks too.
//!
//! Requests are Metadata version 1 and Produce version 3, with record batches of version 2 (kafka.apache.org, "Message
//! format").

use super::peer::{MAX_ANSWER_BYTES, Peer, STREAM};
use anyhow::{Context, Result, bail};
use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Broker of Apache Kafka or Redpanda that leads the partition.
pub(super) struct Kafka {
    pub address: String,
}

const PRODUCE: i16 = 0;
const METADATA: i16 = 3;
/// Error codes of a topic that is being created: UNKNOWN_TOPIC_OR_PARTITION and LEADER_NOT_AVAILABLE.
const NOT_YET: [i16; 2] = [3, 5];
/// Longest wait for the creation of a topic.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a record batch that its length does not count: base offset, and the length itself.
const BATCH_PREFIX: usize = 12;
/// Offset from which the checksum covers a record batch: after base offset, length, leader epoch, magic and the checksum.
const CHECKED_FROM: usize = 21;

fn string(into: &mut Vec<u8>, text: &str) {
    into.extend((text.len() as i16).to_be_bytes());
    into.extend(text.as_bytes());
}

fn request(key: i16, version: i16, body: &[u8]) -> Vec<u8> {
    let mut request = Vec::with_capacity(body.len() + 32);
    request.extend(key.to_be_bytes());
    request.extend(version.to_be_bytes());
    // Correlation id: answers come in order.
    request.extend(0i32.to_be_bytes());
    string(&mut request, STREAM);
    request.extend(body);
    let mut framed = (request.len() as i32).to_be_bytes().to_vec();
    framed.append(&mut request);
    framed
}

/// Appends a zigzag integer: seven bits per byte, the lowest first.
fn varint(into: &mut Vec<u8>, value: i32) {
    let mut rest = ((value << 1) ^ (value >> 31)) as u32;
    while rest >= 0x80 {
        into.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    into.push(rest as u8);
}

fn record_batch(message: &[u8], count: usize) -> Vec<u8> {
    let mut batch = Vec::with_capacity(count * (message.len() + 16) + 64);
    batch.extend(0i64.to_be_bytes());
    batch.extend(0i32.to_be_bytes());
    // Leader epoch, magic; checksum, below.
    batch.extend((-1i32).to_be_bytes());
    batch.push(2);
    batch.extend(0u32.to_be_bytes());
    // Attributes, last offset, first and last time, producer, its epoch, sequence, count.
    batch.extend(0i16.to_be_bytes());
    batch.extend((count as i32 - 1).to_be_bytes());
    batch.extend([0; 16]);
    batch.extend((-1i64).to_be_bytes());
    batch.extend((-1i16).to_be_bytes());
    batch.extend((-1i32).to_be_bytes());
    batch.extend((count as i32).to_be_bytes());
    let mut record = Vec::with_capacity(message.len() + 16);
    for index in 0..count {
        record.clear();
        // Attributes and time.
        record.extend([0, 0]);
        varint(&mut record, index as i32);
        // No key.
        varint(&mut record, -1);
        varint(&mut record, message.len() as i32);
        record.extend(message);
        // No headers.
        varint(&mut record, 0);
        varint(&mut batch, record.len() as i32);
        batch.append(&mut record);
    }
    let length = (batch.len() - BATCH_PREFIX) as i32;
    batch[8..BATCH_PREFIX].copy_from_slice(&length.to_be_bytes());
    let checksum = embarcadero_wire::crc32c(&batch[CHECKED_FROM..]);
    batch[CHECKED_FROM - 4..CHECKED_FROM].copy_from_slice(&checksum.to_be_bytes());
    batch
}

/// Rest of an answer that is being read.
struct Answer<'a>(&'a [u8]);

impl<'a> Answer<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes).context("an answer ends early")?;
        self.0 = rest;
        Ok(taken)
    }

    fn i16(&mut self) -> Result<i16> {
        Ok(i16::from_be_bytes(self.take(2)?.try_into()?))
    }

    fn i32(&mut self) -> Result<i32> {
        Ok(i32::from_be_bytes(self.take(4)?.try_into()?))
    }

    /// Takes a string that may be null.
    fn string(&mut self) -> Result<&'a [u8]> {
        let bytes = self.i16()?;
        self.take(usize::try_from(bytes).unwrap_or(0))
    }

    fn each(&mut self, mut element: impl FnMut(&mut Self) -> Result<()>) -> Result<()> {
        (0..self.i32()?).try_for_each(|_| element(self))
    }
}

fn answer(reader: &mut BufReader<TcpStream>) -> Result<Vec<u8>> {
    let mut length = [0; 4];
    reader.read_exact(&mut length)?;
    let bytes = usize::try_from(i32::from_be_bytes(length)).unwrap_or(usize::MAX);
    anyhow::ensure!((4..=MAX_ANSWER_BYTES).contains(&bytes), "an answer of {bytes} bytes");
    let mut answer = vec![0; bytes];
    reader.read_exact(&mut answer)?;
    // Without its correlation id.
    Ok(answer.split_off(4))
}

/// First error code of a topic or a partition in an answer to Metadata; 0 if there is none.
fn metadata_error(answer: &[u8]) -> Result<i16> {
    let mut answer = Answer(answer);
    answer.each(|broker| {
        broker.i32()?;
        broker.string()?;
        broker.i32()?;
        broker.string().map(drop)
    })?;
    answer.i32()?;
    let mut errors = Vec::new();
    answer.each(|topic| {
        errors.push(topic.i16()?);
        topic.string()?;
        topic.take(1)?;
        topic.each(|partition| {
            errors.push(partition.i16()?);
            partition.take(8)?;
            (0..2).try_for_each(|_| partition.each(|replica| replica.i32().map(drop)))
        })
    })?;
    Ok(errors.into_iter().find(|error| *error != 0).unwrap_or(0))
}

/// Error code in an answer to Produce for one partition; 0 if there is none.
fn produce_error(answer: &[u8]) -> Result<i16> {
    let mut answer = Answer(answer);
    let mut errors = Vec::new();
    answer.each(|topic| {
        topic.string()?;
        topic.each(|partition| {
            partition.i32()?;
            errors.push(partition.i16()?);
            partition.take(16).map(drop)
        })
    })?;
    errors.into_iter().max_by_key(|error| i32::from(*error).abs()).context("an answer for no partition")
}

impl Peer for Kafka {
    fn address(&self) -> &str {
        &self.address
    }

    fn open(&self, _: u32, writer: &mut TcpStream, reader: &mut BufReader<TcpStream>) -> Result<()> {
        let begun = Instant::now();
        loop {
            let mut body = 1i32.to_be_bytes().to_vec();
            string(&mut body, STREAM);
            writer.write_all(&request(METADATA, 1, &body))?;
            match metadata_error(&answer(reader)?)? {
                0 => return Ok(()),
                error if NOT_YET.contains(&error) && begun.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                error => bail!("{} has no topic for us: error code {error}", self.address),
            }
        }
    }

    fn requests(&self, _: u32, message: &[u8], count: usize) -> Vec<u8> {
        let batch = record_batch(message, count);
        let mut body = Vec::with_capacity(batch.len() + 64);
        // No transaction; acknowledged by the leader (the only replica) within 10 s; one topic of one partition.
        body.extend((-1i16).to_be_bytes());
        body.extend(1i16.to_be_bytes());
        body.extend(10_000i32.to_be_bytes());
        body.extend(1i32.to_be_bytes());
        string(&mut body, STREAM);
        body.extend(1i32.to_be_bytes());
        body.extend(0i32.to_be_bytes());
        body.extend((batch.len() as i32).to_be_bytes());
        body.extend(batch);
        request(PRODUCE, 3, &body)
    }

    fn acknowledgement(&self, _: &mut TcpStream, reader: &mut BufReader<TcpStream>, count: u64) -> Result<u64> {
        match produce_error(&answer(reader)?)? {
            0 => Ok(count),
            error => bail!("{} did not store messages: error code {error}", self.address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn integers_are_zigzag() {
        // "Message format", and Protocol Buffers' encoding guide.
        for (value, encoded) in [(0, vec![0]), (-1, vec![1]), (1, vec![2]), (-64, vec![127]), (150, vec![0xac, 0x02])] {
            let mut into = Vec::new();
            varint(&mut into, value);
            assert_eq!(into, encoded, "{value}");
        }
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(bytes: Vec<u8>) {
            let _ = (metadata_error(&bytes), produce_error(&bytes));
        }
    }
}
