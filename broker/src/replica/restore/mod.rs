//! Restoring of topics into an empty region from replica files, after the region or the whole cluster was lost.

mod plan;
mod write;

pub use plan::TopicPlan;

use super::format::Identity;
use super::medium::{Directory, Medium};
use super::store::{Scan, StoreError, scan};
use crate::mirror::{self, MirrorError, MirroredTopic};
use embarcadero_cxl::layout::{LeaderArea, RegionRole};
use embarcadero_cxl::leadership::{activate_term, claim_term, latest_claim};
use embarcadero_cxl::region::{Region, RegionError};
use embarcadero_cxl::segment::PoolError;
use embarcadero_cxl::{CoherentFabric, Damage, Fabric};
use embarcadero_wire::{BrokerId, Incarnation, SessionSlot, Stream, Term, TopicId, WireError};
use plan::ScannedStream;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use uuid::Uuid;
use write::TopicWriter;

/// Area that a restored region is written in, as if its broker led.
const RESTORED: LeaderArea = LeaderArea(BrokerId(0));
/// Term under which a restored region is written.
const RESTORED_TERM: Term = Term(1);

/// Reason why a region cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A replica cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A directory cannot be read.
    #[error("cannot list {path}: {source}")]
    List {
        /// Directory.
        path: PathBuf,
        /// Error of the system.
        source: std::io::Error,
    },
    /// No replica files were found of the region that was asked for, or of any region.
    #[error("there are no replica files in {0}")]
    Nothing(String),
    /// The files are of several regions.
    #[error("the files are of {} regions; choose one with --uuid: {}", .0.len(), .0.join(", "))]
    SeveralRegions(Vec<String>),
    /// Acknowledged batches are missing.
    #[error("batches that were durable are missing:\n{0}\ngive the directories of all replicas, or accept the loss")]
    Lost(String),
    /// The region is in use, or was.
    #[error("the region has been used; make an empty one with `region create`")]
    NotEmpty,
    /// The region has too few slots of one kind.
    #[error("the region has room for {found} {what}, the replicas need {needed}")]
    Geometry {
        /// Name of the slots.
        what: &'static str,
        /// Slots of the region.
        found: u32,
        /// Slots that are needed.
        needed: u32,
    },
    /// The region has too little memory.
    #[error("{0}; make a larger region")]
    Pool(#[from] PoolError),
    /// The new region is damaged.
    #[error(transparent)]
    Damage(#[from] Damage),
    /// The mirror's memory is damaged.
    #[error("the mirror: {0}")]
    Mirror(#[from] MirrorError),
    /// The mirror is another region's, or no mirror.
    #[error("the mirror: {0}")]
    OtherMirror(#[from] RegionError),
    /// A replica holds bytes that are not a batch.
    #[error("position {position} of topic {topic} is not a batch: {source}")]
    Batch {
        /// Topic.
        topic: String,
        /// Position in the order index.
        position: u64,
        /// Fault of the bytes.
        source: WireError,
    },
}

/// Finds the directories below `roots` that hold replica files.
///
/// # Errors
/// [`RestoreError::List`].
pub fn find_media(roots: &[PathBuf]) -> Result<Vec<Box<dyn Medium>>, RestoreError> {
    fn look(path: &Path, found: &mut Vec<Box<dyn Medium>>) -> Result<(), RestoreError> {
        let failed = |source| RestoreError::List { path: path.to_owned(), source };
        let mut files = false;
        for entry in std::fs::read_dir(path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_type().map_err(failed)?.is_dir() {
                look(&entry.path(), found)?;
            } else {
                files |= entry.path().extension().is_some_and(|extension| extension == "replica");
            }
        }
        if files {
            found.push(Box::new(Directory::new(path.to_owned(), false)));
        }
        Ok(())
    }
    let mut found = Vec::new();
    roots.iter().try_for_each(|root| look(root, &mut found))?;
    Ok(found)
}

/// Files of one stream on one medium, as a scan found them.
struct Files {
    /// Index of the medium.
    medium: usize,
    identity: Identity,
    scan: Scan,
}

impl Files {
    fn region(&self) -> Uuid {
        Uuid::from_bytes(self.identity.region)
    }

    /// Returns true when the files are of this topic.
    fn are_of(&self, topic: TopicId, incarnation: Incarnation) -> bool {
        (self.identity.topic.id, self.identity.topic.incarnation) == (topic, incarnation)
    }
}

/// Topics that replica files give.
pub struct Plan {
    media: Vec<Box<dyn Medium>>,
    /// UUID of the region that was lost.
    pub region: Uuid,
    /// Topics.
    pub topics: Vec<TopicPlan>,
    /// Damage in the files, one line for each place.
    pub damage: Vec<String>,
    /// Directories whose batches are of no known topic, one line each.
    unnamed: Vec<String>,
}

impl Plan {
    /// Reads and verifies all files, and plans which batches to restore. `region` chooses one of several regions.
    ///
    /// Without a mirror, a topic gets the newest batches that follow each other:
    ///
    /// - Where a batch is missing that was not durable, nothing behind it was acknowledged as durable. It is left out.
    /// - Where a batch is missing that was durable, its offsets are lost, and what was before it is left out.
    /// - Where retention took a batch, what was before it is left out, and nothing is lost.
    ///
    /// With the mirror of the region, a topic gets every batch that the mirror has. Those that are in no file are lost.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn read<F: Fabric>(
        media: Vec<Box<dyn Medium>>,
        mirror: Option<&Region<F>>,
        region: Option<Uuid>,
    ) -> Result<Self, RestoreError> {
        let mut mirrored = Vec::new();
        if let Some(mirror) = mirror {
            mirror.require_role(RegionRole::Mirror)?;
            region.map_or(Ok(()), |region| mirror.require_uuid(region))?;
            mirrored = mirror::read(mirror)?;
        }
        let mut files = Vec::new();
        let (mut damage, mut unnamed) = (Vec::new(), Vec::new());
        for (index, medium) in media.iter().enumerate() {
            let mut scan = scan(&**medium)?;
            damage.extend(scan.damage.iter().map(|damage| format!("{}: {damage}", medium.name())));
            if let Some(identity) = scan.identity.take() {
                files.push(Files { medium: index, identity, scan });
            } else if scan.holds_batches() {
                unnamed.push(format!("{}: no whole file header says of which topic its batches are", medium.name()));
            }
        }
        let region = match mirror {
            Some(mirror) => mirror.uuid(),
            None => choose_region(&files, region, &media)?,
        };
        files.retain(|files| files.region() == region);
        let topics = plan_topics(&media, &files, &mirrored)?;
        Ok(Self { media, region, topics, damage, unnamed })
    }

    /// Describes the offsets and the files that are lost; `None` when none are.
    #[must_use]
    pub fn losses(&self) -> Option<String> {
        let offsets = self.topics.iter().flat_map(TopicPlan::losses);
        let lines: Vec<String> = offsets.chain(self.unnamed.iter().cloned()).collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    }

    /// Writes the topics into an empty region. `progress` gets the bytes of each batch.
    ///
    /// # Errors
    /// [`RestoreError`]. The region is then of no use; make a new one.
    pub fn write<F: CoherentFabric>(
        &self,
        region: &Region<F>,
        mut progress: impl FnMut(u64),
    ) -> Result<(), RestoreError> {
        if latest_claim(region) > Term::NONE {
            return Err(RestoreError::NotEmpty);
        }
        let mut next_slot = SessionSlot(0);
        for topic in &self.topics {
            let (found, needed) = (region.geometry().max_topics, topic.config.id.0 + 1);
            if needed > found {
                return Err(RestoreError::Geometry { what: "topics", found, needed });
            }
            TopicWriter::new(region, &self.media, topic).write(&mut next_slot, &mut progress)?;
        }
        // The first leader succeeds this term.
        claim_term(region, RESTORED, RESTORED_TERM);
        activate_term(region, RESTORED, RESTORED_TERM);
        Ok(())
    }
}

/// Chooses the region to restore: the wanted one, or the only one that there are files of.
fn choose_region(files: &[Files], wanted: Option<Uuid>, media: &[Box<dyn Medium>]) -> Result<Uuid, RestoreError> {
    let regions: BTreeSet<Uuid> = files.iter().map(Files::region).collect();
    let nothing = || {
        let names: Vec<String> = media.iter().map(|medium| medium.name()).collect();
        RestoreError::Nothing(names.join(", "))
    };
    match wanted {
        Some(wanted) => regions.get(&wanted).copied().ok_or_else(nothing),
        None if regions.len() > 1 => Err(RestoreError::SeveralRegions(regions.iter().map(Uuid::to_string).collect())),
        None => regions.first().copied().ok_or_else(nothing),
    }
}

/// Plans every topic of the region's files and of its mirror.
fn plan_topics(
    media: &[Box<dyn Medium>],
    files: &[Files],
    mirrored: &[MirroredTopic],
) -> Result<Vec<TopicPlan>, RestoreError> {
    // Several topics may have had a slot one after another. The last one counts.
    let mut newest: BTreeMap<TopicId, Incarnation> = BTreeMap::new();
    let of_files = files.iter().map(|files| &files.identity.topic);
    for config in of_files.chain(mirrored.iter().map(|topic| &topic.config)) {
        let known = newest.entry(config.id).or_default();
        *known = (*known).max(config.incarnation);
    }
    let mut topics = Vec::new();
    for (id, incarnation) in newest {
        let mirror = mirrored.iter().find(|topic| (topic.config.id, topic.config.incarnation) == (id, incarnation));
        let mut config = mirror.map(|topic| topic.config.clone());
        let mut streams: BTreeMap<Stream, Vec<ScannedStream<'_>>> = BTreeMap::new();
        if mirror.is_some() {
            streams.entry(Stream::GLOBAL).or_default();
        }
        for Files { medium, identity, scan } in files.iter().filter(|files| files.are_of(id, incarnation)) {
            streams.entry(identity.stream).or_default().push(ScannedStream { medium: *medium, scan });
            config = Some(identity.topic.clone());
        }
        let Some(config) = config else { continue };
        let mut topic = TopicPlan::new(config, mirror);
        for (stream, scanned) in streams {
            topic.add_stream(media, stream, &scanned, mirror.filter(|_| stream == Stream::GLOBAL))?;
        }
        topics.push(topic);
    }
    Ok(topics)
}
