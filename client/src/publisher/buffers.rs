//! Buffers in which batches are filled.

use crate::error::ClientError;
use embarcadero_transport::SendBuffer;
use embarcadero_wire::batch::BatchBuilder;

/// Batch in memory that NICs can send from.
pub(super) type Batch = BatchBuilder<SendBuffer>;

/// Free buffers of a publisher, and the account of all its buffers.
pub(super) struct Buffers {
    free: Vec<Batch>,
    /// Bytes of all buffers: the open one, those in flight, and the free ones.
    held_bytes: usize,
    /// Upper bound of `held_bytes`.
    budget_bytes: usize,
}

impl Buffers {
    /// Account without buffers. At most `count` buffers are expected, of `budget_bytes` together.
    pub(super) fn new(count: usize, budget_bytes: usize) -> Self {
        Self { free: Vec::with_capacity(count), held_bytes: 0, budget_bytes }
    }

    /// Takes a buffer for a batch of `size` bytes; `None` when too much is in flight.
    pub(super) fn get(&mut self, size: usize) -> Result<Option<Batch>, ClientError> {
        if let Some(index) = self.free.iter().rposition(|batch| batch.capacity() == size) {
            return Ok(Some(self.free.swap_remove(index)));
        }
        // The free ones have an earlier size.
        while self.held_bytes + size > self.budget_bytes {
            let Some(other) = self.free.pop() else { return Ok(None) };
            self.held_bytes -= other.capacity();
        }
        let buffer = SendBuffer::new(size).map_err(ClientError::io("get memory for a batch"))?;
        self.held_bytes += size;
        Ok(Some(Batch::in_buffer(buffer)))
    }

    /// Takes a buffer back.
    pub(super) fn put(&mut self, mut batch: Batch) {
        batch.clear();
        self.free.push(batch);
    }
}
