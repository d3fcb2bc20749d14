//! What the journal promises: what was accepted is there again, once, as it stood; and what can't be trusted is said.

use std::{
    fs,
    num::NonZeroU32,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    sync::{Arc, mpsc},
    time::Duration,
};

use bytes::Bytes;
use tempfile::tempdir;

use crate::{
    AcceptError, Accepted, Delivery, Filter, Finish, FolderLock, HostDeath, IdempotencyKey, Journal, NewJob,
    OpenError, OpenJob, Retention, Retry, State, Suspicion, set_aside,
};

const HOUR: Duration = Duration::from_secs(3600);
const KEEP: Retention = Retention { time: HOUR, bytes_max: 1 << 30, names: HOUR };
const UNKNOWN: HostDeath = HostDeath::Killed { memory_was_short: true };

fn open(folder: &Path, retention: Retention) -> (Journal, Vec<OpenJob>) {
    try_open(folder, retention).unwrap()
}

fn try_open(folder: &Path, retention: Retention) -> Result<(Journal, Vec<OpenJob>), OpenError> {
    Journal::open(FolderLock::take(folder)?, &UNKNOWN, retention, Box::new(|_| ()))
}

fn open_after(death: &HostDeath, folder: &Path) -> (Journal, Vec<OpenJob>) {
    Journal::open(FolderLock::take(folder).unwrap(), death, KEEP, Box::new(|_| ())).unwrap()
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
        idempotency: None,
        from_queue: false,
    }
}

fn accept(journal: &Journal, job: NewJob) -> Result<Accepted, AcceptError> {
    let (done, answer) = mpsc::sync_channel(1);
    journal.accept(job, move |accepted| done.send(accepted).unwrap());
    answer.recv().unwrap()
}

fn finish(journal: &Journal, id: crate::JobId, queue: Option<&str>) {
    let (done, answer) = mpsc::sync_channel(1);
    let finish = succeeded(journal, id, b"{\"a\":1}", queue);
    journal.finish(finish, move |written| done.send(written).unwrap());
    assert_eq!(answer.recv().unwrap(), Ok(()));
}

fn succeeded(journal: &Journal, id: crate::JobId, result: &'static [u8], queue: Option<&str>) -> Finish {
    Finish {
        id,
        state: State::Succeeded,
        attempts: 1,
        started: Some(2),
        finished: 3,
        result: Some(Bytes::from_static(result)),
        error: None,
        queue: queue.map(ToOwned::to_owned),
        since: journal.clock().now(),
    }
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
    journal.delivered(ids[2], || ());
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
    let idempotency = |digest: u8| Some(IdempotencyKey { name: "k".into(), digest: [digest; 32] });
    let first = NewJob { idempotency: idempotency(1), ..job(&journal, "{}") };
    let id = first.id;
    assert_eq!(accept(&journal, first), Ok(Accepted::New));
    assert_eq!(
        accept(&journal, NewJob { idempotency: idempotency(1), ..job(&journal, "{}") }),
        Ok(Accepted::Known(id))
    );
    assert_eq!(
        accept(&journal, NewJob { idempotency: idempotency(2), ..job(&journal, "{}") }),
        Err(AcceptError::Conflict(id))
    );
    drop(journal);
    let (journal, _) = open(folder.path(), KEEP);
    assert_eq!(
        accept(&journal, NewJob { idempotency: idempotency(1), ..job(&journal, "{}") }),
        Ok(Accepted::Known(id))
    );
}

