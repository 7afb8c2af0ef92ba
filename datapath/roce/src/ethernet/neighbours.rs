//! Addresses of neighbours, shared by the stations at one port.

use super::frame::Mac;
use crate::time::Nanos;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Shortest time between two questions for one neighbour, nanoseconds.
pub(super) const ASK_EVERY: Nanos = 10_000_000;
/// Most neighbours that are remembered.
pub(super) const MOST: usize = 4096;

/// Ethernet addresses of neighbours. The stations at the queues of one port share it.
#[derive(Debug, Default)]
pub struct Neighbours {
    table: Mutex<Table>,
    /// Number of changes of what is known.
    changes: AtomicU64,
}

/// Known neighbours, and questions that are open.
#[derive(Debug, Default)]
struct Table {
    known: HashMap<IpAddr, Mac>,
    /// Time of the last question for an address that has not answered.
    asked: HashMap<IpAddr, Nanos>,
}

/// Remembers something about an address. Strangers can fill the map: then all is forgotten, and asked for again where it
/// is needed.
fn remember<T>(map: &mut HashMap<IpAddr, T>, address: IpAddr, what: T) -> Option<T> {
    if map.len() >= MOST {
        map.clear();
    }
    map.insert(address, what)
}

impl Neighbours {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that `address` stated its Ethernet address. It counts only as the answer to a question, or with one (`asks`).
    pub(super) fn learn(&self, address: IpAddr, mac: Mac, asks: bool) {
        let mut table = self.lock();
        if (table.asked.remove(&address).is_some() || asks) && remember(&mut table.known, address, mac) != Some(mac) {
            // SYNC: pairs with the acquire in `changes`; the lock orders the table itself.
            self.changes.fetch_add(1, Ordering::Release);
        }
    }

    /// Returns true when a question for `address` is due at time `now`, and then counts the question as asked.
    pub(super) fn asks(&self, address: IpAddr, now: Nanos) -> bool {
        let mut table = self.lock();
        let asks = table.asked.get(&address).is_none_or(|last| now >= last + ASK_EVERY);
        if asks {
            remember(&mut table.asked, address, now);
        }
        asks
    }

    /// Number of changes so far of what is known.
    pub(super) fn changes(&self) -> u64 {
        // SYNC: pairs with the release in `learn`.
        self.changes.load(Ordering::Acquire)
    }

    /// Copies what is known into `known`.
    pub(super) fn copy_to(&self, known: &mut HashMap<IpAddr, Mac>) {
        known.clone_from(&self.lock().known);
    }
}
