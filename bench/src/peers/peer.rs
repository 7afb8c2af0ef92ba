//! Peer: another system to which a bench publishes, by that system's protocol.

use anyhow::{Result, bail};
use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;

/// Bytes that a peer keeps before it deletes the oldest messages.
pub(super) const KEPT_BYTES: usize = 512 << 20;
/// Name of the stream or topic at a peer.
pub(super) const STREAM: &str = "embarcadero-bench";
/// Bytes of the longest line or body of an answer.
pub(super) const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Protocol of a peer: encodes requests and reads answers.
pub(super) trait Peer: Sync {
    fn address(&self) -> &str;

    /// Prepares a fresh connection, which has this number, for publishing.
    fn open(&self, number: u32, writer: &mut TcpStream, reader: &mut BufReader<TcpStream>) -> Result<()>;

    /// Encodes the requests with which connection `number` publishes a message `count` times.
    fn requests(&self, number: u32, message: &[u8], count: usize) -> Vec<u8>;

    /// Reads one answer to requests for `count` messages each. Returns the number of messages that it acknowledges.
    fn acknowledgement(&self, writer: &mut TcpStream, reader: &mut BufReader<TcpStream>, count: u64) -> Result<u64>;
}

/// Reads a line of an answer, without its end.
pub(super) fn line(reader: &mut BufReader<TcpStream>) -> Result<String> {
    let mut line = String::new();
    let mut bounded = reader.by_ref().take(MAX_ANSWER_BYTES as u64);
    if bounded.read_line(&mut line)? == 0 {
        bail!("the peer closed the connection");
    }
    Ok(line.trim_end().to_owned())
}
