//! Holds the search against a reference in 64 bits, and its speed against what the device under it can do at most: how fast it reads
//! memory, and how fast it multiplies, both measured here, in the same run.
//!
//! `measure [--gpu] [--rows N] [--width N] [--seconds S]`; ends with 1 where an answer is wrong. It needs no cargo.

#![allow(clippy::print_stdout, reason = "a program for the command line")]

use std::{
    env,
    hint::black_box,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use cudarc::{
    cublas::{CudaBlas, Gemm, GemmConfig, sys::cublasOperation_t},
    driver::CudaContext,
};
use modalkit_sdk::{Device, PipelineError};
use rayon::prelude::*;
use similarity::{
    cpu, gpu,
    matrix::Matrix,
    top::{self, Neighbour},
};

const TOP_K: usize = 10;
const QUERIES: usize = 64;
const BATCHES: [usize; 2] = [1, QUERIES];
/// Rounds of each measurement; the median is told.
const ROUNDS: usize = 5;

struct Options {
    gpu: bool,
    rows: usize,
    width: usize,
    seconds: f64,
}

impl Options {
    fn read() -> Result<Self, String> {
        let mut options = Self { gpu: false, rows: 100_000, width: 384, seconds: 1.0 };
        let mut arguments = env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut number = || -> Result<f64, String> {
                let text = arguments.next().ok_or(format!("expected a number after {argument}"))?;
                text.parse().map_err(|_| format!("expected a number after {argument}, found {text:?}"))
            };
            match argument.as_str() {
                "--gpu" => options.gpu = true,
                "--rows" => options.rows = number()? as usize,
                "--width" => options.width = number()? as usize,
                "--seconds" => options.seconds = number()?,
                _ => return Err(format!("expected --gpu, --rows, --width or --seconds, found {argument:?}")),
            }
        }
        Ok(options)
    }
}

enum Engine {
    Cpu(cpu::Engine),
    Gpu(Box<gpu::Engine>),
}

impl Engine {
    /// Of these rows; a GPU makes at most so many bytes of scores at once.
    fn new(
        device: Option<&Device>,
        values: &[f32],
        width: usize,
        scores_bytes_max: usize,
    ) -> Result<Self, PipelineError> {
        let matrix = Matrix::new(values.to_vec(), width)?;
        Ok(match device {
            Some(device) => Self::Gpu(Box::new(gpu::Engine::new(device, &matrix, scores_bytes_max)?)),
            None => Self::Cpu(cpu::Engine::new(matrix)?),
        })
    }

    fn search(&self, queries: &[f32], top_k: usize) -> Result<Vec<Vec<Neighbour>>, PipelineError> {
        match self {
            Self::Cpu(engine) => Ok(engine.search(queries, top_k)),
            Self::Gpu(engine) => engine.search(queries, top_k),
        }
    }
}

/// What the device can do at most.
struct Limits {
    bytes_per_second: f64,
    operations_per_second: f64,
}