#[test]
fn a_crash_is_counted_for_all_that_ran_and_blamed_on_the_one_that_ran_alone() {
    let folder = tempdir().unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    let jobs: Vec<NewJob> = (0..4).map(|_| job(&journal, "{}")).collect();
    let ids: Vec<_> = jobs.iter().map(|job| job.id).collect();
    for job in jobs {
        accept(&journal, job).unwrap();
    }
    let counts = |found: &[OpenJob]| {
        found.iter().map(|job| (job.attempts, job.crashes, job.crashes_alone)).collect::<Vec<_>>()
    };
    // The first and the last are being run, the second waits for its turn, the third was run and recorded.
    let slots: Vec<_> = ids.iter().map(|id| journal.ledger().slot(*id, 1, false)).collect();
    for index in [0, 2, 3] {
        slots[index].begins();
    }
    journal.retry(Retry { id: ids[2], attempts: 1, started: None, next: 0, error: String::new() });
    drop((slots, journal));
    for _ in 0..2 {
        let (_journal, found) = open(folder.path(), KEEP);
        assert_eq!(counts(&found), [(0, 1, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0)], "no attempt is charged");
    }
    // One dies while it is run alone; one was run alone and has ended; one was joined by others.
    let (journal, _) = open(folder.path(), KEEP);
    let alone = |index: usize, attempt| journal.ledger().slot(ids[index], attempt, true);
    let (dies, ended, joined) = (alone(0, 1), alone(1, 1), alone(3, 1));
    for slot in [&dies, &ended, &joined] {
        slot.begins();
    }
    joined.joined();
    drop(ended);
    // As a killed process leaves its file.
    std::mem::forget((dies, joined));
    drop(journal);
    let (journal, found) = open(folder.path(), KEEP);
    assert_eq!(counts(&found), [(0, 2, 1), (0, 0, 0), (1, 0, 0), (0, 2, 0)]);
    drop(journal);
    // Who is suspected stays so until an attempt has ended, however often a host starts.
    let (journal, found) = open(folder.path(), KEEP);
    let suspects =
        |found: &[OpenJob]| found.iter().map(|job| job.suspicion == Suspicion::Suspected).collect::<Vec<_>>();
    assert_eq!(suspects(&found), [true, false, false, true]);
    journal.retry(Retry { id: ids[3], attempts: 1, started: None, next: 0, error: String::new() });
    drop(journal);
    let (journal, found) = open(folder.path(), KEEP);
    assert_eq!(suspects(&found), [true, false, false, false]);
    assert_eq!(journal.job(ids[0]).unwrap().unwrap().crashes, 2);
}

/// Has a job begin on a thread of its own, whose number comes back, and leaves it there as a host does that dies.
fn begin(journal: &Journal, id: crate::JobId, alone: bool) -> NonZeroU32 {
    let slot = journal.ledger().slot(id, 1, alone);
    let begins = || {
        slot.begins();
        NonZeroU32::new(rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()).unwrap()
    };
    let thread = std::thread::scope(|scope| scope.spawn(begins).join().unwrap());
    std::mem::forget(slot);
    thread
}

#[test]
fn only_what_ran_on_the_thread_that_ended_the_host_is_suspected_and_convicted_where_it_was_alone() {
    let folder = tempdir().unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    let jobs: Vec<NewJob> = (0..2).map(|_| job(&journal, "{}")).collect();
    let (first, second) = (jobs[0].id, jobs[1].id);
    for job in jobs {
        accept(&journal, job).unwrap();
    }
    let again = |journal: Journal, death: &HostDeath| {
        drop(journal);
        let (journal, found) = open_after(death, folder.path());
        let known: Vec<_> = found.iter().map(|job| (job.suspicion, job.crashes, job.crashes_alone)).collect();
        (journal, known)
    };
    let code = |thread| HostDeath::Code { thread, how: "SIGSEGV in predict".to_owned() };
    let innocent = (Suspicion::None, 0, 0);
    let suspected = |crashes, alone| (Suspicion::Suspected, crashes, alone);
    // A machine that stopped, and code on a thread that ran no job, are no job's doing.
    begin(&journal, first, false);
    begin(&journal, second, false);
    let (journal, known) = again(journal, &HostDeath::MachineStopped);
    assert_eq!(known, [innocent; 2]);
    begin(&journal, first, false);
    let other = NonZeroU32::new(begin(&journal, second, false).get() ^ 1 << 30);
    let (journal, known) = again(journal, &code(other));
    assert_eq!(known, [innocent; 2]);
    let thread = begin(&journal, first, false);
    begin(&journal, second, false);
    let (journal, known) = again(journal, &code(Some(thread)));
    assert_eq!(known, [suspected(1, 0), innocent]);
    // Whoever kills from outside adds nothing to what a job fails for.
    begin(&journal, first, true);
    let (journal, known) = again(journal, &HostDeath::Killed { memory_was_short: false });
    assert_eq!(known, [suspected(2, 0), innocent]);
    // Code outside of any call may be anybody's: once is not enough.
    begin(&journal, first, true);
    let (journal, known) = again(journal, &code(None));
    assert_eq!(known, [suspected(3, 1), innocent]);
    let thread = begin(&journal, first, true);
    let (journal, known) = again(journal, &code(Some(thread)));
    assert_eq!(known, [(Suspicion::Convicted, 4, 2), innocent]);
    // On disk, with the reason.
    drop(journal);
    let (_journal, found) = open(folder.path(), KEEP);
    assert_eq!(
        (found[0].suspicion, found[0].error.as_deref()),
        (Suspicion::Convicted, Some("SIGSEGV in predict"))
    );
}

