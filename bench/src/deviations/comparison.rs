//! Comparison of two designs by one figure.

use crate::report::{Row, human, median};

/// Direction in which values are better.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Better {
    More,
    Less,
}

/// One figure of an entry, for both designs.
pub(super) struct Comparison {
    pub(super) id: &'static str,
    pub(super) what: String,
    pub(super) unit: &'static str,
    /// Direction that is better, and the bound of the ratio of ours to the baseline that keeps the entry.
    stays: (Better, f64),
    pub(super) baseline: Vec<f64>,
    pub(super) ours: Vec<f64>,
}

impl Comparison {
    pub(super) fn new(id: &'static str, what: impl Into<String>, unit: &'static str, stays: (Better, f64)) -> Self {
        Self { id, what: what.into(), unit, stays, baseline: Vec::new(), ours: Vec::new() }
    }

    /// Adds one run of each design.
    pub(super) fn add(&mut self, baseline: f64, ours: f64) {
        self.baseline.push(baseline);
        self.ours.push(ours);
    }

    fn ratio(&self) -> f64 {
        median(&self.ours) / median(&self.baseline)
    }

    pub(super) fn verdict(&self) -> &'static str {
        let kept = match self.stays {
            (Better::More, bound) => self.ratio() >= bound,
            (Better::Less, bound) => self.ratio() <= bound,
        };
        if kept { "kept" } else { "**bound missed**" }
    }

    pub(super) fn line(&self) -> String {
        let show = |row: &Row| {
            let (least, most) = row.spread();
            let [value, least, most] = [row.median(), least, most].map(|value| human(value, self.unit));
            format!("{value} ({least} to {most})")
        };
        let [baseline, ours] = [&self.baseline, &self.ours].map(|runs| show(&Row::new("", self.unit, runs)));
        let bound = match self.stays {
            (Better::More, bound) => format!(">= {bound}"),
            (Better::Less, bound) => format!("<= {bound}"),
        };
        format!(
            "| {} | {} | {baseline} | {ours} | {:.2} | {bound} | {} |",
            self.id,
            self.what,
            self.ratio(),
            self.verdict()
        )
    }
}
