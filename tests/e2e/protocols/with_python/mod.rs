//! Clients in Python, and pipelines in it.

mod coding;
mod grpc;
mod pipelines;
