//! Movement of a publisher's bytes: gives batches to connections in turn, and takes acknowledgements.

use super::connection::{BrokerConnection, ConnectionState};
use super::sender::Sender;
use crate::environment::Environment;
use embarcadero_transport::{LinkError, PublisherLink};
use embarcadero_wire::batch::BatchOrigin;
use embarcadero_wire::{Ack, Frame, UNKNOWN_OFFSET, WireError};
use std::io;

/// Number of batches that wait in one connection before another is chosen.
const QUEUED_PER_CONNECTION: usize = 2;

impl<E: Environment> Sender<E> {
    /// Moves bytes and takes acknowledgements. Returns true when anything moved.
    pub(super) fn drive(&mut self) -> bool {
        let first = self.in_flight.first();
        let mut moved = false;
        for index in 0..self.connections.len() {
            moved |= self.poll_frames(index);
        }
        self.assign();
        for index in 0..self.connections.len() {
            moved |= self.write(index);
        }
        self.retire();
        self.driven_at = self.now();
        if self.in_flight.first() != first || self.in_flight.is_empty() {
            self.silence.restart(self.driven_at);
        } else {
            self.silence.look(self.driven_at);
        }
        moved
    }

    /// Takes the frames that a broker has sent.
    fn poll_frames(&mut self, index: usize) -> bool {
        let Some(channel) = self.connections[index].channel_mut() else { return false };
        let mut frames = std::mem::take(&mut self.frames);
        let polled = channel.poll(&mut frames);
        let moved = !frames.is_empty() || polled.is_err();
        let taken = frames.drain(..).try_for_each(|frame| self.take_frame(index, &frame));
        self.frames = frames;
        if let Err(error) = taken.and(polled) {
            self.connection_ended(index, error);
        }
        moved
    }

    fn take_frame(&mut self, index: usize, frame: &Frame) -> Result<(), LinkError> {
        match frame {
            Frame::PublishReady(_) => {
                self.connections[index].set_ready();
                self.trouble = None;
            }
            Frame::Ack(ack) if ack.session_epoch == self.session.origin.session_epoch => self.acknowledge(ack),
            Frame::Fenced(fenced) if fenced.session_epoch == self.session.origin.session_epoch => {
                self.session_ended = true;
            }
            // Of an epoch that this publisher has left.
            Frame::Ack(_) | Frame::Fenced(_) => {}
            other => return Err(WireError::Kind { found: other.kind() }.into()),
        }
        Ok(())
    }

    fn acknowledge(&mut self, ack: &Ack) {
        let committed = self.session.number(ack.committed);
        if committed <= self.in_flight.next_number() {
            self.session.committed = self.session.committed.max(committed);
        }
        self.in_flight.acknowledge(self.session.number(ack.sequence), ack.first_offset);
    }

    /// Gives queued batches to connections in turn.
    fn assign(&mut self) {
        // Nothing commits under an epoch that has ended, so nothing is sent under it.
        while let Some(number) = self.in_flight.next_queued().filter(|_| !self.session_ended) {
            if (number - self.in_flight.first()) as usize >= self.session.window {
                return;
            }
            let count = self.connections.len();
            let has_room = |index: &usize| {
                let connection = &self.connections[*index];
                connection.is_ready() && connection.queue.len() < QUEUED_PER_CONNECTION
            };
            let turns = (0..count).map(|step| (self.next_connection + step) % count);
            let Some(chosen) = turns.into_iter().find(has_room) else { return };
            self.next_connection = chosen + 1;
            self.in_flight.pop_queued();
            let sequence = self.session.sequence(number);
            let origin = self.session.origin;
            let Some(sent) = self.in_flight.get_mut(number) else { continue };
            if BatchOrigin::of(&sent.header) != origin || sent.header.sequence != sequence {
                sent.header.sequence = sequence;
                sent.header = sent.batch.readdress(&sent.header, &origin);
            }
            self.in_flight.send(number, chosen);
            if number == self.in_flight.first() {
                // Before, no broker could say anything about it.
                self.silence.restart(self.driven_at);
            }
            self.connections[chosen].queue.push_back(number);
        }
    }

