//! Replicator: copies batches from CXL memory to this broker's disk, and publishes its progress.

use super::assign::{Choice, replicas_of};
use super::format::{GROUP_RECORDS, Group, Identity, Indexed, group_bytes, peek_group, write_group};
use super::medium::Medium;
use super::store::{StoreError, StoreOptions, StreamLog};
use crate::archive::{ArchiveKey, Catalog};
use crate::topics::{Topic, TopicTable};
use embarcadero_cxl::broker_table::{last_incarnation, publish_replica_state, read_replica_state};
use embarcadero_cxl::layout::ReplicaState;
use embarcadero_cxl::leadership::{UnknownLeader, read_leader};
use embarcadero_cxl::order_index::{OrderIndexReader, ReadError, StreamId, read_extent};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::replication::{Completion, Replication, publish_replicated, read_completion, read_replicated};
use embarcadero_cxl::{Damage, Fabric, Guard, RegionOffset, Site};
use embarcadero_os::buffer::Buffer;
use embarcadero_wire::{BrokerId, Incarnation, Stream};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// Most index entries that are looked at for one group.
const SCAN_ENTRIES: u64 = 64 << 10;

/// Returns the brokers whose replica runs, among those that the leader takes for alive, one bit each.
///
/// # Errors
/// [`UnknownLeader`].
pub(crate) fn running_replicas<F: Fabric>(region: &Region<F>) -> Result<u64, UnknownLeader> {
    live_replicas(region, |state| state == Ok(ReplicaState::Running))
}

/// Returns the brokers whose replica may run: its state is damaged, or says so.
///
/// # Errors
/// [`UnknownLeader`].
pub(crate) fn possible_replicas<F: Fabric>(region: &Region<F>) -> Result<u64, UnknownLeader> {
    live_replicas(region, |state| state.is_err() || state == Ok(ReplicaState::Running))
}

fn live_replicas<F: Fabric>(
    region: &Region<F>,
    counts: impl Fn(Result<ReplicaState, Damage>) -> bool,
) -> Result<u64, UnknownLeader> {
    let live = read_leader(region)?.broker_mask;
    let brokers = region.geometry().brokers().filter(|broker| live & (1 << broker.0) != 0);
    let replicas = brokers.filter(|broker| counts(read_replica_state(region, *broker)));
    Ok(replicas.fold(0, |mask, broker| mask | 1 << broker.0))
}

/// Withdraws what an earlier process of this broker published about its disk, which may be another disk now. A replica
/// that runs publishes its progress again once it has read the disk.
pub fn disclaim<F: Fabric>(region: &Region<F>, broker: BrokerId) {
    publish_replica_state(region, broker, ReplicaState::None);
    for topic in region.geometry().topics() {
        for source in region.geometry().brokers() {
            let own = Replication { topic, replica: broker, source };
            if read_replicated(region, own) > 0 {
                publish_replicated(region, own, 0);
            }
        }
    }
}

/// Options of a replica.
#[derive(Clone, Copy, Debug)]
pub struct ReplicaOptions {
    /// Bytes of a full group.
    pub group_bytes: u64,
    /// Time without progress after which others take over from a replica, microseconds.
    pub patience_us: u64,
    /// Options of its files.
    pub store: StoreOptions,
}

/// Function that opens the medium of a stream's files.
pub type OpenMedium = Box<dyn Fn(&Identity) -> Box<dyn Medium> + Send>;

/// Replica that a task belongs to.
struct Replica<'a, F> {
    region: &'a Region<F>,
    broker: BrokerId,
    options: &'a ReplicaOptions,
}

/// Memory that is used again for every group.
struct Scratch {
    buffer: Buffer,
    batches: Vec<Indexed>,
}

/// Positions at which the batches of some sources are missing on this disk.
struct Due {
    positions: Range<u64>,
    /// Sources whose batches are missing, one bit each.
    sources: u32,
}

