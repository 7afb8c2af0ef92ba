//! The only door to shared memory.

use bytemuck::Pod;

/// Bytes of a cache line, the unit in which memory moves between a host's cache and the region.
pub const LINE_BYTES: u64 = 64;
const _: () = assert!(LINE_BYTES == embarcadero_wire::batch::ALIGN_BYTES, "batches begin at lines");

/// A byte position in the region. Shared memory holds offsets, never pointers: each process maps it elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionOffset(pub u64);

impl RegionOffset {
    /// The position `bytes` further on.
    #[inline]
    #[must_use]
    pub const fn add(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

/// A structure of exactly one cache line. `Pod` proves at compile time that it has no padding and no pointers.
pub trait Line: Pod {}

macro_rules! sites {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Every place where protocol code writes back or drops cache lines, or fences.
        ///
        /// A label, nothing more: `Native` ignores it. `Simulated` can be told to skip one, which is how the tests prove
        /// that each of them is needed: see `tests/fabric_schedules.rs`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Site { $($(#[$doc])* $name),* }
        impl Site {
            /// All of them.
            pub const ALL: &'static [Site] = &[$(Site::$name),*];
        }
    };
}

sites! {
    /// Superblock, written once at creation.
    SuperblockFlush,
    /// Superblock, before it is judged.
    SuperblockRead,
    /// What a leader says of the brokers.
    ControlFlush,
    /// The same, by anyone.
    ControlRead,
    /// Who is the leader, by one that takes over.
    TermFlush,
    /// The same, by whoever acts on what a leader says.
    TermRead,
    /// What a leader takes over into its own area.
    TakeoverFlush,
    /// The same, in the area of the leader before.
    TakeoverRead,
    /// Broker slot: endpoints and incarnation.
    BrokerSlotFlush,
    /// Broker slot, by anyone.
    BrokerSlotRead,
    /// Heartbeat and activity counters of a broker.
    PulseFlush,
    /// The same, by the leader.
    PulseRead,
    /// Topic configuration and name, by the leader.
    TopicFlush,
    /// The same, by brokers.
    TopicRead,
    /// Payload bytes that the network put into this host's cache.
    PayloadFlush,
    /// Payload bytes, before this host sends them on.
    PayloadRead,
    /// Batchlog entries.
    BatchEntryFlush,
    /// Entries and payload are in memory before the leader that publishes them.
    BatchEntryFence,
    /// Batchlog entries, by the sequencer.
    BatchEntryRead,
    /// Broker half of an offset entry: the Batchlog's head.
    BatchlogHeadFlush,
    /// The same, by the sequencer.
    BatchlogHeadRead,
    /// Order index entries.
    IndexEntryFlush,
    /// Order index entries are in memory before the tail that publishes them.
    IndexEntryFence,
    /// Order index entries, by a reader.
    IndexEntryRead,
    /// Directory of the order index's segments.
    DirectoryFlush,
    /// The same, by a reader.
    DirectoryRead,
    /// Tail of an order index.
    TailFlush,
    /// The same, by a reader.
    TailRead,
    /// Trim point of an order index.
    TrimFlush,
    /// The same, by a reader that is about to deliver.
    TrimRead,
    /// Identity and state of a session.
    SessionFlush,
    /// The same, by a broker.
    SessionRead,
    /// Commit records of a session.
    RecordFlush,
    /// The same, by a broker that acknowledges.
    RecordRead,
    /// Sequencer half of an offset entry.
    ConsumedFlush,
    /// The same, by the broker that reuses Batchlog slots and segments.
    ConsumedRead,
    /// What a broker is delivering from.
    PinFlush,
    /// The same, before a segment is reclaimed.
    PinRead,
    /// How far a replica is.
    ReplicationFlush,
    /// The same, by the leader.
    ReplicationRead,
    /// How far a stream is durable, by the leader.
    CompletionFlush,
    /// The same, by a broker that acknowledges.
    CompletionRead,
    /// Owner of a segment.
    OwnerFlush,
    /// The same, when a broker or inspector starts.
    OwnerRead,
    /// A broker's partition of the segment bitmap.
    BitmapFlush,
    /// The same, by others (inspection) or after a restart.
    BitmapRead,
}

/// A check of the protocol that `Simulated` can be told to leave out, which is how the tests prove that each of them is
/// needed; in `Native` they are always there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Guard {
    /// Whoever acts on what a leader says looks afterwards that it still is the leader.
    TermAfterRead,
    /// A successor claims its epoch before it reads what its predecessor left.
    ClaimBeforeCopy,
    /// A successor does not write into the open segment of its predecessor's order index.
    OwnSegment,
    /// A reader that knows a segment of the order index looks for it anew under another leader.
    SegmentOfLeader,
    /// Sessions are brought up to the order index before anything is accepted.
    RecoverBeforeAccept,
    /// What was taken from the Batchlogs and not decided is taken again.
    RetakeUndecided,
    /// A batch is compared with what its session committed, and dropped if it was among it.
    DedupCompare,
    /// A slot of a Batchlog is reused only after the sequencer took what was in it.
    SlotReuse,
    /// A segment is reused only when all that was received into it is decided.
    DecidedBeforeReuse,
    /// A segment is reused only when nobody reads it.
    PinBeforeReuse,
    /// A batch counts as durable only when enough replicas say that it is on their disks.
    DiskBeforeAck,
    /// A replica looks, after it copied, whether what it copied was trimmed meanwhile.
    TrimAfterCopy,
}

impl Guard {
    /// All of them.
    pub const ALL: &'static [Self] = &[
        Self::TermAfterRead,
        Self::ClaimBeforeCopy,
        Self::OwnSegment,
        Self::SegmentOfLeader,
        Self::RecoverBeforeAccept,
        Self::RetakeUndecided,
        Self::DedupCompare,
        Self::SlotReuse,
        Self::DecidedBeforeReuse,
        Self::PinBeforeReuse,
        Self::DiskBeforeAck,
        Self::TrimAfterCopy,
    ];
}

