//! Plan of a restored topic: which batches its streams will have, and which are lost.

use super::super::format::Record;
use super::super::medium::Medium;
use super::super::store::{Located, Scan};
use super::RestoreError;
use crate::mirror::MirroredTopic;
use embarcadero_cxl::session_table::Session;
use embarcadero_cxl::topic_table::TopicConfig;
use embarcadero_wire::Stream;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// Batch on a medium.
pub(super) struct StoredBatch {
    /// Index of the medium in [`super::Plan`].
    pub(super) medium: usize,
    /// Place on the medium.
    pub(super) located: Located,
}

impl StoredBatch {
    pub(super) fn record(&self) -> &Record {
        &self.located.record
    }

    /// Offset after the last message.
    fn end_offset(&self) -> u64 {
        self.record().first_offset + u64::from(self.record().message_count)
    }
}

/// Files of a stream on one medium.
#[derive(Clone, Copy)]
pub(super) struct ScannedStream<'a> {
    /// Index of the medium in [`super::Plan`].
    pub(super) medium: usize,
    pub(super) scan: &'a Scan,
}

/// Part of a restored stream.
pub(super) enum Piece {
    Batch(StoredBatch),
    /// Offsets whose messages are lost.
    Lost(Range<u64>),
}

/// Stream that will be restored.
pub(super) struct StreamPlan {
    pub(super) stream: Stream,
    /// Parts of the stream. Each begins at the offset at which the one before it ends.
    pub(super) pieces: Vec<Piece>,
}

impl StreamPlan {
    pub(super) fn batches(&self) -> impl Iterator<Item = &StoredBatch> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Batch(batch) => Some(batch),
            Piece::Lost(_) => None,
        })
    }

    /// Offset at which the stream begins; `None` if nothing is known of it.
    pub(super) fn first_offset(&self) -> Option<u64> {
        self.pieces.first().map(|piece| match piece {
            Piece::Batch(batch) => batch.record().first_offset,
            Piece::Lost(offsets) => offsets.start,
        })
    }
}

/// Topic that will be restored.
pub struct TopicPlan {
    /// Configuration of the topic.
    pub config: TopicConfig,
    pub(super) streams: Vec<StreamPlan>,
    /// Sessions of the topic in the mirror, and the sequence that each expected next.
    pub(super) sessions: Vec<(Session, u64)>,
    /// Offsets of each stream that were durable, or are in the mirror, and are in none of the files.
    pub lost: Vec<(Stream, Range<u64>)>,
    /// Number of batches that are left out because one before them is missing. None of them was acknowledged as
    /// durable.
    pub unacknowledged: u64,
}

impl TopicPlan {
    /// Returns the plan of a topic without streams.
    pub(super) fn new(config: TopicConfig, mirror: Option<&MirroredTopic>) -> Self {
        let sessions = mirror.map_or_else(Vec::new, |topic| topic.sessions.clone());
        Self { config, streams: Vec::new(), sessions, lost: Vec::new(), unacknowledged: 0 }
    }

    /// Returns the number of batches, and their bytes.
    #[must_use]
    pub fn size(&self) -> (u64, u64) {
        let batches = self.streams.iter().flat_map(StreamPlan::batches);
        batches.fold((0, 0), |(count, bytes), batch| (count + 1, bytes + u64::from(batch.record().bytes)))
    }

    /// Returns the number of messages.
    #[must_use]
    pub fn messages(&self) -> u64 {
        let batches = self.streams.iter().flat_map(StreamPlan::batches);
        batches.map(|batch| u64::from(batch.record().message_count)).sum()
    }

    /// Describes the offsets that are lost, one line for each range.
    pub(super) fn losses(&self) -> impl Iterator<Item = String> {
        self.lost.iter().map(|(stream, offsets)| {
            let stream = stream.broker().map_or(String::new(), |broker| format!(" of broker {broker}"));
            format!("topic {}{stream}: offsets {} to {}", self.config.name, offsets.start, offsets.end - 1)
        })
    }