/// Stream that this broker replicates.
struct Task<F: Fabric> {
    topic: Arc<Topic<F>>,
    stream: StreamId,
    reader: OrderIndexReader<F>,
    /// Pin on the topic's board, which is for the stream that this broker serves. Others' streams have no pin.
    pin: Option<usize>,
    log: StreamLog,
    catalog: Arc<Catalog>,
    /// Brokers whose batches this one copies, one bit each.
    sources: u32,
    /// End of the newest group.
    forward: u64,
    /// Position at which to go on after retention overtook the replica. Batches before it come later, if they are still
    /// there.
    resume: u64,
    /// Position that was last published for each source.
    said: Vec<Option<u64>>,
}

impl<F: Fabric> Drop for Task<F> {
    fn drop(&mut self) {
        if let Some(pin) = self.pin {
            self.topic.pins.unregister(pin);
        }
        // Nobody relies on a disk that failed.
        self.catalog.set(key(&self.topic, self.stream), None);
    }
}

/// Returns the key of a stream in the catalog.
fn key<F: Fabric>(topic: &Topic<F>, stream: StreamId) -> ArchiveKey {
    ArchiveKey { topic: topic.config.id, incarnation: topic.config.incarnation, stream: stream.stream }
}

/// This broker as a replica of its own and others' batches.
pub struct Replicator<F: Fabric> {
    region: Region<F>,
    broker: BrokerId,
    topics: Arc<TopicTable<F>>,
    open: OpenMedium,
    options: ReplicaOptions,
    tasks: Vec<Task<F>>,
    scratch: Scratch,
    /// True once the disk failed.
    failed: bool,
    /// Batches on this broker's disk, for others to read.
    catalog: Arc<Catalog>,
    /// Position at which each preceding replica was, and the time at which it got there, microseconds.
    watched: BTreeMap<Replication, (u64, u64)>,
}

impl<F: Fabric> Replicator<F> {
    /// Returns a replicator without tasks. Other brokers count on it from now on.
    ///
    /// # Errors
    /// The error of the system when there is too little memory.
    pub fn new(topics: Arc<TopicTable<F>>, open: OpenMedium, options: ReplicaOptions) -> std::io::Result<Self> {
        let (region, broker) = (topics.region().clone(), topics.broker());
        let buffer = Buffer::new(options.group_bytes as usize)?;
        disclaim(&region, broker);
        publish_replica_state(&region, broker, ReplicaState::Running);
        Ok(Self {
            region,
            broker,
            topics,
            open,
            options,
            tasks: Vec::new(),
            scratch: Scratch { buffer, batches: Vec::with_capacity(GROUP_RECORDS) },
            failed: false,
            catalog: Arc::new(Catalog::new(true)),
            watched: BTreeMap::new(),
        })
    }

    /// Returns the batches on this broker's disk, for others to read.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// Returns true once the disk failed. The replicator does nothing any more then.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Takes up the streams that fall to this broker, and drops those of deleted topics. Call it every few
    /// milliseconds.
    pub fn maintain(&mut self, now_us: u64) {
        if self.failed {
            return;
        }
        for index in (0..self.tasks.len()).rev() {
            if self.tasks[index].topic.is_deleted() {
                let mut task = self.tasks.swap_remove(index);
                if let Err(error) = task.log.destroy() {
                    tracing::warn!(%error, "the files of a deleted topic stay");
                }
                let key = key(&task.topic, task.stream);
                drop(task);
                self.catalog.forget(key);
            }
        }
        let Ok(usable) = running_replicas(&self.region) else { return };
        for topic in self.topics.opened() {
            if topic.config.replication_factor < 2 || topic.is_deleted() {
                continue;
            }
            let sources = self.sources_of(&topic, usable, now_us);
            let streams: Vec<(Stream, u32)> = if topic.config.order.is_global() {
                vec![(Stream::GLOBAL, sources)]
            } else {
                let all = self.region.geometry().brokers();
                all.map(|broker| (Stream::of(broker), sources & 1 << broker.0)).collect()
            };
            for (stream, sources) in streams {
                let id = StreamId { topic: topic.config.id, stream };
                if let Some(task) = self.tasks.iter_mut().find(|task| task.stream == id) {
                    task.sources = sources;
                } else if sources != 0 || self.has_files(&topic, id) {
                    self.begin(&topic, id, sources);
                }
            }
        }
    }

