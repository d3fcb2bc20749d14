//! What the journal promises: what was accepted is there again, once, as it stood; and what can't be trusted is said.

use std::{
    fs,
    path::Path,
    sync::{Arc, mpsc},
    time::Duration,
};

use bytes::Bytes;
use tempfile::tempdir;

use crate::{
    AcceptError, Accepted, Delivery, Filter, Finish, Journal, NewJob, Once, OpenError, OpenJob, Retention,
    Retry, State, set_aside,
};

const KEEP: Retention = Retention { time: Duration::from_secs(3600), bytes_max: 1 << 30 };

fn open(folder: &Path, retention: Retention) -> (Journal, Vec<OpenJob>) {
    Journal::open(folder, retention, Box::new(|_| ())).unwrap()
}

fn job(journal: &Journal, envelope: &str) -> NewJob {
    NewJob {
        id: journal.next_id(),
        model: "echo".into(),
        key: None,
        envelope: Bytes::copy_from_slice(envelope.as_bytes()),
        accepted: 1,
        deadline: None,
        trace: None,
        once: None,
    }
}

fn accept(journal: &Journal, job: NewJob) -> Result<Accepted, AcceptError> {
    let (done, answer) = mpsc::sync_channel(1);
    journal.accept(job, move |accepted| done.send(accepted).unwrap());
    answer.recv().unwrap()
}

fn finish(journal: &Journal, id: crate::JobId, queue: Option<&str>) {
    let (done, answer) = mpsc::sync_channel(1);
    let finish = Finish {
        id,
        state: State::Succeeded,
        attempts: 1,
        started: Some(2),
        finished: 3,
        result: Some(Bytes::from_static(b"{\"a\":1}")),
        error: None,
        queue: queue.map(ToOwned::to_owned),
    };
    journal.finish(finish, move || done.send(()).unwrap());
    answer.recv().unwrap();
}

#[test]
fn what_was_accepted_is_there_again_as_it_stood() {
    let folder = tempdir().unwrap();
    let (journal, found) = open(folder.path(), KEEP);
    assert!(found.is_empty());
    let jobs: Vec<NewJob> = (0..4).map(|number| job(&journal, &format!("{{\"n\":{number}}}"))).collect();
    let ids: Vec<_> = jobs.iter().map(|job| job.id).collect();
    for job in jobs {
        assert_eq!(accept(&journal, job), Ok(Accepted::New));
    }
    finish(&journal, ids[1], None);
    finish(&journal, ids[2], Some("results"));
    journal.retry(Retry { id: ids[3], attempts: 1, started: Some(5), next: 99, error: "no luck".into() });
    drop(journal);

    let (journal, found) = open(folder.path(), KEEP);
    let states: Vec<_> = found.iter().map(|job| (job.id, job.state, job.attempts)).collect();
    assert_eq!(
        states,
        [(ids[0], State::Queued, 0), (ids[2], State::Succeeded, 1), (ids[3], State::Queued, 1)]
    );
    assert_eq!((found[1].queue.as_deref(), found[2].next), (Some("results"), Some(99)));
    assert_eq!(journal.envelope(ids[0]).unwrap().unwrap(), "{\"n\":0}");
    assert_eq!(journal.result(ids[2]).unwrap().unwrap(), "{\"a\":1}");
    let done = journal.job(ids[1]).unwrap().unwrap();
    assert_eq!((done.state, done.delivery, done.started), (State::Succeeded, Delivery::None, Some(2)));
    assert_eq!(journal.job(ids[3]).unwrap().unwrap().error.as_deref(), Some("no luck"));
    assert!(journal.next_id() > ids[3]);

    // Delivered, it is done with; delivered again, it is open again.
    journal.delivered(ids[2]);
    let (done, again) = mpsc::sync_channel(1);
    journal.redeliver(ids[2], move |job| done.send(job).unwrap());
    assert_eq!(again.recv().unwrap().unwrap().id, ids[2]);
    journal.dead(ids[2], "too old".into());
    let (done, again) = mpsc::sync_channel(1);
    journal.redeliver(ids[0], move |job| done.send(job).unwrap());
    assert!(again.recv().unwrap().is_none(), "it has no message");
    let dead = journal.job(ids[2]).unwrap().unwrap();
    assert_eq!((dead.delivery, dead.delivery_error.as_deref()), (Delivery::Dead, Some("too old")));
}

