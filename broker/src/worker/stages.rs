//! The ordering stages that a polling thread runs to completion in its loop.

use crate::delegation::Delegation;
use crate::replica::completion::CompletionStage;
use crate::sequencer::{GROUP_BATCHES, Sequencer};
use crossbeam_channel::Receiver;
use embarcadero_cxl::Native;
use std::sync::Arc;

/// Batches that the delegation takes at a time.
const DELEGATION_BATCHES: usize = 256;

/// The stages that only the leader has.
pub struct LeaderStages {
    /// Global order.
    pub sequencer: Sequencer<Native>,
    /// The count of what is durable.
    pub completion: CompletionStage<Native>,
    /// Dropped when the stages end.
    pub in_use: Arc<()>,
}

/// The stages of one thread: all of the broker's in its first, none in the others.
#[derive(Default)]
pub struct Stages {
    /// Local order.
    pub delegation: Option<Delegation<Native>>,
    /// Where global order and the count of what is durable come from, when this broker becomes the leader.
    pub promoted: Option<Receiver<LeaderStages>>,
    leader: Option<LeaderStages>,
}

/// A later process has this broker's place.
pub(super) struct Superseded;

impl Stages {
    /// The stages of a broker's first thread.
    #[must_use]
    pub fn new(delegation: Delegation<Native>, promoted: Receiver<LeaderStages>) -> Self {
        Self { delegation: Some(delegation), promoted: Some(promoted), leader: None }
    }

    /// Orders what has come. True when anything moved.
    pub(super) fn poll(&mut self, now_us: u64) -> bool {
        let mut moved = false;
        if let Some(delegation) = &mut self.delegation {
            moved |= delegation.poll(now_us, DELEGATION_BATCHES) > 0;
        }
        if let Some(LeaderStages { sequencer, completion, .. }) = &mut self.leader {
            moved |= sequencer.poll(now_us, GROUP_BATCHES) > 0;
            moved |= completion.poll(now_us) > 0;
        }
        moved
    }

    /// Says that this broker lives, and does what has time. `stalled` if publishers wait for room.
    pub(super) fn maintain(&mut self, now_us: u64, stalled: bool) -> Result<(), Superseded> {
        if let Some(delegation) = &mut self.delegation {
            if delegation.is_superseded() {
                return Err(Superseded);
            }
            delegation.beat();
            if stalled {
                delegation.stalled();
            }
            delegation.maintain(now_us);
        }
        if self.leader.as_ref().is_some_and(|leader| !leader.sequencer.leads()) {
            self.leader = None;
        }
        if self.leader.is_none() {
            self.leader = self.promoted.as_ref().and_then(|promoted| promoted.try_recv().ok());
        }
        if let Some(LeaderStages { sequencer, completion, .. }) = &mut self.leader {
            sequencer.maintain(now_us);
            completion.maintain(sequencer.awaited_topics());
        }
        Ok(())
    }
}
