//! Publisher's connection to one broker.

use crate::environment::{Environment, PublisherEnd};
use crate::error::ClientError;
use crate::views::BrokerView;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Shortest wait before an attempt to connect is repeated.
pub(super) const RETRY_MIN: Duration = Duration::from_millis(50);
/// Longest wait before an attempt to connect is repeated.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(1);

/// State of a connection.
pub(super) enum ConnectionState<L> {
    Down {
        retry_at: Instant,
        wait: Duration,
    },
    /// An attempt to connect is under way.
    Connecting,
    Up {
        channel: L,
        /// True once the broker takes batches.
        ready: bool,
    },
}

/// Publisher's connection to a broker, and the batches on it.
pub(super) struct BrokerConnection<E: Environment> {
    pub(super) broker: BrokerView,
    pub(super) state: ConnectionState<PublisherEnd<E>>,
    /// Numbers of the batches to write.
    pub(super) queue: VecDeque<u64>,
    /// Bytes of the first batch in `queue` that are written.
    pub(super) written_bytes: usize,
    /// Numbers of the batches that were written and may still be read in place. Only without acknowledgements.
    pub(super) reading: VecDeque<u64>,
    /// Number of the attempt to connect. A late result of an earlier attempt is ignored.
    attempt: u64,
}

/// Attempt to connect that is due.
pub(super) struct ConnectAttempt {
    /// Index of the connection.
    pub(super) index: usize,
    /// Broker to connect to.
    pub(super) broker: BrokerView,
    /// Wait before this attempt.
    wait: Duration,
    number: u64,
}

impl<E: Environment> BrokerConnection<E> {
    /// State without a connection; an attempt is due at once.
    pub(super) fn new(broker: BrokerView, now: Instant) -> Self {
        let state = ConnectionState::Down { retry_at: now, wait: Duration::ZERO };
        Self { broker, state, queue: VecDeque::new(), written_bytes: 0, reading: VecDeque::new(), attempt: 0 }
    }

    /// Begins an attempt to connect if one is due. `index` is the connection's own.
    pub(super) fn begin_attempt(&mut self, index: usize, now: Instant) -> Option<ConnectAttempt> {
        let ConnectionState::Down { retry_at, wait } = self.state else { return None };
        if retry_at > now {
            return None;
        }
        self.state = ConnectionState::Connecting;
        self.attempt += 1;
        Some(ConnectAttempt { index, broker: self.broker.clone(), wait, number: self.attempt })
    }

    /// Takes the result of an attempt. Returns the error of one that failed; an outdated result is dropped.
    pub(super) fn end_attempt(
        &mut self,
        attempt: &ConnectAttempt,
        result: Result<PublisherEnd<E>, ClientError>,
        now: Instant,
    ) -> Option<ClientError> {
        if self.attempt != attempt.number {
            return None;
        }
        match result {
            Ok(channel) => {
                self.state = ConnectionState::Up { channel, ready: false };
                None
            }
            Err(error) => {
                self.drop_channel((attempt.wait * 2).clamp(RETRY_MIN, RETRY_MAX), now);
                Some(error)
            }
        }
    }

    /// Drops the connection and forgets the batches on it. The next attempt is due after `wait`.
    pub(super) fn drop_channel(&mut self, wait: Duration, now: Instant) {
        self.state = ConnectionState::Down { retry_at: now + wait, wait };
        self.attempt += 1;
        self.queue.clear();
        self.written_bytes = 0;
        self.reading.clear();
    }

    /// Open channel to the broker, if there is one.
    pub(super) fn channel_mut(&mut self) -> Option<&mut PublisherEnd<E>> {
        match &mut self.state {
            ConnectionState::Up { channel, .. } => Some(channel),
            ConnectionState::Down { .. } | ConnectionState::Connecting => None,
        }
    }

    /// Returns true while there is a connection.
    pub(super) fn is_up(&self) -> bool {
        matches!(self.state, ConnectionState::Up { .. })
    }

    /// Returns true once the broker takes batches.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.state, ConnectionState::Up { ready: true, .. })
    }

    /// Records that the broker takes batches.
    pub(super) fn set_ready(&mut self) {
        if let ConnectionState::Up { ready, .. } = &mut self.state {
            *ready = true;
        }
    }
}
