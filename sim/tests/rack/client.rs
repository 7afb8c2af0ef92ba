//! An application that publishes through the production client. Sometimes it crashes, and starts again without knowing what
//! became of its last messages. Sometimes it closes its publisher and opens another.

use super::environment::ClientHost;
use super::fate::{Clock, one_in};
use super::history::Instance;
use super::host::message;
use super::{CLIENTS, COPIES, Rack, TOPIC_NAME};
use embarcadero_client::polled::{PolledPublisher, PublisherOpening};
use embarcadero_client::{ClientError, MessageId, Status};
use embarcadero_sim::Power;
use embarcadero_wire::ErrorCode;
use std::collections::VecDeque;
use std::sync::Arc;

/// Most messages that an application has under way.
const WINDOW: usize = 8;

/// Publisher of an application, or the opening of one.
enum Publisher {
    Opening(Box<PublisherOpening<ClientHost>>),
    Open(Box<PolledPublisher<ClientHost>>),
}

impl Publisher {
    fn opening(host: &Arc<ClientHost>) -> Self {
        Self::Opening(Box::new(PublisherOpening::begin(Arc::clone(host), TOPIC_NAME)))
    }
}

pub(crate) struct Client {
    id: usize,
    rack: Arc<Rack>,
    clock: Clock,
    power: Power,
    host: Arc<ClientHost>,
    publisher: Publisher,
    /// True while it publishes nothing more through its publisher, which it closes.
    leaving: bool,
    /// Number of publishers that it had before.
    lives: usize,
    /// Messages that are not acknowledged, and their contents.
    under_way: VecDeque<(MessageId, u64)>,
    /// Content of the next message.
    next: u64,
    /// Content after that of the last message.
    end: u64,
}

impl Client {
    pub(crate) fn new(id: usize, rack: &Arc<Rack>, messages: u64) -> Self {
        let (clock, power) = (Clock::of_client(), Power::default());
        let host = ClientHost::start(id, rack, clock, &power);
        let publisher = Publisher::opening(&host);
        let (rack, under_way) = (Arc::clone(rack), VecDeque::new());
        Self { id, rack, clock, power, host, publisher, leaving: false, lives: 0, under_way, next: 0, end: messages }
    }

    /// Returns true when it has published everything, and all of it is acknowledged.
    pub(crate) fn is_done(&self) -> bool {
        self.next == self.end && self.under_way.is_empty()
    }

    /// Describes what it waits for, for a report.
    pub(crate) fn state(&self) -> String {
        let open = match &self.publisher {
            Publisher::Opening(_) => "opens".to_owned(),
            Publisher::Open(publisher) => format!("{:#x}, {:?}", publisher.client_id().0, publisher.stats()),
        };
        format!("client {}: {:?} under way, next {} of {}, {open}", self.id, self.under_way, self.next, self.end)
    }

    /// Name of its publisher among all that the rack ever has.
    fn instance(&self) -> Instance {
        Instance((self.id + self.lives * CLIENTS) as u64)
    }

    /// Crashes, with the host or without, and starts again.
    pub(crate) fn crash(&mut self) {
        self.rack.history.count(|tally| &mut tally.client_crashes);
        if one_in(2) {
            self.power.fail();
        }
        self.power = Power::default();
        self.host = ClientHost::start(self.id, &self.rack, self.clock, &self.power);
        self.begin_anew();
    }

    /// Opens another publisher. Nothing is known of what was under way.
    fn begin_anew(&mut self) {
        if let Publisher::Open(publisher) = &self.publisher {
            self.rack.history.note(publisher.stats());
        }
        self.leaving = false;
        self.lives += 1;
        self.under_way.clear();
        self.publisher = Publisher::opening(&self.host);
    }

    pub(crate) fn round(&mut self) {
        self.host.lines().turn();
        match &mut self.publisher {
            Publisher::Opening(opening) => match opening.turn() {
                None => {}
                Some(Ok(publisher)) => {
                    self.rack.history.count(|tally| &mut tally.publishers);
                    self.publisher = Publisher::Open(Box::new(publisher));
                }
                Some(Err(error)) => self.end(&error),
            },
            Publisher::Open(publisher) => {
                publisher.turn();
                if let Err(error) = self.publish() {
                    self.end(&error);
                }
            }
        }
    }

    /// Publishes what there is room for, and takes acknowledgements.
    fn publish(&mut self) -> Result<(), ClientError> {
        let instance = self.instance();
        let Publisher::Open(publisher) = &self.publisher else { return Ok(()) };
        self.leaving |= self.next < self.end && one_in(100);
        while !self.leaving && self.under_way.len() < WINDOW && self.next < self.end {
            match publisher.publish(&message(instance, self.next)) {
                Ok(id) => self.under_way.push_back((id, self.next)),
                Err(ClientError::BufferFull { .. }) => break,
                Err(error) => return Err(error),
            }
            self.next += 1;
        }
        let mut still = VecDeque::new();
        for (id, content) in std::mem::take(&mut self.under_way) {
            match publisher.status(id)? {
                Status::Pending => still.push_back((id, content)),
                Status::Acknowledged(offset) => {
                    if let Some(offset) = offset.filter(|_| self.rack.replicated) {
                        self.rack.history.must_be_durable(offset, COPIES);
                    }
                    self.rack.history.acknowledged((instance, content), offset);
                }
            }
        }
        self.under_way = still;
        if self.leaving && self.under_way.is_empty() {
            self.rack.history.count(|tally| &mut tally.closed);
            drop(publisher.close());
            self.begin_anew();
        }
        Ok(())
    }

    /// Handles the end of a publisher: the application goes on with another, and does not send again what was under way.
    fn end(&mut self, error: &ClientError) {
        match error {
            ClientError::SessionLost { .. } => self.rack.history.count(|tally| &mut tally.lost_sessions),
            ClientError::Control { .. } | ClientError::Unreachable { .. } => {}
            ClientError::Broker { code: ErrorCode::NotReplicated | ErrorCode::PoolExhausted, .. } => {
                assert!(self.rack.retention_bytes > 0, "{error}");
            }
            error => panic!("client {}: {error} ({error:?})", self.id),
        }
        self.begin_anew();
    }
}
