//! What a configuration needs around it, rendered: a Dockerfile, manifests for Kubernetes, a Helm chart, a compose file, a unit of systemd. It
//! writes nothing, builds nothing, and asks no cluster.
//!
//! Each is a template beside this file, filled with what `facts` says of the configuration. The chart is the template of the manifests filled
//! with Helm's expressions, and a `values.yaml` with what these stand for: both say the same.

mod facts;
mod image;
mod template;

use std::path::PathBuf;

use minijinja::value::Value;
use serde_json::json;

use crate::config::Loaded;
use facts::Facts;

pub use image::dockerfile;

/// What is rendered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Manifests.
    Kubernetes,
    /// A chart.
    Helm,
    /// A compose file.
    Compose,
    /// A unit.
    Systemd,
}

/// What scales pods with the work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Autoscaler {
    /// Kubernetes' own, on CPU time.
    #[default]
    Hpa,
    /// KEDA, on the length of queues.
    Keda,
}

/// What the configuration doesn't say.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The image with its tag; else the application's name and this version.
    pub image: Option<String>,
    /// What scales pods.
    pub autoscaler: Autoscaler,
    /// Where Prometheus answers, which KEDA asks for the models' queues.
    pub prometheus: Option<String>,
    /// Pods keep no state: a Deployment, whose accepted jobs go with their pod.
    pub stateless: bool,
    /// KServe's ServingRuntime and InferenceService beside the rest.
    pub kserve: bool,
}

/// A rendered file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Where it belongs, from the folder that is written to.
    pub path: PathBuf,
    /// What it holds.
    pub text: String,
}

/// Why nothing was rendered.
#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    /// The configuration doesn't fit what is wanted of it.
    #[error("{0}")]
    Unfit(String),
    /// A template is wrong, which is a mistake in this program.
    #[error("a template can't be filled")]
    Template(#[from] minijinja::Error),
}

/// Renders what a target takes.
///
/// # Errors
/// The configuration can't be served there: it says what is missing.
pub fn render(loaded: &Loaded, target: Target, options: &Options) -> Result<Vec<File>, DeployError> {
    let facts = Facts::of(loaded, options, target != Target::Systemd)?;
    let one = |path: &str, text: String| Ok(vec![File { path: path.into(), text }]);
    match target {
        Target::Kubernetes => one("kubernetes.yaml", manifests(&facts, Value::from_serialize(&facts))?),
        Target::Helm => chart(&facts),
        Target::Compose => Ok(vec![
            File {
                path: "compose.yaml".into(),
                text: template::fill("compose.yaml", Value::from_serialize(&facts))?,
            },
            File { path: "modalkit.toml".into(), text: facts.configuration.clone() },
        ]),
        Target::Systemd => {
            one("modalkit.service", template::fill("modalkit.service", Value::from_serialize(&facts))?)
        }
    }
}

/// The image's name and tag, where nobody says another.
#[must_use]
pub fn image_name(loaded: &Loaded) -> String {
    facts::image_name(loaded)
}

/// Every manifest, in one text.
fn manifests(facts: &Facts, values: Value) -> Result<String, DeployError> {
    let mut text = template::fill("kubernetes.yaml", values.clone())?;
    if facts.kserve {
        text.push_str(&template::fill("kserve.yaml", values)?);
    }
    Ok(text)
}

fn chart(facts: &Facts) -> Result<Vec<File>, DeployError> {
    let mut expressions = serde_json::to_value(facts).unwrap_or_default();
    // What an operator may set; the rest follows from the configuration.
    let values = [
        ("image", json!(facts.image)),
        ("replicas", json!(facts.replicas)),
        ("replicas_max", json!((facts.scales || facts.kserve).then_some(facts.replicas_max))),
        ("grace_seconds", json!(facts.grace_seconds)),
        ("drain_delay_seconds", json!(facts.drain_delay_seconds)),
        ("state_storage", json!(facts.state_storage)),
        ("memory", json!(facts.memory)),
        ("cpu", json!(facts.cpu)),
        ("gpus", json!(facts.gpus)),
        ("region", json!(facts.region)),
    ];
    let mut text = "# What of the chart is set here; the rest follows from the configuration that it was rendered from.\n".to_owned();
    for (name, value) in values.into_iter().filter(|(_, value)| !value.is_null()) {
        text.push_str(&format!("{name}: {value}\n"));
        expressions[name] = json!(format!("{{{{ .Values.{name} }}}}"));
    }
    expressions["configuration_block"] = json!("{{ .Files.Get \"files/modalkit.toml\" | nindent 4 }}");
    expressions["configuration_sha256"] = json!("{{ .Files.Get \"files/modalkit.toml\" | sha256sum }}");
    let manifests = manifests(facts, Value::from_serialize(&expressions))?;
    let file = |path: &str, text: String| File { path: path.into(), text };
    Ok(vec![
        file("Chart.yaml", template::fill("Chart.yaml", Value::from_serialize(facts))?),
        file("values.yaml", text),
        file("files/modalkit.toml", facts.configuration.clone()),
        file("templates/modalkit.yaml", manifests),
    ])
}
