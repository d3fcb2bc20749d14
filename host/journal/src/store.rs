//! Every statement that changes the journal, and its first reading. It never knows threads, nor who waits for what is written.

use std::{io::Read, path::Path, sync::Arc};

use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, Transaction, TransactionBehavior, params};

use crate::{
    JobId, Suspicion,
    record::{Accepted, Delivery, Finish, NewJob, OpenJob, Retry, State, Totals},
    schema::{MAGIC, StoreError, prepare},
};

/// Jobs that one transaction forgets.
pub(crate) const FORGOTTEN_AT_ONCE: usize = 1024;
/// Bytes of a name's rows beside the name, about.
const NAME_ROW_BYTES: u64 = 128;
/// Bytes of a row without its bodies, about.
const ROW_BYTES: i64 = 128;

/// Whether an error lies in what was to be written, and not in the file: the same change fails each time, and others don't.
pub(crate) fn is_of_one_change(error: &rusqlite::Error) -> bool {
    match error {
        rusqlite::Error::SqliteFailure(failure, _) => matches!(
            failure.code,
            ErrorCode::TooBig
                | ErrorCode::ConstraintViolation
                | ErrorCode::TypeMismatch
                | ErrorCode::ParameterOutOfRange
        ),
        rusqlite::Error::ToSqlConversionFailure(_) => true,
        _ => false,
    }
}

/// The one connection that writes.
pub(crate) struct Store {
    connection: Connection,
    pub(crate) totals: Totals,
    /// Bytes that names take up, about.
    pub(crate) names_bytes: u64,
}

/// What there is room for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// There is none for jobs.
    pub(crate) is_full: bool,
    /// Bytes of names.
    pub(crate) names_bytes_max: u64,
}

/// Bytes that a name takes up, about: it stands in two trees.
fn name_bytes(length: usize) -> u64 {
    2 * length as u64 + NAME_ROW_BYTES
}

/// A file, opened, and what was found in it.
pub(crate) struct Opened {
    pub(crate) store: Store,
    pub(crate) open_jobs: Vec<OpenJob>,
    pub(crate) last_row: i64,
    /// The journal's time when it was last written.
    pub(crate) clock: u64,
}

impl Store {
    pub(crate) fn open(path: &Path) -> Result<Opened, StoreError> {
        // SQLite takes a file that is shorter than its own header for a new one.
        let mut header = [0; MAGIC.len()];
        let read = std::fs::File::open(path)
            .and_then(|mut file| Ok((file.metadata()?.len(), file.read(&mut header)?)));
        if read.is_ok_and(|(length, _)| length > 0) && header != *MAGIC {
            return Err(StoreError::Damaged("it doesn't begin as a journal does".to_owned()));
        }
        let mut connection = Connection::open(path).map_err(StoreError::of_open)?;
        let opened = prepare(&mut connection).and_then(|()| Self::look(&connection));
        let Found { totals, names_bytes, open_jobs, last_row, clock } = opened?;
        Ok(Opened { store: Self { connection, totals, names_bytes }, open_jobs, last_row, clock })
    }

    fn look(connection: &Connection) -> Result<Found, StoreError> {
        let read = || -> rusqlite::Result<_> {
            let (totals, clock) = connection.query_row("SELECT * FROM totals", [], |row| {
                let mut totals = Totals::default();
                for index in 0..4 {
                    totals.states[index] = row.get(index + 1)?;
                    totals.deliveries[index] = row.get(index + 5)?;
                }
                Ok((totals, row.get(9)?))
            })?;
            let last: Option<i64> =
                connection.query_row("SELECT max(row) FROM jobs", [], |row| row.get(0))?;
            let names_bytes = connection.query_row(
                "SELECT coalesce(sum(2 * length(name)), 0) + ?1 * count(*) FROM once",
                [NAME_ROW_BYTES],
                |row| row.get(0),
            )?;
            let text =
                format!("SELECT {OPEN_COLUMNS} FROM jobs INDEXED BY open_jobs WHERE open = 1 ORDER BY row");
            let mut statement = connection.prepare(&text)?;
            let open_jobs = statement.query_map([], open_job)?.collect::<rusqlite::Result<Vec<_>>>()?;
            Ok(Found { totals, names_bytes, open_jobs, last_row: last.unwrap_or_default(), clock })
        };
        read().map_err(StoreError::of_open)
    }

