//! Archive: batches that the region no longer holds are read from the disks of this broker's and other brokers'
//! replicas.
//!
//! A replica has the batches of some brokers only, so that no disk need have all of a stream. The answers of all disks
//! are joined by offset.

use crate::caller::Caller;
use crate::replica::store::{Archived, StoreError, StreamFiles};
use crossbeam_channel::{Receiver, Sender, bounded};
use embarcadero_control::v1 as proto;
use embarcadero_control::v1::control_client::ControlClient;
use embarcadero_cxl::broker_table::{BrokerInfo, read_broker, read_replica_state};
use embarcadero_cxl::layout::ReplicaState;
use embarcadero_cxl::leadership::{UnknownLeader, read_leader};
use embarcadero_cxl::{Damage, Fabric, Region, Row};
use embarcadero_wire::{BrokerId, Incarnation, Stream, TopicId};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{JoinError, JoinSet};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Number of bytes that a replica is asked for at a time. One batch may be larger and is then answered alone.
const READ_BYTES: u64 = 2 << 20;
/// Largest answer of a replica, in bytes.
const ANSWER_BYTES: usize = 32 << 20;
/// Longest time for a call to a replica, and for the connection to it.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Silence after which a broker is asked whether it is still there, and the wait for its answer.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Stream of one incarnation of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ArchiveKey {
    /// Topic slot.
    pub(crate) topic: TopicId,
    /// Incarnation of the topic slot.
    pub(crate) incarnation: Incarnation,
    /// Stream of the topic.
    pub(crate) stream: Stream,
}

/// Place in a stream where a read begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadFrom {
    /// Batch that has the message with this offset.
    Offset(u64),
    /// First batch that was ordered at this time, in microseconds since 1970, or later. Only this batch is read.
    Time(u64),
}

impl fmt::Display for ReadFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Offset(offset) => write!(f, "offset {offset}"),
            Self::Time(since_us) => write!(f, "time {since_us} us"),
        }
    }
}

/// Streams on the disk of this broker's own replica, for readers in other threads.
pub struct Catalog {
    /// Files per stream: `None` for a stream without files. Streams that have not been looked for yet have no entry.
    streams: Mutex<BTreeMap<ArchiveKey, Option<Arc<StreamFiles>>>>,
    /// True while streams without an entry may still be on the disk.
    replicates: AtomicBool,
}

impl Catalog {
    /// Returns an empty catalog. `replicates` tells whether the broker has a disk that is still to be looked at.
    #[must_use]
    pub fn new(replicates: bool) -> Self {
        Self { streams: Mutex::default(), replicates: AtomicBool::new(replicates) }
    }

    /// Records that the disk failed. Streams that were not looked for count as absent from now on.
    pub(crate) fn give_up(&self) {
        self.replicates.store(false, Ordering::Relaxed);
    }

    fn streams(&self) -> MutexGuard<'_, BTreeMap<ArchiveKey, Option<Arc<StreamFiles>>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a stream's files for reading; `None` when there are none, or none that can be relied on.
    pub(crate) fn set(&self, key: ArchiveKey, files: Option<Arc<StreamFiles>>) {
        self.streams().insert(key, files);
    }

    /// Returns true once it is known whether a stream has files.
    #[must_use]
    pub(crate) fn knows(&self, key: ArchiveKey) -> bool {
        self.streams().contains_key(&key)
    }

    /// Removes a stream whose topic was deleted.
    pub(crate) fn forget(&self, key: ArchiveKey) {
        self.streams().remove(&key);
    }

    /// Reads batches from this broker's disk, up to `max_bytes` but at least one. Returns none when the disk has none.
    /// May wait for the disk.
    ///
    /// # Errors
    /// [`DiskError::Store`], or [`DiskError::NotScanned`].
    pub(crate) fn read(&self, key: ArchiveKey, from: ReadFrom, max_bytes: u64) -> Result<Vec<Archived>, DiskError> {
        let files = self.streams().get(&key).cloned();
        match files {
            Some(Some(files)) => match from {
                ReadFrom::Offset(offset) => files.read(offset, max_bytes),
                ReadFrom::Time(since_us) => files.first_since(since_us).and_then(|found| {
                    let mut batches = found.map_or(Ok(Vec::new()), |offset| files.read(offset, 1))?;
                    batches.truncate(1);
                    Ok(batches)
                }),
            }
            .map_err(DiskError::Store),
            None if self.replicates.load(Ordering::Relaxed) => Err(DiskError::NotScanned),
            Some(None) | None => Ok(Vec::new()),
        }
    }
}

