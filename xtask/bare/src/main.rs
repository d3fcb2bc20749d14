//! A server with nothing but hyper and serde_json, for `cargo xtask bench`: `bare echo|batched|big|tensors PORT`; with nothing but tonic: `bare grpc PORT`; and
//! the load for that: `bare grpc-load PORT CONNECTIONS SECONDS BYTES`.
//!
//! It does each workload's work in the shortest way one would write it, and never checks, limits, counts or logs.

#![forbid(unsafe_code)]

mod batcher;
mod grpc;
mod load;

use std::{convert::Infallible, env, net::SocketAddr, sync::Arc};

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;

use batcher::Batcher;

#[derive(Clone)]
enum Work {
    Echo,
    Batched(Arc<Batcher>),
    Big,
    /// Gives the body back.
    Tensors,
    /// Gives tensors back, over gRPC.
    Grpc,
}

#[derive(Deserialize)]
struct Text {
    text: String,
}

#[derive(Serialize)]
struct Translated {
    status: &'static str,
    translated_text: String,
    confidence: f32,
}

#[derive(Deserialize)]
struct Floats {
    values: Vec<f32>,
}

#[derive(Serialize)]
struct Summed {
    status: &'static str,
    sum: f64,
    length: usize,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    if let [role, port, connections, seconds, bytes] = args.as_slice()
        && role == "grpc-load"
    {
        return load::run(port.parse()?, connections.parse()?, seconds.parse()?, bytes.parse()?).await;
    }
    let [workload, port] = args.as_slice() else {
        bail!("expected: bare echo|batched|big|tensors|grpc PORT")
    };
    let work = match workload.as_str() {
        "echo" => Work::Echo,
        "batched" => Work::Batched(Arc::new(Batcher::start()?)),
        "big" => Work::Big,
        "tensors" => Work::Tensors,
        "grpc" => Work::Grpc,
        other => bail!("expected the workload grpc, echo, batched, big or tensors, found {other:?}"),
    };
    let port: u16 = port.parse().context("expected a port")?;
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], port))).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let work = work.clone();
        tokio::spawn(async move {
            if let Work::Grpc = work {
                // A client that leaves is no error.
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), TowerToHyperService::new(grpc::server()))
                    .await;
                return;
            }
            let service = service_fn(|request| answer(&work, request));
            // A client that leaves is no error.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(work: &Work, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let body =
        request.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let json = match work {
        Work::Echo => serde_json::from_slice::<Text>(&body).and_then(|input| {
            let translated_text = input.text.to_uppercase();
            serde_json::to_vec(&Translated { status: "success", translated_text, confidence: 0.95 })
        }),
        Work::Batched(batcher) => match serde_json::from_slice::<Text>(&body) {
            Ok(input) => {
                let translated_text = batcher.run(input.text).await;
                serde_json::to_vec(&Translated { status: "success", translated_text, confidence: 0.95 })
            }
            Err(error) => Err(error),
        },
        Work::Big => serde_json::from_slice::<Floats>(&body).and_then(|input| {
            let sum = input.values.iter().map(|value| f64::from(*value)).sum();
            serde_json::to_vec(&Summed { status: "success", sum, length: input.values.len() })
        }),
        Work::Grpc => return Ok(Response::new(Full::new(Bytes::new()))),
        Work::Tensors => return Ok(Response::new(Full::new(body))),
    };
    let mut response = Response::new(Full::new(Bytes::new()));
    match json {
        Ok(json) => *response.body_mut() = Full::new(json.into()),
        Err(_) => *response.status_mut() = hyper::StatusCode::UNPROCESSABLE_ENTITY,
    }
    response
        .headers_mut()
        .insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
    Ok(response)
}
