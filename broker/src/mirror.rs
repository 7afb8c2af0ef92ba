//! Mirror of a region: a second region, on another unit of memory.
//!
//! The leader keeps a copy there of what it writes: topics, sessions, and the global orders. If the region is lost, the
//! mirror tells what was in it, to the last message that was acknowledged ([`crate::replica::restore`]).
//!
//! The mirror has the tables of a region and is written by the same code, each leader in its own area. What the mirror
//! shows, the region shows too, or is about to. Whatever is acknowledged is in both.

use crate::takeover::TakeoverError;
use embarcadero_cxl::layout::{LeaderArea, RegionRole, SESSION_WINDOW, SessionState};
use embarcadero_cxl::leadership::{activate_term, claim_term, last_active};
use embarcadero_cxl::order_index::{
    IndexOptions, OrderIndexReader, OrderIndexWriter, ReadError, StreamId, read_extent_at,
};
use embarcadero_cxl::region::{Region, RegionError};
use embarcadero_cxl::segment::{PartitionAllocator, SegmentAllocator};
use embarcadero_cxl::session_table::{
    Commit, Progress, Session, SessionCommit, publish_commits, publish_session, read_commit_at, read_progress_at,
    read_session_at, store_progress,
};
use embarcadero_cxl::takeover::copy_predecessor;
use embarcadero_cxl::topic_table::{TopicConfig, TopicRows, publish_topic};
use embarcadero_cxl::{Damage, Fabric, Row, Site};
use embarcadero_wire::{SessionSlot, Stream, Term};
use std::sync::Arc;

/// Checks that `mirror` is the mirror of `region`.
///
/// # Errors
/// [`RegionError::Role`] or [`RegionError::Uuid`].
pub(crate) fn check<F: Fabric>(region: &Region<F>, mirror: &Region<F>) -> Result<(), RegionError> {
    region.require_role(RegionRole::Mirrored)?;
    mirror.require_role(RegionRole::Mirror)?;
    mirror.require_uuid(region.uuid())
}

/// Mirror of a region, as the leader writes it.
pub(crate) struct Mirror<F: Fabric> {
    region: Region<F>,
    area: LeaderArea,
    term: Term,
    pool: Arc<dyn SegmentAllocator>,
}

impl<F: Fabric> Mirror<F> {
    /// Takes over the mirror from the leader that wrote it last, as in the region itself. That may not be the region's
    /// last leader: a leader that died early never wrote to the mirror. [`Mirror::activate`] completes it.
    ///
    /// # Errors
    /// [`TakeoverError`].
    pub(crate) fn take_over(region: Region<F>, area: LeaderArea, term: Term) -> Result<Self, TakeoverError> {
        let pool: Arc<dyn SegmentAllocator> = Arc::new(PartitionAllocator::of_broker(region.clone(), area.0));
        claim_term(&region, area, term);
        let own = copy_predecessor(&region, area).from.is_none_or(|(from, _)| from == area);
        let mirror = Self { region, area, term, pool };
        for config in live_topics(&mirror.region, area)? {
            if !config.order.is_global() || own {
                continue;
            }
            // Another broker that led may go on. What is not whole is written again by `follow`.
            if let Ok(mut copy) = mirror.open(&config)
                && copy.seal_last()
            {
                // No batches take memory of a mirror, so that there is room.
                copy.make_room()?;
            }
        }
        Ok(mirror)
    }

    /// Completes the takeover: who reads the mirror follows this leader. The mirror must have all that the region has.
    pub(crate) fn activate(&self) {
        activate_term(&self.region, self.area, self.term);
    }

    /// Opens the copy of a topic's order.
    ///
    /// # Errors
    /// [`Damage`] in the mirror.
    pub(crate) fn open(&self, config: &TopicConfig) -> Result<OrderIndexWriter<F>, Damage> {
        OrderIndexWriter::open(self.region.clone(), self.copy_of(config), Arc::clone(&self.pool))
    }

    fn copy_of(&self, config: &TopicConfig) -> IndexOptions {
        IndexOptions {
            id: StreamId { topic: config.id, stream: Stream::GLOBAL },
            incarnation: config.incarnation,
            writer: self.area,
            term: self.term,
        }
    }

    /// Opens the copy of a topic's order, and brings it up to everything that `index` has.
    ///
    /// # Errors
    /// [`TakeoverError`] when the mirror has too little room, or is damaged.
    pub(crate) fn follow(
        &self,
        config: &TopicConfig,
        index: &OrderIndexWriter<F>,
    ) -> Result<OrderIndexWriter<F>, TakeoverError> {
        let whole = match self.open(config) {
            // Another copy is new, or missed part of the order.
            Ok(copy) => (index.earliest_offset()..=index.next_offset()).contains(&copy.next_offset()).then_some(copy),
            Err(damage) => {
                // A predecessor that goes on may write its copy anew while this leader copies its tail and directory.
                tracing::warn!(topic = config.name, %damage, "the mirror's copy of the order is written again");
                None
            }
        };
        let mut copy = whole.unwrap_or_else(|| {
            // The segments that the copy had are orphaned: a later term may have taken them over already.
            let mut anew =
                OrderIndexWriter::open_anew(self.region.clone(), self.copy_of(config), Arc::clone(&self.pool));
            anew.begin_at(index.earliest_offset());
            anew
        });
        for position in index.trimmed()..index.next() {
            let Some(entry) = index.entry(position)? else { continue };
            if entry.first_offset >= copy.next_offset() {
                copy.make_room()?;
                copy.append(entry);
            }
        }
        copy.write_back_entries();
        copy.publish_tail(self.term);
        copy.fence();
        Ok(copy)
    }

