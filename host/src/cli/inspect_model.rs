//! `inspect` of a model's file: which plugin takes it, what it takes and gives, and how fast it runs here.
//!
//! It knows plugins by what their settings' schema says of files, and never knows what is in one.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use modalkit::{app, config::Loaded, reload::build};
use modalkit_engine::{
    ChunkResult, Datatype, EventSink, Instance, Interest, Isolation, Load, LogLevel, Outcome, Payload,
    Plugin, PluginLog, Rejection, Signature, Tensor, TensorSpec,
};
use serde_json::{Map, Value, json};

use super::{
    DONE, NOT_DONE,
    check::FILE_MARK,
    print::{Colour, coloured, print, table},
};

/// Marks a setting that names a model's file: the files' extensions.
const EXTENSIONS_MARK: &str = "x-modalkit-extensions";
/// Marks a setting that names a model's folder: a file that such folders have.
const FOLDER_MARK: &str = "x-modalkit-folder-with";
/// The model's name while it is looked at.
const MODEL: &str = "inspected";
/// Sizes that are tried for dimensions of any size, and words of texts.
const SIZES: [u64; 3] = [16, 64, 256];
/// Inputs that are run at once.
const BATCHES: [usize; 2] = [1, 8];
/// How long one shape is run, and how often at most.
const RUN_TIME: Duration = Duration::from_millis(400);
const RUNS_MAX: usize = 30;
/// How long a model may take to load; nothing ends it.
const LOAD_TIME: Duration = Duration::from_secs(600);

/// What is asked.
pub(crate) struct Asked<'a> {
    /// The model's file or folder.
    pub(crate) file: &'a Path,
    /// The plugin's file, or its name in a volume; else the one that says that it takes such files.
    pub(crate) plugin: Option<&'a Path>,
    /// Keys of the model's entry, `KEY=VALUE`.
    pub(crate) settings: &'a [String],
}

/// A plugin that takes the file, and the setting that names it.
struct Found {
    plugin: Arc<dyn Plugin>,
    key: String,
}

/// One shape that was run.
struct Speed {
    input: String,
    batch: usize,
    /// The median time of a batch, or why there is none.
    took: Result<Duration, String>,
}

pub(crate) fn run(asked: &Asked<'_>, loaded: &Loaded, as_json: bool) -> u8 {
    let log = PluginLog { level: || LogLevel::Info, sink: say };
    match inspect(asked, loaded, (!as_json).then_some(log)) {
        Ok((found, signature, load_time, speeds)) => {
            print(&if as_json {
                in_json(&found, signature.as_deref(), load_time, &speeds)
            } else {
                for_people(asked.file, &found, signature.as_deref(), load_time, &speeds)
            });
            DONE
        }
        Err(reason) => {
            print(&if as_json {
                format!("{:#}\n", json!({"taken": false, "reason": reason}))
            } else {
                let file = asked.file.display();
                format!("{}: this host would not serve {file}: {reason}\n", coloured("refused", Colour::Red))
            });
            NOT_DONE
        }
    }
}

/// What the plugin logs while it loads says more than its signature.
fn say(_: LogLevel, _: &str, _: &str, message: &str, fields: &str) {
    print(&format!("{message}: {fields}\n"));
}

type Inspected = (Found, Option<Arc<Signature>>, Duration, Vec<Speed>);

fn inspect(asked: &Asked<'_>, loaded: &Loaded, log: Option<PluginLog>) -> Result<Inspected, String> {
    let file = fs::canonicalize(asked.file).map_err(|error| error.to_string())?;
    let found = find(asked, &file, loaded, log)?;
    let (folder, name) = (file.parent().unwrap_or(Path::new("/")), file.file_name().unwrap_or_default());
    let mut settings = Map::from_iter([(found.key.clone(), json!(name.to_string_lossy()))]);
    for setting in asked.settings {
        let (key, value) =
            setting.split_once('=').ok_or_else(|| format!("--set {setting}: expected KEY=VALUE"))?;
        let value = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
        settings.insert(key.to_owned(), value);
    }
    let settings = Value::Object(settings).to_string();
    found.plugin.check_settings(&settings).map_err(|failure| failure.message)?;
    let begun = Instant::now();
    let instance = found
        .plugin
        .load(&Load {
            model_name: MODEL,
            all_model_data_folder: &folder.to_string_lossy(),
            common_settings: "{}",
            application: "{}",
            settings: &settings,
            secrets: &BTreeMap::new(),
            devices: &[],
            crash_note: None,
            batches_in_flight: 1,
            limit: LOAD_TIME,
        })
        .map_err(|failure| failure.message)?;
    let load_time = begun.elapsed();
    let signature = instance.signature();
    let speeds = signature.as_ref().map(|signature| speeds(&*instance, signature)).unwrap_or_default();
    Ok((found, signature, load_time, speeds))
}

