//! How long an incomplete batch is worth waiting for, learned from when jobs come after a batch has ended, and from how long batches take. It owns what was
//! seen, and never knows the queue.
//!
//! Callers that send again once they are answered come back in a burst after a batch's end. A batch that is taken before they are back leaves them for the
//! next one: two half-full batches take turns then. One that waits for them when they don't come costs everybody that time. So what is learned is how many
//! jobs come, for each of the batch that ended, within which time of its end; and a batch of `k` jobs that takes the time `S` waits a time `w` for `r` more
//! where that gives clearly more jobs in the time: `r / w` more than [`GAIN`] times `k / S`. A caller alone never waits: nobody else is expected. Of arrivals
//! that have nothing to do with batches' ends, `r / w` is about `k / S`, and nothing waits either.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// How many times as many jobs a second waiting must give as running.
const GAIN: f64 = 2.0;
/// Fewer jobs than this are a chance that is not waited for.
const LEAST: f64 = 0.5;
/// The part that the latest batch has in what is known: the last ten or so count.
const NEWEST: f64 = 0.125;
/// Seconds from a batch's end to the end of the first span; each further one ends later by this factor.
const FIRST_SPAN: f64 = 16e-6;
const FACTOR: f64 = 1.189_207_115_002_721;
/// The last one ends after some nine minutes.
const SPANS: usize = 101;

/// Batches whose time counts: the median of the last few, so that one that was slow changes nothing.
const BATCHES_TIMED: usize = 9;
/// The part of what is known of a time after a batch's end that is forgotten where the next one ended before it.
const FORGOTTEN: f64 = 1.0 / 64.0;

/// What was seen of one model.
#[derive(Debug)]
pub(crate) struct Learned {
    /// Seconds that the last batches took, the newest last.
    times: VecDeque<f64>,
    /// Their median; 0 where none has ended yet.
    service: f64,
    /// Jobs that come within each span after a batch's end, for each job of that batch.
    returns: [f64; SPANS],
    last: Option<Ended>,
}

/// The batch that ended last, and jobs that have come since.
#[derive(Debug)]
struct Ended {
    at: Instant,
    jobs: f64,
    came: [f64; SPANS],
}

impl Learned {
    pub(crate) fn new() -> Self {
        Self {
            times: VecDeque::with_capacity(BATCHES_TIMED),
            service: 0.0,
            returns: [0.0; SPANS],
            last: None,
        }
    }

    /// A batch of so many jobs has ended, and took so long.
    pub(crate) fn batch_ended(&mut self, at: Instant, jobs: usize, took: Duration) {
        self.note_time(took.as_secs_f64());
        let ended = Ended { at, jobs: jobs.max(1) as f64, came: [0.0; SPANS] };
        let Some(last) = self.last.replace(ended) else { return };
        let passed = at.saturating_duration_since(last.at).as_secs_f64();
        // Whoever is answered comes back once: what is more has to do with other things.
        let mut left = last.jobs;
        for (span, end) in spans_from(0) {
            let known = &mut self.returns[span];
            if end > passed {
                // Of later spans nothing was seen.
                *known *= 1.0 - FORGOTTEN;
                continue;
            }
            let came = last.came[span].min(left);
            left -= came;
            *known += NEWEST * (came / last.jobs - *known);
        }
    }

    fn note_time(&mut self, seconds: f64) {
        if self.times.len() == BATCHES_TIMED {
            self.times.pop_front();
        }
        self.times.push_back(seconds);
        let mut sorted = [0.0; BATCHES_TIMED];
        let sorted = &mut sorted[..self.times.len()];
        sorted.iter_mut().zip(&self.times).for_each(|(place, seconds)| *place = *seconds);
        sorted.sort_by(f64::total_cmp);
        self.service = sorted[sorted.len() / 2];
    }

    /// So many jobs have come.
    pub(crate) fn came(&mut self, at: Instant, jobs: usize) {
        let Some(last) = &mut self.last else { return };
        if let Some(came) = last.came.get_mut(span_of(at.saturating_duration_since(last.at).as_secs_f64())) {
            *came += jobs as f64;
        }
    }