    /// A transaction at this moment of the journal's time. What it does to the totals counts when it is committed.
    pub(crate) fn begin(&mut self, now: u64) -> rusqlite::Result<Group<'_>> {
        let (totals, names_bytes) = (self.totals, self.names_bytes);
        // A write at its end would otherwise find that another had come between.
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        Ok(Group {
            transaction,
            now,
            totals,
            names_bytes,
            counted: (&mut self.totals, &mut self.names_bytes),
        })
    }

    /// Takes no text or blob of more bytes than this, as SQLite itself doesn't beyond its own limit.
    #[cfg(test)]
    pub(crate) fn limit_bytes(&self, bytes: i32) {
        self.connection.set_limit(rusqlite::limits::Limit::SQLITE_LIMIT_LENGTH, bytes).expect("a limit");
    }

    /// Bytes that jobs take up in the file; what is free in it doesn't count.
    pub(crate) fn bytes(&self) -> rusqlite::Result<u64> {
        let number = |name: &str| self.connection.pragma_query_value(None, name, |row| row.get::<_, u64>(0));
        Ok((number("page_count")? - number("freelist_count")?) * number("page_size")?)
    }

    /// Writes the journal's time.
    pub(crate) fn write_clock(&self, now: u64) -> rusqlite::Result<()> {
        self.connection.prepare_cached("UPDATE totals SET clock = ?1")?.execute([now as i64]).map(drop)
    }

    /// Works the write-ahead log into the file.
    pub(crate) fn checkpoint(&self) -> rusqlite::Result<()> {
        self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
    }
}

/// What a file holds when it is opened.
struct Found {
    totals: Totals,
    names_bytes: u64,
    open_jobs: Vec<OpenJob>,
    last_row: i64,
    clock: u64,
}

const OPEN_COLUMNS: &str = "row, tail, model, key, state, attempts, accepted, next, deadline, pending, queue, trace, cancelled, crashes, crashes_alone, suspect, from_queue, error";

fn open_job(row: &Row<'_>) -> rusqlite::Result<OpenJob> {
    Ok(OpenJob {
        id: JobId::from_parts(row.get(0)?, row.get(1)?),
        model: Arc::from(row.get_ref(2)?.as_str()?),
        key: row.get_ref(3)?.as_str_or_null()?.map(Arc::from),
        state: State::of(row.get(4)?),
        attempts: row.get(5)?,
        accepted: row.get(6)?,
        next: row.get(7)?,
        deadline: row.get(8)?,
        pending: row.get(9)?,
        queue: row.get(10)?,
        trace: row.get(11)?,
        cancelled: row.get(12)?,
        crashes: row.get(13)?,
        crashes_alone: row.get(14)?,
        suspicion: Suspicion::of(row.get(15)?),
        from_queue: row.get(16)?,
        error: row.get(17)?,
    })
}

/// Changes that are committed together.
pub(crate) struct Group<'s> {
    transaction: Transaction<'s>,
    now: u64,
    totals: Totals,
    names_bytes: u64,
    counted: (&'s mut Totals, &'s mut u64),
}

/// Which jobs are forgotten.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Forget {
    /// Those that were done with before this moment of the journal's time.
    ClosedBefore(u64),
    /// The oldest, about so many bytes of them.
    Bytes(u64),
}

/// Why one job of a group isn't accepted.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// Something else came before under its name.
    Conflict(JobId),
    /// There is no room.
    Full,
    /// There is no room for its name.
    FullOfNames,
    /// The group fails.
    Store(rusqlite::Error),
}

impl From<rusqlite::Error> for Refusal {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error)
    }
}

