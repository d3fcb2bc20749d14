//! How many replicas a model should have. Pure: what was observed goes in, one step comes out.

use std::time::Duration;

use crate::config::Replicas;

/// A whole batch must have waited this long, with no lane free, before another replica is started.
pub(super) const SCALE_UP_AFTER: Duration = Duration::from_millis(200);

/// What the fleet sees.
#[derive(Clone, Copy, Debug)]
pub(super) struct Observed {
    /// Replicas that serve.
    pub(super) live: usize,
    /// Replicas that are loading.
    pub(super) starting: usize,
    /// Threads that overran their time and haven't come back.
    pub(super) stuck: usize,
    /// Jobs that wait.
    pub(super) queued: usize,
    /// How long at least a whole batch has waited while no lane was free.
    pub(super) short_for: Duration,
    /// How long a whole replica's lanes have been free.
    pub(super) spare_for: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Start,
    Retire,
    Stay,
}

/// One step towards the wanted number; the fleet asks again after each.
pub(super) fn next(limits: &Replicas, observed: &Observed) -> Step {
    let coming = observed.live + observed.starting;
    // Threads that hang hold their memory and device: beyond this many, replacing them only spreads the damage.
    if observed.stuck > limits.stuck_max {
        return Step::Stay;
    }
    let wakes = coming == 0 && observed.queued > 0;
    let grows = observed.starting == 0 && coming < limits.max && observed.short_for >= SCALE_UP_AFTER;
    if coming < limits.min || wakes || grows {
        return Step::Start;
    }
    // The limit itself may have been lowered.
    if observed.live > limits.max.max(1) {
        return Step::Retire;
    }
    if observed.live > limits.min && observed.queued == 0 && observed.spare_for >= limits.idle_timeout {
        return Step::Retire;
    }
    Step::Stay
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Replicas = Replicas {
        min: 1,
        max: 3,
        spare: 0,
        batches_in_flight: 1,
        idle_timeout: Duration::from_secs(10),
        batch_timeout: Duration::from_secs(1),
        stream_wait: Duration::from_secs(10),
        stuck_max: 2,
        load_timeout: Duration::from_secs(1),
    };
    const SEEN: Observed = Observed {
        live: 1,
        starting: 0,
        stuck: 0,
        queued: 0,
        short_for: Duration::ZERO,
        spare_for: Duration::ZERO,
    };

    #[test]
    fn it_grows_under_a_backlog_one_at_a_time_up_to_the_limit() {
        let short = Observed { queued: 9, short_for: SCALE_UP_AFTER, ..SEEN };
        assert_eq!(next(&LIMITS, &short), Step::Start);
        assert_eq!(next(&LIMITS, &Observed { starting: 1, ..short }), Step::Stay);
        assert_eq!(next(&LIMITS, &Observed { live: 3, ..short }), Step::Stay);
        assert_eq!(next(&LIMITS, &Observed { short_for: Duration::ZERO, ..short }), Step::Stay);
    }

    #[test]
    fn it_shrinks_to_the_minimum_when_a_replica_has_been_spare_for_long() {
        let spare = Observed { live: 2, spare_for: Duration::from_secs(10), ..SEEN };
        assert_eq!(next(&LIMITS, &spare), Step::Retire);
        assert_eq!(next(&LIMITS, &Observed { live: 1, ..spare }), Step::Stay);
        assert_eq!(next(&LIMITS, &Observed { queued: 1, ..spare }), Step::Stay);
    }

    #[test]
    fn a_lowered_limit_is_kept_also_under_load() {
        let many = Observed { live: 4, queued: 9, ..SEEN };
        assert_eq!(next(&LIMITS, &many), Step::Retire);
        assert_eq!(next(&LIMITS, &Observed { live: 3, ..many }), Step::Stay);
    }

    #[test]
    fn a_minimum_of_zero_sleeps_and_wakes_with_the_first_job() {
        let limits = Replicas { min: 0, ..LIMITS };
        let spare = Observed { spare_for: Duration::from_secs(10), ..SEEN };
        assert_eq!(next(&limits, &spare), Step::Retire);
        assert_eq!(next(&limits, &Observed { live: 0, ..SEEN }), Step::Stay);
        assert_eq!(next(&limits, &Observed { live: 0, queued: 1, ..SEEN }), Step::Start);
    }

    #[test]
    fn a_lost_replica_is_replaced_until_too_many_hang() {
        assert_eq!(next(&LIMITS, &Observed { live: 0, stuck: 2, ..SEEN }), Step::Start);
        assert_eq!(next(&LIMITS, &Observed { live: 0, stuck: 3, queued: 5, ..SEEN }), Step::Stay);
    }
}
