//! The best few of many scores. The order is total: the higher score first and, of the same scores, the lower row.

use std::cmp::Ordering;

/// The most neighbours that are looked for.
pub const MAX: usize = 100;

/// A row, and how similar it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Neighbour {
    /// The row's number, from 0.
    pub row: usize,
    /// Its score.
    pub score: f32,
}

impl Neighbour {
    fn order(&self, other: &Self) -> Ordering {
        other.score.total_cmp(&self.score).then(self.row.cmp(&other.row))
    }
}

/// The best so far, the best first.
#[derive(Clone, Debug)]
pub struct Top {
    count: usize,
    best: Vec<Neighbour>,
    /// What a score must exceed to be among them, or equal.
    least: f32,
}

impl Top {
    /// Of so many.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self { count, best: Vec::with_capacity(count + 1), least: f32::NEG_INFINITY }
    }

    /// Takes scores of rows from this one on.
    pub fn take(&mut self, first_row: usize, scores: &[f32]) {
        for (place, &score) in scores.iter().enumerate() {
            // Nearly all of them end here.
            if score < self.least {
                continue;
            }
            self.insert(Neighbour { row: first_row + place, score });
        }
    }

    /// Takes one.
    pub fn insert(&mut self, neighbour: Neighbour) {
        let at = self.best.partition_point(|known| known.order(&neighbour).is_lt());
        if at >= self.count {
            return;
        }
        self.best.insert(at, neighbour);
        self.best.truncate(self.count);
        if self.best.len() == self.count {
            self.least = self.best[self.count - 1].score;
        }
    }

    /// The best of both.
    #[must_use]
    pub fn merged(mut self, other: Self) -> Self {
        other.best.into_iter().for_each(|neighbour| self.insert(neighbour));
        self
    }

    /// The best, the best first.
    #[must_use]
    pub fn into_best(self) -> Vec<Neighbour> {
        self.best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_kept_whatever_the_order_they_come_in() {
        let mut random = fastrand::Rng::with_seed(1);
        for round in 0..200 {
            // Few different scores, so that many are the same.
            let scores: Vec<f32> = (0..random.usize(1..300)).map(|_| random.u8(..20).into()).collect();
            let count = random.usize(1..20);
            let mut sorted: Vec<Neighbour> =
                scores.iter().enumerate().map(|(row, &score)| Neighbour { row, score }).collect();
            sorted.sort_by(Neighbour::order);
            sorted.truncate(count);
            let half = scores.len() / 2;
            let (mut first, mut second) = (Top::new(count), Top::new(count));
            first.take(half, &scores[half..]);
            second.take(0, &scores[..half]);
            assert_eq!(first.merged(second).into_best(), sorted, "round {round}");
        }
    }
}
