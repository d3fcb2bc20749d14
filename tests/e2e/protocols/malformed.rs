//! Calls of gRPC as nobody should write them: frames, lengths, messages. Each has an answer with a code, none harms anybody, and nothing is kept.

use std::{fs, time::Duration};

use modalkit_proto::{ModelInferRequest, model_infer_request::InferInputTensor};
use modalkit_tests::{Setup, wait_until};
use prost::Message;
use serde_json::json;

use super::calls::client;
use crate::tensors::Numbers;

const REQUESTS: usize = 10_000;
/// How much more memory a host may hold afterwards.
const GROWTH_KIB_MAX: u64 = 48 << 10;

fn good() -> ModelInferRequest {
    let input = InferInputTensor {
        name: "values".into(),
        datatype: "FP32".into(),
        shape: vec![2, 2],
        ..InferInputTensor::default()
    };
    ModelInferRequest {
        model_name: "tensors".into(),
        inputs: vec![input],
        raw_input_contents: vec![vec![0; 16].into()],
        ..ModelInferRequest::default()
    }
}

/// A message in its frame.
fn framed(flag: u8, length: u32, message: &[u8]) -> Vec<u8> {
    [&[flag][..], &length.to_be_bytes(), message].concat()
}

fn mutated(numbers: &mut Numbers) -> Vec<u8> {
    let mut request = good();
    let shapes =
        [vec![2, 2], vec![], vec![-1, 2], vec![i64::MAX, i64::MAX], vec![1 << 40, 2], vec![0, 2], vec![2]];
    match numbers.next(7) {
        6 => {
            // A few bytes that would become millions of tensors.
            let count = 1 << (10 + numbers.next(10));
            let message =
                [&b"\x0a\x07tensors"[..], &[*numbers.one_of(&[0x2a_u8, 0x32, 0x3a]), 0].repeat(count)]
                    .concat();
            return framed(0, message.len() as u32, &message);
        }
        0 => request.inputs[0].shape.clone_from(numbers.one_of(&shapes)),
        1 => request.raw_input_contents = vec![vec![0; numbers.next(40) as usize].into()],
        2 => request.raw_input_contents.clear(),
        3 => (*numbers.one_of(&["FP32", "BYTES", "FP99", ""])).clone_into(&mut request.inputs[0].datatype),
        4 => (*numbers.one_of(&["values", "words", ""])).clone_into(&mut request.inputs[0].name),
        _ => request.inputs = vec![request.inputs[0].clone(); numbers.next(2000) as usize],
    }
    let mut message = request.encode_to_vec();
    let length = message.len() as u32;
    match numbers.next(8) {
        0 => message.truncate(numbers.next(u64::from(length) + 1) as usize),
        1 if !message.is_empty() => {
            for _ in 0..=numbers.next(4) {
                let place = numbers.next(message.len() as u64) as usize;
                message[place] = numbers.next(256) as u8;
            }
        }
        2 => return framed(numbers.next(256) as u8, length, &message),
        3 => return framed(0, numbers.next(1 << 32) as u32, &message),
        4 => {
            let mut frames = framed(0, length, &message);
            frames.truncate(numbers.next(frames.len() as u64) as usize);
            return frames;
        }
        5 => return [framed(0, length, &message), framed(0, length, &message)].concat(),
        _ => {}
    }
    framed(0, message.len() as u32, &message)
}

fn resident_kib(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn ten_thousand_malformed_calls_get_a_code_each_and_harm_nobody() {
    let host = Setup::new().plugin("tensors").config("[server]\nbody_bytes_max = 4_000_000\n").ready();
    let client = client().http2_prior_knowledge().timeout(Duration::from_secs(60)).build().unwrap();
    let mut numbers = Numbers(11);
    let mut before = 0;
    let mut codes = std::collections::BTreeMap::new();
    for number in 0..REQUESTS {
        if number == REQUESTS / 10 {
            before = resident_kib(host.id());
        }
        let body = mutated(&mut numbers);
        let path = [
            "ModelInfer",
            "ModelInfer",
            "ModelInfer",
            "ModelStreamInfer",
            "ModelMetadata",
            "RepositoryIndex",
        ][numbers.next(6) as usize];
        let encoding = *numbers.one_of(&["identity", "identity", "gzip", "deflate", "br", "ä"]);
        let timeout = *numbers.one_of(&["", "10S", "10S", "1x", "999999999S"]);
        let mut request = client
            .post(format!("http://{}/inference.GRPCInferenceService/{path}", host.address))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("grpc-encoding", reqwest::header::HeaderValue::from_bytes(encoding.as_bytes()).unwrap())
            .body(body);
        if !timeout.is_empty() {
            request = request.header("grpc-timeout", timeout);
        }
        let answer = request.send().unwrap();
        assert_eq!(answer.status().as_u16(), 200, "request {number}");
        // Where it failed before its first message, the status stands among the headers.
        let code =
            answer.headers().get("grpc-status").map_or(0, |code| code.to_str().unwrap().parse().unwrap());
        *codes.entry(code).or_insert(0) += 1;
        assert!([0, 3, 5, 8, 11, 12, 13].contains(&code), "request {number} has the code {code}");
        // All of it: an answer that breaks off is none.
        let body = answer.bytes().unwrap();
        assert!(
            code != 0 || path == "ModelStreamInfer" || !body.is_empty(),
            "request {number} has no message"
        );
    }
    // Invalid arguments, broken messages, what is too long, unknown encodings, and some that are right all the same.
    assert!([0, 3, 11, 12, 13].iter().all(|code| codes.contains_key(code)), "{codes:?}");
    let grown = resident_kib(host.id()).saturating_sub(before);
    assert!(grown < GROWTH_KIB_MAX, "it holds {grown} KiB more");
    let right = json!({"inputs": [{"name": "values", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]});
    assert_eq!(host.post("/v2/models/tensors/infer", &right).0, 200);
    wait_until("nothing is held", || host.metric("modalkit_bytes_in_flight").abs() < 0.5);
    let panicked = host
        .log()
        .iter()
        .any(|line| line["message"].as_str().is_some_and(|text| text.starts_with("panicked")));
    assert!(!panicked);
}
