//! Publishes lines from standard input in strong order and prints the offset of each.
//!
//! ```text
//! rm -f /tmp/embarcadero.ready
//! embarcadero cluster --ready-file /tmp/embarcadero.ready &
//! while kill -0 $! && [ ! -s /tmp/embarcadero.ready ]; do sleep 0.1; done
//! embarcadero topic create events
//! seq 10 | cargo run --release --example publish -- 127.0.0.1:7000 events
//! ```

use embarcadero_client::{Client, ClientConfig, Status};
use std::error::Error;
use std::io::BufRead;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(broker), Some(topic)) = (arguments.next(), arguments.next()) else {
        return Err("usage: publish BROKER TOPIC".into());
    };
    let client = Client::connect(ClientConfig::at(broker))?;
    let publisher = client.publisher(&topic)?;
    let mut ids = Vec::new();
    for line in std::io::stdin().lock().lines() {
        // Waits while the buffer is full.
        ids.push(publisher.publish_wait(line?.as_bytes())?);
    }
    publisher.flush()?;
    for id in ids {
        if let Status::Acknowledged(Some(offset)) = publisher.poll(id)? {
            println!("{offset}");
        }
    }
    publisher.close()?;
    Ok(())
}