/// The plugin that is named, or the first in the volumes or beside the file that says that it takes such files.
fn find(asked: &Asked<'_>, file: &Path, loaded: &Loaded, log: Option<PluginLog>) -> Result<Found, String> {
    let open = |path: &Path| app::inspect(path, None, &Isolation::default(), &loaded.config.server, log);
    if let Some(named) = asked.plugin {
        let path = match build::find(&named.to_string_lossy(), &loaded.config.volumes) {
            Some(path) if !named.is_file() => path,
            _ => named.to_owned(),
        };
        let plugin =
            open(&path).map_err(|error| format!("the plugin {}: {}", path.display(), error.chain()))?;
        let keys = file_keys(&*plugin);
        // One that says nothing of extensions takes any file, by the one setting that names some.
        let fitting = keys.iter().find(|(_, schema)| takes(schema, file)).or_else(|| keys.first());
        let key = fitting.map(|(key, _)| key.clone()).ok_or_else(|| {
            format!(
                "the plugin {} has no setting that names a file (`x-modalkit-file` in its schema)",
                path.display()
            )
        })?;
        return Ok(Found { plugin, key });
    }
    // Opening a plugin runs its code: only where whoever may write is trusted.
    let trusted = loaded.config.volumes.iter().filter(|volume| volume.takes_any_plugin());
    let mut folders: Vec<PathBuf> = trusted.map(|volume| volume.mount_point.clone()).collect();
    folders.extend(file.parent().map(Path::to_owned));
    let entries = folders.iter().flat_map(|folder| fs::read_dir(folder).into_iter().flatten().flatten());
    let mut libraries: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    libraries.retain(|path| path.extension().is_some_and(|kind| kind == "so"));
    libraries.sort();
    for path in &libraries {
        // One that isn't taken has its own `inspect`.
        let Ok(plugin) = open(path) else { continue };
        if let Some((key, _)) = file_keys(&*plugin).into_iter().find(|(_, schema)| takes(schema, file)) {
            return Ok(Found { plugin, key });
        }
    }
    let folders: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    Err(format!(
        "no plugin in {} says that it takes such a file: install one there (`cargo xtask plugin onnx`, say), or name it with --plugin",
        folders.join(", ")
    ))
}

/// The settings that name files, and what is said of them.
fn file_keys(plugin: &dyn Plugin) -> Vec<(String, Value)> {
    let schema: Value = serde_json::from_str(&plugin.description().settings_schema).unwrap_or_default();
    let properties = schema["properties"].as_object().cloned().unwrap_or_default();
    properties.into_iter().filter(|(_, schema)| schema[FILE_MARK] == true).collect()
}

fn takes(schema: &Value, file: &Path) -> bool {
    let extension = file.extension().map(|kind| kind.to_string_lossy().into_owned());
    let has = |kinds: &Vec<Value>| kinds.iter().any(|kind| kind.as_str() == extension.as_deref());
    match schema[FOLDER_MARK].as_str() {
        Some(name) if file.is_dir() => file.join(name).is_file(),
        _ => file.is_file() && extension.is_some() && schema[EXTENSIONS_MARK].as_array().is_some_and(has),
    }
}

fn speeds(instance: &dyn Instance, signature: &Signature) -> Vec<Speed> {
    let is_any = |input: &TensorSpec| input.datatype == Datatype::Bytes || input.shape.contains(&None);
    let sizes = if signature.inputs.iter().any(is_any) { &SIZES[..] } else { &SIZES[..1] };
    let batches = if signature.batched { &BATCHES[..] } else { &BATCHES[..1] };
    let mut speeds = Vec::new();
    for size in sizes {
        for batch in batches {
            let inputs: Result<Vec<_>, _> = (0..*batch).map(|_| tensors(signature, *size)).collect();
            let inputs = match inputs {
                Ok(inputs) => inputs,
                Err(error) => {
                    speeds.push(Speed { input: format!("size {size}"), batch: *batch, took: Err(error) });
                    continue;
                }
            };
            let input = inputs.first().map(|tensors| described(tensors, *size)).unwrap_or_default();
            speeds.push(Speed { input, batch: *batch, took: time(instance, &inputs) });
        }
    }
    speeds
}

