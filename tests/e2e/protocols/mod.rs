//! The Open Inference Protocol as its clients speak it, over HTTP and gRPC: the same answers as on every other path, whoever asks and however.

mod calls;
mod malformed;
mod rest;
mod with_kserve;
mod with_mlserver;
mod with_python;