    /// Returns true when an earlier process left files of a stream, which others may want to read.
    fn has_files(&mut self, topic: &Topic<F>, stream: StreamId) -> bool {
        let key = key(topic, stream);
        if self.catalog.knows(key) {
            return false;
        }
        // A directory that cannot be listed may have files: whoever opens it gets the error.
        let found = !(self.open)(&self.identity(topic, stream)).list().is_ok_and(|files| files.is_empty());
        if !found {
            self.catalog.set(key, None);
        }
        found
    }

    fn identity(&self, topic: &Topic<F>, stream: StreamId) -> Identity {
        Identity { region: *self.region.uuid().as_bytes(), topic: topic.config.clone(), stream: stream.stream }
    }

    /// Returns the brokers whose batches of a topic this one replicates, one bit each.
    fn sources_of(&mut self, topic: &Topic<F>, usable: u64, now_us: u64) -> u32 {
        let brokers = self.region.geometry().max_brokers;
        let copies = u32::from(topic.config.replication_factor) - 1;
        let mut mine = 0;
        for source in self.region.geometry().brokers() {
            if last_incarnation(&self.region, source) == Incarnation::NONE {
                continue;
            }
            let mut usable = usable;
            // Replicas that stand still do not count. Each that is left out makes room for another.
            loop {
                let chosen: Vec<BrokerId> = replicas_of(source, Choice { brokers, usable, copies }).collect();
                let me = self.broker;
                let mut others = chosen.iter().copied().filter(|replica| *replica != me);
                let id = topic.config.id;
                let stuck = others.find(|replica| {
                    let other = Replication { topic: id, replica: *replica, source };
                    self.stands_still(topic, other, now_us)
                });
                match stuck {
                    Some(replica) => usable &= !(1 << replica.0),
                    None => {
                        mine |= u32::from(chosen.contains(&self.broker)) << source.0;
                        break;
                    }
                }
            }
        }
        mine
    }

    /// Returns true when a replica had batches to copy for longer than the patience, and copied none.
    fn stands_still(&mut self, topic: &Topic<F>, other: Replication, now_us: u64) -> bool {
        let position = read_replicated(&self.region, other);
        let Ok(extent) = read_extent(&self.region, topic.stream(other.source)) else { return false };
        let seen = self.watched.entry(other).or_insert((position, now_us));
        if seen.0 != position || position >= extent.committed {
            *seen = (position, now_us);
        }
        now_us.saturating_sub(seen.1) > self.options.patience_us
    }

    /// Opens the files of a stream, and begins a task.
    fn begin(&mut self, topic: &Arc<Topic<F>>, stream: StreamId, sources: u32) {
        let max_brokers = self.region.geometry().max_brokers;
        let identity = self.identity(topic, stream);
        let medium = (self.open)(&identity);
        let place = medium.name();
        let (log, damage) = match StreamLog::open(medium, identity, max_brokers, self.options.store) {
            Ok(opened) => opened,
            Err(error) => return self.fail(&error),
        };
        for damage in damage {
            tracing::warn!(topic = topic.config.name, place, %damage, "a replica file");
        }
        let reader = OrderIndexReader::new(self.region.clone(), stream);
        let pin = (topic.stream(self.broker) == stream).then(|| topic.pins.register());
        let said = vec![None; max_brokers as usize];
        let catalog = Arc::clone(&self.catalog);
        catalog.set(key(topic, stream), Some(log.readable()));
        let (topic, forward, resume) = (Arc::clone(topic), 0, 0);
        self.tasks.push(Task { topic, stream, reader, pin, log, catalog, sources, forward, resume, said });
    }

    /// Ends replication on this broker: its disk cannot be relied on.
    fn fail(&mut self, error: &StoreError) {
        tracing::error!(%error, "this broker's replica failed; others take over, if there are any");
        self.failed = true;
        self.tasks.clear();
        self.catalog.give_up();
        publish_replica_state(&self.region, self.broker, ReplicaState::Failed);
    }

