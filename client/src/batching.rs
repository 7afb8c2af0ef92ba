//! When a batch is full enough to go.

/// What a policy may look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Batches handed to the transport and not acknowledged.
    pub in_flight: usize,
    /// Batches that wait for the transport.
    pub queued: usize,
    /// Bytes in the batch that is being filled.
    pub open_bytes: usize,
}

/// Decides when the open batch goes. A batch that cannot take the next message always goes.
pub trait BatchPolicy: Send + Sync {
    /// Bytes of a full batch, header included; buffers have this size.
    fn capacity(&self) -> usize;

    /// True when the open batch should go now.
    fn goes(&self, load: Load) -> bool;
}

/// Batches of a fixed size; a message goes out at once when nothing is under way, so light load pays no delay.
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
        load.open_bytes >= self.bytes || (load.in_flight == 0 && load.queued == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_message_goes_at_once_and_others_gather() {
        let policy = FixedSize::new(1000);
        assert!(policy.goes(Load { in_flight: 0, queued: 0, open_bytes: 70 }));
        assert!(!policy.goes(Load { in_flight: 1, queued: 0, open_bytes: 70 }));
        assert!(policy.goes(Load { in_flight: 9, queued: 3, open_bytes: 1000 }));
    }
}
