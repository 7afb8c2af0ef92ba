//! A publisher's connection to one broker.

use crate::views::BrokerView;
use embarcadero_transport::PublisherChannel;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Whether there is a connection.
pub(super) enum Connection {
    Down {
        retry_at: Instant,
        wait: Duration,
    },
    /// Being connected by the background thread.
    Connecting,
    Up {
        link: PublisherChannel,
        ready: bool,
    },
}

/// A broker, and what is on the connection to it.
pub(super) struct BrokerConnection {
    pub(super) broker: BrokerView,
    pub(super) connection: Connection,
    /// Batches to write, and how many bytes of the first are written.
    pub(super) queue: VecDeque<u64>,
    pub(super) written: usize,
    /// Without acknowledgements: batches that were written, and are read in place.
    pub(super) reading: VecDeque<u64>,
    /// Changes with each connection, so that a late result is not taken for the present one's.
    pub(super) attempt: u64,
}

impl BrokerConnection {
    /// No connection yet; one is due at once.
    pub(super) fn new(broker: BrokerView, now: Instant) -> Self {
        let connection = Connection::Down { retry_at: now, wait: Duration::ZERO };
        Self { broker, connection, queue: VecDeque::new(), written: 0, reading: VecDeque::new(), attempt: 0 }
    }

    /// Forgets the connection and what was on it. Another is due after `wait`.
    pub(super) fn drop_connection(&mut self, wait: Duration) {
        self.connection = Connection::Down { retry_at: Instant::now() + wait, wait };
        self.attempt += 1;
        self.queue.clear();
        self.written = 0;
        self.reading.clear();
    }

    /// True while there is a connection.
    pub(super) fn is_up(&self) -> bool {
        matches!(self.connection, Connection::Up { .. })
    }

    /// True once the broker takes batches.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.connection, Connection::Up { ready: true, .. })
    }
}