#[test]
fn one_change_that_cannot_be_written_is_told_and_the_others_of_its_group_are_written() {
    let folder = tempdir().unwrap();
    let limit = |store: &crate::store::Store| store.limit_bytes(10_000);
    let (journal, _) = Journal::open_prepared(
        FolderLock::take(folder.path()).unwrap(),
        &UNKNOWN,
        KEEP,
        Box::new(|_| ()),
        limit,
    )
    .unwrap();
    let jobs: Vec<NewJob> = (0..3).map(|_| job(&journal, "{}")).collect();
    let ids: Vec<_> = jobs.iter().map(|job| job.id).collect();
    for job in jobs {
        accept(&journal, job).unwrap();
    }
    // Handed over together: what can't be written stands between others.
    let (done, answers) = mpsc::sync_channel(9);
    let large: &'static [u8] = Box::leak(vec![b'1'; 20_000].into());
    let too_large = job(&journal, &"x".repeat(20_000));
    for (index, result) in [&b"1"[..], large, b"3"].into_iter().enumerate() {
        let done = done.clone();
        journal.finish(succeeded(&journal, ids[index], result, None), move |written| {
            done.send((index, written.is_ok())).unwrap();
        });
    }
    let accepted = done.clone();
    journal.accept(too_large, move |taken| {
        assert!(matches!(taken, Err(AcceptError::Unfit(_))), "{taken:?}");
        accepted.send((3, taken.is_ok())).unwrap();
    });
    let mut told: Vec<(usize, bool)> = answers.iter().take(4).collect();
    told.sort_unstable();
    assert_eq!(told, [(0, true), (1, false), (2, true), (3, false)]);
    assert_eq!(journal.failing(), None);
    let state = |id| journal.job(id).unwrap().unwrap().state;
    assert_eq!(
        [state(ids[0]), state(ids[1]), state(ids[2])],
        [State::Succeeded, State::Queued, State::Succeeded]
    );
    // It ends with less to say, and new jobs are taken.
    finish(&journal, ids[1], None);
    accept(&journal, job(&journal, "{}")).unwrap();
}

