//! Ordering stages that a polling thread runs to completion in its loop.

use crate::delegation::Delegation;
use crate::replica::completion::CompletionStage;
use crate::sequencer::{GROUP_BATCHES, Sequencer};
use crossbeam_channel::Receiver;
use embarcadero_cxl::Native;
use embarcadero_os::Times;
use std::sync::Arc;

/// Largest number of batches that the delegation takes at a time.
const DELEGATION_BATCHES: usize = 256;

/// Stages that only the leader has.
pub(crate) struct LeaderStages {
    /// Stage that gives batches their place in the global order.
    pub(crate) sequencer: Sequencer<Native>,
    /// Stage that counts how far batches are durable.
    pub(crate) completion: CompletionStage<Native>,
    /// Token of the candidate, which sees by its drop that the stages have ended.
    #[expect(dead_code, reason = "held for its drop")]
    pub(crate) in_use: Arc<()>,
}

/// Stages of one thread. The broker's first worker has all of them, the others have none.
#[derive(Default)]
pub(crate) struct Stages {
    /// Stage that puts batches into local order.
    pub(crate) delegation: Option<Delegation<Native>>,
    /// Channel on which the leader's stages come when this broker becomes the leader.
    pub(crate) promoted: Option<Receiver<LeaderStages>>,
    leader: Option<LeaderStages>,
}

/// Error: a later process has this broker's id.
pub(super) struct Superseded;

impl Stages {
    /// Returns the stages of a broker's first worker.
    #[must_use]
    pub(crate) fn new(delegation: Delegation<Native>, promoted: Receiver<LeaderStages>) -> Self {
        Self { delegation: Some(delegation), promoted: Some(promoted), leader: None }
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

    /// Moves the heartbeat, and runs what is due every few milliseconds. `stalled` says that publishers wait for room.
    ///
    /// # Errors
    /// [`Superseded`], when the broker must stop.
    pub(super) fn maintain(&mut self, now: Times, stalled: bool) -> Result<(), Superseded> {
        if let Some(delegation) = &mut self.delegation {
            if delegation.is_superseded() {
                return Err(Superseded);
            }
            delegation.beat();
            if stalled {
                delegation.stalled();
            }
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
