//! Protocols as their clients speak them: the same answers as on every other path, whoever asks and however.

mod calls;
mod malformed;
mod openapi;
mod rest;
mod with_browser;
mod with_kserve;
mod with_mlserver;
mod with_openapi;
mod with_python;
