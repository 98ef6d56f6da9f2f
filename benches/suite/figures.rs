//! Samples, and the statistics of them.

use anyhow::Result;

use crate::attribution::Part;

/// One row of the table: a figure with the samples of each contestant.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    pub(crate) samples: Vec<(String, Vec<f64>)>,
}

/// All figures, in the order of their measurement.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    pub(crate) rows: Vec<Figure>,
    /// Bytes of rvmm's stripped binary, by crate.
    pub(crate) sizes: Vec<(String, u64)>,
    /// Where rvmm's boot spends its time: part, count, milliseconds.
    pub(crate) boot_parts: Vec<Part>,
    /// Failures: group, contestant, reason.
    pub(crate) failures: Vec<(String, String, String)>,
}

impl Figures {
    pub(crate) fn add(&mut self, name: &str, unit: &'static str, contestant: &str, value: f64) {
        let row = match self.rows.iter().position(|row| row.name == name) {
            Some(at) => &mut self.rows[at],
            None => {
                self.rows.push(Figure {
                    name: name.into(),
                    unit,
                    samples: Vec::new(),
                });
                self.rows.last_mut().expect("just pushed")
            }
        };
        match row.samples.iter_mut().find(|(who, _)| who == contestant) {
            Some((_, samples)) => samples.push(value),
            None => row.samples.push((contestant.into(), vec![value])),
        }
    }

    pub(crate) fn merge(&mut self, other: Figures) {
        for row in other.rows {
            for (who, samples) in row.samples {
                for value in samples {
                    self.add(&row.name, row.unit, &who, value);
                }
            }
        }
    }

    /// Adds samples that were taken elsewhere.
    pub(crate) fn add_given(
        &mut self,
        name: &str,
        unit: &'static str,
        who: &str,
        values: &[String],
    ) -> Result<()> {
        for value in values {
            self.add(name, unit, who, value.parse()?);
        }
        Ok(())
    }

    pub(crate) fn add_size(&mut self, part: &str, bytes: u64) {
        self.sizes.push((part.into(), bytes));
    }

    pub(crate) fn failed(&mut self, group: &str, contestant: &str, why: &str) {
        let failure = (group.into(), contestant.into(), why.into());
        if !self.failures.contains(&failure) {
            self.failures.push(failure);
        }
    }

    pub(crate) fn failures_of(&self, names: &[&str]) -> Vec<String> {
        let of = self
            .failures
            .iter()
            .filter(|(_, who, _)| names.contains(&who.as_str()));
        of.map(|(group, who, why)| format!("{group}, {who}: {why}"))
            .collect()
    }
}

impl Figure {
    pub(crate) fn summary(&self, contestant: &str) -> Option<Summary> {
        let (_, samples) = self.samples.iter().find(|(who, _)| who == contestant)?;
        Summary::of(samples)
    }

    /// The ratio of `a`'s median to `b`'s.
    pub(crate) fn ratio(&self, a: &str, b: &str) -> Option<f64> {
        let (a, b) = (self.summary(a)?.median, self.summary(b)?.median);
        (b > 0.0).then(|| a / b)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Summary {
    fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            (sorted[middle - 1] + sorted[middle]) / 2.0
        };
        Some(Self { median, min, max })
    }

    /// Half the distance between the least and the largest sample, in percent of the median.
    pub(crate) fn spread(&self) -> f64 {
        if self.median == 0.0 {
            return 0.0;
        }
        (self.max - self.min) / 2.0 / self.median * 100.0
    }
}