#[test]
fn a_name_gives_the_same_job_and_refuses_another_body() {
    let folder = tempdir().unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    let once = |digest: u8| Some(Once { name: "k".into(), digest: [digest; 32] });
    let first = NewJob { once: once(1), ..job(&journal, "{}") };
    let id = first.id;
    assert_eq!(accept(&journal, first), Ok(Accepted::New));
    assert_eq!(accept(&journal, NewJob { once: once(1), ..job(&journal, "{}") }), Ok(Accepted::Known(id)));
    assert_eq!(
        accept(&journal, NewJob { once: once(2), ..job(&journal, "{}") }),
        Err(AcceptError::Conflict(id))
    );
    drop(journal);
    let (journal, _) = open(folder.path(), KEEP);
    assert_eq!(accept(&journal, NewJob { once: once(1), ..job(&journal, "{}") }), Ok(Accepted::Known(id)));
}

#[test]
fn a_job_that_was_running_when_its_host_died_counts_an_attempt_once() {
    let folder = tempdir().unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    let jobs: Vec<NewJob> = (0..3).map(|_| job(&journal, "{}")).collect();
    let ids: Vec<_> = jobs.iter().map(|job| job.id).collect();
    for job in jobs {
        accept(&journal, job).unwrap();
    }
    // The first is being run, the second waits for its turn, the third was run and recorded.
    let slots: Vec<_> = ids.iter().map(|id| journal.ledger().slot(*id, 1)).collect();
    slots[0].begins();
    slots[2].begins();
    journal.retry(Retry { id: ids[2], attempts: 1, started: None, next: 0, error: String::new() });
    drop((slots, journal));
    for _ in 0..2 {
        let (_journal, found) = open(folder.path(), KEEP);
        assert_eq!(found.iter().map(|job| job.attempts).collect::<Vec<_>>(), [1, 0, 1]);
    }
}

#[test]
fn what_is_done_with_is_forgotten_by_age_and_by_size_and_what_is_not_is_kept() {
    let folder = tempdir().unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    let body = format!("{{\"x\":\"{}\"}}", "y".repeat(4000));
    let waits = job(&journal, &body);
    let waiting = waits.id;
    accept(&journal, waits).unwrap();
    for _ in 0..600 {
        let job = job(&journal, &body);
        let id = job.id;
        accept(&journal, job).unwrap();
        finish(&journal, id, None);
    }
    let count =
        |journal: &Journal| journal.list(&Filter { limit: 5000, ..Filter::default() }).unwrap().jobs.len();
    assert_eq!(count(&journal), 601);
    journal.set_retention(Retention { time: Duration::ZERO, ..KEEP });
    wait_until(|| count(&journal) == 1);
    assert!(journal.job(waiting).unwrap().is_some());

    // Where finished jobs take all the room, they make room for new ones, of which none is refused.
    journal.set_retention(Retention { bytes_max: 1 << 20, ..KEEP });
    for _ in 0..2000 {
        let job = job(&journal, &body);
        let id = job.id;
        accept(&journal, job).unwrap();
        finish(&journal, id, None);
    }
    let kept = count(&journal);
    assert!((100..2000).contains(&kept), "{kept} of 2000 are kept in a mebibyte");

    // Envelopes of jobs that wait fill it; nothing more is taken until there is room.
    journal.set_retention(Retention { bytes_max: 400 << 10, ..KEEP });
    let mut refused = false;
    for _ in 0..300 {
        match accept(&journal, job(&journal, &body)) {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error, AcceptError::Full);
                refused = true;
            }
        }
    }
    assert!(refused);
    let queued = Filter { limit: 5000, state: Some(State::Queued), ..Filter::default() };
    for job in journal.list(&queued).unwrap().jobs {
        finish(&journal, job.id, None);
    }
    wait_until(|| accept(&journal, job(&journal, &body)).is_ok());
}