    /// Plans a stream from its files, and from the mirror if there is one.
    pub(super) fn add_stream(
        &mut self,
        media: &[Box<dyn Medium>],
        stream: Stream,
        files: &[ScannedStream<'_>],
        mirror: Option<&MirroredTopic>,
    ) -> Result<(), RestoreError> {
        let mut known: BTreeMap<u64, StoredBatch> = BTreeMap::new();
        for ScannedStream { medium, scan } in files {
            for located in scan.batches(&*media[*medium])? {
                known.entry(located.record.position).or_insert(StoredBatch { medium: *medium, located });
            }
        }
        let pieces = match mirror {
            Some(mirror) => self.compare(mirror, known),
            None => self.contiguous(stream, files, known),
        };
        self.streams.push(StreamPlan { stream, pieces });
        Ok(())
    }

    /// Plans a stream from files alone. `known` has the batches by position. Takes the newest batches that follow each
    /// other without a gap, up to the first that is missing and was not durable.
    fn contiguous(
        &mut self,
        stream: Stream,
        files: &[ScannedStream<'_>],
        known: BTreeMap<u64, StoredBatch>,
    ) -> Vec<Piece> {
        let durable = files.iter().map(|files| files.scan.durable_through).max().unwrap_or(0);
        let lost = files.iter().map(|files| files.scan.lost_through).max().unwrap_or(0);
        let mut pieces: Vec<Piece> = Vec::new();
        // Position and offset of the batch that follows the last piece.
        let mut due = None;
        for (position, batch) in known {
            match due {
                Some((due, offset)) if due < position => {
                    if due >= durable {
                        self.unacknowledged += 1;
                        continue;
                    }
                    if position > lost {
                        self.lost.push((stream, offset..batch.record().first_offset));
                    }
                    pieces.clear();
                }
                _ => {}
            }
            due = Some((position + 1, batch.end_offset()));
            pieces.push(Piece::Batch(batch));
        }
        pieces
    }

    /// Plans a stream that is in the mirror. It gets every batch of the mirror, from a disk if one has it. Batches on
    /// disks that lead up to the mirror's first come before those.
    fn compare(&mut self, mirror: &MirroredTopic, known: BTreeMap<u64, StoredBatch>) -> Vec<Piece> {
        let mut known: BTreeMap<u64, StoredBatch> =
            known.into_values().map(|batch| (batch.record().first_offset, batch)).collect();
        let earliest = mirror.batches.first().map_or(mirror.next_offset, |(first, _)| *first);
        let mut kept = known.split_off(&earliest);
        let mut pieces: Vec<Piece> = leading_up_to(earliest, known).into();
        for (first, messages) in &mirror.batches {
            let end = first + u64::from(*messages);
            match (kept.remove(first), pieces.last_mut()) {
                (Some(batch), _) if batch.end_offset() == end => pieces.push(Piece::Batch(batch)),
                (_, Some(Piece::Lost(offsets))) => offsets.end = end,
                _ => pieces.push(Piece::Lost(*first..end)),
            }
        }
        self.unacknowledged += kept.len() as u64;
        let lost = pieces.iter().filter_map(|piece| match piece {
            Piece::Lost(offsets) => Some((Stream::GLOBAL, offsets.clone())),
            Piece::Batch(_) => None,
        });
        self.lost.extend(lost);
        if pieces.is_empty() && earliest > 0 {
            // The stream is empty, but its offsets go on from here.
            pieces.push(Piece::Lost(earliest..earliest));
        }
        pieces
    }
}

/// Returns the newest batches of `known` that follow each other without a gap and end at the offset `end`. `known` has
/// the batches by first offset.
fn leading_up_to(end: u64, known: BTreeMap<u64, StoredBatch>) -> VecDeque<Piece> {
    let mut pieces = VecDeque::new();
    let mut due = end;
    for (first, batch) in known.into_iter().rev() {
        if batch.end_offset() != due {
            break;
        }
        due = first;
        pieces.push_front(Piece::Batch(batch));
    }
    pieces
}