    /// Until when a batch of so many jobs, which has room for so many more and of whose kind this part of all jobs is, waits; `None` where it doesn't.
    pub(crate) fn waits_until(&self, now: Instant, jobs: usize, room: usize, part: f64) -> Option<Instant> {
        let last = self.last.as_ref()?;
        let passed = now.saturating_duration_since(last.at).as_secs_f64();
        // Nobody waits for those who come later than that.
        let in_time = || spans_from(0).take_while(|(_, end)| *end <= self.service).map(|(span, _)| span);
        let expected: f64 = in_time().map(|span| self.returns[span]).sum::<f64>() * last.jobs;
        let came: f64 = in_time().map(|span| last.came[span]).sum();
        let most = ((expected - came) * part).min(room as f64);
        let rate = jobs as f64 / self.service;
        let (mut more, mut best) = (0.0, None);
        // A batch waits no longer than it takes.
        for (span, end) in spans_from(span_of(passed)).take_while(|(_, end)| *end <= self.service) {
            more += (self.returns[span] * last.jobs - last.came[span]).max(0.0) * part;
            let (more, wait) = (f64::min(more, most), end - passed);
            let gives = (jobs as f64 + more) / (self.service + wait);
            if more >= LEAST && more > GAIN * rate * wait && best.is_none_or(|(most, _)| gives > most) {
                best = Some((gives, end));
            }
        }
        let until = last.at + Duration::from_secs_f64(best?.1);
        Some(until).filter(|until| *until > now)
    }

    /// How long a batch takes.
    pub(crate) fn service(&self) -> Duration {
        Duration::from_secs_f64(self.service)
    }
}

/// The span in which something comes so many seconds after a batch's end.
fn span_of(seconds: f64) -> usize {
    // A negative number is 0 then.
    ((seconds / FIRST_SPAN).log(FACTOR) + 1.0) as usize
}

