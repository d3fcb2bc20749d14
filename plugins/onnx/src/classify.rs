//! The best classes of a classifying output, with their labels.

use modalkit_sdk::{Datatype, PipelineError};
use schemars::JsonSchema;
use serde::Serialize;

use crate::{
    Settings,
    array::Array,
    port::{Dim, Port, describe_all},
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
    /// The output's place.
    output: usize,
    labels: Option<Vec<String>>,
    top_k: usize,
}

impl Classifier {
    /// `None` where the settings ask for no classification. `outputs` are those of one request.
    pub(crate) fn new(outputs: &[Port], settings: &Settings) -> Result<Option<Self>, PipelineError> {
        if settings.labels.is_none() && settings.top_k.is_none() && settings.classify.is_none() {
            return Ok(None);
        }
        let output = match &settings.classify {
            Some(name) => outputs.iter().position(|port| port.name == *name),
            None => Some(0).filter(|_| !outputs.is_empty()),
        };
        let Some(output) = output else {
            return Err(PipelineError::permanent(format!(
                "`classify` names the output {:?}; expected one of {}",
                settings.classify.as_deref().unwrap_or_default(),
                describe_all(outputs)
            )));
        };
        let port = &outputs[output];
        if port.datatype == Datatype::Bytes {
            return Err(PipelineError::permanent(format!(
                "the output `{}` has strings and can't classify; `classify` names another",
                port.name
            )));
        }
        // Around the classes there may be dimensions of one.
        let classes = match &port.dims[..] {
            [outer @ .., classes] if outer.iter().all(|dim| *dim == Dim::Fixed(1)) => classes,
            _ => {
                return Err(PipelineError::permanent(format!(
                    "the output `{}` is {} and can't classify: expected one number for each class",
                    port.name,
                    port.describe()
                )));
            }
        };
        if let (Some(labels), Dim::Fixed(classes)) = (&settings.labels, classes)
            && labels.len() != *classes
        {
            return Err(PipelineError::permanent(format!(
                "`labels` must name every class: the output `{}` is {}, expected {classes} labels, found {}",
                port.name,
                port.describe(),
                labels.len()
            )));
        }
        let top_k = settings.top_k.unwrap_or(1);
        if top_k == 0 {
            return Err(PipelineError::permanent("`top_k` is 0; expected at least 1"));
        }
        Ok(Some(Self { output, labels: settings.labels.clone(), top_k }))
    }

    /// The best classes of one request's outputs, the best first; of equals the first.
    pub(crate) fn best(&self, outputs: &[Array]) -> Result<Vec<Label>, PipelineError> {
        let scores = outputs.get(self.output).and_then(|array| array.elements.to_f32());
        let scores =
            scores.ok_or_else(|| PipelineError::permanent("the classifying output has no numbers"))?;
        let mut scores: Vec<(usize, f32)> = scores.into_iter().enumerate().collect();
        scores.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        scores.truncate(self.top_k);
        let name = |index: usize| {
            let labels = self.labels.as_ref();
            labels.and_then(|labels| labels.get(index)).cloned().unwrap_or_else(|| index.to_string())
        };
        Ok(scores.into_iter().map(|(index, score)| Label { label: name(index), index, score }).collect())
    }
}