    fn write(&mut self, index: usize) -> bool {
        let written = self.write_queue(index).and_then(|moved| Ok(moved | self.flush(index)?));
        written.unwrap_or_else(|error| {
            self.connection_failed(index, error);
            true
        })
    }

    /// Writes the queued batches of a connection, as far as it has room.
    fn write_queue(&mut self, index: usize) -> io::Result<bool> {
        let mut moved = false;
        loop {
            let BrokerConnection { state: ConnectionState::Up { channel, .. }, queue, written_bytes, reading, .. } =
                &mut self.connections[index]
            else {
                return Ok(moved);
            };
            let Some(number) = queue.front().copied() else { return Ok(moved) };
            // A batch that was acknowledged while it waited is written all the same: the peer may have half of it.
            let Some(sent) = self.in_flight.get_mut(number) else {
                queue.pop_front();
                continue;
            };
            let taken = channel.write(&mut sent.batch, *written_bytes)?;
            if taken == 0 {
                return Ok(moved);
            }
            moved = true;
            *written_bytes += taken;
            if *written_bytes == sent.batch.bytes().len() {
                *written_bytes = 0;
                queue.pop_front();
                if self.session.ack_level == 0 {
                    reading.push_back(number);
                }
                self.assign();
            }
        }
    }

    /// Sends what was written. Without acknowledgements, batches are done once the network has their bytes.
    fn flush(&mut self, index: usize) -> io::Result<bool> {
        let BrokerConnection { state: ConnectionState::Up { channel, .. }, reading, .. } = &mut self.connections[index]
        else {
            return Ok(false);
        };
        channel.flush()?;
        let mut moved = false;
        let in_use = channel.batches_in_use();
        while reading.len() > in_use
            && let Some(number) = reading.pop_front()
        {
            moved = true;
            self.in_flight.acknowledge(number, UNKNOWN_OFFSET);
        }
        Ok(moved)
    }

