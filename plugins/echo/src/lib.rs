//! A pipeline that "translates" a text by upper-casing it: the smallest one that does something.
//!
//! It owns its input, its output and three stages, and never knows how it is served.

use modalkit_sdk::{InferencePipeline, LoadContext, NoSettings, Outcome, PipelineError, export_pipeline};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One request: `{"text": "hello"}`.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct Input {
    /// The text to translate.
    pub text: String,
}

/// One output: `{"translated_text": "HELLO", "confidence": 0.95}`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Output {
    /// The translation.
    pub translated_text: String,
    /// How sure the model is, from 0 to 1.
    pub confidence: f32,
}

/// The model. Weights and tokenizers go here; `load` fills them.
pub struct Pipeline;

impl InferencePipeline for Pipeline {
    type Settings = NoSettings;
    type Input = Input;
    type Output = Output;
    type Preprocessed = ();
    type RawOutput = Vec<String>;

    fn load(_ctx: LoadContext<NoSettings>) -> Result<Self, PipelineError> {
        Ok(Self)
    }

    fn preprocess(&self, _inputs: &[Input]) -> Result<(), PipelineError> {
        Ok(())
    }

    fn predict(&self, inputs: &[Input], (): ()) -> Result<Vec<String>, PipelineError> {
        Ok(inputs.iter().map(|input| input.text.to_uppercase()).collect())
    }

    fn postprocess(
        &self,
        _inputs: &[Input],
        texts: Vec<String>,
    ) -> Result<Vec<Outcome<Output>>, PipelineError> {
        Ok(texts
            .into_iter()
            .map(|translated_text| Ok(Output { translated_text, confidence: 0.95 }))
            .collect())
    }
}

export_pipeline!(Pipeline);

#[cfg(test)]
mod tests {
    use modalkit_sdk::testkit::TestKit;
    use serde_json::json;

    use super::*;

    #[test]
    fn answers_in_the_order_of_its_inputs() {
        let model = TestKit::new().load::<Pipeline>().unwrap();
        let answers = model.run_json(&[json!({"text": "hello"}), json!({"text": "straße"})]);
        assert_eq!(answers[0].as_ref().unwrap()["translated_text"], "HELLO");
        assert_eq!(answers[1].as_ref().unwrap()["translated_text"], "STRASSE");
    }

    #[test]
    fn says_what_is_wrong_with_an_input() {
        let model = TestKit::new().load::<Pipeline>().unwrap();
        let error = model.run_json(&[json!({"txt": "hello"})]).remove(0).unwrap_err();
        assert!(error.to_string().contains("missing field `text`"), "{error}");
    }
}
