//! Seeds under which a schedule fails when something is left out.

use super::*;

/// Returns a seed under which some schedule fails without `site`. It is found anew when the code that schedules drive changes.
pub(super) const fn recorded(site: Site) -> u64 {
    match site {
        Site::SuperblockFlush => 1,
        Site::SuperblockRead => 1,
        Site::ControlFlush => 1,
        Site::ControlRead => 1,
        Site::TermFlush => 1,
        Site::TermRead => 1,
        Site::TakeoverFlush => 1,
        Site::TakeoverRead => 5246,
        Site::BrokerSlotFlush => 1,
        Site::BrokerSlotRead => 1,
        Site::PulseFlush => 1,
        Site::PulseRead => 8,
        Site::TopicFlush => 1,
        Site::TopicRead => 1,
        Site::PayloadFlush => 1,
        Site::PayloadRead => 1,
        Site::BatchEntryFlush => 1,
        Site::BatchEntryFence => 523,
        Site::BatchEntryRead => 8,
        Site::BatchlogHeadFlush => 1,
        Site::BatchlogHeadRead => 1,
        Site::IndexEntryFlush => 1,
        Site::IndexEntryFence => 545,
        Site::IndexEntryRead => 3,
        Site::DirectoryFlush => 1,
        Site::DirectoryRead => 4,
        Site::TailFlush => 1,
        Site::TailRead => 1,
        Site::TrimFlush => 1,
        Site::TrimRead => 23,
        Site::SessionFlush => 1,
        Site::SessionRead => 1,
        Site::RecordFlush => 1,
        Site::RecordRead => 1,
        Site::ConsumedFlush => 1,
        Site::ConsumedRead => 1,
        Site::PinFlush => 1,
        Site::PinRead => 39,
        Site::ReplicationFlush => 3,
        Site::ReplicationRead => 3,
        Site::CompletionFlush => 2,
        Site::CompletionRead => 3,
        Site::OwnerFlush => 1,
        Site::OwnerRead => 1,
        Site::BitmapFlush => 1,
        Site::BitmapRead => 1,
    }
}

/// Returns a seed under which some schedule fails without `guard`. Clients of schedules keep their sessions, so `None` for
/// guards that tests in `sim/tests/protocol` notice. No two processes of
/// schedules share a host, and none moves: `sim/tests/protocol/shared_caches.rs` and `sim/tests/protocol/moved_ids.rs`. A
/// reader's first look at another leader is hardly ever at a tail: `sim/tests/protocol/full_fences.rs`.
pub(super) const fn recorded_guard(guard: Guard) -> Option<u64> {
    Some(match guard {
        Guard::RecordOwner | Guard::AheadOfGap | Guard::GroupBound | Guard::IndexReserve => return None,
        Guard::MemoryBeforeAct | Guard::FreshOwnLines | Guard::TermAfterRead => return None,
        Guard::ClaimBeforeCopy => 1356,
        Guard::OwnSegment => 77,
        Guard::SegmentOfLeader => 3,
        Guard::RecoverBeforeAccept => 38,
        Guard::RetakeUndecided => 5,
        Guard::DedupCompare => 1,
        Guard::SlotReuse => 17,
        Guard::DecidedBeforeReuse => 1,
        Guard::PinBeforeReuse => 22,
        Guard::DiskBeforeAck => 3,
        Guard::TrimAfterCopy => 1373,
    })
}