fn main() -> ExitCode {
    let options = match Options::read() {
        Ok(options) => options,
        Err(error) => {
            println!("{error}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool, PipelineError> {
    let Options { rows, width, .. } = *options;
    let values = normal(rows * width, 1);
    let queries = normal(QUERIES * width, 2);
    let (device, limits) = if options.gpu {
        let (device, limits) = gpu_limits()?;
        (Some(device), limits)
    } else {
        (None, cpu_limits(&values))
    };
    let name = device.as_ref().map_or("the CPU", Device::name);
    println!("{rows} x {width} numbers of 32 bits on {name}, {} threads", rayon::current_num_threads());
    let engine = Engine::new(device.as_ref(), &values, width, gpu::SCORES_BYTES_MAX)?;
    let mut right = true;
    for batch in BATCHES {
        right &= hold_against_reference(&engine, &values, &queries[..batch * width], width, TOP_K)?;
    }
    // A last chunk that isn't full, several slabs, and every size of an answer.
    let (few, narrow) = (10_001, 48);
    let engine_of_few = Engine::new(device.as_ref(), &values[..few * narrow], narrow, 1)?;
    for (batch, top_k) in [(1, 1), (7, 10), (QUERIES, top::MAX)] {
        let (values, queries) = (&values[..few * narrow], &queries[..batch * narrow]);
        right &= hold_against_reference(&engine_of_few, values, queries, narrow, top_k)?;
    }
    println!(
        "at most {:.1} GB/s read and {:.0} Gflop/s multiplied and added, as measured here",
        limits.bytes_per_second / 1e9,
        limits.operations_per_second / 1e9
    );
    for batch in BATCHES {
        let seconds = time_of_batch(&engine, &queries[..batch * width], options.seconds)?;
        let bytes = (rows * width * size_of::<f32>()) as f64;
        let operations = (2 * rows * width * batch) as f64;
        println!(
            "batches of {batch:>2}: {:>9.1} queries/s, {:.3} ms a batch; {:.2} of the memory's rate, {:.2} of the multiplications'",
            batch as f64 / seconds,
            seconds * 1e3,
            bytes / seconds / limits.bytes_per_second,
            operations / seconds / limits.operations_per_second
        );
    }
    Ok(right)
}

/// Numbers as from a bell curve, always the same.
fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    let number = |random: &mut fastrand::Rng| {
        let (one, two) = (1.0 - random.f64(), random.f64());
        ((-2.0 * one.ln()).sqrt() * (std::f64::consts::TAU * two).cos()) as f32
    };
    (0..count).map(|_| number(&mut random)).collect()
}

/// Says how far scores are off, and whether the best are the best wherever their scores differ by more than that.
fn hold_against_reference(
    engine: &Engine,
    values: &[f32],
    queries: &[f32],
    width: usize,
    top_k: usize,
) -> Result<bool, PipelineError> {
    let found = engine.search(queries, top_k)?;
    let scores: Vec<Vec<f64>> = queries
        .par_chunks_exact(width)
        .map(|query| values.chunks_exact(width).map(|row| product(row, query)).collect())
        .collect();
    let off = |(neighbours, scores): (&Vec<Neighbour>, &Vec<f64>)| {
        let of = |neighbour: &Neighbour| {
            let exact = scores[neighbour.row];
            ((f64::from(neighbour.score) - exact) / exact).abs()
        };
        neighbours.iter().map(of).fold(0.0, largest)
    };
    let error = found.iter().zip(&scores).map(off).fold(0.0, largest);
    let (mut same, mut wrong) = (0, 0);
    for (neighbours, scores) in found.iter().zip(&scores) {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&left, &right| scores[right].total_cmp(&scores[left]).then(left.cmp(&right)));
        for (neighbour, &best) in neighbours.iter().zip(&order) {
            let differs = (scores[best] - scores[neighbour.row]).abs() > error * scores[best].abs();
            same += usize::from(neighbour.row == best);
            wrong += usize::from(differs);
        }
        wrong += usize::from(neighbours.len() != top_k.min(scores.len()));
    }
    let all = found.len() * top_k;
    println!(
        "batches of {:>2} against 64 bits: relative error {error:.1e}; {same} of {all} places of the best {top_k} are the same, {wrong} differ by more than that",
        found.len()
    );
    Ok(wrong == 0 && error < 1e-4)
}

/// The larger; what is no number is larger than all.
fn largest(left: f64, right: f64) -> f64 {
    if right > left || right.is_nan() { right } else { left }
}

fn product(left: &[f32], right: &[f32]) -> f64 {
    left.iter().zip(right).map(|(&left, &right)| f64::from(left) * f64::from(right)).sum()
}

/// Seconds that a batch takes: of each round the mean, of these the median.
fn time_of_batch(engine: &Engine, queries: &[f32], seconds: f64) -> Result<f64, PipelineError> {
    let mut rounds = Vec::new();
    engine.search(queries, TOP_K)?;
    for _ in 0..ROUNDS {
        let (begun, mut count) = (Instant::now(), 0);
        while begun.elapsed() < Duration::from_secs_f64(seconds) {
            black_box(engine.search(queries, TOP_K)?);
            count += 1;
        }
        rounds.push(begun.elapsed().as_secs_f64() / f64::from(count));
    }
    Ok(median(rounds))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// How often the matrix is read to learn how fast that can be.
const READINGS: usize = 5;
/// Numbers that are added up at once.
const PART: usize = 1 << 18;

/// Reading is measured on the matrix itself: a part of it may stay in a cache, for the search as well as for this.
fn cpu_limits(values: &[f32]) -> Limits {
    let read = || {
        let begun = Instant::now();
        for _ in 0..READINGS {
            black_box(values.par_chunks(PART).map(sum).sum::<f32>());
        }
        (READINGS * size_of_val(values)) as f64 / begun.elapsed().as_secs_f64()
    };
    let multiply = || {
        let threads = rayon::current_num_threads();
        let begun = Instant::now();
        let operations: u64 = (0..threads).into_par_iter().map(|_| multiply_and_add()).sum();
        operations as f64 / begun.elapsed().as_secs_f64()
    };
    // The best there is: a limit, not a typical case.
    let best = |measure: &dyn Fn() -> f64| (0..ROUNDS).map(|_| measure()).fold(0.0, f64::max);
    Limits { bytes_per_second: best(&read), operations_per_second: best(&multiply) }
}

fn sum(numbers: &[f32]) -> f32 {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has it.
        unsafe { sum_512_bits(numbers) }
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has it.
        unsafe { sum_256_bits(numbers) }
    } else {
        add_up::<16>(numbers)
    }
}

#[target_feature(enable = "avx512f")]
fn sum_512_bits(numbers: &[f32]) -> f32 {
    add_up::<64>(numbers)
}

#[target_feature(enable = "avx2")]
fn sum_256_bits(numbers: &[f32]) -> f32 {
    add_up::<32>(numbers)
}

/// Four vectors of sums, which stay in registers.
#[inline(always)]
fn add_up<const LANES: usize>(numbers: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (wide, _) = numbers.as_chunks::<LANES>();
    for numbers in wide {
        for (lane, number) in lanes.iter_mut().zip(numbers) {
            *lane += number;
        }
    }
    lanes.iter().sum()
}

const TURNS: u64 = 20_000_000;

/// Multiplies and adds in registers alone; says how many operations those were.
fn multiply_and_add() -> u64 {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has it.
        unsafe { with_512_bits() }
    } else if is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has it.
        unsafe { with_256_bits() }
    } else {
        turn::<4>(TURNS)
    }
}

