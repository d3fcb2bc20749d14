//! What is read of the journal, beside the connection that writes. It changes nothing.

use std::path::Path;

use bytes::Bytes;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, params};

use crate::{
    JobId,
    record::{Delivery, Filter, Page, State, Stored},
};

/// Rows that one list looks at: beyond them the caller asks again.
const ROWS_LOOKED_AT: usize = 10_000;

/// A connection that reads beside the one that writes.
pub(crate) struct Reader(Connection);

const ENDED: &str = "INDEXED BY ended_jobs WHERE finished IS NOT NULL";
const COLUMNS: &str = "row, tail, model, key, state, attempts, accepted, started, finished, next, error, queue, delivery, delivered, delivery_error, crashes";

impl Reader {
    /// Looks through the whole file; what is wrong with it, if anything is.
    pub(crate) fn damage(&self) -> rusqlite::Result<Option<String>> {
        let said: String = self.0.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        Ok((said != "ok").then_some(said))
    }

    pub(crate) fn open(path: &Path) -> rusqlite::Result<Self> {
        // A read-only connection could not take part in the write-ahead log of a file that nobody else has open.
        let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        connection.pragma_update(None, "query_only", true)?;
        Ok(Self(connection))
    }

    pub(crate) fn job(&self, id: JobId) -> rusqlite::Result<Option<Stored>> {
        let text = format!("SELECT {COLUMNS}, result FROM jobs WHERE row = ?1 AND tail = ?2");
        let mut statement = self.0.prepare_cached(&text)?;
        statement
            .query_row(params![id.row(), id.tail()], |row| {
                let result: Option<Vec<u8>> = row.get(16)?;
                Ok(Stored { result: result.map(Bytes::from), ..stored(row)? })
            })
            .optional()
    }

    pub(crate) fn result_bytes(&self, id: JobId) -> rusqlite::Result<usize> {
        let text = "SELECT coalesce(length(result), 0) FROM jobs WHERE row = ?1";
        let bytes = self.0.prepare_cached(text)?.query_row([id.row()], |row| row.get(0)).optional()?;
        Ok(bytes.unwrap_or_default())
    }

    /// One of the two bodies of a job.
    pub(crate) fn body(&self, id: JobId, result: bool) -> rusqlite::Result<Option<Bytes>> {
        let text = if result {
            "SELECT result FROM jobs WHERE row = ?1"
        } else {
            "SELECT envelope FROM jobs WHERE row = ?1"
        };
        let mut statement = self.0.prepare_cached(text)?;
        let body = statement.query_row([id.row()], |row| row.get::<_, Option<Vec<u8>>>(0)).optional()?;
        Ok(body.flatten().map(Bytes::from))
    }

    #[cfg(test)]
    pub(crate) fn plan(&self, filter: &Filter) -> rusqlite::Result<String> {
        let mut statement = self.0.prepare(&format!("EXPLAIN QUERY PLAN {}", list_text(filter)))?;
        let parameters = statement.parameter_count();
        let nulls = std::iter::repeat_n(rusqlite::types::Null, parameters);
        let steps = statement.query_map(rusqlite::params_from_iter(nulls), |row| row.get::<_, String>(3))?;
        Ok(steps.collect::<rusqlite::Result<Vec<_>>>()?.join("; "))
    }

    pub(crate) fn list(&self, filter: &Filter) -> rusqlite::Result<Page> {
        let mut statement = self.0.prepare_cached(&list_text(filter))?;
        let before = filter.after.map_or(i64::MAX, JobId::row);
        let mut rows = match &filter.key {
            Some(Some(key)) => statement.query(params![before, ROWS_LOOKED_AT, key])?,
            Some(None) | None => statement.query(params![before, ROWS_LOOKED_AT])?,
        };
        let (mut jobs, mut looked_at, mut last) = (Vec::new(), 0, None);
        while jobs.len() < filter.limit
            && let Some(row) = rows.next()?
        {
            let job = stored(row)?;
            looked_at += 1;
            last = Some(job.id);
            let fits = filter.state.is_none_or(|state| state == job.state)
                && filter.model.as_ref().is_none_or(|model| *model == job.model)
                && filter.key.as_ref().is_none_or(|key| *key == job.key)
                && filter.delivery.is_none_or(|delivery| delivery == job.delivery);
            if fits {
                jobs.push(job);
            }
        }
        let more = jobs.len() == filter.limit || looked_at == ROWS_LOOKED_AT;
        Ok(Page { jobs, next: last.filter(|_| more) })
    }
}

/// Finds jobs by what the filter says of state and key, the youngest first, along an index where there is one for it.
fn list_text(filter: &Filter) -> String {
    // What isn't done with is found without looking at all that is.
    let open = "INDEXED BY open_jobs WHERE open = 1 AND";
    let is_open = filter.state == Some(State::Queued) || filter.delivery == Some(Delivery::Pending);
    let find = |places: &str, whose: &str| format!("SELECT {COLUMNS} FROM jobs {places}{whose} row < ?1");
    let whose = match &filter.key {
        None => "",
        Some(None) => " key IS NULL AND",
        Some(Some(_)) => " key = ?3 AND",
    };
    let of_state = |state: State| match state {
        State::Queued => find(&format!("{open} state = {} AND", state.code()), whose),
        State::Succeeded => find(&format!("{ENDED} AND state = {} AND", state.code()), whose),
        State::Failed | State::Cancelled => {
            find(&format!("{ENDED} AND state > 1 AND state = {} AND", state.code()), whose)
        }
    };
    let found = match (&filter.key, filter.state) {
        _ if is_open => find(open, whose),
        // The index doesn't have all of these; whoever reads the rows filters them, and stops after so many.
        (None, _) | (Some(None), None | Some(State::Succeeded)) => find("WHERE", ""),
        (Some(_), Some(state)) => of_state(state),
        // Each of these comes ordered, and SQLite merges them as they are read.
        (Some(Some(_)), None) => State::ALL.map(of_state).join(" UNION ALL "),
    };
    format!("{found} ORDER BY row DESC LIMIT ?2")
}

fn stored(row: &Row<'_>) -> rusqlite::Result<Stored> {
    Ok(Stored {
        id: JobId::from_parts(row.get(0)?, row.get(1)?),
        model: row.get(2)?,
        key: row.get(3)?,
        state: State::of(row.get(4)?),
        attempts: row.get(5)?,
        accepted: row.get(6)?,
        started: row.get(7)?,
        finished: row.get(8)?,
        next: row.get(9)?,
        result: None,
        error: row.get(10)?,
        queue: row.get(11)?,
        delivery: Delivery::of(row.get(12)?),
        delivered: row.get(13)?,
        delivery_error: row.get(14)?,
        crashes: row.get(15)?,
    })
}
