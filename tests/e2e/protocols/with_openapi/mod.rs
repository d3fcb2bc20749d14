//! What this host says of itself, as tools read it that know nothing else, and OpenAI's shapes, as its client reads them.

mod document;
mod openai;
