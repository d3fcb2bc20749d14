//! From the vectors of a text's tokens to the text's.

use schemars::JsonSchema;
use serde::Deserialize;

/// How the vectors of a text's tokens become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pooling {
    /// Their mean.
    Mean,
    /// The first one's.
    Cls,
    /// The largest of each place.
    Max,
}

impl Pooling {
    /// Of the first `tokens` vectors of `size` numbers; those after them are padding.
    pub(crate) fn pool(self, vectors: &[f32], size: usize, tokens: usize) -> Vec<f32> {
        let mut rows = vectors.chunks_exact(size).take(tokens);
        let mut pooled = rows.next().map(<[f32]>::to_vec).unwrap_or_default();
        match self {
            Self::Cls => {}
            Self::Mean => {
                for row in rows {
                    pooled.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
                }
                let count = tokens.max(1) as f32;
                pooled.iter_mut().for_each(|sum| *sum /= count);
            }
            Self::Max => {
                for row in rows {
                    pooled.iter_mut().zip(row).for_each(|(largest, value)| *largest = largest.max(*value));
                }
            }
        }
        pooled
    }
}

/// Makes the length 1; zeros stay.
pub(crate) fn to_unit(vector: &mut [f32]) {
    let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|value| *value /= length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_counts_for_nothing() {
        let vectors = [1.0, 4.0, 3.0, 2.0, 9.0, 9.0];
        assert_eq!(Pooling::Mean.pool(&vectors, 2, 2), [2.0, 3.0]);
        assert_eq!(Pooling::Cls.pool(&vectors, 2, 2), [1.0, 4.0]);
        assert_eq!(Pooling::Max.pool(&vectors, 2, 2), [3.0, 4.0]);
        let mut vector = [3.0, 4.0];
        to_unit(&mut vector);
        assert_eq!(vector, [0.6, 0.8]);
    }
}
