//! A batch of JSON and tensors through the exported functions, as a host calls them.

use modalkit_abi::{Buffer, Datatype, EventSink, abi_stable::std_types::RNone};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::*;
use crate::{LoadContext, NoSettings, Outcome, Tensors};

#[derive(Deserialize, JsonSchema)]
struct Input {
    number: f32,
}

#[derive(Serialize, JsonSchema)]
struct Output {
    half: f32,
}

/// Halves numbers, and sends each back before; zero is none that it takes.
struct Half;

impl InferencePipeline for Half {
    type Input = Input;
    type Output = Output;
    type Preprocessed = ();
    type RawOutput = ();
    type Settings = NoSettings;

    fn load(_: LoadContext<NoSettings>) -> Result<Self, PipelineError> {
        Ok(Self)
    }

    fn input_from_tensors(mut tensors: Tensors) -> Result<Input, crate::Invalid> {
        Ok(Input { number: tensors.take("number")?.values::<f32>()?[0] })
    }

    fn output_to_tensors(&self, output: Output) -> Result<Vec<crate::Tensor>, PipelineError> {
        Ok(vec![crate::Tensor::new("half", [1], vec![output.half])?])
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
        let half = |(item, input): (usize, &Input)| {
            chunks.send(item, &input.number)?;
            match input.number {
                0.0 => Err(PipelineError::invalid_input("expected another number than 0")),
                number => Ok(Output { half: number / 2.0 }),
            }
        };
        Ok(inputs.iter().enumerate().map(half).collect())
    }
}

type Seen = Vec<(usize, String)>;

unsafe fn seen(sink: SinkHandle, item: usize, what: String) {
    // SAFETY: the test below makes such handles.
    unsafe { &mut *sink.into_raw().cast::<Seen>() }.push((item, what));
}

unsafe extern "C" fn json(sink: SinkHandle, item: usize, json: RVec<u8>) {
    // SAFETY: as in `seen`.
    unsafe { seen(sink, item, String::from_utf8_lossy(&json).into_owned()) };
}

unsafe extern "C" fn tensors(sink: SinkHandle, item: usize, tensors: RVec<Tensor>, _: RString) {
    // SAFETY: as in `seen`.
    unsafe { seen(sink, item, format!("{} {:?}", tensors[0].name, &*tensors[0].data)) };
}

unsafe extern "C" fn failed(sink: SinkHandle, item: usize, failure: Failure) {
    // SAFETY: as in `seen`.
    unsafe { seen(sink, item, failure.message.into()) };
}

/// The first item's caller wants chunks; the fourth's has left.
unsafe extern "C" fn interest(_: SinkHandle, item: usize) -> Interest {
    match item {
        0 => Interest::CHUNKS,
        3 => Interest::NOTHING,
        _ => Interest::OUTCOME,
    }
}

unsafe extern "C" fn chunk(
    sink: SinkHandle,
    item: usize,
    json: RSlice<'_, u8>,
    when_full: WhenFull,
) -> ChunkResult {
    // SAFETY: as in `seen`.
    unsafe { seen(sink, item, format!("{} {}", String::from_utf8_lossy(json.as_slice()), when_full.0)) };
    ChunkResult::TAKEN
}

/// As a host gives them.
#[repr(align(64))]
struct Aligned([u8; 4]);

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn tensor(number: f32) -> RVec<Tensor> {
    let tensor = Tensor {
        name: "number".into(),
        datatype: Datatype::FP32,
        shape: vec![1].into(),
        data: Buffer::from_owner(Aligned(number.to_le_bytes())),
        parameters: RString::new(),
    };
    vec![tensor].into()
}

#[test]
fn a_batch_of_json_and_tensors_answers_each_in_its_own_form_on_any_thread() {
    let given = r#"{"model_name": "m", "all_model_data_folder": ".", "common_settings": {}, "settings": {}, "later": 1}"#;
    let instance = load::<Half>(given.into()).unwrap();
    let sink = EventSink { json, tensors, failed, interest, chunk }.leak_into_prefix();
    // SAFETY: handles of this library, each used and given back once.
    let item = |number: f32, is_tensor: bool| unsafe {
        let decoded = match is_tensor {
            true => decode_tensors::<Half>(RNone, tensor(number), "".into()),
            false => decode::<Half>(RNone, format!(r#"{{"number": {number}}}"#).as_bytes().into()),
        };
        decoded.unwrap().item
    };
    let items = [item(1.0, false), item(2.0, true), item(0.0, true), item(4.0, false), item(8.0, true)];
    let mut outcomes: Seen = Vec::new();
    // SAFETY: as above; each stage has ended before the next begins.
    unsafe {
        let batch = begin::<Half>(instance, RSlice::from_slice(&items));
        let elsewhere = move || preprocess::<Half>(batch).is_ok();
        assert!(std::thread::spawn(elsewhere).join().unwrap());
        predict::<Half>(batch).unwrap();
        let handle = SinkHandle::from_raw((&raw mut outcomes).cast());
        postprocess::<Half>(batch, handle, sink).unwrap();
        let elsewhere = move || drop_batch::<Half>(batch);
        std::thread::spawn(elsewhere).join().unwrap();
        drop_instance::<Half>(instance);
    }
    assert_eq!(outcomes.remove(0), (0, "1.0 1".to_owned()));
    let expected = [
        r#"{"half":0.5}"#.to_owned(),
        format!("half {:?}", 1.0_f32.to_le_bytes()),
        "expected another number than 0".to_owned(),
        "nobody waits for this item any more".to_owned(),
        format!("half {:?}", 4.0_f32.to_le_bytes()),
    ];
    assert_eq!(outcomes, expected.into_iter().enumerate().collect::<Seen>());
    // SAFETY: no handle goes with these.
    let wrong = unsafe { decode_tensors::<Half>(RNone, RVec::new(), "".into()) };
    assert_eq!(wrong.unwrap_err().kind, FailureKind::INVALID_INPUT);
}
