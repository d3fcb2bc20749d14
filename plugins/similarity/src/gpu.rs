//! The search on a GPU: scores by one product of cuBLAS, the best of each chunk of them by a kernel that NVRTC compiles at load
//! (`top_k.cu`), and the chunks merged here. All `unsafe` of launches stands here.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::{
    cublas::{CudaBlas, Gemm, GemmConfig, sys::cublasOperation_t},
    driver::{CudaFunction, CudaSlice, CudaStream, LaunchConfig, PushKernelArg},
    nvrtc,
};
use modalkit_sdk::{Device, PipelineError};

use crate::{
    matrix::Matrix,
    top::{Neighbour, Top},
};

const KERNEL: &str = include_str!("top_k.cu");
/// As in the kernel.
const THREADS: u32 = 256;
/// As in the kernel.
const CHUNK: usize = 4096;
/// As in the kernel: no row.
const NOBODY: u32 = u32::MAX;
/// Bytes of scores that are made at once: larger matrices are taken in slabs.
pub const SCORES_BYTES_MAX: usize = 256 << 20;

/// A matrix in a device's memory.
pub struct Engine {
    stream: Arc<CudaStream>,
    kernel: CudaFunction,
    matrix: CudaSlice<f32>,
    rows: usize,
    width: usize,
    scores_bytes_max: usize,
    /// One batch at a time: the device is not faster with two, and a handle of cuBLAS is one thread's.
    work: Mutex<Work>,
}

struct Work {
    blas: CudaBlas,
    /// Grow with the largest batch so far.
    queries: CudaSlice<f32>,
    scores: CudaSlice<f32>,
    best: CudaSlice<f32>,
    best_rows: CudaSlice<u32>,
}

impl Engine {
    /// Copies the matrix to the device and compiles the kernel.
    ///
    /// # Errors
    /// The device's memory is too small, or cuBLAS or NVRTC is missing.
    pub fn new(device: &Device, matrix: &Matrix, scores_bytes_max: usize) -> Result<Self, PipelineError> {
        // SAFETY: it loads NVIDIA's libraries, whose constructors are as trusted as the driver. cudarc panics where they are missing.
        let (blas, nvrtc) =
            unsafe { (cudarc::cublas::sys::is_culib_present(), nvrtc::sys::is_culib_present()) };
        for (present, library) in [(blas, "libcublas.so"), (nvrtc, "libnvrtc.so")] {
            if !present {
                return Err(PipelineError::permanent(format!(
                    "there is no {library} on the loader's path: install it with CUDA 12 or 13, put its folder into LD_LIBRARY_PATH, or serve with `gpu = []`"
                )));
            }
        }
        let context = device.cuda()?;
        let kernel = context.load_module(nvrtc::compile_ptx(KERNEL)?)?.load_function("top_k")?;
        let stream = context.new_stream()?;
        let work = Work {
            blas: CudaBlas::new(Arc::clone(&stream))?,
            queries: stream.alloc_zeros(1)?,
            scores: stream.alloc_zeros(1)?,
            best: stream.alloc_zeros(1)?,
            best_rows: stream.alloc_zeros(1)?,
        };
        let values = stream.clone_htod(matrix.values())?;
        // What goes wrong on the way is said now, and not by the first batch.
        stream.synchronize()?;
        Ok(Self {
            matrix: values,
            rows: matrix.rows(),
            width: matrix.width(),
            scores_bytes_max,
            kernel,
            stream,
            work: Mutex::new(work),
        })
    }

    /// The best rows of each query; queries stand one after the other.
    ///
    /// # Errors
    /// What CUDA says.
    pub fn search(&self, queries: &[f32], top_k: usize) -> Result<Vec<Vec<Neighbour>>, PipelineError> {
        self.stream.context().bind_to_thread()?;
        let count = queries.len() / self.width;
        let slab_max = (self.scores_bytes_max / size_of::<f32>() / count.max(1)).max(CHUNK).min(self.rows);
        let chunks_max = slab_max.div_ceil(CHUNK);
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let work = &mut *work;
        room(&self.stream, &mut work.queries, queries.len())?;
        room(&self.stream, &mut work.scores, slab_max * count)?;
        room(&self.stream, &mut work.best, chunks_max * count * top_k)?;
        room(&self.stream, &mut work.best_rows, chunks_max * count * top_k)?;
        self.stream.memcpy_htod(queries, &mut work.queries.slice_mut(..queries.len()))?;
        let mut tops = vec![Top::new(top_k); count];
        for first in (0..self.rows).step_by(slab_max) {
            let rows = slab_max.min(self.rows - first);
            let chunks = rows.div_ceil(CHUNK);
            self.score(work, first, rows, count)?;
            self.select(work, rows, count, top_k)?;
            let found = chunks * count * top_k;
            let best = self.stream.clone_dtoh(&work.best.slice(..found))?;
            let best_rows = self.stream.clone_dtoh(&work.best_rows.slice(..found))?;
            self.stream.synchronize()?;
            let of_query = chunks * top_k;
            for ((top, scores), rows) in
                tops.iter_mut().zip(best.chunks_exact(of_query)).zip(best_rows.chunks_exact(of_query))
            {
                for (&score, &row) in scores.iter().zip(rows).filter(|(_, row)| **row != NOBODY) {
                    top.insert(Neighbour { row: first + row as usize, score });
                }
            }
        }
        Ok(tops.into_iter().map(Top::into_best).collect())
    }

    /// The scores of a slab of rows for each query, those of one query one after the other.
    fn score(&self, work: &mut Work, first: usize, rows: usize, count: usize) -> Result<(), PipelineError> {
        let (m, n, k) = (i32::try_from(rows)?, i32::try_from(count)?, i32::try_from(self.width)?);
        // cuBLAS counts columns first: our rows are its columns, and the scores of one query are one of them.
        let config = GemmConfig {
            transa: cublasOperation_t::CUBLAS_OP_T,
            transb: cublasOperation_t::CUBLAS_OP_N,
            m,
            n,
            k,
            alpha: 1.0,
            lda: k,
            ldb: k,
            beta: 0.0,
            ldc: m,
        };
        let slab = self.matrix.slice(first * self.width..(first + rows) * self.width);
        // SAFETY: the slab is rows by width, the queries count by width, and there is room for rows by count scores.
        unsafe { work.blas.gemm(config, &slab, &work.queries, &mut work.scores) }?;
        Ok(())
    }

    /// The best of each chunk of scores.
    fn select(&self, work: &mut Work, rows: usize, count: usize, top_k: usize) -> Result<(), PipelineError> {
        let config = LaunchConfig {
            grid_dim: (u32::try_from(rows.div_ceil(CHUNK))?, u32::try_from(count)?, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let (rows, top_k) = (u32::try_from(rows)?, u32::try_from(top_k)?);
        let mut launch = self.stream.launch_builder(&self.kernel);
        launch.arg(&work.scores).arg(&rows).arg(&top_k).arg(&mut work.best).arg(&mut work.best_rows);
        // SAFETY: the arguments are the kernel's, in its order; `best` and `best_rows` have room for top_k of each chunk of each query.
        unsafe { launch.launch(config) }?;
        Ok(())
    }
}

fn room<T: cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits>(
    stream: &Arc<CudaStream>,
    buffer: &mut CudaSlice<T>,
    count: usize,
) -> Result<(), PipelineError> {
    if buffer.len() < count {
        *buffer = stream.alloc_zeros(count)?;
    }
    Ok(())
}