#[test]
fn ages_count_from_when_a_job_was_done_with_and_names_outlive_what_is_removed_for_its_size() {
    let folder = tempdir().unwrap();
    let idempotency = Some(IdempotencyKey { name: "k".into(), digest: [1; 32] });
    let (journal, _) = open(folder.path(), KEEP);
    let named = NewJob { idempotency: idempotency.clone(), ..job(&journal, "{}") };
    let id = named.id;
    accept(&journal, named).unwrap();
    let again = |journal: &Journal| {
        accept(journal, NewJob { idempotency: idempotency.clone(), ..job(journal, "{}") })
    };
    // Of a job that isn't done with, the name stays, whatever its age.
    journal.set_retention(Retention { names: Duration::ZERO, ..KEEP });
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(again(&journal), Ok(Accepted::Known(id)));
    // It was accepted and ended long ago by the system's clock (1 and 3 ms after 1970), and is done with only now.
    journal.set_retention(KEEP);
    finish(&journal, id, Some("results"));
    journal.delivered(id, || ());
    wait_until(|| journal.job(id).unwrap().unwrap().delivery == Delivery::Delivered);
    std::thread::sleep(Duration::from_millis(1500));
    assert!(journal.job(id).unwrap().is_some(), "no clock makes it an hour old");
    // The row goes for its size, the name does not.
    journal.set_retention(Retention { bytes_max: 1, ..KEEP });
    wait_until(|| journal.job(id).unwrap().is_none());
    assert_eq!(again(&journal), Ok(Accepted::Known(id)));
    drop(journal);
    let (journal, _) = open(folder.path(), KEEP);
    assert_eq!(again(&journal), Ok(Accepted::Known(id)), "also after a restart");
    assert!(journal.clock().now() >= 3000, "it goes on where it was: {:?}", journal.clock());
    journal.set_retention(Retention { names: Duration::ZERO, ..KEEP });
    wait_until(|| again(&journal) == Ok(Accepted::New));
}

#[test]
fn a_journal_of_format_1_is_taken_over() {
    let folder = tempdir().unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    let jobs = [job(&journal, "{\"n\":1}"), job(&journal, "{\"n\":2}")];
    let ids = jobs.clone().map(|job| job.id);
    for job in jobs {
        accept(&journal, job).unwrap();
    }
    finish(&journal, ids[1], Some("results"));
    drop(journal);
    // As the version before wrote it: ages in the system's time, none of the newer columns.
    let file = rusqlite::Connection::open(folder.path().join("jobs.sqlite")).unwrap();
    file.execute_batch(
        "DROP INDEX closed_jobs; DROP INDEX ended_jobs; DROP INDEX once_by_age;
         ALTER TABLE jobs DROP COLUMN suspect; ALTER TABLE jobs DROP COLUMN crashes; ALTER TABLE jobs DROP COLUMN crashes_alone; ALTER TABLE jobs DROP COLUMN closed; ALTER TABLE jobs DROP COLUMN from_queue;
         ALTER TABLE jobs ADD COLUMN once TEXT; ALTER TABLE once DROP COLUMN at; ALTER TABLE totals DROP COLUMN clock;
         UPDATE jobs SET pending = 1760000000000 WHERE delivery = 1; PRAGMA user_version = 1;",
    )
    .unwrap();
    drop(file);
    let (journal, found) = open(folder.path(), KEEP);
    assert_eq!(
        found.iter().map(|job| (job.id, job.pending)).collect::<Vec<_>>(),
        [(ids[0], None), (ids[1], Some(0))]
    );
    assert_eq!(journal.envelope(ids[0]).unwrap().unwrap(), "{\"n\":1}");
    assert_eq!(journal.result(ids[1]).unwrap().unwrap(), "{\"a\":1}");
    journal.delivered(ids[1], || ());
    finish(&journal, ids[0], None);
    drop(journal);
    assert!(open(folder.path(), KEEP).1.is_empty());
}

