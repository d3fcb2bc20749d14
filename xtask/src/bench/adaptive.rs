//! `bench adaptive`: a wait that is learned beside a fixed one and none at all, of the same model: one caller and many, and over time while callers come in
//! bursts, become more, and the model's time drifts. The second is a figure.

use std::{
    fs,
    io::{BufReader, Read, Write},
    net::TcpStream,
    ops::Range,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use plotters::prelude::*;

use super::{Options, PREDICT, WORKLOADS, Workload, build, measure_in, process::Server, start_host, stream};
use crate::build::{self as artefacts};

/// The waits that are compared, and their colours in the figure.
const WAITS: [(&str, &str, RGBColor); 3] = [
    ("none", "0", RGBColor(0x88, 0x88, 0x88)),
    ("5 ms", "5", RGBColor(0xd5, 0x5e, 0x00)),
    ("adaptive", "\"adaptive\"", RGBColor(0x00, 0x72, 0xb2)),
];

/// Seconds of the figure, and of each of its points.
const SECONDS: usize = 32;
const POINT_SECONDS: f64 = 0.25;
const POINTS: usize = (SECONDS as f64 / POINT_SECONDS) as usize;
/// The most callers there are.
const CALLERS: usize = 32;
/// What a batch takes while nothing is said of it.
const BATCH_MS: f64 = 5.0;
/// Seconds in which there is one caller; 32 for half a second in each second; more and more; 16, of a model whose time drifts.
const ALONE: Range<f64> = 0.0..6.0;
const BURSTS: Range<f64> = 6.0..12.0;
const RAMP: Range<f64> = 12.0..20.0;
const DRIFT: Range<f64> = 20.0..32.0;
const DRIFT_CALLERS: usize = 16;
const DRIFT_MS: Range<f64> = 2.0..20.0;
const FIGURE_SIZE: (u32, u32) = (1100, 640);

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    build()?;
    let folder = std::env::temp_dir().join(format!("modalkit-bench-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let measured = measure(options, &folder);
    // Left alone where it can't be removed: it is in the system's folder for such things.
    let _ = fs::remove_dir_all(&folder);
    measured
}

fn measure(options: &Options, folder: &Path) -> anyhow::Result<()> {
    let batched = WORKLOADS.iter().find(|workload| workload.name == "batched").context("there is none")?;
    let workload = Workload {
        config: "",
        note: "predict sleeps 5 ms + 0.1 ms an item, max_batch_size 32; the ratios are those of the adaptive wait",
        ..*batched
    };
    let start = |(name, wait, _): (&'static str, &str, _)| {
        let batches = format!("[app_settings.batch_config]\nmax_batch_size = 32\nwait_ms = {wait}\n");
        start_host(name, &artefacts::release(), &workload, &batches, folder)
    };
    let servers = WAITS.into_iter().map(start).collect::<anyhow::Result<Vec<Server>>>()?;
    measure_in(&workload, options, folder, &servers)?;
    let latencies =
        servers.iter().map(|server| over_time(server.port)).collect::<anyhow::Result<Vec<_>>>()?;
    println!(
        "\nmedian latency in ms while there is one caller, 32 in bursts, a ramp of callers, a model that drifts:"
    );
    for ((name, ..), points) in WAITS.iter().zip(&latencies) {
        let of = |seconds: Range<f64>| {
            let mut times: Vec<f64> =
                points.iter().filter(|(at, _)| seconds.contains(at)).map(|(_, ms)| *ms).collect();
            times.sort_by(f64::total_cmp);
            stream::share(&times, 0.5)
        };
        let [alone, bursts, ramp, drift] = [ALONE, BURSTS, RAMP, DRIFT].map(of);
        println!("{name:>10} {alone:>8.2} {bursts:>8.2} {ramp:>8.2} {drift:>8.2}");
    }
    let file = artefacts::target().join("adaptive.svg");
    draw(&file, &latencies).with_context(|| format!("{} can't be drawn", file.display()))?;
    println!("the figure is {}", file.display());
    Ok(())
}

/// Callers at a time, and what a batch takes.
fn load_at(seconds: f64) -> (usize, f64) {
    let within = |range: &Range<f64>| (seconds - range.start) / (range.end - range.start);
    match seconds {
        _ if ALONE.contains(&seconds) => (1, BATCH_MS),
        _ if BURSTS.contains(&seconds) => (if seconds.fract() < 0.5 { CALLERS } else { 0 }, BATCH_MS),
        _ if RAMP.contains(&seconds) => (1 + (within(&RAMP) * CALLERS as f64) as usize, BATCH_MS),
        _ => {
            // Up and down again.
            let part = 1.0 - (2.0 * within(&DRIFT) - 1.0).abs();
            (DRIFT_CALLERS, DRIFT_MS.start + part * (DRIFT_MS.end - DRIFT_MS.start))
        }
    }
}

/// When each request was sent, in seconds, and its milliseconds.
fn over_time(port: u16) -> anyhow::Result<Vec<(f64, f64)>> {
    let begun = Instant::now();
    let caller = |number: usize| -> anyhow::Result<Vec<(f64, f64)>> {
        let mut connection = BufReader::new(TcpStream::connect(("127.0.0.1", port))?);
        let mut times = Vec::new();
        loop {
            let at = begun.elapsed().as_secs_f64();
            if at >= SECONDS as f64 {
                return Ok(times);
            }
            let (callers, batch_ms) = load_at(at);
            if number >= callers {
                thread::sleep(Duration::from_millis(5));
                continue;
            }
            let body = format!("{{\"text\":\"hello world\",\"batch_ms\":{batch_ms:.3}}}");
            let head = format!(
                "POST {PREDICT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            connection.get_mut().write_all((head + &body).as_bytes())?;
            let length = stream::read_head(&mut connection)?.context("an answer without a length")?;
            connection.read_exact(&mut vec![0; length])?;
            times.push((at, (begun.elapsed().as_secs_f64() - at) * 1e3));
        }
    };
    thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS).map(|number| scope.spawn(move || caller(number))).collect();
        let joined = callers.into_iter().map(|caller| caller.join().expect("it returns its errors"));
        Ok(joined.collect::<anyhow::Result<Vec<_>>>()?.concat())
    })
}

