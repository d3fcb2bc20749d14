//! The Dockerfile: the host, its plugins and its folders of Python, built in stages and put on the application's own base. It looks at which
//! sources there are, and builds nothing.

use std::{
    collections::BTreeSet,
    path::{Component, Path, PathBuf},
};

use minijinja::value::Value;
use serde::Serialize;

use super::{
    DeployError, Options,
    facts::{BUCKETS_FOLDER, Facts, IN_IMAGE},
    template,
};
use crate::{config::Loaded, reload::build};

/// What compiles the host and plugins: its glibc is no newer than that of the bases below.
const BUILDER: &str = "rust:1.95-slim-bookworm";
/// The base where none is said: as small as what plugins may link against allows.
const BASE: &str = "debian:bookworm-slim";
/// The same where there are folders of Python.
const BASE_OF_PYTHON: &str = "python:3.11-slim-bookworm";
/// Where compiled plugins' sources are in this tree.
const PLUGINS: &str = "plugins";
/// Files that say what a folder of Python needs, in the order in which they count.
const REQUIREMENTS: [(&str, &str); 2] =
    [("requirements.txt", "-r requirements.txt"), ("pyproject.toml", ".")];

#[derive(Serialize)]
struct Image {
    version: &'static str,
    builder: &'static str,
    base: String,
    folder: &'static str,
    packages: Vec<String>,
    libraries: Vec<Library>,
    prebuilt: Vec<Prebuilt>,
    pipelines: Vec<Pipeline>,
    environment: Vec<(String, String)>,
    commands: Vec<String>,
    workdir: PathBuf,
    mounts: Vec<Copied>,
    links: Vec<Link>,
    buckets_folder: &'static str,
    port: u16,
    /// The configuration as it is in the image, where none is mounted over it.
    configuration: Vec<String>,
}

/// A plugin that is compiled from this tree.
#[derive(Serialize)]
struct Library {
    name: String,
    file: String,
}

/// A plugin that is there.
#[derive(Serialize)]
struct Prebuilt {
    path: PathBuf,
    name: String,
}

/// A folder of Python.
#[derive(Serialize)]
struct Pipeline {
    name: String,
    path: PathBuf,
    install: Option<&'static str>,
}

#[derive(Serialize)]
struct Copied {
    from: PathBuf,
    to: PathBuf,
    is_folder: bool,
}

#[derive(Serialize)]
struct Link {
    parent: PathBuf,
    mount_point: PathBuf,
    target: String,
}

/// The Dockerfile of an application; its context is the current folder, which holds the host's sources.
///
/// # Errors
/// What it copies lies outside of that.
pub fn dockerfile(loaded: &Loaded, options: &Options) -> Result<String, DeployError> {
    let facts = Facts::of(loaded, options, true)?;
    let config = &loaded.config;
    let (mut libraries, mut prebuilt, mut pipelines) = (Vec::new(), Vec::new(), Vec::new());
    for plugin in &plugins(loaded) {
        // What lies elsewhere on this machine is none of the image's: it comes in a volume.
        let found = build::find(plugin, &config.volumes).filter(|path| in_context(path).is_ok());
        match found {
            Some(folder) if folder.is_dir() => pipelines.push(pipeline(plugin, &folder)?),
            _ if Path::new(PLUGINS).join(plugin).join("Cargo.toml").is_file() => libraries
                .push(Library { name: plugin.clone(), file: format!("lib{}.so", plugin.replace('-', "_")) }),
            Some(file) => prebuilt.push(Prebuilt { path: in_context(&file)?, name: format!("{plugin}.so") }),
            // It comes in a volume.
            None => {}
        }
    }
    let mounts = config.mounts.iter().map(|mount| {
        Ok(Copied { from: in_context(&mount.from)?, to: mount.to.clone(), is_folder: mount.folder })
    });
    let newline = |text: &String| text.contains('\n');
    if let Some((name, _)) = config.container.environment.iter().find(|(_, value)| newline(value)) {
        return Err(DeployError::Unfit(format!(
            "expected a line for build_config.env.{name}, found several"
        )));
    }
    let base = if pipelines.is_empty() { BASE } else { BASE_OF_PYTHON };
    let image = Image {
        version: facts.version,
        builder: BUILDER,
        base: config.container.base.clone().unwrap_or_else(|| base.to_owned()),
        folder: IN_IMAGE,
        packages: libraries.iter().map(|library: &Library| library.name.clone()).collect(),
        libraries,
        prebuilt,
        pipelines,
        environment: quoted(&config.container.environment),
        commands: config.container.commands.iter().map(|command| run_of(command)).collect(),
        workdir: config.container.workdir.clone(),
        mounts: mounts.collect::<Result<_, DeployError>>()?,
        links: facts
            .buckets
            .iter()
            .map(|bucket| Link {
                parent: bucket.parent.clone(),
                mount_point: bucket.mount_point.clone(),
                target: bucket.target.clone(),
            })
            .collect(),
        buckets_folder: BUCKETS_FOLDER,
        port: facts.port,
        configuration: facts.configuration.lines().map(str::to_owned).collect(),
    };
    template::fill("Dockerfile", Value::from_serialize(&image))
}

/// What the configuration or a volume names: plugins of models and of queues, each once.
fn plugins(loaded: &Loaded) -> BTreeSet<String> {
    let config = &loaded.config;
    let mut all: BTreeSet<String> = config.models.values().map(|spec| spec.plugin.clone()).collect();
    all.extend(build::folders(&config.volumes));
    all.extend(config.queues.backends.values().filter_map(|backend| match backend {
        modalkit_queue::Spec::Plugin(queue) => Some(queue.plugin.clone()),
        _ => None,
    }));
    all
}

/// A command after `RUN`: one of several lines in the form that takes them.
fn run_of(command: &str) -> String {
    let command = command.trim();
    match command.contains('\n') {
        false => command.to_owned(),
        true => serde_json::json!(["/bin/sh", "-ec", command]).to_string(),
    }
}

fn pipeline(name: &str, folder: &Path) -> Result<Pipeline, DeployError> {
    let found = REQUIREMENTS.iter().find(|(file, _)| folder.join(file).is_file());
    Ok(Pipeline {
        name: name.to_owned(),
        path: in_context(folder)?,
        install: found.map(|(_, install)| *install),
    })
}

/// A path from the context on.
fn in_context(path: &Path) -> Result<PathBuf, DeployError> {
    let context = std::env::current_dir().unwrap_or_default();
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let inside = absolute.strip_prefix(&context).ok().map(Path::to_owned);
    let is_plain = |path: &PathBuf| path.components().all(|part| matches!(part, Component::Normal(_)));
    inside.filter(is_plain).ok_or_else(|| {
        DeployError::Unfit(format!(
            "expected {} below {}, the folder that the image is built from; found it elsewhere: start this command there, or move it",
            path.display(),
            context.display()
        ))
    })
}

/// In double quotes, as a Dockerfile takes values.
fn quoted(environment: &std::collections::BTreeMap<String, String>) -> Vec<(String, String)> {
    let quote = |value: &String| {
        format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"").replace('$', "\\$"))
    };
    environment.iter().map(|(name, value)| (name.clone(), quote(value))).collect()
}
