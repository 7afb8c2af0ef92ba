//! Labels for the places and rules that the tests leave out, to show that each of them is needed.

macro_rules! labels {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$doc:meta])* $variant:ident),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$doc])* $variant),* }

        impl $name {
            /// Every label.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];
        }
    };
}

labels! {
    /// Place where protocol code writes back or drops cache lines, or fences.
    ///
    /// A label and nothing more: [`crate::Native`] ignores it. The simulated fabric can skip one, and the tests show
    /// that each is needed (`sim/tests/fabric_schedules/main.rs`).
    pub enum Site {
        /// Superblock, at creation.
        SuperblockFlush,
        /// Superblock, by a process that opens the region.
        SuperblockRead,
        /// Leader's statement about the brokers.
        ControlFlush,
        /// Leader's statement, by any reader.
        ControlRead,
        /// Claimed and active term, by a candidate.
        TermFlush,
        /// Terms, by a reader of a leader's area, and by a leader.
        TermRead,
        /// Predecessor's state, in the successor's area.
        TakeoverFlush,
        /// Predecessor's state, by its successor.
        TakeoverRead,
        /// Row of the broker table.
        BrokerSlotFlush,
        /// Row of the broker table, by any reader.
        BrokerSlotRead,
        /// Counters of a broker, and its connections of sessions.
        PulseFlush,
        /// Counters of a broker, and its connections of sessions, by the leader.
        PulseRead,
        /// Configuration and name of a topic, by the leader.
        TopicFlush,
        /// Configuration and name of a topic, by a broker.
        TopicRead,
        /// Payload bytes that the network put into this host's cache.
        PayloadFlush,
        /// Payload bytes, before this host sends them.
        PayloadRead,
        /// Batchlog entries.
        BatchEntryFlush,
        /// Batchlog entries and payload, before the Batchlog's head that covers them.
        BatchEntryFence,
        /// Batchlog entries, by the sequencer.
        BatchEntryRead,
        /// Head of a Batchlog.
        BatchlogHeadFlush,
        /// Head of a Batchlog, by the sequencer.
        BatchlogHeadRead,
        /// Order index entries.
        IndexEntryFlush,
        /// Order index entries, before the tail that covers them.
        IndexEntryFence,
        /// Order index entries, by a reader.
        IndexEntryRead,
        /// Directory of an order index.
        DirectoryFlush,
        /// Directory of an order index, by a reader.
        DirectoryRead,
        /// Tail of an order index.
        TailFlush,
        /// Tail of an order index, by a reader.
        TailRead,
        /// Trim point of an order index.
        TrimFlush,
        /// Trim point of an order index, by a reader that is about to deliver.
        TrimRead,
        /// Identity and state of a session.
        SessionFlush,
        /// Identity and state of a session, by a broker.
        SessionRead,
        /// Commit records and progress of a session.
        RecordFlush,
        /// Commit records and progress of a session, by a broker that acknowledges.
        RecordRead,
        /// Sequencer half of a broker.
        ConsumedFlush,
        /// Sequencer half, by the broker that reuses Batchlog slots and segments.
        ConsumedRead,
        /// Pin of a broker.
        PinFlush,
        /// Pins, before a segment is reclaimed.
        PinRead,
        /// Position up to which a replica has a source's batches.
        ReplicationFlush,
        /// Position of a replica, by the leader.
        ReplicationRead,
        /// Completion vector, by the leader.
        CompletionFlush,
        /// Completion vector, by a broker that acknowledges.
        CompletionRead,
        /// Holder of a segment.
        OwnerFlush,
        /// Holder of a segment, by a broker that starts or an inspector.
        OwnerRead,
        /// Partition of the segment bitmap.
        BitmapFlush,
        /// Partition of the segment bitmap, by others or after a restart.
        BitmapRead,
    }
}

labels! {
    /// Check of the protocol. The simulated fabric can leave one out, and the tests show that each is needed; on native
    /// memory all are always made.
    pub enum Guard {
        /// A reader checks after its read that the leader it read from still leads.
        TermAfterRead,
        /// A process acts on what another thread or process of its host wrote only once that is in memory.
        MemoryBeforeAct,
        /// A process drops what its host cached of the lines that its broker writes, when it starts and when it takes over.
        FreshOwnLines,
        /// A successor claims its term before it copies what its predecessor left.
        ClaimBeforeCopy,
        /// A successor does not write into the open segment of its predecessor's order index.
        OwnSegment,
        /// A reader that knows a segment of the order index looks it up again under another leader.
        SegmentOfLeader,
        /// A successor brings sessions up to the order index before it accepts batches.
        RecoverBeforeAccept,
        /// A successor takes again what its predecessor took from the Batchlogs and had not decided.
        RetakeUndecided,
        /// The sequencer drops a batch that its session has committed already.
        DedupCompare,
        /// A broker takes the record of a batch only for that of a client's own.
        RecordOwner,
        /// A batch that was committed ahead of a gap is known under the next epoch, and to the next leader.
        AheadOfGap,
        /// A group has no more batches than a successor brings to the sessions.
        GroupBound,
        /// A broker reuses a Batchlog slot only after the sequencer took its entry.
        SlotReuse,
        /// A broker reuses a segment only when every batch in it is decided.
        DecidedBeforeReuse,
        /// A broker reuses a segment only when nobody reads it.
        PinBeforeReuse,
        /// Batches leave segments free that order indexes may need.
        IndexReserve,
        /// A batch counts as durable only when enough replicas have it on disk.
        DiskBeforeAck,
        /// A replica checks after a copy whether the copied batches were trimmed meanwhile.
        TrimAfterCopy,
    }
}
