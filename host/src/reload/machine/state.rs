//! What serves and what is on its way to: the two states of a machine. They own fleets and candidates, and never decide what follows.

use std::{sync::Arc, time::Instant};

use modalkit_device::Reservation;

use super::{candidate::Candidate, hooks::Changes};
use crate::pipeline::{Fleet, Generation, Progress};

/// What is on its way to serve. Each step of it takes the value of the step before and gives the next one's.
pub(super) enum State {
    /// Nothing.
    Idle,
    /// A file is copied, tried in a process of its own and opened.
    Building(Candidate),
    /// Replicas load and warm up; they take no work.
    Loading(Candidate, Fleet),
    /// One of them is asked golden requests.
    Golden(Candidate, Fleet),
}

/// What serves.
pub(super) enum Serving {
    Nothing,
    /// It has stopped, so that the next one gets its devices; callers wait. It is loaded again where the next one fails.
    Stopped(Stopped),
    Alone(Fleet),
    /// It serves, and the one before is on standby until it has passed.
    OnProbation {
        fleet: Fleet,
        standby: Standby,
    },
}

/// A generation without replicas, and what is needed to bring it back.
pub(super) struct Stopped {
    pub(super) generation: Arc<Generation>,
    pub(super) replicas: usize,
    /// Its devices are this model's until something serves on them again.
    pub(super) _reservation: Reservation,
}

/// The generation before, loaded, its lanes paused.
pub(super) struct Standby {
    pub(super) fleet: Fleet,
    /// The record of the swap, in the history.
    pub(super) record: u64,
    pub(super) until: Instant,
    /// What it was not told of.
    pub(super) missed: Changes,
}

impl State {
    /// Whether nothing is under way but what may go on for ever: a first generation that is tried again and again, or a wait for a device.
    pub(super) fn is_settled(&self) -> bool {
        match self {
            Self::Idle => true,
            Self::Loading(candidate, _) => match candidate.seen {
                // For a lease that may never end.
                Progress::Failed(_) | Progress::Waits(_) => true,
                Progress::Loading | Progress::Loaded => false,
            },
            Self::Building(_) | Self::Golden(..) => false,
        }
    }
}

impl Serving {
    /// The fleet that takes the jobs.
    pub(super) fn fleet(&self) -> Option<&Fleet> {
        match self {
            Self::Nothing | Self::Stopped(_) => None,
            Self::Alone(fleet) | Self::OnProbation { fleet, .. } => Some(fleet),
        }
    }

    /// What serves, or has stopped for the next one.
    pub(super) fn generation(&self) -> Option<&Arc<Generation>> {
        match self {
            Self::Stopped(stopped) => Some(&stopped.generation),
            other => other.fleet().map(|fleet| &fleet.generation),
        }
    }
}