/// Loads, stores and cache control over one shared region, as seen by one host.
///
/// A store is visible to this host at once and to other hosts after [`Fabric::flush`] and [`Fabric::fence`]; a load
/// may return what this host cached earlier until [`Fabric::invalidate`] dropped it. Loads acquire, stores release.
pub trait Fabric: Clone + Send + Sync + 'static {
    /// Bytes of the region.
    fn bytes(&self) -> u64;

    /// Reads the 8-byte word at `at` (aligned to 8), possibly stale.
    fn load(&self, at: RegionOffset) -> u64;

    /// Writes the 8-byte word at `at` (aligned to 8) into this host's cache.
    fn store(&self, at: RegionOffset, value: u64);

    /// Starts the write-back of every line that `len` bytes from `at` touch. Complete only after a fence.
    fn flush(&self, at: RegionOffset, len: u64, site: Site);

    /// Orders all flushes and stores of this thread before its later flushes and stores. A later load may still be
    /// done before they are in memory.
    fn fence(&self, site: Site);

    /// As [`Fabric::fence`], and orders them before later loads too: when this returns they are in memory. Needed
    /// where two hosts each store a word and then load the other's, and at least one of them has to see the other.
    fn full_fence(&self, site: Site);

    /// Drops this host's copies of the lines, so that the next load comes from memory.
    /// Only for lines that this host does not write. It does not wait for this host's own flushes.
    fn invalidate(&self, at: RegionOffset, len: u64, site: Site);

    /// Copies bytes out of the region, possibly stale.
    fn read_bytes(&self, at: RegionOffset, into: &mut [u8]);

    /// Copies bytes into the region, through this host's cache.
    fn write_bytes(&self, at: RegionOffset, from: &[u8]);

    /// True when hosts see each other's stores without flushes.
    fn is_coherent(&self) -> bool;

    /// False where a test leaves this guard out.
    #[inline]
    fn keeps(&self, guard: Guard) -> bool {
        let _ = guard;
        true
    }

    /// Reads a word as memory has it now.
    #[inline]
    fn observe(&self, at: RegionOffset, site: Site) -> u64 {
        self.invalidate(at, 8, site);
        self.load(at)
    }

    /// Reads a line, its last word first: when that word says that the line is complete, the rest is too.
    #[inline]
    fn load_line<T: Line>(&self, at: RegionOffset) -> T {
        let mut words = [0u64; 8];
        for word in (0..8).rev() {
            words[word] = self.load(at.add(word as u64 * 8));
        }
        bytemuck::cast(words)
    }

    /// Reads a line as memory has it now.
    #[inline]
    fn observe_line<T: Line>(&self, at: RegionOffset, site: Site) -> T {
        self.invalidate(at, LINE_BYTES, site);
        self.load_line(at)
    }

    /// Writes a line, its last word (the commit word) last.
    #[inline]
    fn store_line<T: Line>(&self, at: RegionOffset, line: &T) {
        let words: [u64; 8] = bytemuck::cast(*line);
        for (index, word) in words.iter().enumerate() {
            self.store(at.add(index as u64 * 8), *word);
        }
    }

    /// Writes a line that readers may look at while it changes. Its last word is a version: odd while it changes.
    /// The whole line is in memory when this returns.
    fn publish_versioned<T: Line>(&self, at: RegionOffset, line: &T, site: Site) {
        self.publish_versioned_with(at, line, site, || {});
    }

    /// As [`Fabric::publish_versioned`]; `more` writes and flushes further lines that the same version guards.
    fn publish_versioned_with<T: Line>(&self, at: RegionOffset, line: &T, site: Site, more: impl FnOnce()) {
        let version_at = at.add(56);
        let version = self.load(version_at) | 1;
        // SYNC: pairs with `observe_versioned`: odd before the first changed word, even after the last.
        self.store(version_at, version);
        if !self.is_coherent() {
            self.flush(at, LINE_BYTES, site);
            self.fence(site);
        }
        more();
        self.fence(site);
        let words: [u64; 8] = bytemuck::cast(*line);
        for (index, word) in words.iter().take(7).enumerate() {
            self.store(at.add(index as u64 * 8), *word);
        }
        self.store(version_at, version + 1);
        self.flush(at, LINE_BYTES, site);
        self.fence(site);
    }

    /// Reads a versioned line and what `more` reads under it; `None` while its writer is changing it or when it was
    /// never written.
    fn observe_versioned<T: Line, R>(
        &self,
        at: RegionOffset,
        site: Site,
        more: impl FnOnce(&T) -> R,
    ) -> Option<(T, R)> {
        let version_at = at.add(56);
        self.invalidate(at, LINE_BYTES, site);
        let before = self.load(version_at);
        if before == 0 || before & 1 == 1 {
            return None;
        }
        let line: T = self.load_line(at);
        let extra = more(&line);
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        self.invalidate(at, LINE_BYTES, site);
        (self.load(version_at) == before).then_some((line, extra))
    }
}

/// A fabric whose hosts share one coherence domain, so that read-modify-write works across them.
pub trait CoherentFabric: Fabric {
    /// Atomically ors `bits` into the word and returns what was there.
    fn fetch_or(&self, at: RegionOffset, bits: u64) -> u64;
    /// Atomically ands `bits` into the word and returns what was there.
    fn fetch_and(&self, at: RegionOffset, bits: u64) -> u64;
    /// Atomically replaces the word if it is `before`. True if it was.
    fn compare_exchange(&self, at: RegionOffset, before: u64, after: u64) -> bool;
}