    /// Makes at most one group of each stream durable. Returns the number of groups.
    pub fn poll(&mut self) -> usize {
        let mut written = 0;
        for index in 0..self.tasks.len() {
            let Some(task) = self.tasks.get_mut(index) else { break };
            let replica = Replica { region: &self.region, broker: self.broker, options: &self.options };
            match task.step(&replica, &mut self.scratch) {
                Ok(true) => written += 1,
                Ok(false) => {}
                Err(error) => {
                    self.fail(&error);
                    return written;
                }
            }
        }
        written
    }
}

impl<F: Fabric> Task<F> {
    /// Iterates over the sources.
    fn each_source(&self) -> impl Iterator<Item = BrokerId> + use<F> {
        let sources = self.sources;
        (0..u32::BITS).filter(move |source| sources & (1 << source) != 0).map(BrokerId)
    }

    /// Makes the next due batches durable, and publishes how far this replica is. Returns true when it did something.
    fn step(&mut self, replica: &Replica<'_, F>, scratch: &mut Scratch) -> Result<bool, StoreError> {
        let (region, broker) = (replica.region, replica.broker);
        if self.topic.is_deleted() || self.sources == 0 {
            return Ok(false);
        }
        let own = self.stream.stream.broker().unwrap_or(broker);
        let read = (read_extent(region, self.stream), read_completion(region, self.stream.topic, own));
        let (Ok(extent), Ok(completion)) = read else { return Ok(false) };
        if extent.incarnation != self.topic.config.incarnation {
            return Ok(false);
        }
        let committed = self.reader.poll();
        let first = completion.durable_through.max(extent.trimmed);
        if self.forward < extent.trimmed && self.forward < committed {
            // A replica that follows the trim point would leave one gap after another.
            (self.forward, self.resume) = (committed, committed);
        }
        // Batches that nobody waits for come last.
        let due = self
            .due(first.max(self.resume), committed)
            .or_else(|| self.due(first, committed))
            .or_else(|| self.due(extent.trimmed, first.min(committed)));
        let worked = match due {
            Some(due) => self.copy(replica, &due, completion, scratch)?,
            None => false,
        };
        for source in self.each_source() {
            let reached = self.log.missing(source, first);
            let said = &mut self.said[source.index()];
            if *said != Some(reached) {
                *said = Some(reached);
                let own = Replication { topic: self.stream.topic, replica: broker, source };
                publish_replicated(region, own, reached);
            }
        }
        Ok(worked)
    }

    /// Returns the lowest positions in `from..to` that a source misses, as far as the same sources miss them all.
    fn due(&self, from: u64, to: u64) -> Option<Due> {
        let begin =
            self.each_source().map(|source| self.log.missing(source, from)).min().filter(|begin| *begin < to)?;
        let mut until = to;
        let mut sources = 0;
        for source in self.each_source() {
            match self.log.missing(source, begin) {
                missing if missing == begin => {
                    sources |= 1 << source.0;
                    until = until.min(self.log.missing_until(source, begin));
                }
                later => until = until.min(later),
            }
        }
        Some(Due { positions: begin..until, sources })
    }

    /// Makes due batches durable, as far as one group reaches. Returns false when retention took them first, or the
    /// region has no leader.
    fn copy(
        &mut self,
        replica: &Replica<'_, F>,
        due: &Due,
        completion: Completion,
        scratch: &mut Scratch,
    ) -> Result<bool, StoreError> {
        let trimmed = match self.pin {
            // Retention leaves the batches alone while they are pinned.
            Some(pin) => self.topic.pins.set(pin, due.positions.start),
            // Nothing holds them, and `was_kept` says afterwards whether they stayed.
            None => read_extent(replica.region, self.stream).map(|extent| extent.trimmed),
        };
        let through = match trimmed {
            Ok(trimmed) if trimmed <= due.positions.start => self.read_group(replica, due, completion, scratch),
            _ => Ok(None),
        };
        if let Some(pin) = self.pin {
            self.topic.pins.clear(pin);
        }
        let Some(through) = through? else { return Ok(false) };
        if scratch.batches.is_empty() {
            let covered = due.positions.start..through;
            let moved = !covered.is_empty();
            self.log.cover(due.sources, covered);
            self.forward = self.forward.max(through);
            return Ok(moved);
        }
        let header = peek_group(&scratch.buffer).map_err(StoreError::memory)?;
        self.log.append(&header, &scratch.buffer)?;
        self.forward = self.forward.max(header.through);
        Ok(true)
    }

