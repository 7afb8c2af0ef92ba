//! Assignment of sources to replicas.
//!
//! Every broker computes it for itself. While two brokers disagree, there is a copy more or fewer. That does no harm:
//! durable batches are counted on disks, not derived from the assignment.

use embarcadero_wire::BrokerId;

/// Brokers to choose replicas from, and their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Number of broker slots of the region.
    pub(crate) brokers: u32,
    /// Brokers that can take batches, one bit each.
    pub(crate) usable: u64,
    /// Number of replicas of each batch.
    pub(crate) copies: u32,
}

/// Returns the brokers that replicate the batches of `source`: the first usable ones that follow it, in a ring of all.
/// The source comes last, as a failure of its host takes its disk too.
pub(crate) fn replicas_of(source: BrokerId, among: Choice) -> impl Iterator<Item = BrokerId> {
    let Choice { brokers, usable, copies } = among;
    (1..=brokers)
        .map(move |step| BrokerId((source.0 + step) % brokers))
        .filter(move |broker| usable & (1 << broker.0) != 0)
        .take(copies as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chosen(source: u32, usable: u64, brokers: u32, copies: u32) -> Vec<u32> {
        replicas_of(BrokerId(source), Choice { brokers, usable, copies }).map(|broker| broker.0).collect()
    }

    #[test]
    fn the_next_ones_that_can_take_over() {
        assert_eq!(chosen(0, 0b1111, 4, 2), [1, 2]);
        assert_eq!(chosen(3, 0b1111, 4, 2), [0, 1]);
        assert_eq!(chosen(0, 0b1101, 4, 2), [2, 3]);
        assert_eq!(chosen(0, 0b0001, 4, 2), [0]);
        assert_eq!(chosen(0, 0, 4, 2), [0; 0]);
    }

    proptest! {
        #[test]
        fn as_many_as_there_are_and_nobody_twice(source in 0u32..32, usable: u32, copies in 1u32..31) {
            let mut replicas = chosen(source, usable.into(), 32, copies);
            prop_assert_eq!(replicas.len() as u32, copies.min(usable.count_ones()));
            replicas.sort_unstable();
            replicas.dedup();
            prop_assert_eq!(replicas.len() as u32, copies.min(usable.count_ones()));
        }

        #[test]
        fn when_one_fails_the_others_keep_what_they_have(source in 0u32..8, usable: u8, failed in 0u32..8, copies in 1u32..8) {
            let before = chosen(source, usable.into(), 8, copies);
            let after = chosen(source, u64::from(usable) & !(1 << failed), 8, copies);
            prop_assert!(before.iter().filter(|replica| **replica != failed).all(|replica| after.contains(replica)));
        }
    }
}
