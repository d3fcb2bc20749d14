//! The shapes of OpenAI's API: requests for embeddings and texts as inputs of a pipeline, and its outputs and chunks as their answers. It knows
//! neither sockets nor models' insides.
//!
//! An input is the request itself, with one of its texts where the request has a list, and without what is said to the server alone (`model`, `n`,
//! `stream`, `stream_options`, `encoding_format`) or left empty (`null`). An output has `embedding`, `text` or `message`; the two files below say
//! what else it may have.
//!
//! <https://platform.openai.com/docs/api-reference>

mod answer;
mod chunks;
mod problem;
mod request;

pub use answer::{AnswerHead, write_embeddings, write_texts};
pub use chunks::{DONE, TextChunks};
pub use problem::problem;
pub use request::{AnswerForm, Request};
