//! The NAME pipeline. It upper-cases a text: replace settings, input, output and stages by your model's.

use modalkit_sdk::{InferencePipeline, Invalid, LoadContext, Outcome, PipelineError, export_pipeline};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The model's own keys, in `[model_settings.model_entries.NAME]` of the configuration. A key that isn't here is an error.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct Settings {
    /// The most characters that a text may have.
    #[serde(default = "default_chars_max")]
    pub chars_max: usize,
}

fn default_chars_max() -> usize {
    1000
}

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
pub struct Pipeline {
    settings: Settings,
}

impl InferencePipeline for Pipeline {
    type Settings = Settings;
    type Input = Input;
    type Output = Output;
    type Preprocessed = ();
    type RawOutput = Vec<String>;

    /// Runs once for each replica. `ctx.all_model_data_folder()` says where weights are. What goes wrong here, and in the stages, is a
    /// `PipelineError`: `permanent("…")`, `transient("…")` where another try may help, or `invalid_input("…")`.
    fn load(ctx: LoadContext<Settings>) -> Result<Self, PipelineError> {
        Ok(Self { settings: ctx.into_settings() })
    }

    /// Runs for each request before it is queued. What it refuses is a 422.
    fn validate(&self, input: &Input) -> Result<(), Invalid> {
        let (found, most) = (input.text.chars().count(), self.settings.chars_max);
        if (1..=most).contains(&found) {
            return Ok(());
        }
        Err(Invalid::new(format!("expected 1 to {most} characters, found {found}")).at("text"))
    }

    fn preprocess(&self, _inputs: &[Input]) -> Result<(), PipelineError> {
        Ok(())
    }

    fn predict(&self, inputs: &[Input], (): ()) -> Result<Vec<String>, PipelineError> {
        Ok(inputs.iter().map(|input| input.text.to_uppercase()).collect())
    }

    /// One outcome for each input, in their order; an `Err` in its place fails that input alone.
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
        let error = model.run_json(&[json!({"text": ""})]).remove(0).unwrap_err();
        assert!(error.to_string().contains("text: expected 1 to 1000 characters, found 0"), "{error}");
    }

    #[test]
    fn a_text_may_be_as_long_as_its_settings_say() {
        let model = TestKit::new().settings(json!({"chars_max": 5})).load::<Pipeline>().unwrap();
        let answers = model.run_json(&[json!({"text": "hello"}), json!({"text": "hello!"})]);
        assert!(answers[0].is_ok());
        let error = answers[1].as_ref().unwrap_err().to_string();
        assert!(error.contains("text: expected 1 to 5 characters, found 6"), "{error}");
    }
}
