//! The best classes of a classifying output, with their labels.

use std::collections::BTreeMap;

use modalkit_sdk::PipelineError;
use schemars::JsonSchema;
use serde::Serialize;

use crate::{
    Settings,
    array::{Array, Values},
    model::{Dim, Model, describe},
};

/// One class.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub(crate) struct Label {
    /// Its label, or its index where there are no labels.
    pub(crate) label: String,
    /// Its place in the output, from 0.
    pub(crate) index: usize,
    /// What the model gave it.
    pub(crate) score: f32,
}

pub(crate) struct Classifier {
    output: String,
    labels: Option<Vec<String>>,
    top_k: usize,
}

impl Classifier {
    /// `None` where the settings ask for no classification.
    pub(crate) fn new(model: &Model, settings: &Settings) -> Result<Option<Self>, PipelineError> {
        if settings.labels.is_none() && settings.top_k.is_none() && settings.classify.is_none() {
            return Ok(None);
        }
        let port = match &settings.classify {
            Some(name) => model.outputs.iter().find(|port| port.name == *name),
            None => model.outputs.first(),
        };
        let Some(port) = port else {
            return Err(PipelineError::permanent(format!(
                "`classify` names the output {:?}; expected one of {}",
                settings.classify.as_deref().unwrap_or_default(),
                model.outputs_text()
            )));
        };
        let dims = model.item_dims(port);
        let [.., classes] = dims else {
            return Err(PipelineError::permanent(format!(
                "the output `{}` is a single number and can't classify",
                port.name
            )));
        };
        if let (Some(labels), Dim::Fixed(classes)) = (&settings.labels, classes)
            && labels.len() != *classes
        {
            return Err(PipelineError::permanent(format!(
                "`labels` must name every class: the output `{}` is {}, expected {classes} labels, found {}",
                port.name,
                describe(port.element, dims),
                labels.len()
            )));
        }
        let top_k = settings.top_k.unwrap_or(1);
        if top_k == 0 {
            return Err(PipelineError::permanent("`top_k` is 0; expected at least 1"));
        }
        Ok(Some(Self { output: port.name.clone(), labels: settings.labels.clone(), top_k }))
    }

    /// The best classes of one request's output, the best first; of equals the first.
    pub(crate) fn best(&self, outputs: &BTreeMap<String, Array>) -> Result<Vec<Label>, PipelineError> {
        let Some(array) = outputs.get(&self.output) else {
            return Err(PipelineError::permanent(format!("the model gave no output `{}`", self.output)));
        };
        let mut scores: Vec<(usize, f32)> = match &array.values {
            Values::Singles(values) => values.iter().copied().enumerate().collect(),
            Values::Floats(values) => values.iter().map(|value| *value as f32).enumerate().collect(),
            Values::Integers(values) => values.iter().map(|value| *value as f32).enumerate().collect(),
        };
        scores.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        scores.truncate(self.top_k);
        let name = |index: usize| {
            self.labels
                .as_ref()
                .and_then(|labels| labels.get(index))
                .cloned()
                .unwrap_or_else(|| index.to_string())
        };
        Ok(scores.into_iter().map(|(index, score)| Label { label: name(index), index, score }).collect())
    }
}
