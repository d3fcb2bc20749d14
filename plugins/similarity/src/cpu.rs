//! The search on all cores: the matrix is taken block by block, each small enough to stay in a core's cache, so that the product and
//! the look for its best rows read the matrix once from memory.

use modalkit_sdk::PipelineError;
use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};

use crate::{
    matrix::Matrix,
    top::{Neighbour, Tops},
};

/// Bytes of the matrix in one block.
const BLOCK_BYTES: usize = 2 << 20;

/// A matrix in the machine's memory, and the threads that search it: as many as there are cores, gone with it. rayon's own would stay
/// for as long as the process, once for each build of this plugin that was ever loaded.
pub struct Engine {
    matrix: Matrix,
    threads: ThreadPool,
}

impl Engine {
    /// Takes the matrix as it is.
    ///
    /// # Errors
    /// The machine gives no more threads.
    pub fn new(matrix: Matrix) -> Result<Self, PipelineError> {
        let threads =
            ThreadPoolBuilder::new().thread_name(|number| format!("similarity.{number}")).build()?;
        Ok(Self { matrix, threads })
    }

    /// The best rows of each query; queries stand one after the other.
    #[must_use]
    pub fn search(&self, queries: &[f32], top_k: usize) -> Vec<Vec<Neighbour>> {
        self.threads.install(|| self.search_here(queries, top_k))
    }

    fn search_here(&self, queries: &[f32], top_k: usize) -> Vec<Vec<Neighbour>> {
        let width = self.matrix.width();
        let count = queries.len() / width;
        let rows_of_block = (BLOCK_BYTES / (width * size_of::<f32>())).max(1);
        let nothing = || (Tops::new(count, top_k), Vec::new());
        let (best, _) = self
            .matrix
            .values()
            .par_chunks(rows_of_block * width)
            .enumerate()
            .fold(nothing, |(mut best, mut scores): (Tops, Vec<f32>), (block, values)| {
                let rows = values.len() / width;
                scores.resize(rows * count, 0.0);
                product(values, queries, width, &mut scores);
                for (place, scores) in scores.chunks_exact(count).enumerate() {
                    best.take(block * rows_of_block + place, scores);
                }
                (best, scores)
            })
            .reduce(nothing, |(left, scores), (right, _)| (left.merged(right), scores));
        best.into_best()
    }
}

/// The product of each row with each query: the scores of the first row for all queries, then those of the second. Queries, which are
/// few, are the side of the product that gemm lays out anew; rows are read as they lie.
fn product(rows: &[f32], queries: &[f32], width: usize, scores: &mut [f32]) {
    let (row_count, query_count) = (rows.len() / width, queries.len() / width);
    assert_eq!(scores.len(), row_count * query_count, "room for each score");
    let stride = |count: usize| isize::try_from(count).expect("a slice is no longer");
    // SAFETY: the strides stay within the slices: `queries` is query_count by width, `rows` is row_count by width, and `scores`
    // row_count by query_count by the assertion; `scores` is nobody else's.
    unsafe {
        gemm::gemm(
            query_count,
            row_count,
            width,
            scores.as_mut_ptr(),
            stride(query_count),
            1,
            false,
            queries.as_ptr(),
            1,
            stride(width),
            rows.as_ptr(),
            stride(width),
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
