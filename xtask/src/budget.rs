//! Budgets: how many schedules, seeds, rounds and seconds the open-ended tests run for. The tests read environment variables.
//! Their defaults are those of [`Budget::SMALL`]. Tests of mutations, which that budget skips, have those of [`Budget::FULL`].

/// Budgets of all open-ended tests in one run.
#[derive(Clone, Copy)]
pub(crate) struct Budget {
    /// Number of schedules in `sim/tests/fabric_schedules/main.rs`.
    pub schedules: u32,
    /// Number of schedules or seeds within which a test must notice a mutation, such as a flush left out. 0 skips these tests.
    pub mutation: u32,
    /// Number of seeds in `sim/tests/rack`.
    pub rack_seeds: u32,
    /// Number of rounds in `tests/it/chaos.rs`.
    pub chaos_rounds: u32,
    /// Time for each fuzz target, in seconds.
    pub fuzz_s: u32,
}

impl Budget {
    /// Budget of `cargo xtask test`, which takes a few minutes.
    pub(crate) const SMALL: Self = Self { schedules: 1000, mutation: 0, rack_seeds: 100, chaos_rounds: 2, fuzz_s: 0 };
    /// Budget of `cargo xtask all`.
    pub(crate) const FULL: Self =
        Self { schedules: 5000, mutation: 10_000, rack_seeds: 1000, chaos_rounds: 8, fuzz_s: 10 };
    /// Budget of `cargo xtask long`, which takes hours. Fuzzing of the seven targets takes one hour in all.
    pub(crate) const LONG: Self =
        Self { schedules: 100_000, mutation: 10_000, rack_seeds: 100_000, chaos_rounds: 200, fuzz_s: 514 };

    /// Environment variables that the tests read, with their values.
    pub(crate) fn variables(&self) -> [(&'static str, String); 5] {
        [
            ("EMBARCADERO_SIM_SCHEDULES", self.schedules.to_string()),
            ("EMBARCADERO_SIM_MUTATION_BUDGET", self.mutation.to_string()),
            ("EMBARCADERO_RACK_SEEDS", self.rack_seeds.to_string()),
            ("EMBARCADERO_RACK_MUTATION_BUDGET", self.mutation.to_string()),
            ("EMBARCADERO_CHAOS_ROUNDS", self.chaos_rounds.to_string()),
        ]
    }
}
