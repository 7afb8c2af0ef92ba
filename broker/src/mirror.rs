//! The mirror: a second region, on another unit of memory, in which the leader keeps a copy of what it writes: topics,
//! sessions, and the global orders. Should the region be lost, it says what was in it to the last message that was
//! acknowledged ([`crate::replica::restore`]).
//!
//! It has the tables of a region and is written by the same code, each leader in its own area. What the mirror shows, the
//! region shows already or is about to; what is acknowledged, both have.

use crate::sequencer::TakeoverError;
use crate::spares::spare_segments;
use embarcadero_cxl::layout::{LeaderArea, RegionRole, SESSION_WINDOW};
use embarcadero_cxl::leadership::{activate_term, claim_term, last_active};
use embarcadero_cxl::order_index::{
    IndexOptions, OrderIndexReader, OrderIndexWriter, ReadError, StreamId, read_extent_at,
};
use embarcadero_cxl::region::{Region, RegionError};
use embarcadero_cxl::segment::{PartitionAllocator, SegmentAllocator};
use embarcadero_cxl::session_table::{
    Commit, Session, SessionCommit, publish_commits, publish_session, read_commit_at, read_progress_at, read_session_at,
};
use embarcadero_cxl::takeover::copy_predecessor;
use embarcadero_cxl::topic_table::{TopicConfig, live_topics_at, publish_topic};
use embarcadero_cxl::{Damage, Fabric, Site};
use embarcadero_wire::{Stream, Term};
use std::sync::Arc;

/// Checks that `mirror` is the mirror of `region`.
///
/// # Errors
/// What differs.
pub fn check<F: Fabric>(region: &Region<F>, mirror: &Region<F>) -> Result<(), RegionError> {
    region.require_role(RegionRole::Mirrored)?;
    mirror.require_role(RegionRole::Mirror)?;
    mirror.require_uuid(region.uuid())
}

/// The mirror, as the leader writes it.
pub struct Mirror<F: Fabric> {
    region: Region<F>,
    area: LeaderArea,
    term: Term,
    pool: Arc<dyn SegmentAllocator>,
}

impl<F: Fabric> Mirror<F> {
    /// Takes over from the leader before, as in the region itself. That may be another one here: it came so far, and no further.
    ///
    /// # Errors
    /// [`TakeoverError`].
    pub fn take_over(region: Region<F>, area: LeaderArea, term: Term) -> Result<Self, TakeoverError> {
        let pool: Arc<dyn SegmentAllocator> = Arc::new(PartitionAllocator::of_broker(region.clone(), area.0));
        // Whoever it was may go on, unless it was this broker.
        let mut spares = match last_active(&region) {
            Some((led, _)) if led != area => spare_segments(&region, &*pool)?,
            _ => Vec::new(),
        };
        claim_term(&region, area, term);
        let own = copy_predecessor(&region, area).from.is_none_or(|(from, _)| from == area);
        let mirror = Self { region, area, term, pool };
        for config in live_topics_at(&mirror.region, area) {
            if config.order.is_global() && !own {
                mirror.open(&config)?.replace_last(&mut spares)?;
            }
        }
        for spare in spares {
            let _ = mirror.pool.release(spare);
        }
        activate_term(&mirror.region, area, term);
        Ok(mirror)
    }

    /// The copy of a topic's order.
    ///
    /// # Errors
    /// [`Damage`] in the mirror.
    pub fn open(&self, config: &TopicConfig) -> Result<OrderIndexWriter<F>, Damage> {
        let copy = IndexOptions {
            id: StreamId { topic: config.id, stream: Stream::GLOBAL },
            incarnation: config.incarnation,
            writer: self.area,
            term: self.term,
        };
        OrderIndexWriter::open(self.region.clone(), copy, Arc::clone(&self.pool))
    }

    /// The copy of a topic's order, with everything that `index` has.
    ///
    /// # Errors
    /// [`TakeoverError`] when it has no room for that, or is damaged.
    pub fn follow(
        &self,
        config: &TopicConfig,
        index: &OrderIndexWriter<F>,
    ) -> Result<OrderIndexWriter<F>, TakeoverError> {
        let mut copy = self.open(config)?;
        let follows = (index.earliest_offset()..=index.next_offset()).contains(&copy.next_offset());
        if !follows {
            // It is new, or was away.
            copy.abandon();
            copy.begin_at(index.earliest_offset());
        }
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

    /// Copies what is known of sessions.
    pub fn follow_sessions(&self, from: &Region<F>) {
        for slot in from.geometry().sessions() {
            let Some(session) = read_session_at(from, self.area, slot).used() else { continue };
            let expected = read_progress_at(from, self.area, slot);
            for sequence in expected.saturating_sub(SESSION_WINDOW)..expected + SESSION_WINDOW {
                if let Commit::At(record) = read_commit_at(from, self.area, slot, sequence) {
                    self.commit(&[SessionCommit { slot, record, expected }]);
                }
            }
            self.session(&session);
        }
    }

    /// Writes a topic's line.
    pub fn topic(&self, config: &TopicConfig) {
        publish_topic(&self.region, self.area, config);
    }

    /// Writes a session's line.
    pub fn session(&self, session: &Session) {
        publish_session(&self.region, self.area, session);
    }

    /// Writes commit records.
    pub fn commit(&self, commits: &[SessionCommit]) {
        publish_commits(&self.region, self.area, commits);
        self.region.fabric().fence(Site::RecordFlush);
    }
}

/// A topic, as a mirror has it.
#[derive(Clone, Debug)]
pub struct MirroredTopic {
    /// As it was.
    pub config: TopicConfig,
    /// Offset of the next message.
    pub next_offset: u64,
    /// Offset of the first message of each batch that was kept, and how many it has. They follow each other.
    pub batches: Vec<(u64, u32)>,
    /// Its sessions, and what each expected next.
    pub sessions: Vec<(Session, u64)>,
}

/// What a mirror says of the topics with a global order.
///
/// # Errors
/// [`ReadError`]: its memory is damaged.
pub fn read<F: Fabric>(mirror: &Region<F>) -> Result<Vec<MirroredTopic>, ReadError> {
    let Some((area, _)) = last_active(mirror) else { return Ok(Vec::new()) };
    let sessions: Vec<(Session, u64)> = mirror
        .geometry()
        .sessions()
        .filter_map(|slot| Some((read_session_at(mirror, area, slot).used()?, read_progress_at(mirror, area, slot))))
        .collect();
    let mut topics = Vec::new();
    for config in live_topics_at(mirror, area).into_iter().filter(|config| config.order.is_global()) {
        let id = StreamId { topic: config.id, stream: Stream::GLOBAL };
        let extent = read_extent_at(mirror, area, id);
        let mut reader = OrderIndexReader::new(mirror.clone(), id);
        let mut batches = Vec::new();
        // The word for the next offset in the tail may be ahead of it: what counts is where the last batch ends.
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
