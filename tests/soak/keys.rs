//! How long a wrong key takes to be refused, by how much of it is right: it should not matter.

use std::{fs, hint::black_box, time::Instant};

use modalkit::{
    access::{Access, AccessError, Origin, Shown},
    config::{self, Environment},
    insight::{metrics::Metrics, traces::Traces},
};

const KEY: &str = "0123456789abcdef0123456789abcdef";
const ROUNDS: usize = 400;
const CALLS: u32 = 2_000;

struct Headers<'a>(&'a str);

impl Shown for Headers<'_> {
    fn header(&self, name: &str) -> Option<&[u8]> {
        (name == "x-api-key").then_some(self.0.as_bytes())
    }
}

pub(crate) fn by_matching_prefix() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keys.toml");
    let keys: String = (0..3)
        .map(|index| format!("[app_settings.auth_config.keys.other{index}]\napi_key = \"another{index}\"\n"))
        .collect();
    fs::write(&file, format!("{keys}[app_settings.auth_config.keys.one]\napi_key = {KEY:?}\n"))
        .expect("it is written");
    let loaded = config::load(&[file], &Environment::default()).expect("it is right");
    let metrics = Metrics::new(Traces::default());
    let access = Access::new(loaded.config.auth, metrics.calls_by_key.clone());
    let from = Origin::Network(([127, 0, 0, 1], 1).into());
    assert!(access.admit(&from, &Headers(KEY)).is_ok());
    // Of the right length, and right up to each place.
    let wrong: Vec<String> =
        (0..KEY.len()).map(|right| format!("{}{}", &KEY[..right], "x".repeat(KEY.len() - right))).collect();
    let mut times: Vec<Vec<f64>> = vec![Vec::with_capacity(ROUNDS); wrong.len()];
    for round in 0..ROUNDS {
        // In another order each time, so that what drifts with time doesn't look like a trend.
        for step in 0..wrong.len() {
            let place = (step * 13 + round * 7) % wrong.len();
            let begun = Instant::now();
            for _ in 0..CALLS {
                let refused = access.admit(&from, black_box(&Headers(&wrong[place])));
                assert!(matches!(refused, Err(AccessError::Wrong { .. })));
            }
            times[place].push(begun.elapsed().as_nanos() as f64 / f64::from(CALLS));
        }
    }
    let medians: Vec<f64> = times.iter_mut().map(|times| median(times)).collect();
    let (slope, t) = trend(&medians);
    let (least, most) =
        medians.iter().fold((f64::MAX, f64::MIN), |(least, most), time| (least.min(*time), most.max(*time)));
    println!(
        "a wrong key of the right length, 0 to {} characters right, {ROUNDS} rounds of {CALLS}: medians from {least:.1} to {most:.1} ns; {slope:+.4} ns a character, t = {t:+.2} (a trend would be far beyond 2)",
        KEY.len() - 1
    );
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The slope of a line through the values, and its t statistic.
fn trend(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let (middle, mean) = ((count - 1.0) / 2.0, values.iter().sum::<f64>() / count);
    let spread: f64 = (0..values.len()).map(|x| (x as f64 - middle).powi(2)).sum();
    let slope =
        values.iter().enumerate().map(|(x, y)| (x as f64 - middle) * (y - mean)).sum::<f64>() / spread;
    let residuals: f64 =
        values.iter().enumerate().map(|(x, y)| (y - mean - slope * (x as f64 - middle)).powi(2)).sum();
    (slope, slope / (residuals / (count - 2.0) / spread).sqrt())
}
