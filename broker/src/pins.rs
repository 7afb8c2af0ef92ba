//! Pins of the readers within a broker, which keep what they read from being reclaimed.

use embarcadero_cxl::Fabric;
use embarcadero_cxl::leadership::NoLeader;
use embarcadero_cxl::order_index::{Pin, StreamId};
use embarcadero_cxl::region::Region;
use embarcadero_wire::{BrokerId, Order, Stream, TopicId};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Pins of one broker on the stream of a topic that it serves: the global one, or its own. There is one per reader within
/// the broker, and the region shows the lowest.
pub struct PinBoard<F: Fabric> {
    pins: Mutex<Pins<F>>,
}

struct Pins<F: Fabric> {
    /// Position that each reader pins, by its number: `u64::MAX` for none. `None` is a number without a reader.
    readers: Vec<Option<u64>>,
    /// Lowest of them, as the region shows it.
    lowest: Pin<F>,
}

impl<F: Fabric> Pins<F> {
    /// Pin of a registered reader.
    fn of(&mut self, reader: usize) -> &mut Option<u64> {
        let pin = &mut self.readers[reader];
        assert!(pin.is_some(), "reader {reader} is not registered");
        pin
    }

    /// Shows the lowest pin in the region. Returns the trim point seen afterwards.
    fn show(&mut self) -> Result<u64, NoLeader> {
        self.lowest.set(self.readers.iter().flatten().copied().min().unwrap_or(u64::MAX))
    }
}

impl<F: Fabric> PinBoard<F> {
    /// Returns a board without readers.
    pub(crate) fn new(region: &Region<F>, topic: TopicId, order: Order, broker: BrokerId) -> Self {
        let stream = if order.is_global() { Stream::GLOBAL } else { Stream::of(broker) };
        let lowest = Pin::new(region.clone(), StreamId { topic, stream }, broker);
        Self { pins: Mutex::new(Pins { readers: Vec::new(), lowest }) }
    }

    fn pins(&self) -> MutexGuard<'_, Pins<F>> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a reader, which pins nothing yet. Returns the reader's number, which is valid until
    /// `PinBoard::unregister`.
    pub fn register(&self) -> usize {
        let mut pins = self.pins();
        let readers = &mut pins.readers;
        let number = readers.iter().position(Option::is_none).unwrap_or_else(|| {
            readers.push(None);
            readers.len() - 1
        });
        readers[number] = Some(u64::MAX);
        number
    }

    /// Removes a reader and its pin.
    ///
    /// # Panics
    /// When the reader is not registered.
    pub(crate) fn unregister(&self, reader: usize) {
        let mut pins = self.pins();
        *pins.of(reader) = None;
        // Without a leader the pin is shown all the same; only the trim point is unknown.
        let _ = pins.show();
    }

    /// Removes a reader's pin; the reader stays.
    ///
    /// # Panics
    /// When the reader is not registered.
    pub fn clear(&self, reader: usize) {
        // Without a leader the pin is shown all the same; only the trim point is unknown.
        let _ = self.set(reader, u64::MAX);
    }

    /// Pins everything from `position` on for a reader; `u64::MAX` pins nothing. Returns the trim point seen
    /// afterwards.
    ///
    /// Entries at or above both the position and the trim point stay in the region until the pin moves on.
    ///
    /// # Errors
    /// [`NoLeader`] when no leader can say what is trimmed. The pin is set all the same.
    ///
    /// # Panics
    /// When the reader is not registered.
    #[inline]
    pub fn set(&self, reader: usize, position: u64) -> Result<u64, NoLeader> {
        let mut pins = self.pins();
        *pins.of(reader) = Some(position);
        pins.show()
    }
}
