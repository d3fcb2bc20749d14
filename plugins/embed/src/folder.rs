//! What a model's folder says of itself, as Hugging Face's hub lays it out.

use std::{
    fs,
    path::{Path, PathBuf},
};

use modalkit_sdk::PipelineError;
use serde::{Deserialize, de::DeserializeOwned};

use crate::{bert::Shape, pool::Pooling};

/// Where weights may be, the first that is there.
const WEIGHTS: [&str; 3] = ["model.safetensors", "onnx/model.onnx", "model.onnx"];

pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    /// What the network is like.
    pub(crate) shape: Shape,
    pub(crate) weights: PathBuf,
    /// Tokens of a text at most, as the model was trained.
    pub(crate) max_tokens: Option<usize>,
    /// Tokens that it has positions for.
    pub(crate) positions: Option<usize>,
    /// An error where it says something else than is done here: the entry may say what is.
    pub(crate) pooling: Result<Option<Pooling>, PipelineError>,
    pub(crate) normalizes: bool,
    /// Whether texts are made lower case before they are made tokens.
    pub(crate) lowers_case: bool,
}

/// Of `sentence_bert_config.json`.
#[derive(Default, Deserialize)]
struct Sentences {
    max_seq_length: Option<usize>,
    #[serde(default)]
    do_lower_case: bool,
}

/// One of `modules.json`.
#[derive(Deserialize)]
struct Module {
    path: String,
    r#type: String,
}

/// Of `1_Pooling/config.json`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct PoolingConfig {
    pooling_mode_cls_token: bool,
    pooling_mode_mean_tokens: bool,
    pooling_mode_max_tokens: bool,
    pooling_mode_mean_sqrt_len_tokens: bool,
    pooling_mode_weightedmean_tokens: bool,
    pooling_mode_lasttoken: bool,
}

impl Folder {
    pub(crate) fn open(path: &Path) -> Result<Self, PipelineError> {
        let shape: Shape = required(path, "config.json")?;
        let found = |names: &[&str]| names.iter().map(|name| path.join(name)).find(|file| file.is_file());
        // A graph of another type can't be written here: one that is there already comes first.
        let graphs = if shape.is_known() { None } else { found(&WEIGHTS[1..]) };
        let weights = graphs.or_else(|| found(&WEIGHTS)).ok_or_else(|| {
            let names = WEIGHTS.join(", ");
            PipelineError::permanent(format!("expected weights in one of {names}, found none"))
        })?;
        let sentences: Sentences = optional(path, "sentence_bert_config.json")?.unwrap_or_default();
        let modules: Vec<Module> = optional(path, "modules.json")?.unwrap_or_default();
        let is = |module: &&Module, name: &str| module.r#type.rsplit('.').next() == Some(name);
        if let Some(unknown) = modules
            .iter()
            .find(|module| !["Transformer", "Pooling", "Normalize"].iter().any(|name| is(module, name)))
        {
            return Err(PipelineError::permanent(format!(
                "modules.json has the module {}, which isn't done here; expected Transformer, Pooling and Normalize",
                unknown.r#type
            )));
        }
        let pooling = match modules.iter().find(|module| is(module, "Pooling")) {
            Some(module) => pooling(&path.join(&module.path)),
            None => Ok(None),
        };
        let normalizes = modules.iter().any(|module| is(&module, "Normalize"));
        Ok(Self {
            path: path.to_owned(),
            weights,
            max_tokens: sentences.max_seq_length,
            positions: shape.positions(),
            pooling,
            normalizes,
            lowers_case: sentences.do_lower_case,
            shape,
        })
    }
}

fn pooling(folder: &Path) -> Result<Option<Pooling>, PipelineError> {
    let config: PoolingConfig = required(folder, "config.json")?;
    let others = config.pooling_mode_mean_sqrt_len_tokens
        || config.pooling_mode_weightedmean_tokens
        || config.pooling_mode_lasttoken;
    let known =
        (config.pooling_mode_cls_token, config.pooling_mode_mean_tokens, config.pooling_mode_max_tokens);
    match (known, others) {
        ((true, false, false), false) => Ok(Some(Pooling::Cls)),
        ((false, true, false), false) => Ok(Some(Pooling::Mean)),
        ((false, false, true), false) => Ok(Some(Pooling::Max)),
        _ => Err(PipelineError::permanent(format!(
            "{}: expected one of the modes cls_token, mean_tokens and max_tokens: say `pooling` in the model's entry",
            folder.join("config.json").display()
        ))),
    }
}

fn optional<T: DeserializeOwned>(folder: &Path, name: &str) -> Result<Option<T>, PipelineError> {
    match folder.join(name) {
        file if file.exists() => required(folder, name).map(Some),
        _ => Ok(None),
    }
}

fn required<T: DeserializeOwned>(folder: &Path, name: &str) -> Result<T, PipelineError> {
    let bytes = fs::read(folder.join(name)).map_err(|error| PipelineError::from(error).context(name))?;
    serde_json::from_slice(&bytes).map_err(|error| PipelineError::permanent(format!("{name}: {error}")))
}
