//! An application that reads the order through the production subscriber.

use super::environment::ClientHost;
use super::fate::{Clock, one_in};
use super::host::content_in;
use super::{CLIENTS, Rack, TOPIC_NAME};
use embarcadero_client::polled::{Call, Control, Environment, PolledSubscriber};
use embarcadero_client::{ClientError, Start};
use embarcadero_control::v1 as proto;
use embarcadero_sim::Power;
use std::sync::Arc;

/// Most batches that a reader takes in a round.
const BATCHES: usize = 8;

enum Subscriber {
    /// Nobody has said yet which brokers there are.
    Asking(Call<proto::MetadataResponse>),
    Open(Box<PolledSubscriber<ClientHost>>),
}

pub(crate) struct Reader {
    id: usize,
    rack: Arc<Rack>,
    clock: Clock,
    power: Power,
    host: Arc<ClientHost>,
    subscriber: Subscriber,
    /// Offset of the next message.
    next: u64,
    /// Time at which the last batch was ordered, by the leader's clock.
    ordered_us: u64,
}

impl Reader {
    pub(crate) fn new(number: usize, rack: &Arc<Rack>) -> Self {
        let (id, clock, power) = (CLIENTS + number, Clock::of_client(), Power::default());
        let host = ClientHost::start(id, rack, clock, &power);
        let subscriber = Subscriber::Asking(host.control().cluster());
        Self { id, rack: Arc::clone(rack), clock, power, host, subscriber, next: 0, ordered_us: 0 }
    }

    /// Returns the offset up to which it has read.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Goes away, sometimes without a word, and comes back.
    pub(crate) fn crash(&mut self) {
        if one_in(2) {
            self.power.fail();
        }
        self.power = Power::default();
        self.host = ClientHost::start(self.id, &self.rack, self.clock, &self.power);
        self.subscribe();
    }

    fn subscribe(&mut self) {
        self.subscriber = Subscriber::Asking(self.host.control().cluster());
    }

    pub(crate) fn round(&mut self) {
        self.host.lines().turn();
        let read = match &mut self.subscriber {
            Subscriber::Asking(call) => match call.look() {
                None => return,
                Some(Ok(cluster)) => {
                    PolledSubscriber::new(Arc::clone(&self.host), TOPIC_NAME, Start::Offset(self.next), cluster)
                        .map(|subscriber| self.subscriber = Subscriber::Open(Box::new(subscriber)))
                }
                Some(Err(error)) => Err(error),
            },
            Subscriber::Open(_) => self.read(),
        };
        match read {
            Ok(()) => {}
            Err(ClientError::OffsetOutOfRange { earliest, .. }) if earliest > self.next => {
                assert!(self.rack.retention_bytes > 0, "{} is gone", self.next);
                self.rack.history.skipped(self.next..earliest);
                self.next = earliest;
                self.subscribe();
            }
            Err(ClientError::Control { .. } | ClientError::Unreachable { .. }) => self.subscribe(),
            Err(error) => panic!("reader {}: {error} ({error:?})", self.id),
        }
    }

    /// Reads what has come.
    fn read(&mut self) -> Result<(), ClientError> {
        let Subscriber::Open(subscriber) = &mut self.subscriber else { return Ok(()) };
        for _ in 0..BATCHES {
            if !subscriber.look()? {
                break;
            }
            let Some(batch) = subscriber.take_batch() else { break };
            assert_eq!(batch.first_offset, self.next, "a message was left out, or came twice");
            // When retention by time has taken all batches, nobody knows how late it was.
            let is_known = self.rack.retention_ms == 0;
            assert!(!is_known || batch.ordered_us >= self.ordered_us, "time goes back at {}", self.next);
            self.ordered_us = batch.ordered_us;
            self.rack.history.count(|tally| &mut tally.delivered);
            for message in batch.messages() {
                self.rack.history.read(message.offset, content_in(message.payload));
                self.next = message.offset + 1;
            }
        }
        Ok(())
    }
}