    /// Reads the group of the first due batches into the buffer; nothing if none of the batches is a due source's.
    /// Returns the position after the last that the group covers, or `None` when retention took a batch first.
    fn read_group(
        &mut self,
        replica: &Replica<'_, F>,
        due: &Due,
        completion: Completion,
        scratch: &mut Scratch,
    ) -> Result<Option<u64>, StoreError> {
        let Some(through) = self.choose(replica, due, &mut scratch.batches)? else { return Ok(None) };
        let Scratch { buffer, batches } = scratch;
        if batches.is_empty() {
            return Ok(Some(through));
        }
        let bytes = group_bytes(batches) as usize;
        if bytes > buffer.capacity() {
            *buffer = Buffer::new(bytes).map_err(|source| StoreError::Io {
                action: "buffer",
                file: "a group".to_owned(),
                medium: "memory".to_owned(),
                source,
            })?;
        }
        buffer.resize(bytes);
        let fabric = replica.region.fabric();
        let group = Group { positions: due.positions.start..through, sources: due.sources, completion, batches };
        write_group(buffer, &group, |entry, into| {
            let at = RegionOffset(entry.location);
            // SYNC: pairs with the payload flush of the delegation that received it.
            fabric.invalidate(at, entry.bytes.into(), Site::PayloadRead);
            fabric.read_bytes(at, into);
        });
        Ok(self.was_kept(replica.region, due.positions.start).then_some(through))
    }

    /// Chooses the batches of one group: those of due sources, from the first due position on. Returns the position
    /// after the last that was looked at, or `None` when retention took a batch first.
    fn choose(
        &mut self,
        replica: &Replica<'_, F>,
        due: &Due,
        batches: &mut Vec<Indexed>,
    ) -> Result<Option<u64>, StoreError> {
        let Due { positions, sources } = due;
        let layout = replica.region.layout();
        let end = positions.end.min(positions.start + SCAN_ENTRIES);
        let mut through = positions.start;
        batches.clear();
        while through < end && batches.len() < GROUP_RECORDS {
            let entry = match self.reader.read(through) {
                Ok(entry) => entry,
                // The group ends with what was read so far.
                Err(ReadError::NoLeader(_)) => break,
                Err(_) if !self.was_kept(replica.region, positions.start) => return Ok(None),
                Err(error) => return Err(StoreError::memory(error)),
            };
            if u32::from(entry.broker) >= replica.region.geometry().max_brokers {
                if !self.was_kept(replica.region, positions.start) {
                    return Ok(None);
                }
                return Err(StoreError::memory(self.reader.corrupt(through, "broker", entry.broker.into())));
            }
            // An entry without bytes stands for messages that an earlier region lost.
            if entry.bytes > 0 && sources & 1 << entry.broker != 0 {
                let inside = entry.location >= layout.segments
                    && entry.location.saturating_add(entry.bytes.into()) <= layout.region_bytes;
                if !inside && !self.was_kept(replica.region, positions.start) {
                    return Ok(None);
                }
                if !inside {
                    return Err(StoreError::memory(self.reader.corrupt(through, "location", entry.location)));
                }
                batches.push((through, entry));
                if batches.len() > 1 && group_bytes(batches) > replica.options.group_bytes {
                    batches.pop();
                    break;
                }
            }
            through += 1;
        }
        Ok(Some(through))
    }

    /// Returns true when retention has left every batch from `position` on. Until this returns true, nothing that was
    /// read is known to be a batch.
    // SYNC: the extent is read after the batches. A leader that took this broker for dead did not wait for its pin, and
    // another broker's own stream has none, so trimmed memory may hold something else by now. Pairs with `OrderIndexWriter::trim`, which runs before memory is
    // given back.
    fn was_kept(&self, region: &Region<F>, position: u64) -> bool {
        fence(Ordering::Acquire);
        read_extent(region, self.stream).is_ok_and(|extent| extent.trimmed <= position)
            || !region.fabric().keeps(Guard::TrimAfterCopy)
    }
}
