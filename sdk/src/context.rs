//! What a pipeline is given when it is loaded and when a volume changes.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{Device, PipelineError, strict::Strict};

/// What [`crate::InferencePipeline::load`] gets.
///
/// ```
/// use modalkit_sdk::{LoadContext, NoSettings};
///
/// fn weights(ctx: &LoadContext<NoSettings>) -> std::path::PathBuf {
///     ctx.all_model_data_folder().join(ctx.model_name()).join("weights.bin")
/// }
/// ```
#[derive(Debug)]
pub struct LoadContext<S> {
    pub(crate) model_name: String,
    pub(crate) all_model_data_folder: PathBuf,
    pub(crate) common_settings: Value,
    pub(crate) settings: S,
    pub(crate) secrets: Secrets,
    pub(crate) devices: Vec<Device>,
}

/// Secrets by name. Printed, it shows the names.
#[derive(Clone, Default)]
pub(crate) struct Secrets(pub(crate) BTreeMap<String, String>);

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}

impl<S> LoadContext<S> {
    /// The name under which this model is served.
    #[must_use]
    pub fn model_name(&self) -> &str {
        &self.model_name
    }

    /// The folder that holds every model's data: `model_settings.local_model_repository_folder`.
    #[must_use]
    pub fn all_model_data_folder(&self) -> &Path {
        &self.all_model_data_folder
    }

    /// `model_settings.common`, shared by all models: always a JSON object.
    ///
    /// ```
    /// # use modalkit_sdk::{LoadContext, NoSettings};
    /// fn wants_cuda(ctx: &LoadContext<NoSettings>) -> bool {
    ///     ctx.common_settings()["device"] == "cuda"
    /// }
    /// ```
    #[must_use]
    pub fn common_settings(&self) -> &Value {
        &self.common_settings
    }

    /// The pipeline's own keys from the model's entry.
    ///
    /// ```
    /// # use modalkit_sdk::LoadContext;
    /// #[derive(serde::Deserialize)]
    /// struct Settings {
    ///     top_k: usize,
    /// }
    ///
    /// fn top_k(ctx: &LoadContext<Settings>) -> usize {
    ///     ctx.settings().top_k
    /// }
    /// ```
    #[must_use]
    pub fn settings(&self) -> &S {
        &self.settings
    }

    /// A secret that the model's `deployment_config` names in `secrets`; `None` where it isn't named there, or the host found
    /// none of this name. A folder of secrets named `NAME` gives each of its files as `NAME/FILE`.
    ///
    /// ```
    /// # use modalkit_sdk::{LoadContext, NoSettings, PipelineError};
    /// fn token(ctx: &LoadContext<NoSettings>) -> Result<&str, PipelineError> {
    ///     ctx.secret("hub-token").ok_or_else(|| PipelineError::permanent("name hub-token in the model's `secrets`"))
    /// }
    /// ```
    #[must_use]
    pub fn secret(&self, name: &str) -> Option<&str> {
        self.secrets.0.get(name).map(String::as_str)
    }

    /// The device that this replica was given; the first where there are several, and `None` where the model asks for none
    /// (`deployment_config.gpu`).
    ///
    /// ```
    /// # use modalkit_sdk::{LoadContext, NoSettings};
    /// fn runs_on(ctx: &LoadContext<NoSettings>) -> &str {
    ///     ctx.device().map_or("the CPU", |device| device.name())
    /// }
    /// ```
    #[must_use]
    pub fn device(&self) -> Option<&Device> {
        self.devices.first()
    }

    /// All devices that this replica was given.
    #[must_use]
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// The settings, to be kept.
    ///
    /// ```
    /// # use modalkit_sdk::LoadContext;
    /// struct Pipeline<S> {
    ///     settings: S,
    /// }
    ///
    /// fn keep<S>(ctx: LoadContext<S>) -> Pipeline<S> {
    ///     Pipeline { settings: ctx.into_settings() }
    /// }
    /// ```
    #[must_use]
    pub fn into_settings(self) -> S {
        self.settings
    }
}

