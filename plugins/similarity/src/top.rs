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

    /// Takes one. Zero is zero, whatever its sign.
    pub fn insert(&mut self, neighbour: Neighbour) {
        let neighbour = Neighbour { score: neighbour.score + 0.0, ..neighbour };
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

/// The best of several queries at once.
#[derive(Clone, Debug)]
pub struct Tops {
    tops: Vec<Top>,
    /// What each query's score must reach to be among its best: all of them together, so that a row is held against them at once.
    least: Vec<f32>,
}

impl Tops {
    /// Of so many queries, so many each.
    #[must_use]
    pub fn new(queries: usize, count: usize) -> Self {
        Self { tops: vec![Top::new(count); queries], least: vec![f32::NEG_INFINITY; queries] }
    }

    /// Takes a row's score for each query.
    pub fn take(&mut self, row: usize, scores: &[f32]) {
        // Nearly all rows end here. Without a branch for each score, which is what makes it quick.
        if !scores.iter().zip(&self.least).fold(false, |any, (score, least)| any | (score >= least)) {
            return;
        }
        for ((top, least), &score) in self.tops.iter_mut().zip(&mut self.least).zip(scores) {
            if score >= *least {
                top.insert(Neighbour { row, score });
                *least = top.least;
            }
        }
    }

    /// The best of both.
    #[must_use]
    pub fn merged(self, other: Self) -> Self {
        let tops: Vec<Top> =
            self.tops.into_iter().zip(other.tops).map(|(left, right)| left.merged(right)).collect();
        Self { least: tops.iter().map(|top| top.least).collect(), tops }
    }

    /// The best of each query, the best first.
    #[must_use]
    pub fn into_best(self) -> Vec<Vec<Neighbour>> {
        self.tops.into_iter().map(Top::into_best).collect()
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
            // Two queries, of which the second's scores are the first's from behind.
            let (mut first, mut second) = (Tops::new(2, count), Tops::new(2, count));
            for (row, &score) in scores.iter().enumerate() {
                let side = if row < half { &mut first } else { &mut second };
                side.take(row, &[score, -score]);
            }
            let best = second.merged(first).into_best();
            assert_eq!(best[0], sorted, "round {round}");
            assert_eq!(best[1].len(), sorted.len());
            assert!(best[1].is_sorted_by(|left, right| left.order(right).is_lt()), "round {round}");
        }
    }
}