#[target_feature(enable = "avx512f")]
fn with_512_bits() -> u64 {
    turn::<16>(TURNS)
}

#[target_feature(enable = "avx2,fma")]
fn with_256_bits() -> u64 {
    turn::<8>(TURNS)
}

/// As many sums as hide the time that one addition takes, in vectors of so many numbers.
#[inline(always)]
fn turn<const LANES: usize>(turns: u64) -> u64 {
    const SUMS: usize = 12;
    let factor = black_box([0.999_999f32; LANES]);
    let mut sums = [[1.0f32; LANES]; SUMS];
    for _ in 0..turns {
        for sum in &mut sums {
            for (sum, factor) in sum.iter_mut().zip(&factor) {
                *sum = sum.mul_add(*factor, 1e-6);
            }
        }
    }
    black_box(sums);
    turns * (SUMS * LANES * 2) as u64
}

/// Numbers of each side of the largest product.
const SIDE: usize = 8192;
/// Numbers that are copied, which is more than any cache holds, and of each side of the product.
const READ: usize = 128 << 20;
const COPIES: usize = 20;

fn gpu_limits() -> Result<(Device, Limits), PipelineError> {
    // SAFETY: it loads the driver's library. cudarc panics where there is none.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err(PipelineError::permanent("there is no CUDA driver (libcuda.so) on this machine"));
    }
    // SAFETY: as above, of cuBLAS.
    if !unsafe { cudarc::cublas::sys::is_culib_present() } {
        return Err(PipelineError::permanent("there is no libcublas.so on the loader's path"));
    }
    let context = CudaContext::new(0)?;
    let device = Device::new(0, context.name()?, "", context.total_mem()? as u64);
    let stream = context.new_stream()?;
    let timed = |work: &mut dyn FnMut() -> Result<(), PipelineError>| -> Result<f64, PipelineError> {
        work()?;
        stream.synchronize()?;
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let begun = Instant::now();
            for _ in 0..COPIES {
                work()?;
            }
            stream.synchronize()?;
            rounds.push(begun.elapsed().as_secs_f64() / COPIES as f64);
        }
        Ok(rounds.into_iter().fold(f64::INFINITY, f64::min))
    };
    // Zeros cost less than other numbers do.
    let from = stream.clone_htod(&normal(READ, 3))?;
    let mut to = stream.alloc_zeros::<f32>(READ)?;
    let copied = timed(&mut || Ok(stream.memcpy_dtod(&from, &mut to)?))?;
    let blas = CudaBlas::new(Arc::clone(&stream))?;
    let side = i32::try_from(SIDE)?;
    let config = GemmConfig {
        transa: cublasOperation_t::CUBLAS_OP_T,
        transb: cublasOperation_t::CUBLAS_OP_N,
        m: side,
        n: side,
        k: side,
        alpha: 1.0,
        lda: side,
        ldb: side,
        beta: 0.0,
        ldc: side,
    };
    // SAFETY: each has room for SIDE times SIDE numbers.
    let multiplied = timed(&mut || Ok(unsafe { blas.gemm(config, &from, &from, &mut to) }?))?;
    let limits = Limits {
        // Each byte is read and written.
        bytes_per_second: (2 * READ * size_of::<f32>()) as f64 / copied,
        operations_per_second: 2.0 * (SIDE as f64).powi(3) / multiplied,
    };
    Ok((device, limits))
}
