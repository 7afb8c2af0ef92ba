//! A client's host, brokers, and an application that publishes and reads.

use super::brokers::{Brokers, TOPIC, number_of};
use super::host::Host;
use embarcadero_client::polled::{Flush, PolledPublisher, PolledSubscriber, PublisherOpening};
use embarcadero_client::{ClientError, MessageId, Start, Status};
use embarcadero_wire::Order;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::ops::Range;
use std::sync::Arc;

/// Longest run of anything, simulated milliseconds. Only what hangs reaches it.
const LIMIT_MS: u64 = 200_000;
/// Bytes of a message: a few make a batch.
const MESSAGE_BYTES: usize = 200;

pub(crate) struct Rig {
    pub(crate) host: Arc<Host>,
    pub(crate) brokers: Brokers,
    chance: StdRng,
}

impl Rig {
    pub(crate) fn new(brokers: u32, order: Order, seed: u64) -> Self {
        Self::at_level(1, brokers, order, seed)
    }

    pub(crate) fn at_level(ack_level: u8, brokers: u32, order: Order, seed: u64) -> Self {
        let brokers = Brokers::new(brokers, order);
        let host = Arc::new(Host::new(brokers.network(), ack_level, seed));
        Self { host, brokers, chance: StdRng::seed_from_u64(!seed) }
    }

    pub(crate) fn random(&mut self, range: Range<u64>) -> u64 {
        self.chance.random_range(range)
    }

    pub(crate) fn one_in(&mut self, odds: u64) -> bool {
        self.random(0..odds) == 0
    }

    /// Lets a millisecond pass, in which every broker has a turn.
    pub(crate) fn tick(&mut self) {
        assert!(self.host.clock.passed_ms() < LIMIT_MS, "it hangs");
        self.host.clock.step();
        self.brokers.turn(&self.host);
    }

    /// Returns a connection of some broker: the broker's index, and its own.
    pub(crate) fn random_link(&mut self) -> Option<(usize, usize)> {
        let broker = self.random(0..self.brokers.all.len() as u64) as usize;
        let links = self.brokers.links(broker) as u64;
        (links > 0).then(|| (broker, self.random(0..links) as usize))
    }

    /// Opens a publisher.
    pub(crate) fn try_publisher(&mut self) -> Result<Application, ClientError> {
        let mut opening = PublisherOpening::begin(Arc::clone(&self.host), TOPIC);
        loop {
            if let Some(opened) = opening.turn() {
                return Ok(Application { publisher: opened?, ids: Vec::new() });
            }
            self.tick();
        }
    }

    pub(crate) fn publisher(&mut self) -> Application {
        self.try_publisher().unwrap()
    }

    pub(crate) fn subscriber(&mut self, start: Start) -> Reader {
        let cluster = self.brokers.metadata();
        let subscriber = PolledSubscriber::new(Arc::clone(&self.host), TOPIC, start, cluster).unwrap();
        Reader { subscriber, read: Vec::new() }
    }

    /// Returns the numbers of all messages of the global log.
    pub(crate) fn ordered(&self) -> Vec<u64> {
        self.brokers.log().iter().flat_map(|entry| entry.numbers()).collect()
    }

    /// Checks that the global log has the messages 0 to `count`, each once, in order.
    pub(crate) fn assert_ordered(&self, count: u64) {
        assert_eq!(self.ordered(), (0..count).collect::<Vec<_>>());
    }
}

/// Application that publishes numbered messages.
pub(crate) struct Application {
    pub(crate) publisher: PolledPublisher<Host>,
    /// Id of each message.
    pub(crate) ids: Vec<MessageId>,
}

impl Application {
    pub(crate) fn published(&self) -> u64 {
        self.ids.len() as u64
    }

    /// Publishes the next `count` messages, as far as there is room.
    pub(crate) fn publish(&mut self, count: u64) -> Result<(), ClientError> {
        for _ in 0..count {
            let mut message = [0; MESSAGE_BYTES];
            message[..8].copy_from_slice(&self.published().to_le_bytes());
            match self.publisher.publish(&message) {
                Ok(id) => self.ids.push(id),
                Err(ClientError::BufferFull { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Lets a millisecond pass, in which the publisher has a turn too.
    pub(crate) fn tick(&mut self, rig: &mut Rig) {
        self.publisher.turn();
        rig.tick();
    }

    pub(crate) fn ticks(&mut self, rig: &mut Rig, count: u64) {
        (0..count).for_each(|_| self.tick(rig));
    }

    /// Goes on until `done` holds.
    pub(crate) fn until(&mut self, rig: &mut Rig, mut done: impl FnMut(&Self, &Rig) -> bool) {
        while !done(self, rig) {
            self.tick(rig);
        }
    }

    /// Sends all messages, also those of the batch that is being filled.
    pub(crate) fn seal(&mut self) {
        // A flush that nobody waits for.
        let _ = Flush::begin(&self.publisher);
    }

    pub(crate) fn flush(&mut self, rig: &mut Rig) -> Result<(), ClientError> {
        let mut flush = Flush::begin(&self.publisher);
        while !flush.turn(&self.publisher)? {
            self.tick(rig);
        }
        Ok(())
    }

    /// Publishes `count` messages and flushes them.
    pub(crate) fn publish_all(&mut self, rig: &mut Rig, count: u64) -> Result<(), ClientError> {
        let end = self.published() + count;
        while self.published() < end {
            self.publish(end - self.published())?;
            self.tick(rig);
        }
        self.flush(rig)
    }

    pub(crate) fn status(&self, number: u64) -> Result<Status, ClientError> {
        self.publisher.status(self.ids[number as usize])
    }

    /// Checks that every message is acknowledged at its offset, which is its number where all are in one stream.
    pub(crate) fn assert_acknowledged(&self) {
        for number in 0..self.published() {
            assert_eq!(self.status(number).unwrap(), Status::Acknowledged(Some(number)));
        }
    }
}

/// Application that reads.
pub(crate) struct Reader {
    pub(crate) subscriber: PolledSubscriber<Host>,
    /// Number of each message that was read.
    pub(crate) read: Vec<u64>,
}

impl Reader {
    /// Reads what is there: a batch, or messages of one.
    pub(crate) fn look(&mut self, rig: &mut Rig) -> Result<bool, ClientError> {
        if !self.subscriber.look()? {
            return Ok(false);
        }
        if rig.one_in(2) {
            let message = self.subscriber.take_message().unwrap();
            assert!(message.stream.is_some() || message.offset == number_of(message.payload));
            self.read.push(number_of(message.payload));
        } else {
            let batch = self.subscriber.take_batch().unwrap();
            assert_eq!(batch.messages().count(), batch.message_count());
            self.read.extend(batch.messages().map(|message| number_of(message.payload)));
        }
        Ok(true)
    }

    /// Goes on until `count` messages were read.
    pub(crate) fn read_until(&mut self, rig: &mut Rig, count: usize) -> Result<(), ClientError> {
        while self.read.len() < count {
            if !self.look(rig)? {
                rig.tick();
            }
        }
        Ok(())
    }

    /// Looks for a while.
    pub(crate) fn ticks(&mut self, rig: &mut Rig, count: u64) -> Result<(), ClientError> {
        for _ in 0..count {
            while self.look(rig)? {}
            rig.tick();
        }
        Ok(())
    }

    /// Checks that the messages 0 to `count` were read, each once, in order.
    pub(crate) fn assert_read(&self, count: u64) {
        assert_eq!(self.read, (0..count).collect::<Vec<_>>());
    }
}
