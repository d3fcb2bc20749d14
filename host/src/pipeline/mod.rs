//! Served models: a generation (a loaded plugin with a model's settings), its replicas (instances with threads that run
//! stages) and the fleet that keeps as many of them as are wanted. It never knows HTTP, nor where a plugin came from.

mod batch_run;
mod batch_stats;
mod command;
mod fleet;
mod generation;
mod golden;
mod inference_stats;
mod input_faults;
mod lane;
mod lost_device;
mod model;
mod queue;
mod replica;
mod scale;
mod settings;
mod stages;
mod walk;

pub use batch_stats::StatsSnapshot;
pub use command::{Leases, VolumeChange};
pub use fleet::{Fleet, Progress, examine};
pub use generation::{Generation, SharedInstance};
pub use golden::{Golden, GoldenError};
pub use inference_stats::{InferenceTotals, Total};
pub use input_faults::malformed;
pub use model::{Model, Status, StatusWriter};
pub use queue::{BatchEnd, LaneId, LaneState, Queue, QueueLoad, Queued, Taken, too_many};
pub use settings::check_settings;
