//! NATS client protocol (docs.nats.io, "Client Protocol") and JetStream's API ("JetStream wire API").

use super::peer::{KEPT_BYTES, MAX_ANSWER_BYTES, Peer, STREAM, line};
use anyhow::{Context, Result, bail};
use std::io::{BufReader, Read, Write};
use std::net::TcpStream;

/// NATS server with JetStream.
pub(super) struct Nats {
    pub address: String,
}

/// Subject to which the server addresses its answers to a connection.
fn inbox(number: u32) -> String {
    format!("_INBOX.{}.{number}", std::process::id())
}

impl Nats {
    /// Reads the body of the next message.
    fn body(writer: &mut TcpStream, reader: &mut BufReader<TcpStream>) -> Result<String> {
        loop {
            let line = line(reader)?;
            match line.split_whitespace().next() {
                Some("MSG") => {
                    let bytes: usize = line.rsplit(' ').next().unwrap_or_default().parse().context("not a length")?;
                    anyhow::ensure!(bytes <= MAX_ANSWER_BYTES, "an answer of {bytes} bytes");
                    let mut body = vec![0; bytes + 2];
                    reader.read_exact(&mut body)?;
                    return Ok(String::from_utf8_lossy(&body).trim_end().to_owned());
                }
                Some("PING") => writer.write_all(b"PONG\r\n")?,
                Some("-ERR") => bail!("NATS refuses: {line}"),
                _ => {}
            }
        }
    }
}

impl Peer for Nats {
    fn address(&self) -> &str {
        &self.address
    }

    fn open(&self, number: u32, writer: &mut TcpStream, reader: &mut BufReader<TcpStream>) -> Result<()> {
        anyhow::ensure!(line(reader)?.starts_with("INFO"), "{} is not a NATS server", self.address);
        let stream = serde_json::json!({
            "name": STREAM, "subjects": [STREAM], "storage": "memory", "retention": "limits", "discard": "old",
            "max_bytes": KEPT_BYTES, "num_replicas": 1,
        });
        let (stream, inbox) = (stream.to_string(), inbox(number));
        write!(
            writer,
            "CONNECT {{\"verbose\":false,\"pedantic\":false}}\r\nSUB {inbox} 1\r\n\
             PUB $JS.API.STREAM.CREATE.{STREAM} {inbox} {}\r\n{stream}\r\n",
            stream.len()
        )?;
        let answer = Self::body(writer, reader)?;
        anyhow::ensure!(!answer.contains("\"error\""), "NATS has no stream for us: {answer}");
        Ok(())
    }

    fn requests(&self, number: u32, message: &[u8], count: usize) -> Vec<u8> {
        let mut request = format!("PUB {STREAM} {} {}\r\n", inbox(number), message.len()).into_bytes();
        request.extend_from_slice(message);
        request.extend_from_slice(b"\r\n");
        request.repeat(count)
    }

    fn acknowledgement(&self, writer: &mut TcpStream, reader: &mut BufReader<TcpStream>, _: u64) -> Result<u64> {
        let answer = Self::body(writer, reader)?;
        anyhow::ensure!(answer.contains("\"seq\""), "NATS did not store a message: {answer}");
        Ok(1)
    }
}
