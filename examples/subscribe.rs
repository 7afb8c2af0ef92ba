//! Prints what is published to a topic from now on, with offset and publisher.
//!
//! ```text
//! cargo run --release --example subscribe -- 127.0.0.1:7000 events
//! ```

use embarcadero_client::{Client, ClientConfig, Start};
use std::error::Error;
use std::time::Duration;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(broker), Some(topic)) = (arguments.next(), arguments.next()) else {
        return Err("usage: subscribe BROKER TOPIC".into());
    };
    let client = Client::connect(ClientConfig::at(broker))?;
    let mut subscriber = client.subscriber(&topic, Start::Latest)?;
    loop {
        // Zero-copy: the batch is read where it was received.
        let Some(batch) = subscriber.next_batch(Duration::from_secs(1))? else { continue };
        for message in batch.messages() {
            let text = String::from_utf8_lossy(message.payload);
            println!("{}\t{}\t{text}", message.offset, message.client_id);
        }
    }
}