/// For pipelines without keys of their own; any key in the model's entry is then an error.
///
/// ```
/// use modalkit_sdk::{NoSettings, testkit::TestKit};
/// # use modalkit_sdk::{InferencePipeline, LoadContext, Outcome, PipelineError};
/// # struct Plain;
/// # impl InferencePipeline for Plain {
/// #     type Settings = NoSettings;
/// #     type Input = std::collections::BTreeMap<String, f32>;
/// #     type Output = std::collections::BTreeMap<String, f32>;
/// #     type Preprocessed = ();
/// #     type RawOutput = ();
/// #     fn load(_: LoadContext<NoSettings>) -> Result<Self, PipelineError> { Ok(Self) }
/// #     fn preprocess(&self, _: &[Self::Input]) -> Result<(), PipelineError> { Ok(()) }
/// #     fn predict(&self, _: &[Self::Input], (): ()) -> Result<(), PipelineError> { Ok(()) }
/// #     fn postprocess(&self, inputs: &[Self::Input], (): ()) -> Result<Vec<Outcome<Self::Output>>, PipelineError> {
/// #         Ok(inputs.iter().map(|input| Ok(input.clone())).collect())
/// #     }
/// # }
///
/// let error = TestKit::new().settings(serde_json::json!({"top_k": 3})).load::<Plain>().err().unwrap();
/// assert!(error.to_string().contains("`top_k`"));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
pub struct NoSettings {}

/// What changed in a volume, for [`crate::InferencePipeline::on_volume_reload`].
///
/// ```
/// use modalkit_sdk::VolumeReload;
///
/// fn touches_weights(reload: &VolumeReload) -> bool {
///     reload.changed().iter().any(|file| file.extension().is_some_and(|kind| kind == "bin"))
/// }
///
/// assert!(touches_weights(&VolumeReload::new("models", "/mnt/models", ["digits/weights.bin"])));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeReload {
    volume: String,
    mount_point: PathBuf,
    changed: Vec<PathBuf>,
}

impl VolumeReload {
    /// Describes a change: the volume's name, its mount point, and the changed files relative to it. The host makes these;
    /// tests may too.
    ///
    /// ```
    /// # use modalkit_sdk::VolumeReload;
    /// let reload = VolumeReload::new("models", "/mnt/models", ["index.npy"]);
    /// assert_eq!((reload.volume(), reload.changed().len()), ("models", 1));
    /// assert_eq!(reload.mount_point().join(&reload.changed()[0]).to_str(), Some("/mnt/models/index.npy"));
    /// ```
    pub fn new<P: Into<PathBuf>>(
        volume: impl Into<String>,
        mount_point: impl Into<PathBuf>,
        changed: impl IntoIterator<Item = P>,
    ) -> Self {
        Self {
            volume: volume.into(),
            mount_point: mount_point.into(),
            changed: changed.into_iter().map(Into::into).collect(),
        }
    }

    /// The volume's name.
    #[must_use]
    pub fn volume(&self) -> &str {
        &self.volume
    }

    /// Where the volume is mounted.
    #[must_use]
    pub fn mount_point(&self) -> &Path {
        &self.mount_point
    }

    /// The files that changed, relative to the mount point; empty where the host can't tell.
    #[must_use]
    pub fn changed(&self) -> &[PathBuf] {
        &self.changed
    }
}

/// Parses a model's own keys. A key that `S` doesn't know is an error even without `deny_unknown_fields`.
pub(crate) fn parse_settings<S: DeserializeOwned>(json: &str) -> Result<S, PipelineError> {
    let mut unknown = Vec::new();
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let settings =
        serde_ignored::deserialize(Strict(&mut deserializer), |path| unknown.push(format!("`{path}`")))
            .map_err(|error| {
                PipelineError::permanent(error)
                    .context("the model's entry doesn't fit the pipeline's settings")
            })?;
    if unknown.is_empty() {
        return Ok(settings);
    }
    Err(PipelineError::permanent(format!(
        "the model's entry has keys that the pipeline doesn't know: {}; correct or remove them",
        unknown.join(", ")
    )))
}
