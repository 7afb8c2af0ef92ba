//! Ordering stages that a polling thread runs to completion in its loop.

use crate::delegation::Delegation;
use crate::replica::completion::CompletionStage;
use crate::sequencer::{GROUP_BATCHES, Sequencer};
use crossbeam_channel::Receiver;
use embarcadero_cxl::Fabric;
use embarcadero_os::Times;
use std::sync::Arc;

/// Largest number of batches that the delegation takes at a time.
const DELEGATION_BATCHES: usize = 256;

/// Stages that only the leader has.
pub struct LeaderStages<F: Fabric> {
    /// Stage that gives batches their place in the global order.
    pub sequencer: Sequencer<F>,
    /// Stage that counts how far batches are durable.
    pub completion: CompletionStage<F>,
    /// Token of the candidate, which sees by its drop that the stages have ended.
    pub in_use: Arc<()>,
}

/// Stages of one thread. The broker's first worker has all of them, the others have none.
pub struct Stages<F: Fabric> {
    /// Stage that puts batches into local order.
    pub delegation: Option<Delegation<F>>,
    /// Channel on which the leader's stages come when this broker becomes the leader.
    pub promoted: Option<Receiver<LeaderStages<F>>>,
    leader: Option<LeaderStages<F>>,
}

/// Error: a later process has this broker's id.
pub(super) struct Superseded;

impl<F: Fabric> Stages<F> {
    /// Returns the stages of a worker that orders nothing.
    #[must_use]
    pub fn none() -> Self {
        Self { delegation: None, promoted: None, leader: None }
    }

    /// Returns the stages of a broker's first worker.
    #[must_use]
    pub fn new(delegation: Delegation<F>, promoted: Receiver<LeaderStages<F>>) -> Self {
        Self { delegation: Some(delegation), promoted: Some(promoted), leader: None }
    }

    /// Returns the stage that gives batches their place in the global order, while this broker leads.
    #[must_use]
    pub fn sequencer(&self) -> Option<&Sequencer<F>> {
        self.leader.as_ref().map(|leader| &leader.sequencer)
    }

    /// Orders the batches that have come. Returns true when anything moved.
    pub(super) fn poll(&mut self, now: Times) -> bool {
        let mut moved = false;
        if let Some(delegation) = &mut self.delegation {
            moved |= delegation.poll(now.wall_us, DELEGATION_BATCHES) > 0;
        }
        if let Some(LeaderStages { sequencer, completion, .. }) = &mut self.leader {
            moved |= sequencer.poll(now, GROUP_BATCHES) > 0;
            moved |= completion.poll(now.steady_us) > 0;
        }
        moved
    }

    /// Moves the heartbeat, and runs what is due every few milliseconds.
    ///
    /// # Errors
    /// [`Superseded`], when the broker must stop.
    pub(super) fn maintain(&mut self, now: Times) -> Result<(), Superseded> {
        if let Some(delegation) = &mut self.delegation {
            if delegation.is_superseded() {
                return Err(Superseded);
            }
            delegation.beat();
            delegation.maintain(now);
        }
        if self.leader.as_ref().is_some_and(|leader| !leader.sequencer.leads()) {
            self.leader = None;
        }
        if self.leader.is_none() {
            self.leader = self.promoted.as_ref().and_then(|promoted| promoted.try_recv().ok());
        }
        if let Some(LeaderStages { sequencer, completion, .. }) = &mut self.leader {
            sequencer.maintain(now);
            completion.maintain(sequencer.awaited_topics());
        }
        Ok(())
    }
}
