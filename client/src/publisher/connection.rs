//! Publisher's connection to one broker.

use crate::views::BrokerView;
use embarcadero_transport::PublisherChannel;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// State of a connection.
pub(super) enum Connection {
    Down {
        retry_at: Instant,
        wait: Duration,
    },
    /// The background thread is connecting.
    Connecting,
    Up {
        link: PublisherChannel,
        ready: bool,
    },
}

/// Broker, the state of the connection to it, and the batches on that connection.
pub(super) struct BrokerConnection {
    pub(super) broker: BrokerView,
    pub(super) connection: Connection,
    /// Numbers of the batches to write.
    pub(super) queue: VecDeque<u64>,
    /// Bytes of the first batch in `queue` that are written.
    pub(super) written: usize,
    /// Numbers of the batches that were written and may still be read in place. Only without acknowledgements.
    pub(super) reading: VecDeque<u64>,
    /// Number of the attempt to connect. A late result of an earlier attempt is ignored.
    pub(super) attempt: u64,
}

impl BrokerConnection {
    /// State without a connection; an attempt is due at once.
    pub(super) fn new(broker: BrokerView, now: Instant) -> Self {
        let connection = Connection::Down { retry_at: now, wait: Duration::ZERO };
        Self { broker, connection, queue: VecDeque::new(), written: 0, reading: VecDeque::new(), attempt: 0 }
    }

    /// Drops the connection and forgets the batches on it. The next attempt is due after `wait`.
    pub(super) fn drop_connection(&mut self, wait: Duration) {
        self.connection = Connection::Down { retry_at: Instant::now() + wait, wait };
        self.attempt += 1;
        self.queue.clear();
        self.written = 0;
        self.reading.clear();
    }

    /// Returns true while there is a connection.
    pub(super) fn is_up(&self) -> bool {
        matches!(self.connection, Connection::Up { .. })
    }

    /// Returns true once the broker takes batches.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.connection, Connection::Up { ready: true, .. })
    }
}
