//! Structures of the region. Every size and offset is asserted at compile time.
//!
//! A *line* is written by one host at a time, word by word. A *versioned* line is read whole: its last word is odd
//! while its writer changes it. A *block* is a row of lines, a *record* a part of a line. Fields whose names begin with
//! `reserved` are zero, and readers check that. Where they look at single words only, [`crate::damaged_lines`] does.

use super::{MAX_BROKERS, SESSION_WINDOW, TOPIC_NAME_BYTES};
use crate::fabric::{LINE_BYTES, Line, Versioned};
use bytemuck::{Pod, Zeroable};
use embarcadero_wire::{
    BrokerId, ClientId, DIGEST_SEED, Epoch, Incarnation, SessionSlot, SessionToken, Term, TopicId, digest, is_reserved,
    with_bytes,
};
use std::mem::{offset_of, size_of};

macro_rules! structures {
    ($($(#[$meta:meta])* $kind:ident $name:ident: $bytes:literal {
        $($(#[$field_meta:meta])* $field:ident: $ty:ty = $offset:literal),* $(,)?
    })*) => {
        $(
            structures!(@define $kind $(#[$meta])* $name { $($(#[$field_meta])* $field: $ty),* });
            structures!(@implement $kind $name { $($field: $ty),* });
            const _: () = {
                assert!(size_of::<$name>() == $bytes);
                $(assert!(offset_of!($name, $field) == $offset);)*
            };
        )*

        /// Name and bytes of every structure, and the name, type and offset of each of its fields.
        pub const STRUCTURES: &[(&str, usize, &[(&str, &str, usize)])] =
            &[$((stringify!($name), $bytes, &[$((stringify!($field), stringify!($ty), $offset)),*])),*];

        /// Digest of every structure: names, types, sizes and offsets.
        pub(super) const STRUCTURES_DIGEST: u64 = {
            let mut all = DIGEST_SEED;
            $(
                all = digest(all, stringify!($name), $bytes);
                $(
                    all = digest(all, stringify!($field), $offset);
                    all = digest(all, stringify!($ty), size_of::<$ty>() as u64);
                )*
            )*
            all
        };
    };
    (@define record $(#[$meta:meta])* $name:ident { $($fields:tt)* }) => {
        structures!(@body $(#[$meta])* #[repr(C)] $name { $($fields)* });
    };
    (@define $kind:ident $(#[$meta:meta])* $name:ident { $($fields:tt)* }) => {
        structures!(@body $(#[$meta])* #[repr(C, align(64))] $name { $($fields)* });
    };
    (@body $(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $ty:ty),* }) => {
        $(#[$meta])*
        #[allow(missing_docs)] // fields whose names say it
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
        pub struct $name { $($(#[$field_meta])* pub $field: $ty),* }
    };
    (@implement line $name:ident { $($field:ident: $ty:ty),* }) => {
        impl Line for $name {
            const NAME: &'static str = stringify!($name);
            const RESERVED: [u64; 8] = {
                let mut mask = [0; 8];
                $(if is_reserved(stringify!($field)) {
                    mask = with_bytes(mask, offset_of!($name, $field), size_of::<$ty>());
                })*
                mask
            };
        }
    };
    (@implement versioned $name:ident { $($field:ident: $ty:ty),* }) => {
        structures!(@implement line $name { $($field: $ty),* });
        impl Versioned for $name {}
        const _: () = assert!(offset_of!($name, version) as u64 == <$name as Versioned>::VERSION_AT);
    };
    (@implement $kind:ident $name:ident { $($field:ident: $ty:ty),* }) => {};
}

structures! {
    /// First line of the superblock. It is written last, so a region whose creation was cut short has no magic.
    line SuperblockHead: 64 {
        magic: u64 = 0,
        layout_version: u32 = 8,
        superblock_bytes: u32 = 12,
        layout_hash: u64 = 16,
        region_bytes: u64 = 24,
        uuid: [u8; 16] = 32,
        created_ms: u64 = 48,
        reserved: u64 = 56,
    }

    /// Second line of the superblock: the geometry, and a CRC32C over both lines up to itself.
    line SuperblockGeometry: 64 {
        max_brokers: u32 = 0,
        max_topics: u32 = 4,
        max_sessions: u32 = 8,
        batchlog_slots: u32 = 12,
        segment_bytes: u64 = 16,
        segment_count: u32 = 24,
        allocator: u32 = 28,
        max_leaders: u32 = 32,
        role: u32 = 36,
        reserved: [u64; 2] = 40,
        reserved_high: u32 = 56,
        checksum: u32 = 60,
    }

    /// Superblock, at the start of the region. Written once.
    block Superblock: 128 {
        head: SuperblockHead = 0,
        geometry: SuperblockGeometry = 64,
    }

    /// Highest term that a candidate campaigned for, where hosts share one coherence domain. All compare and swap it.
    line ElectionLine: 64 {
        term: Term = 0,
        reserved: [u64; 7] = 8,
    }

    /// Terms of a broker that can be the leader: words, written by that broker. The broker with the highest `claimed`
    /// leads once its `active` is the same, and is taking over until then.
    line TermLine: 64 {
        /// Term under which it last began to take over.
        claimed: Term = 0,
        /// Term under which it last led: everything up to then is in its area.
        active: Term = 8,
        reserved: [u64; 6] = 16,
    }

    /// Leader's statement about the brokers. Written by that leader.
    versioned ControlLine: 64 {
        term: Term = 0,
        incarnation: Incarnation = 8,
        reserved_low: u32 = 12,
        /// Brokers that are alive, one bit each.
        broker_mask: u64 = 16,
        /// Brokers whose pins count, one bit each: the live ones, and those that may only be paused.
        pinning_mask: u64 = 24,
        reserved: [u64; 3] = 32,
        version: u64 = 56,
    }

    /// Control block: the election, then the terms and the statement of each broker that can be the leader.
    block ControlBlock: 4160 {
        election: ElectionLine = 0,
        terms: [TermLine; MAX_BROKERS as usize] = 64,
        statements: [ControlLine; MAX_BROKERS as usize] = 2112,
    }

    /// Addresses of a broker. Written by that broker.
    versioned BrokerLine: 64 {
        /// IPv6, or IPv4 mapped into it (RFC 4291, section 2.5.5.2).
        data_address: [u8; 16] = 0,
        control_address: [u8; 16] = 16,
        data_port: u16 = 32,
        control_port: u16 = 34,
        incarnation: Incarnation = 36,
        process_id: u32 = 40,
        /// 1 while it runs, 0 once it left in order.
        running: u32 = 44,
        /// Digest of the file or device node that has the lock on the broker's id; 0 if it is not known.
        lock_node: u64 = 48,
        version: u64 = 56,
    }

    /// Counters of a broker: words, written by that broker.
    line PulseLine: 64 {
        heartbeat: u64 = 0,
        batches_published: u64 = 8,
        /// State of the broker's replica: a [`super::ReplicaState`].
        replica: u64 = 16,
        /// Secret by which the broker's calls to other brokers are known: who maps the region can read it.
        call_key: u64 = 24,
        reserved: [u64; 4] = 32,
    }

    /// Row of the broker table.
    block BrokerSlot: 128 {
        line: BrokerLine = 0,
        pulse: PulseLine = 64,
    }

    /// Configuration of a topic. Written by a leader. The version also guards the name line behind it.
    versioned TopicLine: 64 {
        incarnation: Incarnation = 0,
        /// A [`super::TopicState`].
        state: u8 = 4,
        /// An [`embarcadero_wire::Order`].
        order: u8 = 5,
        ack_level: u8 = 6,
        replication_factor: u8 = 7,
        retention_bytes: u64 = 8,
        retention_ms: u64 = 16,
        created_ms: u64 = 24,
        name_bytes: u32 = 32,
        reserved_low: u32 = 36,
        reserved: [u64; 2] = 40,
        version: u64 = 56,
    }

    /// Name of a topic: UTF-8, zero padded.
    line NameLine: 64 {
        name: [u8; TOPIC_NAME_BYTES] = 0,
    }

    /// Tail and trim point of an order index: words, each growing on its own.
    line TailLine: 64 {
        /// Entries below this position are complete.
        committed: u64 = 0,
        /// Message offset of the next entry.
        next_offset: u64 = 8,
        /// Position of the first entry of the topic's present incarnation.
        base: u64 = 16,
        /// Entries below this position are gone.
        trimmed: u64 = 24,
        /// Message offset of the first entry that is kept.
        trimmed_offset: u64 = 32,
        /// Term of the writer.
        term: Term = 40,
        /// Bytes of all batches that were ever indexed.
        bytes: u64 = 48,
        /// Incarnation of the topic to which the other words belong.
        incarnation: u64 = 56,
    }

    /// Topic in a leader's area: configuration, name, and tail of the global order.
    block LeaderTopic: 256 {
        topic: TopicLine = 0,
        name: NameLine = 64,
        tail: TailLine = 128,
        reserved: [u64; 8] = 192,
    }

    /// Broker half of an offset entry: words, written by the broker.
    line BrokerHalf: 64 {
        /// Bytes ever reserved in the Blog (the paper's log_ptr).
        log_offset: u64 = 0,
        /// Batchlog entries below this index are complete.
        batchlog_head: u64 = 8,
        /// Messages published to the Batchlog.
        written: u64 = 16,
        /// End of the newest published batch (the paper's processed_ptr).
        written_addr: u64 = 24,
        reserved: [u64; 4] = 32,
    }

    /// Memory that a broker still uses: words, written by the broker.
    line PinLine: 64 {
        /// One more than the lowest position that a sender of this broker reads; all ones when there is none.
        delivering_from: u64 = 0,
        /// Highest topic incarnation of which this broker holds nothing any more.
        released: u64 = 8,
        reserved: [u64; 6] = 16,
    }

    /// A broker's words on a topic. Halves that different hosts write share no line, nor a pair of lines that CPUs
    /// prefetch together.
    block OffsetEntry: 512 {
        half: BrokerHalf = 0,
        pin: PinLine = 64,
        /// Tail of the broker's own order.
        tail: TailLine = 128,
        /// Position up to which this broker, as a replica, has the batches of each source broker.
        replicated: [u64; MAX_BROKERS as usize] = 192,
        reserved: [u64; 8] = 448,
    }

    /// TInode: the brokers' words on a topic, at the index of each broker's id.
    block Tinode: 16384 {
        entries: [OffsetEntry; MAX_BROKERS as usize] = 0,
    }

    /// Leader's progress in a broker's Batchlog: words, written by that leader (the paper's sequencer half).
    line SequencerHalf: 64 {
        /// Batches of this broker that are ordered (the paper's ordered_seq).
        ordered: u64 = 0,
        /// Message offset after the newest ordered batch (the paper's ordered_ptr).
        ordered_offset: u64 = 8,
        /// Batchlog slots of entries below this index may be reused.
        consumed_through: u64 = 16,
        /// Batchlog entries below this index are committed or dropped; none is held back.
        decided_through: u64 = 24,
        reserved: [u64; 4] = 32,
    }

    /// Batch in the order in which its broker received it. `lap` is the commit word.
    line BatchEntry: 64 {
        location: u64 = 0,
        client_id: ClientId = 8,
        sequence: u64 = 16,
        session_epoch: Epoch = 24,
        bytes: u32 = 28,
        message_count: u32 = 32,
        session_slot: SessionSlot = 36,
        topic_incarnation: Incarnation = 40,
        reserved_low: u32 = 44,
        reserved: u64 = 48,
        lap: u64 = 56,
    }

    /// Batch in the order that subscribers read.
    line IndexEntry: 64 {
        first_offset: u64 = 0,
        location: u64 = 8,
        client_id: ClientId = 16,
        sequence: u64 = 24,
        /// Sequencer's wall clock, microseconds since 1970. It never goes back within an index.
        ordered_us: u64 = 32,
        bytes: u32 = 40,
        message_count: u32 = 44,
        session_epoch: Epoch = 48,
        /// Low half of the leader's term; 0 in a broker's own order.
        term: u32 = 52,
        broker: u8 = 56,
        replicas: u8 = 57,
        reserved: u16 = 58,
        /// Digest of the region, the stream and the position of the entry. A foreign line does not match.
        commit: u32 = 60,
    }

    /// Replication of the stream by which a broker acknowledges: words, written by a leader.
    line CompletionLine: 64 {
        /// Entries below this position are on as many disks as the topic asks for, unless they are lost.
        durable_through: u64 = 0,
        /// Entries from `lost_from` on and below this position may be on no disk: retention took them.
        lost_through: u64 = 8,
        /// 1 while sessions wait for batches to be durable; retention waits too then, and where it is damaged.
        awaited: u64 = 16,
        /// First entry that retention took before it was durable.
        lost_from: u64 = 24,
        reserved: [u64; 4] = 32,
    }

    /// Identity and state of a session. Written by a leader.
    versioned SessionLine: 64 {
        client_id: ClientId = 0,
        epoch: Epoch = 8,
        /// A [`super::SessionState`].
        state: u32 = 12,
        topic: TopicId = 16,
        topic_incarnation: Incarnation = 20,
        /// Sequences below this are committed (strong order), or were when the session ended.
        committed: u64 = 24,
        ack_level: u32 = 32,
        /// Epoch under which the client got the slot. Records of earlier epochs are of other clients.
        first_epoch: Epoch = 36,
        /// Sequence of the client's first batch: those below are of other clients.
        first_sequence: u64 = 40,
        /// Secret that the session's client knows; 0 if nobody does.
        token: SessionToken = 48,
        version: u64 = 56,
    }

    /// Progress of a session: words, written by a leader.
    line SessionProgressLine: 64 {
        /// Sequences below this are committed.
        expected: u64 = 0,
        /// Epoch of the session that the word above belongs to. It is written after the row of that epoch, and before
        /// `expected` moves on under it.
        epoch: u64 = 8,
        reserved: [u64; 6] = 16,
    }

    /// Place of a session's batch in the order. `tag` is the commit word.
    record CommitRecord: 32 {
        /// Global offset of the first message.
        first_offset: u64 = 0,
        /// Position of the entry in the order index.
        position: u64 = 8,
        /// Broker that received the batch.
        broker: BrokerId = 16,
        /// Epoch of the session under which it committed.
        session_epoch: Epoch = 20,
        /// Sequence of the batch, plus one.
        tag: u64 = 24,
    }

    /// Row of the session table.
    block SessionRow: 4224 {
        session: SessionLine = 0,
        progress: SessionProgressLine = 64,
        /// Record of the batch with sequence `s`, at index `s` modulo [`SESSION_WINDOW`].
        records: [CommitRecord; SESSION_WINDOW as usize] = 128,
    }

    /// Holder of a segment. Written by the holder.
    versioned OwnerLine: 64 {
        /// A [`super::SegmentKind`].
        kind: u32 = 0,
        topic: TopicId = 4,
        /// Broker that received what is in it; of an index, its stream: a broker id, or `max_brokers` for the global
        /// one.
        broker: u32 = 8,
        topic_incarnation: Incarnation = 12,
        ordinal: u64 = 16,
        /// Broker that took it from the pool, and alone may give it back.
        holder: BrokerId = 24,
        reserved_low: u32 = 28,
        reserved: [u64; 3] = 32,
        version: u64 = 56,
    }
}

// [[DEVIATION_004]] The TInode stands in for a separate broker metadata region.
// [[DEVIATION_011]] Each leader writes topics, sessions and sequencer halves to an area of its own.

const _: () = {
    // CPUs prefetch lines in pairs, and the pair of one writer must not hold a line of another.
    assert!(size_of::<OffsetEntry>().is_multiple_of(256) && size_of::<LeaderTopic>().is_multiple_of(256));
    // A record is written back as a whole.
    assert!(LINE_BYTES.is_multiple_of(size_of::<CommitRecord>() as u64));
};