/// An input of numbers that mean nothing.
fn tensors(signature: &Signature, size: u64) -> Result<Arc<[Tensor]>, String> {
    let tensor = |spec: &TensorSpec| {
        let shape: Vec<u64> = spec.shape.iter().map(|known| known.unwrap_or(size)).collect();
        let count = shape.iter().try_fold(1_u64, |count, size| count.checked_mul(*size)).unwrap_or(u64::MAX);
        let count = usize::try_from(count).ok().filter(|count| *count <= NUMBERS_MAX);
        let count = count.ok_or_else(|| format!("{:?} is more than is tried here", shape))?;
        let data: Vec<u8> = (0..count).flat_map(|place| element(spec.datatype, place, size)).collect();
        Tensor::new(Arc::clone(&spec.name), spec.datatype, shape, Bytes::from(data))
            .map(Tensor::aligned)
            .map_err(|error| error.to_string())
    };
    signature.inputs.iter().filter(|input| !input.optional).map(tensor).collect()
}

/// Of one tensor.
const NUMBERS_MAX: usize = 1 << 24;

/// Fractions from 0 to 1, whole numbers of 0 and 1 (begun with 1, so that masks hide something), texts of so many words.
fn element(datatype: Datatype, place: usize, size: u64) -> Vec<u8> {
    let fraction = (place % 97) as f32 / 97.0;
    let bit = u8::from(place.is_multiple_of(3));
    match datatype {
        Datatype::Fp32 => fraction.to_le_bytes().to_vec(),
        Datatype::Fp64 => f64::from(fraction).to_le_bytes().to_vec(),
        // The numbers 0 and 1.
        Datatype::Fp16 => (u16::from(bit) * 0x3c00).to_le_bytes().to_vec(),
        Datatype::Bf16 => (u16::from(bit) * 0x3f80).to_le_bytes().to_vec(),
        Datatype::Bytes => {
            let text = "the ".repeat(usize::try_from(size).unwrap_or_default());
            let length = u32::try_from(text.len()).unwrap_or_default().to_le_bytes();
            [&length, text.as_bytes()].concat()
        }
        whole => {
            let width = usize::try_from(whole.element_bytes().unwrap_or(1)).unwrap_or(1);
            let mut bytes = vec![0; width];
            bytes[0] = bit;
            bytes
        }
    }
}

fn described(tensors: &[Tensor], size: u64) -> String {
    let described = |tensor: &Tensor| match tensor.datatype() {
        Datatype::Bytes => format!("{} of {size} words", tensor.name()),
        _ => format!("{} {:?}", tensor.name(), tensor.shape()),
    };
    tensors.iter().map(described).collect::<Vec<_>>().join(", ")
}

/// The median time of a batch of these.
fn time(instance: &dyn Instance, inputs: &[Arc<[Tensor]>]) -> Result<Duration, String> {
    run_once(instance, inputs)?;
    let (begun, mut times) = (Instant::now(), Vec::new());
    while times.is_empty() || (begun.elapsed() < RUN_TIME && times.len() < RUNS_MAX) {
        times.push(run_once(instance, inputs)?);
    }
    times.sort_unstable();
    Ok(times[times.len() / 2])
}

fn run_once(instance: &dyn Instance, inputs: &[Arc<[Tensor]>]) -> Result<Duration, String> {
    let begun = Instant::now();
    let decode =
        |tensors: &Arc<[Tensor]>| instance.decode(&Payload::Tensors(Arc::clone(tensors))).map_err(said);
    let decoded = inputs.iter().map(decode).collect::<Result<Vec<_>, _>>()?;
    let mut batch =
        instance.begin(decoded).map_err(|_| "the plugin doesn't know its own inputs".to_owned())?;
    let mut outcomes = Outcomes(inputs.iter().map(|_| None).collect());
    batch
        .preprocess()
        .and_then(|()| batch.predict())
        .and_then(|()| batch.postprocess(&mut outcomes))
        .map_err(|failure| failure.message)?;
    for outcome in outcomes.0 {
        outcome.unwrap_or_else(|| Err("the plugin gave no outcome".to_owned()))?;
    }
    Ok(begun.elapsed())
}

/// Each item's end: nothing, or why it failed.
struct Outcomes(Vec<Option<Result<(), String>>>);

impl Outcomes {
    fn set(&mut self, item: usize, end: Result<(), String>) {
        if let Some(place) = self.0.get_mut(item) {
            *place = Some(end);
        }
    }
}