impl Group<'_> {
    /// Writes a job, where it hasn't come before under its name and there is room.
    pub(crate) fn accept(&mut self, job: &NewJob, room: Room) -> Result<Accepted, Refusal> {
        if let Some(idempotency) = &job.idempotency {
            let mut statement =
                self.transaction.prepare_cached("SELECT row, tail, digest FROM once WHERE name = ?1")?;
            let known = statement
                .query_row([&idempotency.name], |row| {
                    Ok((
                        JobId::from_parts(row.get(0)?, row.get(1)?),
                        row.get_ref(2)?.as_blob()? == idempotency.digest,
                    ))
                })
                .optional()?;
            match known {
                Some((id, true)) => return Ok(Accepted::Known(id)),
                Some((id, false)) => return Err(Refusal::Conflict(id)),
                None => {}
            }
        }
        if room.is_full {
            return Err(Refusal::Full);
        }
        if let Some(idempotency) = &job.idempotency {
            self.names_bytes += name_bytes(idempotency.name.len());
            if self.names_bytes > room.names_bytes_max {
                self.names_bytes -= name_bytes(idempotency.name.len());
                return Err(Refusal::FullOfNames);
            }
            self.transaction
                .prepare_cached("INSERT INTO once (name, row, tail, digest, at) VALUES (?1, ?2, ?3, ?4, ?5)")?
                .execute(params![
                    idempotency.name,
                    job.id.row(),
                    job.id.tail(),
                    idempotency.digest,
                    self.now
                ])?;
        }
        let mut insert = self.transaction.prepare_cached(
            "INSERT INTO jobs (row, tail, model, key, state, open, attempts, accepted, deadline, cancelled, delivery, trace, envelope, from_queue)
             VALUES (?1, ?2, ?3, ?4, 0, 1, 0, ?5, ?6, 0, 0, ?7, ?8, ?9)",
        )?;
        insert.execute(params![
            job.id.row(),
            job.id.tail(),
            &*job.model,
            job.key.as_deref(),
            job.accepted,
            job.deadline,
            job.trace,
            &*job.envelope,
            job.from_queue,
        ])?;
        self.totals.add(State::Queued, Delivery::None, 1);
        Ok(Accepted::New)
    }

    /// Says how often a host died while this job was running, and what is known of it by that.
    pub(crate) fn crashed(&mut self, job: &OpenJob) -> rusqlite::Result<()> {
        let mut update = self.transaction.prepare_cached(
            "UPDATE jobs SET crashes = ?2, crashes_alone = ?3, suspect = ?4, error = ?5 WHERE row = ?1",
        )?;
        let suspect = job.suspicion.code();
        update.execute(params![job.id.row(), job.crashes, job.crashes_alone, suspect, job.error]).map(drop)
    }

    pub(crate) fn retry(&mut self, retry: &Retry) -> rusqlite::Result<()> {
        let mut update = self.transaction.prepare_cached(
            "UPDATE jobs SET attempts = ?2, started = ?3, next = ?4, error = ?5, suspect = 0 WHERE row = ?1 AND state = 0",
        )?;
        let Retry { id, attempts, started, next, error } = retry;
        update.execute(params![id.row(), attempts, started, next, error]).map(drop)
    }

    pub(crate) fn finish(&mut self, finish: &Finish) -> rusqlite::Result<()> {
        let delivery = if finish.queue.is_some() { Delivery::Pending } else { Delivery::None };
        let mut update = self.transaction.prepare_cached(
            "UPDATE jobs SET state = ?2, open = ?3, attempts = ?4, started = coalesce(?5, started), finished = ?6, next = NULL,
             result = ?7, error = ?8, queue = ?9, delivery = ?10, pending = ?11, closed = ?11, envelope = NULL WHERE row = ?1 AND state = 0",
        )?;
        let changed = update.execute(params![
            finish.id.row(),
            finish.state.code(),
            finish.queue.is_some(),
            finish.attempts,
            finish.started,
            finish.finished,
            finish.result.as_deref(),
            finish.error,
            finish.queue,
            delivery.code(),
            finish.since,
        ])?;
        if changed == 1 {
            self.totals.add(State::Queued, Delivery::None, -1);
            self.totals.add(finish.state, delivery, 1);
        }
        Ok(())
    }

    /// Says that a job was taken back while it ran.
    pub(crate) fn cancel(&mut self, id: JobId) -> rusqlite::Result<()> {
        let mut update =
            self.transaction.prepare_cached("UPDATE jobs SET cancelled = 1 WHERE row = ?1 AND state = 0")?;
        update.execute([id.row()]).map(drop)
    }

    /// Writes what is there already: it says whether the disk can be written.
    pub(crate) fn touch(&mut self) -> rusqlite::Result<()> {
        self.transaction.prepare_cached("UPDATE totals SET s0 = s0")?.execute([]).map(drop)
    }

    /// Says that a message was delivered, or given up for a reason.
    pub(crate) fn delivered(&mut self, id: JobId, at: u64, dead: Option<&str>) -> rusqlite::Result<()> {
        let delivery = if dead.is_some() { Delivery::Dead } else { Delivery::Delivered };
        let mut update = self.transaction.prepare_cached(
            "UPDATE jobs SET delivery = ?2, delivered = ?3, delivery_error = ?4, open = 0, closed = ?5 WHERE row = ?1 AND delivery = 1",
        )?;
        if update.execute(params![id.row(), delivery.code(), at, dead, self.now])? == 1 {
            self.totals.deliveries[Delivery::Pending.code() as usize] -= 1;
            self.totals.deliveries[delivery.code() as usize] += 1;
        }
        Ok(())
    }

    /// Has a message delivered again; `None` where there is no such message, or it is on its way.
    pub(crate) fn redeliver(&mut self, id: JobId) -> rusqlite::Result<Option<OpenJob>> {
        let before: Option<i64> = self
            .transaction
            .prepare_cached(
                "SELECT delivery FROM jobs WHERE row = ?1 AND tail = ?2 AND queue IS NOT NULL AND open = 0",
            )?
            .query_row(params![id.row(), id.tail()], |row| row.get(0))
            .optional()?;
        let Some(before) = before else { return Ok(None) };
        // Its time to be delivered begins anew.
        self.transaction
            .prepare_cached(
                "UPDATE jobs SET delivery = 1, delivered = NULL, delivery_error = NULL, open = 1, pending = ?2 WHERE row = ?1",
            )?
            .execute(params![id.row(), self.now])?;
        self.totals.deliveries[Delivery::of(before).code() as usize] -= 1;
        self.totals.deliveries[Delivery::Pending.code() as usize] += 1;
        let text = format!("SELECT {OPEN_COLUMNS} FROM jobs WHERE row = ?1");
        self.transaction.prepare_cached(&text)?.query_row([id.row()], open_job).optional()
    }

    /// Forgets jobs that are done with: those that were before a moment, or of the oldest as many as take up some bytes. Says how many.
    /// Their names are remembered for as long as names are.
    pub(crate) fn forget(&mut self, which: Forget) -> rusqlite::Result<usize> {
        let (text, moment, mut bytes) = match which {
            Forget::ClosedBefore(moment) => (
                "SELECT row, state, delivery, coalesce(length(result), 0) FROM jobs INDEXED BY closed_jobs
                 WHERE open = 0 AND closed < ?1 ORDER BY closed LIMIT ?2",
                moment as i64,
                i64::MAX,
            ),
            Forget::Bytes(bytes) => (
                "SELECT row, state, delivery, coalesce(length(result), 0) FROM jobs NOT INDEXED
                 WHERE open = 0 AND closed <= ?1 ORDER BY row LIMIT ?2",
                i64::MAX,
                bytes as i64,
            ),
        };
        let mut oldest = self.transaction.prepare_cached(text)?;
        let mut rows = oldest.query(params![moment, FORGOTTEN_AT_ONCE])?;
        let mut found: Vec<(i64, i64, i64)> = Vec::new();
        while bytes > 0
            && let Some(row) = rows.next()?
        {
            bytes -= row.get::<_, i64>(3)? + ROW_BYTES;
            found.push((row.get(0)?, row.get(1)?, row.get(2)?));
        }
        drop(rows);
        drop(oldest);
        for (row, state, delivery) in &found {
            self.transaction.prepare_cached("DELETE FROM jobs WHERE row = ?1")?.execute([row])?;
            self.totals.add(State::of(*state), Delivery::of(*delivery), -1);
        }
        Ok(found.len())
    }

    /// Forgets names that came before a moment of the journal's time, but for those of jobs that aren't done with. Says how many.
    pub(crate) fn forget_names(&mut self, before: u64) -> rusqlite::Result<usize> {
        let mut delete = self.transaction.prepare_cached(
            "DELETE FROM once WHERE name IN (
                 SELECT name FROM once WHERE at < ?1
                 AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.row = once.row AND jobs.open = 1)
                 ORDER BY at LIMIT ?2)
             RETURNING length(name)",
        )?;
        let lengths = delete.query_map(params![before, FORGOTTEN_AT_ONCE], |row| row.get::<_, usize>(0))?;
        let mut forgotten = 0;
        for length in lengths {
            self.names_bytes = self.names_bytes.saturating_sub(name_bytes(length?));
            forgotten += 1;
        }
        Ok(forgotten)
    }

    pub(crate) fn commit(self) -> rusqlite::Result<()> {
        let Self { transaction, now, totals, names_bytes, counted } = self;
        if totals != *counted.0 {
            let ([s0, s1, s2, s3], [d0, d1, d2, d3]) = (totals.states, totals.deliveries);
            transaction
                .prepare_cached(
                    "UPDATE totals SET s0 = ?1, s1 = ?2, s2 = ?3, s3 = ?4, d0 = ?5, d1 = ?6, d2 = ?7, d3 = ?8, clock = ?9",
                )?
                .execute([s0, s1, s2, s3, d0, d1, d2, d3, now as i64])?;
        }
        transaction.commit()?;
        (*counted.0, *counted.1) = (totals, names_bytes);
        Ok(())
    }
}
