//! When a batch is full enough to go.

/// What a policy may look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Batches sealed and not acknowledged.
    pub in_flight: usize,
    /// Bytes in the batch that is being filled.
    pub open_bytes: usize,
    /// Messages in it.
    pub open_messages: u32,
    /// The batch before it was full: the application streams.
    pub streaming: bool,
    /// The application waits for what is in it, or has been silent for a while.
    pub awaited: bool,
}

/// Decides when the open batch goes. A batch that cannot take the next message always goes.
pub trait BatchPolicy: Send + Sync {
    /// Bytes of a full batch, header included; buffers have this size.
    fn capacity(&self) -> usize;

    /// True when the open batch should go now.
    fn goes(&self, load: Load) -> bool;
}

/// Batches of a fixed size. When nothing is under way, a batch goes with its first message, or once the application
/// waits for it, so light load pays no delay; a stream fills its batches, however fast they are acknowledged.
///
/// The paper's policy with 512 KiB. `[[DEVIATION_001]]` (adaptive sizes) will be another implementation of the trait.
#[derive(Clone, Copy, Debug)]
pub struct FixedSize {
    bytes: usize,
}

impl FixedSize {
    /// Batches of `bytes`.
    #[must_use]
    pub const fn new(bytes: usize) -> Self {
        Self { bytes }
    }
}

impl BatchPolicy for FixedSize {
    fn capacity(&self) -> usize {
        self.bytes
    }

    #[inline]
    fn goes(&self, load: Load) -> bool {
        let nothing_under_way = load.in_flight == 0;
        let lone = load.open_messages == 1 && !load.streaming;
        load.open_bytes >= self.bytes || (nothing_under_way && (lone || load.awaited))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_message_goes_at_once_and_others_gather() {
        let policy = FixedSize::new(1000);
        let lone = Load { open_bytes: 70, open_messages: 1, ..Load::default() };
        assert!(policy.goes(lone));
        assert!(!policy.goes(Load { in_flight: 1, ..lone }));
        assert!(!policy.goes(Load { streaming: true, ..lone }));
        assert!(!policy.goes(Load { open_messages: 2, ..lone }));
        assert!(policy.goes(Load { open_messages: 2, awaited: true, ..lone }));
        assert!(policy.goes(Load { streaming: true, awaited: true, ..lone }));
        assert!(policy.goes(Load { in_flight: 9, open_bytes: 1000, open_messages: 20, ..lone }));
    }
}
