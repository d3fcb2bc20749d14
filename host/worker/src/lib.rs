//! The engine of worker processes: each instance of an isolated plugin is loaded in a supervised process of its own, of this same program, so
//! that what crashes there harms no other model. A folder of Python always is: its process becomes the user's interpreter, which runs `python/`. It owns the processes, what is said to them and how they are confined; plugins it knows by
//! the engine that opens them, on either side. It never knows models, batches in a queue, or HTTP.
//!
//! In the host, in the order in which a plugin meets them: `engine`, `plugin` (what it says of itself, its loads), `python` (which interpreter), `start` (a process and its
//! connections), `instance` (batches), with `supervisor` and `life` beside them. In the worker: `child`. Between them: `channel`, `frame`,
//! `items`, `documents`, `lines`.

mod cgroup;
mod channel;
pub mod child;
mod documents;
mod engine;
mod frame;
mod instance;
mod items;
mod life;
mod lines;
mod plugin;
mod python;
mod start;
mod supervisor;

pub use engine::Workers;
pub use start::Program;