    /// Copies every session of this leader's area in the region `from`, with its commit records. A session whose row in
    /// the region is damaged cannot go on there, and is not copied; the log names it.
    pub(crate) fn follow_sessions(&self, from: &Region<F>) {
        for slot in from.geometry().sessions() {
            let session = match read_session_at(from, self.area, slot) {
                Row::Used(session) => session,
                Row::Unused | Row::Unsettled => continue,
                Row::Damaged(damage) => {
                    tracing::error!(%slot, %damage, "the session is not copied to the mirror");
                    continue;
                }
            };
            let progress @ Progress { expected, .. } = read_progress_at(from, self.area, slot);
            for sequence in expected.saturating_sub(SESSION_WINDOW)..expected.saturating_add(SESSION_WINDOW) {
                match read_commit_at(from, self.area, slot, sequence) {
                    Ok(Commit::At(record)) => self.commit(&[SessionCommit { slot, record, expected }]),
                    Ok(Commit::Unknown | Commit::Forgotten(_)) => {}
                    Err(damage) => tracing::error!(%slot, %damage, "a commit record is not copied to the mirror"),
                }
            }
            self.session(&session);
            self.progress(slot, progress);
        }
    }

    /// Writes a topic's configuration.
    pub(crate) fn topic(&self, config: &TopicConfig) {
        publish_topic(&self.region, self.area, config);
    }

    /// Writes a session's identity and state.
    pub(crate) fn session(&self, session: &Session) {
        publish_session(&self.region, self.area, session);
    }

    /// Writes a slot's progress. It is in memory when this returns.
    pub(crate) fn progress(&self, slot: SessionSlot, progress: Progress) {
        store_progress(&self.region, self.area, slot, progress);
        self.region.fabric().fence(Site::RecordFlush);
    }

    /// Writes commit records. They are in memory when this returns.
    pub(crate) fn commit(&self, commits: &[SessionCommit]) {
        publish_commits(&self.region, self.area, commits);
        self.region.fabric().fence(Site::RecordFlush);
    }
}

/// Reason why a mirror cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MirrorError {
    /// The row of a topic or of a session is damaged.
    #[error(transparent)]
    Row(#[from] Damage),
    /// An order index cannot be read.
    #[error(transparent)]
    Index(#[from] ReadError),
}

/// Reads the topics of a leader's area in a mirror that are live.
///
/// # Errors
/// [`Damage`] of the first row that has some.
fn live_topics<F: Fabric>(mirror: &Region<F>, area: LeaderArea) -> Result<Vec<TopicConfig>, Damage> {
    let TopicRows { live, damaged } = TopicRows::read(mirror, area);
    damaged.first().map_or(Ok(live), |(_, damage)| Err(*damage))
}

/// Topic, as a mirror has it.
#[derive(Clone, Debug)]
pub struct MirroredTopic {
    /// Configuration of the topic.
    pub config: TopicConfig,
    /// Offset of the next message.
    pub next_offset: u64,
    /// Offset of the first message of each batch that is kept, and the number of its messages. Each batch begins where
    /// the one before it ends.
    pub batches: Vec<(u64, u32)>,
    /// Sessions of the topic, and the sequence that each expected next.
    pub sessions: Vec<(Session, u64)>,
}

/// Reads the topics with a global order from a mirror.
///
/// # Errors
/// [`MirrorError`] when the mirror's memory is damaged.
pub fn read<F: Fabric>(mirror: &Region<F>) -> Result<Vec<MirroredTopic>, MirrorError> {
    let Some((area, _)) = last_active(mirror) else { return Ok(Vec::new()) };
    let mut sessions = Vec::new();
    for slot in mirror.geometry().sessions() {
        match read_session_at(mirror, area, slot) {
            // One whose slot is about to get another client is nobody's.
            Row::Used(session) if session.state == SessionState::Free => {}
            Row::Used(session) => {
                let progress = read_progress_at(mirror, area, slot);
                sessions.push((session, progress.of(&session).unwrap_or(session.committed)));
            }
            // A torn row is that of a session which was about to change, and of which no client was told.
            Row::Unused | Row::Unsettled => {}
            Row::Damaged(damage) => return Err(damage.into()),
        }
    }
    let mut topics = Vec::new();
    for config in live_topics(mirror, area)?.into_iter().filter(|config| config.order.is_global()) {
        let id = StreamId { topic: config.id, stream: Stream::GLOBAL };
        let extent = read_extent_at(mirror, area, id);
        extent.batches(mirror)?;
        let mut reader = OrderIndexReader::new(mirror.clone(), id);
        let mut batches = Vec::new();
        // The tail's next offset may be ahead of its last entry. The end of the last batch is certain.
        let mut next_offset = extent.earliest_offset;
        for position in extent.trimmed..reader.poll() {
            let entry = reader.read(position)?;
            let end = entry.first_offset.checked_add(entry.message_count.into());
            next_offset = end
                .filter(|_| entry.first_offset == next_offset || batches.is_empty())
                .ok_or_else(|| reader.corrupt(position, "first_offset", entry.first_offset))?;
            batches.push((entry.first_offset, entry.message_count));
        }
        let of_topic = |(session, _): &&(Session, u64)| {
            (session.topic, session.topic_incarnation) == (config.id, config.incarnation)
        };
        let sessions = sessions.iter().filter(of_topic).copied().collect();
        topics.push(MirroredTopic { config, next_offset, batches, sessions });
    }
    Ok(topics)
}