#[test]
fn a_journal_of_format_2_is_taken_over() {
    let folder = tempdir().unwrap();
    drop(open(folder.path(), KEEP));
    let file = rusqlite::Connection::open(folder.path().join("jobs.sqlite")).unwrap();
    file.execute_batch(
        "DROP INDEX ended_jobs; CREATE INDEX ended_jobs ON jobs (key, state, row) WHERE finished IS NOT NULL;
         ALTER TABLE jobs DROP COLUMN from_queue; PRAGMA user_version = 2;",
    )
    .unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    let taken = NewJob { from_queue: true, ..job(&journal, "{}") };
    accept(&journal, taken).unwrap();
    drop(journal);
    assert!(open(folder.path(), KEEP).1[0].from_queue);
    let index: String = file
        .query_row("SELECT sql FROM sqlite_schema WHERE name = 'ended_jobs'", [], |row| row.get(0))
        .unwrap();
    assert!(index.contains("key IS NOT NULL"), "{index}");
    assert_eq!(file.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0)).unwrap(), 3);
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
        since: 0,
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
    let found = try_open(folder.path(), KEEP);
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
    // Of one key: queued and ended ones, in the order in which they came, without another's between them.
    let nobodys = job(&journal, "{}");
    let nobodys_id = nobodys.id;
    accept(&journal, nobodys).unwrap();
    for id in [ids[2], ids[5]] {
        finish(&journal, id, None);
    }
    let of_key =
        |state, after| Filter { key: Some(Some("k".into())), state, after, limit: 4, ..Filter::default() };
    let listed =
        |filter: &Filter| journal.list(filter).unwrap().jobs.iter().map(|job| job.id).collect::<Vec<_>>();
    assert_eq!(listed(&of_key(None, None)), [ids[9], ids[8], ids[7], ids[6]]);
    assert_eq!(listed(&of_key(None, Some(ids[6]))), [ids[5], ids[4], ids[3], ids[2]]);
    assert_eq!(listed(&of_key(Some(State::Succeeded), None)), [ids[5], ids[2]]);
    assert_eq!(listed(&of_key(Some(State::Queued), None)), [ids[9], ids[8], ids[7], ids[6]]);
    let of_none = |state| Filter { key: Some(None), state, limit: 5, ..Filter::default() };
    assert_eq!(listed(&of_none(None)), [nobodys_id]);
    finish(&journal, nobodys_id, None);
    assert_eq!(listed(&of_none(Some(State::Succeeded))), [nobodys_id]);
    assert_eq!(listed(&of_none(None)), [nobodys_id]);
    assert!(listed(&of_none(Some(State::Failed))).is_empty());
}