/// The spans from one on, each with the seconds to its end.
fn spans_from(first: usize) -> impl Iterator<Item = (usize, f64)> {
    let ends = std::iter::successors(Some(FIRST_SPAN * FACTOR.powi(first as i32)), |end| Some(end * FACTOR));
    (first..SPANS).zip(ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: Duration = Duration::from_millis(5);

    fn us(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    /// Batches of so many, whose callers come back at these times after their end.
    fn learned(batches: usize, jobs: usize, returns: &[u64], now: &mut Instant) -> Learned {
        let mut learned = Learned::new();
        for _ in 0..batches {
            learned.batch_ended(*now, jobs, SERVICE);
            returns.iter().for_each(|micros| learned.came(*now + us(*micros), 1));
            *now += SERVICE;
        }
        learned.batch_ended(*now, jobs, SERVICE);
        learned
    }

    #[test]
    fn spans_follow_each_other() {
        assert_eq!((span_of(0.0), span_of(15e-6), span_of(17e-6)), (0, 0, 1));
        assert!(span_of(1e9) >= SPANS);
        for (span, end) in spans_from(0) {
            assert_eq!((span_of(end * 0.999), span_of(end * 1.001)), (span, span + 1));
        }
        assert!(spans_from(0).last().unwrap().1 > 500.0);
    }

    #[test]
    fn a_caller_alone_waits_for_nobody() {
        let mut now = Instant::now();
        // It takes now less, now more time to come back.
        for returns in [&[100][..], &[30], &[500]] {
            let mut learned = learned(20, 1, returns, &mut now);
            for micros in [20, 90, 130, 400, 700, 3_000] {
                learned.batch_ended(now, 1, SERVICE);
                learned.came(now + us(micros), 1);
                assert_eq!(learned.waits_until(now + us(micros), 1, 31, 1.0), None, "{returns:?}, {micros}");
                now += SERVICE;
            }
        }
    }

    #[test]
    fn a_caller_alone_waits_for_nobody_whatever_else_happens() {
        let mut now = Instant::now();
        let mut learned = learned(20, 1, &[100], &mut now);
        for round in 0..200 {
            // Now and then somebody sends a hundred at once, and a batch is slow.
            if round % 7 == 0 {
                learned.came(now + us(3_000), 100);
            }
            now += SERVICE;
            learned.batch_ended(
                now,
                if round % 7 == 0 { 100 } else { 1 },
                if round % 50 == 0 { 2_000 * SERVICE } else { SERVICE },
            );
            now += SERVICE;
            learned.batch_ended(now, 1, SERVICE);
            learned.came(now + us(100), 1);
            assert_eq!(learned.waits_until(now + us(100), 1, 31, 1.0), None, "round {round}");
        }
    }

    #[test]
    fn callers_that_think_for_a_while_and_then_do_not_are_not_waited_for_twice() {
        let mut now = Instant::now();
        let mut learned = Learned::new();
        for (returns, batches) in [(50_000, 30), (500, 300)] {
            for _ in 0..batches {
                learned.batch_ended(now, 1, SERVICE);
                let back = now + us(returns);
                learned.came(back, 1);
                now = back + SERVICE;
            }
        }
        learned.batch_ended(now, 1, SERVICE);
        learned.came(now + us(500), 1);
        assert_eq!(learned.waits_until(now + us(500), 1, 31, 1.0), None);
    }

    #[test]
    fn a_batch_waits_for_those_who_come_back_and_no_longer() {
        let mut now = Instant::now();
        let returns: Vec<u64> = (0..16).map(|caller| 100 + 20 * caller).collect();
        let mut learned = learned(20, 16, &returns, &mut now);
        // The other half waits already.
        let until = learned.waits_until(now, 16, 16, 1.0).unwrap();
        assert!(until > now + us(400) && until < now + us(1_500), "{:?}", until - now);
        for (came, micros) in returns.iter().enumerate() {
            learned.came(now + us(*micros), 1);
            let until = learned.waits_until(now + us(*micros), 17 + came, 100, 1.0);
            match came {
                0..8 => assert!(until.is_some(), "after {} of 16", came + 1),
                15 => assert_eq!(until, None),
                // The last few aren't worth it for all the others.
                _ => {}
            }
        }
        // Where they don't come.
        learned.batch_ended(now, 16, SERVICE);
        assert_eq!(learned.waits_until(now + us(1_500), 16, 16, 1.0), None);
        assert_eq!(learned.waits_until(now, 16, 0, 1.0), None, "there is no room");
        assert_eq!(learned.waits_until(now, 16, 16, 0.1), None, "nearly all of them are of another kind");
    }

    #[test]
    fn arrivals_that_have_nothing_to_do_with_batches_are_not_waited_for() {
        const BATCHES: u32 = 1_000;
        let (mut now, mut learned, mut random) = (Instant::now(), Learned::new(), 1_u64);
        let mut waited = Duration::ZERO;
        for _ in 0..BATCHES {
            learned.batch_ended(now, 4, SERVICE);
            waited += learned.waits_until(now, 4, 28, 1.0).map_or(Duration::ZERO, |until| until - now);
            // Any of the next microseconds, by a generator of Knuth's.
            for _ in 0..4 {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                learned.came(now + us((random >> 33) % 5_000), 1);
            }
            now += SERVICE;
        }
        assert!(waited / BATCHES < SERVICE / 20, "{:?}", waited / BATCHES);
    }

    #[test]
    fn nothing_waits_longer_than_a_batch_takes_or_before_one_has_ended() {
        let mut now = Instant::now();
        let mut learned = Learned::new();
        for _ in 0..20 {
            learned.batch_ended(now, 8, SERVICE);
            learned.came(now + us(7_000), 8);
            now += us(10_000);
        }
        learned.batch_ended(now, 8, SERVICE);
        assert_eq!(learned.waits_until(now, 1, 31, 1.0), None);
        assert_eq!(Learned::new().waits_until(now, 1, 31, 1.0), None);
    }
}