/// Reason why one disk gave no batches, although it may have them.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    /// This broker's own disk failed, or its files are damaged.
    #[error(transparent)]
    Store(StoreError),
    /// The replica has not listed its files yet.
    #[error("this broker has yet to look at its disk")]
    NotScanned,
    /// Nobody knows which brokers are alive.
    #[error(transparent)]
    Leader(#[from] UnknownLeader),
    /// A broker that replicates is not alive.
    #[error("broker {0} replicates, and is not there")]
    Gone(BrokerId),
    /// The region does not tell where a broker is, or whether it replicates.
    #[error("broker {broker} cannot be asked: {damage}")]
    Region {
        /// Broker.
        broker: BrokerId,
        /// Damage of the broker's row or of its counters.
        #[source]
        damage: Damage,
    },
    /// A broker cannot be connected to.
    #[error("broker {broker} cannot be reached: {source}")]
    Connect {
        /// Broker.
        broker: BrokerId,
        /// Error of the transport.
        source: tonic::transport::Error,
    },
    /// A broker answered with an error.
    #[error("broker {broker} cannot read its disk: {}", source.message())]
    Answer {
        /// Broker.
        broker: BrokerId,
        /// Answer of the broker.
        source: Box<Status>,
    },
    /// The task that asked the disk ended without an answer.
    #[error("a read from disk was broken off: {0}")]
    Task(#[from] JoinError),
    /// This broker stops.
    #[error("the broker stops")]
    Stops,
}

impl DiskError {
    /// Returns true when what is on the disk, or what the region says of it, is damaged. Asking again does not help.
    pub(crate) fn is_damage(&self) -> bool {
        match self {
            Self::Store(StoreError::Damaged { .. } | StoreError::Foreign { .. }) | Self::Region { .. } => true,
            Self::Leader(error) => matches!(error, UnknownLeader::Damaged(_)),
            Self::Answer { source, .. } => source.code() == Code::DataLoss,
            Self::Store(_) | Self::NotScanned | Self::Gone(_) => false,
            Self::Connect { .. } | Self::Task(_) | Self::Stops => false,
        }
    }
}

/// Reason why a read from disks has no batches.
#[derive(Debug)]
pub(crate) enum ArchiveError {
    /// No disk has the place that was asked for. Holds the lowest later offset that a disk has, if any.
    Missing(Option<u64>),
    /// A disk that may have the place did not answer. It may later.
    Unreachable(DiskError),
    /// All disks answered, and one that may have the place is damaged.
    Damaged(DiskError),
}

/// Answer of one disk: batches in the order of their offsets.
type DiskAnswer = Result<Vec<Archived>, DiskError>;

/// One or more batches that follow each other without a gap, beginning with the one that was asked for.
pub(crate) type ArchiveAnswer = Result<Vec<Archived>, ArchiveError>;

/// Question of a worker, and the channel for its answer.
struct Request {
    key: ArchiveKey,
    from: ReadFrom,
    reply: Sender<ArchiveAnswer>,
}

/// End of the archive at which workers ask for batches.
#[derive(Clone)]
pub struct Archive {
    requests: UnboundedSender<Request>,
}

impl Archive {
    /// Returns the two ends: one to ask at, and one to answer with [`ArchiveReader::run`] or [`ArchiveReader::poll`].
    #[must_use]
    pub fn new<F: Fabric>(region: Region<F>, caller: Caller, catalog: Arc<Catalog>) -> (Self, ArchiveReader<F>) {
        let (requests, queue) = unbounded_channel();
        (Self { requests }, ArchiveReader { region, caller, catalog, clients: Arc::default(), queue })
    }

    /// Asks for batches of a stream. The answer comes on the returned channel, which closes without one if the broker
    /// stops.
    pub(crate) fn ask(&self, key: ArchiveKey, from: ReadFrom) -> Receiver<ArchiveAnswer> {
        let (reply, answer) = bounded(1);
        // Without a reader the request is dropped, and with it the sender: the caller sees a closed channel.
        let _ = self.requests.send(Request { key, from, reply });
        answer
    }
}

/// Connection to each broker, with the incarnation that it leads to.
type Clients = Arc<Mutex<HashMap<BrokerId, (Incarnation, ControlClient<Channel>)>>>;

/// End of the archive that reads from disks and answers.
pub struct ArchiveReader<F> {
    region: Region<F>,
    /// This broker.
    caller: Caller,
    catalog: Arc<Catalog>,
    clients: Clients,
    queue: UnboundedReceiver<Request>,
}

/// Disk that may have what is asked for.
enum Disk {
    /// This broker's.
    Own,
    /// That of another broker.
    Other(BrokerInfo),
    /// One that cannot be asked.
    Silent(DiskError),
}

impl<F: Fabric> ArchiveReader<F> {
    /// Answers the questions that have come, from this broker's disk and from those of the brokers that `other` returns.
    /// Waits for the disks.
    pub fn poll(&mut self, mut other: impl FnMut(BrokerId) -> Option<Arc<Catalog>>) {
        while let Ok(Request { key, from, reply }) = self.queue.try_recv() {
            let answers = self.disks().into_iter().map(|disk| match disk {
                Disk::Own => self.catalog.read(key, from, READ_BYTES),
                Disk::Other(BrokerInfo { id, .. }) => other(id).ok_or(DiskError::Gone(id))?.read(key, from, READ_BYTES),
                Disk::Silent(error) => Err(error),
            });
            let _ = reply.send(join(from, answers.collect()));
        }
    }

    /// Answers until every [`Archive`] is dropped.
    pub async fn run(mut self) {
        while let Some(Request { key, from, reply }) = self.queue.recv().await {
            let answers = self.ask_all(key, from);
            // The next request need not wait for these disks.
            tokio::spawn(async move {
                let mut answers = answers;
                let mut all = Vec::new();
                while let Some(answer) = answers.join_next().await {
                    let answer = answer.unwrap_or_else(|error| Err(error.into()));
                    if let Err(error) = &answer
                        && error.is_damage()
                    {
                        tracing::error!(%error, %from, "batches on a disk cannot be read");
                    }
                    all.push(answer);
                }
                let _ = reply.send(join(from, all));
            });
        }
    }

    /// Returns all disks that may have batches.
    fn disks(&self) -> Vec<Disk> {
        let leader = match read_leader(&self.region) {
            Ok(leader) => leader,
            Err(error) => return vec![Disk::Own, Disk::Silent(error.into())],
        };
        let others = self.region.geometry().brokers().filter(|id| *id != self.caller.broker).filter_map(|id| {
            let is_live = leader.broker_mask & 1 << id.0 != 0;
            let error = match read_broker(&self.region, id) {
                Row::Used(info) if is_live => return Some(Disk::Other(info)),
                Row::Used(BrokerInfo { running: false, .. }) | Row::Unused => return None,
                Row::Used(_) | Row::Unsettled => self.absent(id, DiskError::Gone(id)),
                Row::Damaged(damage) => self.absent(id, DiskError::Region { broker: id, damage }),
            };
            error.map(Disk::Silent)
        });
        std::iter::once(Disk::Own).chain(others).collect()
    }

    /// Asks every broker whose disk may have the batches.
    fn ask_all(&self, key: ArchiveKey, from: ReadFrom) -> JoinSet<DiskAnswer> {
        let mut answers = JoinSet::new();
        for disk in self.disks() {
            match disk {
                Disk::Own => {
                    let catalog = Arc::clone(&self.catalog);
                    answers.spawn_blocking(move || catalog.read(key, from, READ_BYTES));
                }
                Disk::Other(info) => {
                    answers.spawn(ask(Arc::clone(&self.clients), self.caller, info, key, from));
                }
                Disk::Silent(error) => {
                    answers.spawn(async move { Err(error) });
                }
            }
        }
        answers
    }

    /// Returns `error`, for a broker that cannot be asked, unless the broker has no disk with batches.
    fn absent(&self, broker: BrokerId, error: DiskError) -> Option<DiskError> {
        match read_replica_state(&self.region, broker) {
            Ok(ReplicaState::Running) => Some(error),
            Ok(_) => None,
            Err(damage) => Some(DiskError::Region { broker, damage }),
        }
    }
}

/// Asks one broker for batches on its disk, as `caller`.
///
/// # Errors
/// [`DiskError::Connect`] or [`DiskError::Answer`].
async fn ask(clients: Clients, caller: Caller, info: BrokerInfo, key: ArchiveKey, from: ReadFrom) -> DiskAnswer {
    let unconnected = |source| DiskError::Connect { broker: info.id, source };
    let known = clients.lock().unwrap_or_else(PoisonError::into_inner).get(&info.id).cloned();
    let mut client = match known {
        Some((incarnation, client)) if incarnation == info.incarnation => client,
        _ => {
            let endpoint = Endpoint::try_from(format!("http://{}", info.control)).map_err(unconnected)?;
            let endpoint = endpoint.connect_timeout(CALL_LIMIT).timeout(CALL_LIMIT).keep_alive_while_idle(true);
            let endpoint = endpoint.http2_keep_alive_interval(KEEP_ALIVE).keep_alive_timeout(KEEP_ALIVE);
            let connected = endpoint.connect().await;
            ControlClient::new(connected.map_err(unconnected)?).max_decoding_message_size(ANSWER_BYTES)
        }
    };
    let ArchiveKey { topic, incarnation, stream } = key;
    let (from_offset, since_us) = match from {
        ReadFrom::Offset(offset) => (offset, None),
        ReadFrom::Time(since_us) => (0, Some(since_us)),
    };
    let max_bytes = READ_BYTES;
    let request = proto::ReadReplicaRequest {
        topic: topic.0,
        incarnation: incarnation.0,
        stream: stream.0,
        from_offset,
        max_bytes,
        since_us,
        broker: caller.broker.0,
        call_key: caller.call_key,
    };
    let answer = client.read_replica(request).await;
    let mut clients = clients.lock().unwrap_or_else(PoisonError::into_inner);
    match answer {
        Ok(answer) => {
            clients.insert(info.id, (info.incarnation, client));
            Ok(answer.into_inner().batches.into_iter().map(from_proto).collect())
        }
        Err(error) => {
            clients.remove(&info.id);
            Err(DiskError::Answer { broker: info.id, source: Box::new(error) })
        }
    }
}

fn from_proto(batch: proto::ArchivedBatch) -> Archived {
    let proto::ArchivedBatch { first_offset, message_count, source, ordered_us, bytes } = batch;
    Archived { first_offset, message_count, source: BrokerId(source), ordered_us, bytes }
}

/// Answers another broker that asks for batches on this broker's disk.
///
/// # Errors
/// Data loss when the disk is damaged, else unavailable; with the text of the disk's error.
#[allow(clippy::result_large_err)] // tonic's own error type
pub(crate) fn read_replica(
    catalog: &Catalog,
    request: proto::ReadReplicaRequest,
) -> Result<proto::ReadReplicaResponse, Status> {
    let proto::ReadReplicaRequest { topic, incarnation, stream, from_offset, max_bytes, since_us, .. } = request;
    let key = ArchiveKey { topic: TopicId(topic), incarnation: Incarnation(incarnation), stream: Stream(stream) };
    let from = since_us.map_or(ReadFrom::Offset(from_offset), ReadFrom::Time);
    let found = catalog.read(key, from, max_bytes.min(READ_BYTES)).map_err(|error| {
        let text = error.to_string();
        if error.is_damage() { Status::data_loss(text) } else { Status::unavailable(text) }
    })?;
    let batches = found.into_iter().map(|batch| {
        let Archived { first_offset, message_count, source, ordered_us, bytes } = batch;
        proto::ArchivedBatch { first_offset, message_count, source: source.0, ordered_us, bytes }
    });
    Ok(proto::ReadReplicaResponse { batches: batches.collect() })
}

/// Joins the answers of all disks: the batches that follow each other without a gap from the place that was asked for.
///
/// # Errors
/// [`ArchiveError`]. A disk that did not answer counts before a damaged one: it may have the same batches whole.
fn join(from: ReadFrom, answers: Vec<DiskAnswer>) -> ArchiveAnswer {
    let (mut unreachable, mut damaged) = (None, None);
    let mut batches: BTreeMap<u64, Archived> = BTreeMap::new();
    for answer in answers {
        match answer {
            Ok(found) => batches.extend(found.into_iter().map(|batch| (batch.first_offset, batch))),
            Err(error) if error.is_damage() => damaged = Some(error),
            Err(error) => unreachable = Some(error),
        }
    }
    let silent = unreachable.map(ArchiveError::Unreachable).or(damaged.map(ArchiveError::Damaged));
    let Some(lowest) = batches.keys().next().copied() else {
        return Err(silent.unwrap_or(ArchiveError::Missing(None)));
    };
    let mut due = match from {
        ReadFrom::Offset(offset) => offset,
        ReadFrom::Time(_) => lowest,
    };
    // A disk that gave no batches may have an earlier one that qualifies.
    let silent = match (from, silent) {
        (ReadFrom::Time(_), Some(error)) => return Err(error),
        (_, silent) => silent,
    };
    let mut joined = Vec::new();
    for (first, batch) in batches {
        let end = batch.end_offset();
        let follows = if joined.is_empty() { first <= due } else { first == due };
        if end <= due {
            continue;
        }
        if !follows {
            break;
        }
        due = end;
        joined.push(batch);
    }
    if joined.is_empty() { Err(silent.unwrap_or(ArchiveError::Missing(Some(lowest)))) } else { Ok(joined) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn batch(first_offset: u64, message_count: u32) -> Archived {
        Archived { first_offset, message_count, source: BrokerId(0), ordered_us: 0, bytes: Vec::new() }
    }

    #[test]
    fn an_offset_that_is_on_no_disk_is_missing_unless_a_disk_did_not_answer() {
        let one = || Ok(vec![batch(10, 5), batch(20, 5)]);
        let join = |from, answers| join(ReadFrom::Offset(from), answers);
        let gone = || Err(DiskError::Gone(BrokerId(1)));
        assert!(matches!(join(7, vec![one()]), Err(ArchiveError::Missing(Some(10)))));
        assert!(matches!(join(30, vec![Ok(vec![])]), Err(ArchiveError::Missing(None))));
        assert!(matches!(join(7, vec![one(), gone()]), Err(ArchiveError::Unreachable(DiskError::Gone(BrokerId(1))))));
        assert_eq!(join(12, vec![one(), gone()]).unwrap(), vec![batch(10, 5)]);
    }

    #[test]
    fn a_damaged_disk_is_an_error_unless_another_has_the_batches_or_may_have_them() {
        let lost = || {
            let source = Box::new(Status::data_loss("file 0: a group's checksum"));
            Err(DiskError::Answer { broker: BrokerId(1), source })
        };
        let busy = || {
            let source = Box::new(Status::unavailable("this broker has yet to look at its disk"));
            Err(DiskError::Answer { broker: BrokerId(2), source })
        };
        let one = || Ok(vec![batch(10, 5)]);
        let offset = |from, answers| join(ReadFrom::Offset(from), answers);
        assert!(matches!(offset(7, vec![one(), lost()]), Err(ArchiveError::Damaged(_))));
        assert!(matches!(offset(7, vec![lost()]), Err(ArchiveError::Damaged(_))));
        assert!(matches!(offset(7, vec![lost(), busy()]), Err(ArchiveError::Unreachable(_))));
        assert_eq!(offset(12, vec![lost(), one()]).unwrap(), vec![batch(10, 5)]);
        assert!(matches!(join(ReadFrom::Time(0), vec![one(), lost()]), Err(ArchiveError::Damaged(_))));
    }

    #[test]
    fn a_disk_that_was_not_looked_at_is_unavailable_and_not_lost() {
        let request = proto::ReadReplicaRequest { since_us: None, ..Default::default() };
        let refused = read_replica(&Catalog::new(true), request).map(|found| found.batches.len());
        assert_eq!(refused.unwrap_err().code(), Code::Unavailable);
        assert!(read_replica(&Catalog::new(false), request).unwrap().batches.is_empty());
    }

    proptest! {
        /// However batches are spread over disks, and however far each disk's answer reaches.
        #[test]
        fn what_is_joined_has_no_gaps_and_begins_where_asked(
            batches in prop::collection::vec((1u32..5, 0usize..3), 1..40), from in 0u64..60, reach in prop::array::uniform3(1usize..20),
        ) {
            let mut disks: [Vec<Archived>; 3] = Default::default();
            let mut end = 0;
            for (count, disk) in batches {
                disks[disk].push(batch(end, count));
                end += u64::from(count);
            }
            let mut answers = Vec::new();
            for (disk, reach) in disks.into_iter().zip(reach) {
                answers.push(Ok(disk.into_iter().filter(|batch| batch.end_offset() > from).take(reach).collect()));
            }
            match join(ReadFrom::Offset(from), answers) {
                Ok(joined) => {
                    prop_assert!(joined[0].first_offset <= from && joined[0].end_offset() > from);
                    prop_assert!(joined.windows(2).all(|pair| pair[0].end_offset() == pair[1].first_offset));
                }
                missing => prop_assert!(from >= end && matches!(missing, Err(ArchiveError::Missing(None)))),
            }
        }
    }
}