#[test]
fn a_folder_has_one_host_and_a_damaged_journal_is_kept() {
    let folder = tempdir().unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    let accepted = job(&journal, "{}");
    accept(&journal, accepted).unwrap();
    let second = try_open(folder.path(), KEEP).err().unwrap();
    assert!(matches!(second, OpenError::InUse(_)), "{second}");
    drop(journal);

    let file = folder.path().join("jobs.sqlite");
    let mut bytes = fs::read(&file).unwrap();
    let half = bytes.len() / 2;
    bytes[..100].fill(7);
    bytes[half..].fill(9);
    fs::write(&file, &bytes).unwrap();
    for _ in 0..2 {
        let error = try_open(folder.path(), KEEP).err().unwrap();
        assert!(matches!(&error, OpenError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("jobs.sqlite"), "{error}");
    }
    // One that was cut short is no new one.
    for cut in [1, 40, 99] {
        fs::write(&file, &b"SQLite format 4 and what else there may be in such a file, or in one that was cut off at some point"[..cut]).unwrap();
        assert!(matches!(try_open(folder.path(), KEEP), Err(OpenError::Damaged { .. })));
    }
    fs::write(&file, &bytes).unwrap();
    let aside = set_aside(folder.path()).unwrap();
    assert_eq!(fs::read(&aside).unwrap(), bytes);
    let (_journal, found) = open(folder.path(), KEEP);
    assert!(found.is_empty());
}

/// The names of files that others than their owner may open.
fn open_to_others(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    let open = entries.filter(|entry| entry.metadata().unwrap().mode() & 0o077 != 0);
    open.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

#[test]
fn nobody_else_reads_what_callers_sent() {
    let folder = tempdir().unwrap();
    // As somebody else has made it, and from the first start on.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    let accepted = job(&journal, "{}");
    accept(&journal, accepted).unwrap();
    let names = || fs::read_dir(folder.path()).unwrap().count();
    // The journal, its log and index, the ledger and the lock.
    assert_eq!((names(), open_to_others(folder.path())), (5, vec![]));
    drop(journal);
    // As a version before left them.
    fs::write(folder.path().join("jobs.sqlite.damaged-1"), "").unwrap();
    for entry in fs::read_dir(folder.path()).unwrap() {
        fs::set_permissions(entry.unwrap().path(), fs::Permissions::from_mode(0o644)).unwrap();
    }
    let (journal, _) = open(folder.path(), KEEP);
    assert_eq!(open_to_others(folder.path()), Vec::<String>::new());
    drop(journal);
    // Where it makes the folder itself.
    let made = folder.path().join("deep/state");
    drop(open(&made, KEEP));
    assert_eq!(fs::metadata(&made).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn lists_and_cleanings_go_along_an_index_and_sort_nothing() {
    let folder = tempdir().unwrap();
    let (journal, _) = open(folder.path(), KEEP);
    let of_key = |state, delivery| Filter {
        key: Some(Some("k".into())),
        state,
        delivery,
        limit: 9,
        ..Filter::default()
    };
    let of_none = |state| Filter { key: Some(None), state, limit: 9, ..Filter::default() };
    for filter in [
        of_none(None),
        of_none(Some(State::Succeeded)),
        of_none(Some(State::Failed)),
        of_none(Some(State::Queued)),
        of_key(None, None),
        of_key(Some(State::Cancelled), None),
        of_key(Some(State::Succeeded), None),
        of_key(Some(State::Queued), None),
        of_key(None, Some(Delivery::Pending)),
        Filter { state: Some(State::Queued), limit: 9, ..Filter::default() },
        Filter { limit: 9, ..Filter::default() },
    ] {
        let plan = journal.plan(&filter);
        assert!(!plan.contains("TEMP B-TREE"), "{filter:?}: {plan}");
        let has_ended = matches!(filter.state, Some(State::Succeeded | State::Failed | State::Cancelled));
        // Without a key only what did not succeed is in it.
        let is_indexed = match &filter.key {
            Some(Some(_)) => has_ended,
            Some(None) => has_ended && filter.state != Some(State::Succeeded),
            None => false,
        };
        if is_indexed {
            assert!(plan.contains("ended_jobs (key=? AND state=? AND row<?)"), "{plan}");
        }
    }
}

#[test]
fn names_have_a_bound_of_their_own_and_take_no_jobs_room() {
    let folder = tempdir().unwrap();
    let (journal, _) = open(folder.path(), Retention { bytes_max: 400_000, ..KEEP });
    let named = |number: usize| {
        let idempotency = IdempotencyKey { name: format!("{number:0200}"), digest: [1; 32] };
        NewJob { idempotency: Some(idempotency), ..job(&journal, "{}") }
    };
    // A quarter of the bytes: some 190 names of 528 bytes.
    let refused = (0..1000).find(|number| {
        let named = named(*number);
        let id = named.id;
        let accepted = accept(&journal, named);
        if accepted.is_ok() {
            finish(&journal, id, None);
        }
        accepted == Err(AcceptError::FullOfNames)
    });
    assert!(refused.is_some_and(|refused| (150..250).contains(&refused)), "{refused:?}");
    // Others are accepted, and what is done with is still there.
    let plain = job(&journal, "{}");
    let id = plain.id;
    assert_eq!(accept(&journal, plain), Ok(Accepted::New));
    finish(&journal, id, None);
    assert!(journal.job(id).unwrap().is_some());
    drop(journal);
    let (journal, _) = open(folder.path(), Retention { bytes_max: 400_000, ..KEEP });
    let idempotency = Some(IdempotencyKey { name: "x".repeat(200), digest: [1; 32] });
    let full = NewJob { idempotency, ..job(&journal, "{}") };
    assert_eq!(accept(&journal, full), Err(AcceptError::FullOfNames), "also after a restart");
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
