//! Embedding matrices for tests: made, written as numpy and safetensors write them, and searched in 64 bits.

use serde_json::json;

/// Rows that are always the same for the same seed.
#[must_use]
pub fn rows(seed: u64, count: usize, width: usize) -> Vec<Vec<f32>> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..count).map(|_| (0..width).map(|_| random.f32() - 0.5).collect()).collect()
}

/// The file that numpy writes of them.
#[must_use]
pub fn npy(rows: &[Vec<f32>]) -> Vec<u8> {
    let width = rows.first().map_or(0, Vec::len);
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, {width}), }}", rows.len());
    // Magic, version and length are ten bytes, and the header ends with a line.
    let padded = header.len() + 11;
    let header = format!("{header}{}\n", " ".repeat(padded.next_multiple_of(64) - padded));
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    rows.iter().flatten().for_each(|number| bytes.extend(number.to_le_bytes()));
    bytes
}

/// The same rows as safetensors, in the tensor `rows`.
#[must_use]
pub fn safetensors(rows: &[Vec<f32>]) -> Vec<u8> {
    let width = rows.first().map_or(0, Vec::len);
    let data: Vec<u8> = rows.iter().flatten().flat_map(|number| number.to_le_bytes()).collect();
    let tensor = json!({"dtype": "F32", "shape": [rows.len(), width], "data_offsets": [0, data.len()]});
    let header = json!({"rows": tensor}).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

/// The best rows by the cosine, with it, the best first.
#[must_use]
pub fn best(rows: &[Vec<f32>], query: &[f32], count: usize) -> Vec<(usize, f64)> {
    let product = |left: &[f32], right: &[f32]| -> f64 {
        left.iter().zip(right).map(|(&left, &right)| f64::from(left) * f64::from(right)).sum()
    };
    let length = product(query, query).sqrt();
    let cosine = |row: &Vec<f32>| product(row, query) / product(row, row).sqrt() / length;
    let mut scores: Vec<(usize, f64)> = rows.iter().map(cosine).enumerate().collect();
    scores.sort_by(|left, right| right.1.total_cmp(&left.1).then(left.0.cmp(&right.0)));
    scores.truncate(count);
    scores
}
