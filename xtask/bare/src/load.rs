//! Load over gRPC: connections with one call each under way, until the time is up. It prints calls a second, the median and the 99th percentile in
//! milliseconds, how many calls there were and how many failed.

use std::{
    io::Write,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use modalkit_proto::{ModelInferRequest, model_infer_request::InferInputTensor};
use prost::Message;
use tokio::net::TcpStream;

/// Bytes that a server may send ahead: an answer of a mebibyte doesn't wait for the client.
const WINDOW_BYTES: u32 = 8 << 20;

/// One connection's calls: how long each took, and how many failed.
type Calls = (Vec<Duration>, usize);

pub(crate) async fn run(port: u16, connections: usize, seconds: u64, bytes: usize) -> anyhow::Result<()> {
    let input = InferInputTensor {
        name: "values".into(),
        datatype: "FP32".into(),
        shape: vec![1, (bytes / size_of::<f32>()) as i64],
        ..InferInputTensor::default()
    };
    let request = ModelInferRequest {
        model_name: "tensors".into(),
        inputs: vec![input],
        raw_input_contents: vec![vec![0; bytes].into()],
        ..ModelInferRequest::default()
    };
    let message = request.encode_to_vec();
    let mut framed = vec![0];
    framed.extend_from_slice(&u32::try_from(message.len())?.to_be_bytes());
    framed.extend_from_slice(&message);
    let body = Bytes::from(framed);
    let until = Instant::now() + Duration::from_secs(seconds);
    let begun = Instant::now();
    let uri: Arc<str> = format!("http://127.0.0.1:{port}/inference.GRPCInferenceService/ModelInfer").into();
    let tasks: Vec<_> = (0..connections)
        .map(|_| tokio::spawn(connection(port, Arc::clone(&uri), body.clone(), until)))
        .collect();
    let (mut times, mut failed) = (Vec::new(), 0);
    for task in tasks {
        let (of_connection, failures) = task.await??;
        times.extend(of_connection);
        failed += failures;
    }
    let took = begun.elapsed().as_secs_f64();
    times.sort_unstable();
    let at = |share: f64| {
        let place = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
        times.get(place).map_or(0.0, |time| time.as_secs_f64() * 1e3)
    };
    let rate = times.len() as f64 / took;
    writeln!(std::io::stdout(), "{rate} {} {} {} {failed}", at(0.5), at(0.99), times.len())?;
    Ok(())
}

async fn connection(port: u16, uri: Arc<str>, body: Bytes, until: Instant) -> anyhow::Result<Calls> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.context("can't connect")?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .handshake(TokioIo::new(stream))
        .await?;
    tokio::spawn(connection);
    let (mut times, mut failed) = (Vec::new(), 0);
    while Instant::now() < until {
        let request = Request::post(&*uri)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(body.clone()))?;
        let begun = Instant::now();
        let answer = sender.send_request(request).await?;
        let answer = answer.into_body().collect().await?;
        times.push(begun.elapsed());
        let status = answer.trailers().and_then(|trailers| trailers.get("grpc-status"));
        if status.is_none_or(|status| status != "0") {
            failed += 1;
        }
    }
    Ok((times, failed))
}
