//! A fit pipeline, but for the profile that it is compiled with: a panic in it would end the process.

use std::collections::BTreeMap;

use modalkit_sdk::{InferencePipeline, LoadContext, NoSettings, Outcome, PipelineError, export_pipeline};

struct Pipeline;

impl InferencePipeline for Pipeline {
    type Settings = NoSettings;
    type Input = BTreeMap<String, f32>;
    type Output = BTreeMap<String, f32>;
    type Preprocessed = ();
    type RawOutput = ();

    fn load(_ctx: LoadContext<NoSettings>) -> Result<Self, PipelineError> {
        Ok(Self)
    }

    fn preprocess(&self, _inputs: &[Self::Input]) -> Result<(), PipelineError> {
        Ok(())
    }

    fn predict(&self, _inputs: &[Self::Input], (): ()) -> Result<(), PipelineError> {
        Ok(())
    }

    fn postprocess(
        &self,
        inputs: &[Self::Input],
        (): (),
    ) -> Result<Vec<Outcome<Self::Output>>, PipelineError> {
        Ok(inputs.iter().map(|input| Ok(input.clone())).collect())
    }
}

export_pipeline!(Pipeline);
