//! A pipeline whose chunks are no part of its output: they tell how far it has come. As its author would write and test it.

use modalkit_sdk::{
    Chunks, InferencePipeline, LoadContext, NoSettings, Outcome, PipelineError, testkit::TestKit,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Steps until a root is given up.
const STEPS_MAX: usize = 100;

#[derive(Deserialize, JsonSchema)]
struct Input {
    number: f64,
    tolerance: f64,
}

#[derive(Serialize, JsonSchema)]
struct Output {
    root: f64,
    steps: usize,
}

#[derive(Serialize)]
struct Progress {
    step: usize,
    error: f64,
}

/// Square roots, by Heron's method.
struct Roots;

impl InferencePipeline for Roots {
    type Settings = NoSettings;
    type Input = Input;
    type Output = Output;
    type Preprocessed = ();
    type RawOutput = ();

    fn load(_: LoadContext<NoSettings>) -> Result<Self, PipelineError> {
        Ok(Self)
    }

    fn preprocess(&self, _: &[Input]) -> Result<(), PipelineError> {
        Ok(())
    }

    fn predict(&self, _: &[Input], (): ()) -> Result<(), PipelineError> {
        Ok(())
    }

    fn postprocess(&self, inputs: &[Input], (): ()) -> Result<Vec<Outcome<Output>>, PipelineError> {
        self.postprocess_stream(inputs, (), &mut Chunks::discarding())
    }

    fn postprocess_stream(
        &self,
        inputs: &[Input],
        (): (),
        chunks: &mut Chunks<'_>,
    ) -> Result<Vec<Outcome<Output>>, PipelineError> {
        let root = |(item, Input { number, tolerance }): (usize, &Input)| {
            let mut root = number.max(1.0);
            for step in 1..=STEPS_MAX {
                root = f64::midpoint(root, number / root);
                let error = (root * root - number).abs();
                chunks.send(item, &Progress { step, error })?;
                if error <= *tolerance {
                    return Ok(Output { root, steps: step });
                }
            }
            Err(PipelineError::invalid_input(format!("no root within {tolerance} in {STEPS_MAX} steps")))
        };
        Ok(inputs.iter().enumerate().map(root).collect())
    }
}

#[test]
fn chunks_tell_how_far_a_computation_has_come() {
    let model = TestKit::new().load::<Roots>().unwrap();
    let inputs = [
        json!({"number": 2, "tolerance": 1e-9}),
        json!({"number": 3}),
        json!({"number": 5, "tolerance": -1}),
    ];
    let mut answers = model.stream_json(&inputs);
    let (chunks, failed) = answers.pop().unwrap();
    assert_eq!(chunks.len(), STEPS_MAX);
    assert!(failed.unwrap_err().to_string().contains("no root within -1"));
    let (chunks, refused) = answers.pop().unwrap();
    assert!(chunks.is_empty() && refused.unwrap_err().to_string().contains("missing field `tolerance`"));
    let (chunks, output) = answers.pop().unwrap();
    let output = output.unwrap();
    assert!((output["root"].as_f64().unwrap() - 2_f64.sqrt()).abs() < 1e-9);
    assert_eq!(output["steps"], chunks.len());
    assert!(chunks.windows(2).all(|pair| pair[0]["error"].as_f64() > pair[1]["error"].as_f64()));
    assert_eq!(model.run_json(&inputs[..1])[0].as_ref().unwrap(), &output);
}