/// The median of each quarter of a second.
fn points(latencies: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut by_point = vec![Vec::new(); POINTS];
    for (at, ms) in latencies {
        by_point[((at / POINT_SECONDS) as usize).min(POINTS - 1)].push(*ms);
    }
    let median = |(point, times): (usize, &mut Vec<f64>)| {
        times.sort_by(f64::total_cmp);
        (!times.is_empty()).then(|| (point as f64 * POINT_SECONDS, stream::share(times, 0.5)))
    };
    by_point.iter_mut().enumerate().filter_map(median).collect()
}

fn draw(file: &PathBuf, latencies: &[Vec<(f64, f64)>]) -> anyhow::Result<()> {
    let area = SVGBackend::new(file, FIGURE_SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (above, below) = area.split_vertically(FIGURE_SIZE.1 * 7 / 10);
    let seconds = 0.0..SECONDS as f64;
    let times: Vec<Vec<(f64, f64)>> = latencies.iter().map(|latencies| points(latencies)).collect();
    let most = times.iter().flatten().map(|(_, ms)| *ms).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(&above)
        .caption("Median latency with different waits (max_batch_size 32)", ("sans-serif", 18))
        .margin(10)
        .set_label_area_size(LabelAreaPosition::Left, 60)
        .build_cartesian_2d(seconds.clone(), 0.0..most * 1.05)?;
    chart.configure_mesh().disable_x_mesh().light_line_style(TRANSPARENT).y_desc("ms").draw()?;
    for ((_, wait, colour), points) in WAITS.iter().zip(&times) {
        let line = LineSeries::new(points.iter().copied(), colour.stroke_width(2));
        chart
            .draw_series(line)?
            .label(format!("wait_ms = {wait}"))
            .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .draw()?;
    let load: Vec<(f64, usize, f64)> = (0..SECONDS * 20)
        .map(|step| {
            let at = step as f64 / 20.0;
            let (callers, batch_ms) = load_at(at);
            (at, callers, batch_ms)
        })
        .collect();
    let mut chart = ChartBuilder::on(&below)
        .margin(10)
        .set_label_area_size(LabelAreaPosition::Left, 60)
        .set_label_area_size(LabelAreaPosition::Bottom, 40)
        .build_cartesian_2d(seconds, 0.0..CALLERS as f64 * 1.1)?;
    chart.configure_mesh().disable_mesh().y_labels(5).x_desc("seconds").draw()?;
    let callers = load.iter().map(|(at, callers, _)| (*at, *callers as f64));
    chart
        .draw_series(LineSeries::new(callers, BLACK.stroke_width(2)))?
        .label("callers")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], BLACK.stroke_width(2)));
    let colour = RGBColor(0x00, 0x9e, 0x73);
    let batch_ms = load.iter().map(|(at, _, batch_ms)| (*at, *batch_ms));
    chart
        .draw_series(LineSeries::new(batch_ms, colour.stroke_width(2)))?
        .label("ms of a batch")
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .draw()?;
    area.present()?;
    Ok(())
}