impl EventSink for Outcomes {
    fn interest(&mut self, item: usize) -> Interest {
        match self.0.get(item) {
            Some(None) => Interest::Outcome,
            _ => Interest::Nothing,
        }
    }

    fn chunk(&mut self, _: usize, _: &[u8], _: bool) -> ChunkResult {
        ChunkResult::Taken
    }

    fn end(&mut self, item: usize, outcome: Outcome) {
        self.set(item, outcome.map(drop).map_err(|failure| failure.message));
    }

    fn reject(&mut self, item: usize, rejection: Rejection) {
        self.set(item, Err(said(rejection)));
    }
}

fn said(rejection: Rejection) -> String {
    match rejection {
        Rejection::Malformed { message } => message,
        Rejection::Invalid { faults } => {
            faults.into_iter().map(|fault| fault.message).collect::<Vec<_>>().join("; ")
        }
        Rejection::Failed(failure) => failure.message,
        Rejection::Busy => "the model is changing".to_owned(),
    }
}

/// Sizes as the Open Inference Protocol writes them: -1 is any.
fn sizes(signature: &Signature, spec: &TensorSpec) -> Vec<i64> {
    let known = spec.shape.iter().map(|size| size.map_or(-1, |size| i64::try_from(size).unwrap_or(i64::MAX)));
    signature.batched.then_some(-1).into_iter().chain(known).collect()
}

fn in_json(found: &Found, signature: Option<&Signature>, load_time: Duration, speeds: &[Speed]) -> String {
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let plugin = found.plugin.description();
    let tensors = |signature: &Signature, specs: &[TensorSpec]| -> Vec<Value> {
        specs
            .iter()
            .map(|spec| json!({"name": spec.name, "datatype": spec.datatype.name(), "shape": sizes(signature, spec), "optional": spec.optional}))
            .collect()
    };
    let of_signature = signature.map(|signature| {
        json!({
            "batched": signature.batched, "inputs": tensors(signature, &signature.inputs),
            "outputs": tensors(signature, &signature.outputs),
        })
    });
    let speeds: Vec<Value> = speeds
        .iter()
        .map(|speed| match &speed.took {
            Ok(took) => {
                json!({"input": speed.input, "batch": speed.batch, "milliseconds": milliseconds(*took)})
            }
            Err(reason) => json!({"input": speed.input, "batch": speed.batch, "reason": reason}),
        })
        .collect();
    let whole = json!({
        "taken": true, "plugin": plugin.name, "plugin_version": plugin.version, "setting": found.key,
        "load_milliseconds": milliseconds(load_time), "signature": of_signature, "speeds": speeds,
    });
    format!("{whole:#}\n")
}

fn for_people(
    file: &Path,
    found: &Found,
    signature: Option<&Signature>,
    load_time: Duration,
    speeds: &[Speed],
) -> String {
    let plugin = found.plugin.description();
    let taken = coloured("this host would serve it", Colour::Green);
    let mut text = format!(
        "{}, {taken}\n\nplugin  {} {}, as `{}`\nloaded  in {:.1?}\n",
        file.display(),
        plugin.name,
        plugin.version,
        found.key,
        load_time
    );
    let Some(signature) = signature else {
        text.push_str("\nit takes no tensors, and was not run\n");
        return text;
    };
    for (title, specs) in [("inputs", &signature.inputs), ("outputs", &signature.outputs)] {
        let rows: Vec<[String; 4]> = specs
            .iter()
            .map(|spec| {
                let must = if spec.optional { "optional" } else { "" };
                let shape = format!("{:?}", sizes(signature, spec));
                [format!("  {}", spec.name), spec.datatype.name().to_owned(), shape, must.to_owned()]
            })
            .collect();
        text.push_str(&format!("\n{}\n{}", coloured(title, Colour::Grey), table(&rows)));
    }
    let batches = if signature.batched { "requests share runs" } else { "each request is a run" };
    text.push_str(&format!(
        "\n{}\n",
        coloured(&format!("speed: {batches}; medians, on this machine as it is now"), Colour::Grey)
    ));
    let rows: Vec<[String; 3]> = speeds
        .iter()
        .map(|speed| {
            let took = match &speed.took {
                Ok(took) if speed.batch == 1 => format!("{took:.2?}"),
                Ok(took) => {
                    format!("{took:.2?}, {:.2?} each", *took / u32::try_from(speed.batch).unwrap_or(1))
                }
                Err(reason) => reason.clone(),
            };
            [format!("  {}", speed.input), format!("{} at once", speed.batch), took]
        })
        .collect();
    text.push_str(&table(&rows));
    text
}