    /// Removes acknowledged batches from the front, and takes their buffers back.
    fn retire(&mut self) {
        let connections = &self.connections;
        let is_read = |number| connections.iter().any(|connection| connection.queue.contains(&number));
        while let Some(batch) = self.in_flight.retire(is_read) {
            self.stats.batches_acknowledged += 1;
            self.buffers.put(batch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::session::Session;
    use super::*;
    use crate::config::ClientConfig;
    use crate::environment::publish;
    use crate::environment::testing::TestEnvironment;
    use crate::error::{ClientError, ControlCode};
    use crate::silence::SILENCE_PART;
    use crate::views::{BrokerView, TopicView};
    use embarcadero_control::v1::OpenSessionResponse;
    use embarcadero_wire::{BrokerId, ClientId, Epoch, Incarnation, Order, PublishReady};
    use std::io::Write;
    use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
    use std::sync::Arc;
    use std::time::Duration;

    const SILENCE: Duration = Duration::from_secs(8);
    const HOUR: Duration = Duration::from_secs(3600);

    fn sender(broker: SocketAddr) -> Sender<TestEnvironment> {
        let topic = TopicView::of_order(Order::Strong);
        let opened = OpenSessionResponse { epoch: 1, window_batches: 64, ..OpenSessionResponse::default() };
        let session = Session::new(&opened, &topic, ClientId(1), 1);
        let broker = BrokerView {
            id: BrokerId(0),
            incarnation: Incarnation(1),
            data: broker,
            control: String::new(),
            leader: true,
        };
        let config = ClientConfig {
            batch_size: Some(4096),
            buffer_bytes: 16 << 10,
            batch_checksum: false,
            progress_timeout_ms: (SILENCE * SILENCE_PART).as_millis() as u64,
            ..ClientConfig::default()
        };
        Sender::new(Arc::new(TestEnvironment::new(config)), topic, session, vec![broker])
    }

    /// Sender with one batch on its connection, and the socket of the broker.
    fn sender_with_a_batch() -> (Sender<TestEnvironment>, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut sender = sender(listener.local_addr().unwrap());
        let attempts = sender.begin_attempts(sender.now());
        let channel = publish(&*sender.environment, attempts[0].broker.data, &sender.opening()).unwrap();
        sender.end_attempt(&attempts[0], Ok(channel));
        let (mut broker, _) = listener.accept().unwrap();
        broker.write_all(&PublishReady::blank().encode()).unwrap();
        let mut batch = sender.buffers.get(4096).unwrap().unwrap();
        batch.push(b"message");
        sender.push(batch);
        while sender.in_flight.queued() > 0 || sender.has_to_write() {
            sender.drive();
        }
        (sender, broker)
    }

    #[test]
    fn a_publisher_that_did_not_run_calls_no_broker_silent() {
        let (mut sender, mut broker) = sender_with_a_batch();
        let ack = Ack { session_epoch: Epoch(1), first_offset: 7, committed: 1, ..Ack::blank() };
        broker.write_all(&ack.encode()).unwrap();
        sender.environment.clock.advance(HOUR);
        sender.drive();
        sender.drop_silent_connections();
        while !sender.in_flight.is_empty() {
            sender.drive();
        }
        assert_eq!((sender.stats.batches_acknowledged, sender.stats.connections_lost), (1, 0));
    }

    #[test]
    fn a_broker_that_says_nothing_while_it_is_listened_to_is_left() {
        let (mut sender, _broker) = sender_with_a_batch();
        for _ in 0..2 * SILENCE.as_secs() {
            sender.environment.clock.advance(Duration::from_secs(1));
            sender.drive();
            sender.drop_silent_connections();
        }
        assert_eq!((sender.stats.connections_lost, sender.stats.batches_resubmitted), (1, 1));
        assert_eq!(sender.in_flight.queued(), 1);
    }

    /// Drives a sender until it has left its broker.
    fn drive_until_left(sender: &mut Sender<TestEnvironment>) {
        while sender.stats.connections_lost == 0 {
            sender.drive();
        }
    }

    #[test]
    fn a_lost_connection_is_the_cause_of_the_silence_after_it() {
        let (mut sender, broker) = sender_with_a_batch();
        drop(broker);
        drive_until_left(&mut sender);
        assert!(sender.fatal.is_none());
        assert!(matches!(sender.trouble, Some(ClientError::Io { .. })), "{:?}", sender.trouble);
    }

    #[test]
    fn a_broker_that_does_not_speak_the_protocol_ends_the_publisher() {
        let (mut sender, mut broker) = sender_with_a_batch();
        broker.write_all(&[0x5a; 64]).unwrap();
        drive_until_left(&mut sender);
        assert!(matches!(sender.fatal, Some(ClientError::Wire(_))), "{:?}", sender.fatal);
    }

    #[test]
    fn a_refusal_for_an_unknown_reason_is_the_cause_of_the_silence_after_it() {
        let (mut sender, _broker) = sender_with_a_batch();
        let unknown = LinkError::Refused { code: None, text: "moon phase".to_owned(), detail: 0 };
        sender.connection_ended(0, unknown);
        assert!(sender.fatal.is_none());
        let trouble = sender.trouble.map(|error| error.to_string());
        assert!(trouble.as_ref().is_some_and(|text| text.contains("moon phase")), "{trouble:?}");
    }

    #[test]
    fn only_a_permanent_error_of_the_control_plane_ends_a_publisher() {
        let refused =
            |code: tonic::Code| ClientError::Control { code: code.into(), message: format!("{code:?}"), source: None };
        for code in (0..17).map(tonic::Code::from_i32) {
            let mut sender = sender(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
            sender.session_ended = true;
            let begun = sender.now();
            assert!(sender.is_due_to_reopen(begun + HOUR));
            sender.reopening_failed(refused(code), begun);
            let permanent =
                !matches!(ControlCode::from(code), ControlCode::Unavailable | ControlCode::ResourceExhausted);
            assert_eq!(sender.fatal.is_some(), permanent, "{code:?}");
            assert!(!sender.is_due_to_reopen(begun), "{code:?}");
            assert_eq!(sender.is_due_to_reopen(begun + HOUR), !permanent, "{code:?}");
        }
    }
}
