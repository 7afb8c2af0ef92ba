//! A subscriber, which reads the order through the brokers' deliveries. When it loses its connection it goes on elsewhere.

use super::fate::{one_in, random};
use super::host::content_in;
use super::link::{RackTransport, address};
use super::{GLOBAL, HOSTS, Rack, TOPIC};
use embarcadero_sim::{Power, SimulatedSubscriber};
use embarcadero_transport::{Item, LinkError, SubscriberLink, Transport};
use embarcadero_wire::{BatchHeader, Deliver, ErrorCode, Frame, StartKind, Subscribe};
use std::sync::Arc;

/// Most items that a reader takes in a round.
const ITEMS: usize = 8;

pub(crate) struct Reader {
    rack: Arc<Rack>,
    power: Power,
    transport: RackTransport,
    link: Option<SimulatedSubscriber>,
    /// Offset of the next message.
    next: u64,
    /// Time at which the last batch was ordered, by the leader's clock.
    ordered_us: u64,
}

impl Reader {
    pub(crate) fn new(rack: &Arc<Rack>) -> Self {
        let power = Power::default();
        let transport = rack.transport.of_client(&power, None);
        Self { rack: Arc::clone(rack), power, transport, link: None, next: 0, ordered_us: 0 }
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
        let Self { next, ordered_us, .. } = *self;
        *self = Self { next, ordered_us, ..Self::new(&self.rack) };
    }

    pub(crate) fn round(&mut self) {
        let Some(mut link) = self.link.take() else { return self.connect() };
        for _ in 0..ITEMS {
            match link.take() {
                Ok(Item::Nothing) => break,
                Ok(Item::Frame(Frame::SubscribeReady(ready))) => assert_eq!(ready.start_offset, self.next),
                Ok(Item::Frame(frame)) => panic!("{frame:?} came to a subscriber"),
                Ok(Item::Batch(deliver, header, body)) => {
                    let header = header.expect("nothing damages batches");
                    assert!(deliver.ordered_us >= self.ordered_us, "time goes back at {}", self.next);
                    self.ordered_us = deliver.ordered_us;
                    self.next = self.read(&deliver, &header, content_in(&link.bytes()[body]));
                }
                Err(LinkError::Refused {
                    code: Some(ErrorCode::OffsetOutOfRange | ErrorCode::TooSlow),
                    detail,
                    ..
                }) if detail > self.next => {
                    assert!(self.rack.retention_bytes > 0, "{} is gone", self.next);
                    self.rack.history.skipped(self.next..detail);
                    self.next = detail;
                    return;
                }
                Err(_) => return,
            }
        }
        if !one_in(400) {
            self.link = Some(link);
        }
    }

    fn connect(&mut self) {
        if one_in(4) {
            let request = Subscribe {
                start: self.next,
                start_kind: StartKind::Offset as u32,
                topic: TOPIC.0,
                topic_incarnation: TOPIC.1,
                stream: GLOBAL.stream,
                ..Subscribe::blank()
            };
            let host = random(0..HOSTS as u64) as usize;
            self.link = self.transport.subscribe(address(host), &super::options(), &request).ok();
        }
    }

    /// Records a batch. Returns the offset after it.
    fn read(&self, deliver: &Deliver, header: &BatchHeader, content: (u64, u64)) -> u64 {
        assert_eq!(deliver.first_offset, self.next, "a batch was left out, or came twice");
        assert_eq!((header.client_id, header.sequence), (deliver.client_id, deliver.sequence), "another batch came");
        assert_eq!(header.client_id.0, content.0, "another client's payload came");
        self.rack.history.count(|tally| &mut tally.delivered);
        self.rack.history.read(deliver.first_offset, ((header.client_id, content.1), deliver.first_offset));
        deliver.first_offset + u64::from(deliver.message_count)
    }
}
