//! Redis serialization protocol, version 2 (redis.io, "RESP").

use super::peer::{KEPT_BYTES, Peer, STREAM, line};
use anyhow::Result;
use std::io::{BufReader, Write};
use std::net::TcpStream;

/// Redis server with streams.
pub(super) struct Redis {
    pub address: String,
}

impl Peer for Redis {
    fn address(&self) -> &str {
        &self.address
    }

    fn open(&self, _: u32, writer: &mut TcpStream, reader: &mut BufReader<TcpStream>) -> Result<()> {
        writer.write_all(b"*1\r\n$4\r\nPING\r\n")?;
        let answer = line(reader)?;
        anyhow::ensure!(answer == "+PONG", "{} is not a Redis server: {answer}", self.address);
        Ok(())
    }

    fn requests(&self, _: u32, message: &[u8], count: usize) -> Vec<u8> {
        let kept = (KEPT_BYTES / message.len()).to_string();
        let words: [&[u8]; 8] = [b"XADD", STREAM.as_bytes(), b"MAXLEN", b"~", kept.as_bytes(), b"*", b"m", message];
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            request.extend_from_slice(word);
            request.extend_from_slice(b"\r\n");
        }
        request.repeat(count)
    }

    fn acknowledgement(&self, _: &mut TcpStream, reader: &mut BufReader<TcpStream>, _: u64) -> Result<u64> {
        let answer = line(reader)?;
        anyhow::ensure!(answer.starts_with('$'), "Redis did not store a message: {answer}");
        line(reader)?;
        Ok(1)
    }
}
