//! rten by itself, on one thread: what `cargo xtask bench models` compares a host with.
//!
//! `bare FILE SECONDS BODY INPUT...` runs a file's graph again and again, and prints the runs and the CPU seconds of all its threads. BODY has the inputs' bytes,
//! one after the other; an INPUT is `NAME:f32|i64|i32:SIZE,SIZE…`.

use std::{
    env, fs,
    io::{Write as _, stdout},
    sync::Arc,
    time::{Duration, Instant},
};

use rten::{Model, NodeId, RunOptions, ThreadPool, Value, ValueView};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [file, seconds, body, inputs @ ..] = &arguments[..] else {
        return Err("expected FILE SECONDS BODY INPUT...".into());
    };
    let model = Model::load_file(file)?;
    let bytes = fs::read(body)?;
    let mut rest = &bytes[..];
    let mut values = Vec::new();
    for input in inputs {
        let parts: Vec<&str> = input.split(':').collect();
        let [name, kind, sizes] = parts[..] else {
            return Err(format!("expected NAME:KIND:SIZES, found {input}").into());
        };
        let shape: Vec<usize> =
            sizes.split(',').filter(|size| !size.is_empty()).map(str::parse).collect::<Result<_, _>>()?;
        let value = value(kind, &shape, &mut rest)?;
        values.push((model.node_id(name)?, value));
    }
    let outputs: Vec<NodeId> = model.output_ids().to_vec();
    let threads = Arc::new(ThreadPool::with_num_threads(1));
    let run = || {
        let views: Vec<_> = values.iter().map(|(node, value)| (*node, view(value).into())).collect();
        let options = RunOptions::default().with_thread_pool(Some(Arc::clone(&threads)));
        model.run(views, &outputs, Some(options)).map(drop)
    };
    run()?;
    let (begun, before) = (Instant::now(), cpu_seconds()?);
    let (limit, mut runs) = (Duration::from_secs(seconds.parse()?), 0_u64);
    while begun.elapsed() < limit {
        run()?;
        runs += 1;
    }
    Ok(writeln!(stdout(), "{runs} {}", cpu_seconds()? - before)?)
}

fn view(value: &Value) -> ValueView<'_> {
    value.as_view()
}

fn value(kind: &str, shape: &[usize], rest: &mut &[u8]) -> Result<Value, Failure> {
    let count: usize = shape.iter().product();
    let width = if kind == "i64" { 8 } else { 4 };
    let (bytes, after) = rest.split_at_checked(count * width).ok_or("the body is too short")?;
    *rest = after;
    let words = bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]);
    Ok(match kind {
        "f32" => Value::from_shape(shape, words.map(f32::from_le_bytes).collect::<Vec<_>>())?,
        "i32" => Value::from_shape(shape, words.map(i32::from_le_bytes).collect::<Vec<_>>())?,
        // Of 64 bits rten has the lower half.
        "i64" => Value::from_shape(shape, words.step_by(2).map(i32::from_le_bytes).collect::<Vec<_>>())?,
        other => return Err(format!("expected f32, i64 or i32, found {other}").into()),
    })
}

/// Of all threads, by the scheduler.
fn cpu_seconds() -> Result<f64, Failure> {
    let mut nanoseconds = 0.0;
    for thread in fs::read_dir("/proc/self/task")? {
        let schedule = fs::read_to_string(thread?.path().join("schedstat"))?;
        nanoseconds += schedule.split_whitespace().next().ok_or("schedstat is empty")?.parse::<f64>()?;
    }
    Ok(nanoseconds / 1e9)
}