#[test]
fn what_is_refused_has_failed_at_once_and_what_is_taken_back_stays_so() {
    let folder = tempdir().unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    let (refused, running) = (job(&journal, "no JSON"), job(&journal, "{}"));
    let (id, other) = (refused.id, running.id);
    let finish = Finish {
        id,
        state: State::Failed,
        attempts: 0,
        started: None,
        finished: 3,
        result: Some(Bytes::from_static(b"{}")),
        error: Some("no request".into()),
        queue: Some("dead".into()),
    };
    let (done, answer) = mpsc::sync_channel(1);
    journal.refuse(refused, finish, move |accepted| done.send(accepted).unwrap());
    assert_eq!(answer.recv().unwrap(), Ok(Accepted::New));
    accept(&journal, running).unwrap();
    let (done, answer) = mpsc::sync_channel(1);
    journal.cancel(other, move || done.send(()).unwrap());
    answer.recv().unwrap();
    drop(journal);
    let (_journal, found) = open(folder.path(), KEEP);
    let found: Vec<_> =
        found.iter().map(|job| (job.id, job.state, job.cancelled, job.queue.clone())).collect();
    assert_eq!(found, [(id, State::Failed, false, Some("dead".into())), (other, State::Queued, true, None)]);
}

#[test]
fn damage_behind_a_whole_beginning_is_found() {
    let folder = tempdir().unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    for _ in 0..200 {
        let job = job(&journal, &format!("{{\"x\":\"{}\"}}", "y".repeat(900)));
        let id = job.id;
        accept(&journal, job).unwrap();
        finish(&journal, id, None);
    }
    assert_eq!(journal.damage().unwrap(), None);
    drop(journal);
    let file = folder.path().join("jobs.sqlite");
    let mut bytes = fs::read(&file).unwrap();
    let from = bytes.len() / 2;
    bytes[from..from + 8192].fill(9);
    fs::write(&file, &bytes).unwrap();
    let found = Journal::open(folder.path(), KEEP, Box::new(|_| ()));
    let damaged = match &found {
        Ok((journal, _)) => journal.damage().unwrap().is_some(),
        Err(error) => matches!(error, OpenError::Damaged { .. }),
    };
    assert!(damaged);
}

#[test]
fn lists_are_filtered_and_go_on_where_they_stopped() {
    let folder = tempdir().unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    let mut ids = Vec::new();
    for number in 0..10 {
        let model: Arc<str> = if number % 2 == 0 { "even".into() } else { "odd".into() };
        let job = NewJob { model, key: Some("k".into()), ..job(&journal, "{}") };
        ids.push(job.id);
        accept(&journal, job).unwrap();
    }
    let even = Filter { model: Some("even".into()), limit: 2, ..Filter::default() };
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = journal.list(&Filter { after, ..even.clone() }).unwrap();
        found.extend(page.jobs.iter().map(|job| job.id));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(found, [ids[8], ids[6], ids[4], ids[2], ids[0]]);
    let of_none = Filter { key: Some(None), limit: 5, ..Filter::default() };
    assert!(journal.list(&of_none).unwrap().jobs.is_empty());
}

#[test]
fn a_folder_has_one_host_and_a_damaged_journal_is_kept() {
    let folder = tempdir().unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    let accepted = job(&journal, "{}");
    accept(&journal, accepted).unwrap();
    let second = Journal::open(folder.path(), KEEP, Box::new(|_| ())).err().unwrap();
    assert!(matches!(second, OpenError::InUse(_)), "{second}");
    drop(journal);

    let file = folder.path().join("jobs.sqlite");
    let mut bytes = fs::read(&file).unwrap();
    let half = bytes.len() / 2;
    bytes[..100].fill(7);
    bytes[half..].fill(9);
    fs::write(&file, &bytes).unwrap();
    for _ in 0..2 {
        let error = Journal::open(folder.path(), KEEP, Box::new(|_| ())).err().unwrap();
        assert!(matches!(&error, OpenError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("jobs.sqlite"), "{error}");
    }
    // One that was cut short is no new one.
    for cut in [1, 40, 99] {
        fs::write(&file, &b"SQLite format 4 and what else there may be in such a file, or in one that was cut off at some point"[..cut]).unwrap();
        assert!(matches!(
            Journal::open(folder.path(), KEEP, Box::new(|_| ())),
            Err(OpenError::Damaged { .. })
        ));
    }
    fs::write(&file, &bytes).unwrap();
    let aside = set_aside(folder.path()).unwrap();
    assert_eq!(fs::read(&aside).unwrap(), bytes);
    let (_journal, found) = open(folder.path(), KEEP);
    assert!(found.is_empty());
}

fn wait_until(mut holds: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("waited in vain");
}
