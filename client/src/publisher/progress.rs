//! Waiting for acknowledgements, a look at a time.

use super::polled::{PolledPublisher, SealTrigger};
use crate::environment::Environment;
use crate::error::ClientError;
use crate::silence::Silence;
use embarcadero_os::Clock;
use std::sync::atomic::Ordering;

/// Watch over acknowledgements, which notices when they stop coming.
pub struct Progress {
    acknowledged: u64,
    silence: Silence,
}

impl Progress {
    /// Begins to watch.
    pub fn new<E: Environment>(publisher: &PolledPublisher<E>) -> Self {
        let environment = &publisher.environment;
        let limit = environment.config().progress_timeout();
        Self {
            acknowledged: publisher.acknowledged.load(Ordering::Acquire),
            silence: Silence::new(limit, environment.clock().instant()),
        }
    }

    /// Looks whether anything was acknowledged since the last look.
    ///
    /// # Errors
    /// [`ClientError::TimedOut`] once nothing was for too long.
    pub fn look<E: Environment>(&mut self, publisher: &PolledPublisher<E>) -> Result<(), ClientError> {
        let now = publisher.environment.clock().instant();
        let acknowledged = publisher.acknowledged.load(Ordering::Acquire);
        if acknowledged != self.acknowledged {
            self.acknowledged = acknowledged;
            self.silence.restart(now);
            return Ok(());
        }
        self.silence.look(now);
        if self.silence.is_too_long() {
            let cause = publisher.sender().trouble.clone();
            return Err(ClientError::timed_out(publisher.environment.config().progress_timeout(), cause));
        }
        Ok(())
    }
}

/// Flush that is under way.
pub struct Flush(Progress);

impl Flush {
    /// Sends all messages, and begins to wait for their acknowledgements.
    pub fn begin<E: Environment>(publisher: &PolledPublisher<E>) -> Self {
        let progress = Progress::new(publisher);
        publisher.seal_open(SealTrigger::Flushed);
        Self(progress)
    }

    /// Moves bytes. Returns true once everything is acknowledged; at acknowledgement level 0, handed to the network.
    ///
    /// # Errors
    /// The error that ended the publisher, or [`ClientError::TimedOut`] when acknowledgements stop coming.
    pub fn turn<E: Environment>(&mut self, publisher: &PolledPublisher<E>) -> Result<bool, ClientError> {
        {
            let mut sender = publisher.sender();
            publisher.drive(&mut sender);
            if sender.in_flight.is_empty() {
                return Ok(true);
            }
            if let Some(error) = &sender.fatal {
                return Err(error.clone());
            }
        }
        self.0.look(publisher)?;
        Ok(false)
    }
}
