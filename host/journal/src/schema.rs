//! The journal's tables, what brings those of earlier formats up to date, and what can be wrong with the file. It never knows what is written
//! into them.

use rusqlite::{Connection, ErrorCode};

/// The shape of the tables; a greater number is a later version's file.
const SCHEMA: i64 = 3;
/// The first bytes of each file of SQLite.
pub(crate) const MAGIC: &[u8; 16] = b"SQLite format 3\0";
/// Marks a file as ours.
const APPLICATION_ID: i64 = 0x4d4b_4a31;
/// Pages in the write-ahead log until it is worked into the file.
const CHECKPOINT_PAGES: u32 = 1000;
/// What is left of the write-ahead log's file after it was.
const WAL_BYTES_KEPT: u64 = 8 << 20;

/// Small columns come before the bodies, whose pages are not read for them.
const JOBS: &str = "
    CREATE TABLE jobs (
        row INTEGER PRIMARY KEY,
        tail INTEGER NOT NULL,
        model TEXT NOT NULL,
        key TEXT,
        state INTEGER NOT NULL,
        open INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        crashes INTEGER NOT NULL DEFAULT 0,
        crashes_alone INTEGER NOT NULL DEFAULT 0,
        suspect INTEGER NOT NULL DEFAULT 0,
        from_queue INTEGER NOT NULL DEFAULT 0,
        accepted INTEGER NOT NULL,
        started INTEGER,
        finished INTEGER,
        next INTEGER,
        deadline INTEGER,
        cancelled INTEGER NOT NULL,
        delivery INTEGER NOT NULL,
        pending INTEGER,
        delivered INTEGER,
        closed INTEGER NOT NULL DEFAULT 0,
        queue TEXT,
        trace TEXT,
        error TEXT,
        delivery_error TEXT,
        envelope BLOB,
        result BLOB
    ) STRICT;
    CREATE INDEX open_jobs ON jobs (row) WHERE open = 1;
";
const TABLES: &str = "
    CREATE TABLE once (
        name TEXT PRIMARY KEY,
        row INTEGER NOT NULL,
        tail INTEGER NOT NULL,
        digest BLOB NOT NULL,
        at INTEGER NOT NULL DEFAULT 0
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE totals (
        id INTEGER PRIMARY KEY,
        s0 INTEGER NOT NULL, s1 INTEGER NOT NULL, s2 INTEGER NOT NULL, s3 INTEGER NOT NULL,
        d0 INTEGER NOT NULL, d1 INTEGER NOT NULL, d2 INTEGER NOT NULL, d3 INTEGER NOT NULL,
        clock INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    INSERT INTO totals VALUES (0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
";

/// What makes the tables of format 1 those of later ones. Ages were told by the system's clock there; they begin anew.
const ASIDE_FORMAT_1: &str = "
    DROP INDEX open_jobs;
    ALTER TABLE jobs RENAME TO jobs_1;
";
const FROM_FORMAT_1: &str = "
    INSERT INTO jobs (row, tail, model, key, state, open, attempts, accepted, started, finished, next, deadline, cancelled, delivery,
                      pending, delivered, queue, trace, error, delivery_error, envelope, result)
    SELECT row, tail, model, key, state, open, attempts, accepted, started, finished, next, deadline, cancelled, delivery,
           iif(delivery = 1, 0, pending), delivered, queue, trace, error, delivery_error, envelope, result FROM jobs_1;
    DROP TABLE jobs_1;
    ALTER TABLE once ADD COLUMN at INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE totals ADD COLUMN clock INTEGER NOT NULL DEFAULT 0;
";

/// Format 2 has other indexes, and doesn't know which jobs came from queues.
const FROM_FORMAT_2: &str = "
    DROP INDEX closed_jobs;
    DROP INDEX ended_jobs;
    DROP INDEX once_by_age;
    ALTER TABLE jobs ADD COLUMN from_queue INTEGER NOT NULL DEFAULT 0;
";

/// Finds jobs that are done with by when that was, those that have ended by whose they are and how they ended, and names by their age.
/// Jobs without a key that succeeded, most of all on a host without keys, are found by looking through the rows: an index would cost each
/// of them a microsecond.
const INDEXES: &str = "
    CREATE INDEX closed_jobs ON jobs (closed) WHERE open = 0;
    CREATE INDEX ended_jobs ON jobs (key, state, row) WHERE finished IS NOT NULL AND (key IS NOT NULL OR state > 1);
    CREATE INDEX once_by_age ON once (at);
";

/// What can happen to the file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// It isn't what was written.
    #[error("it is damaged, or no journal at all: {0}")]
    Damaged(String),
    /// It was written by a later version.
    #[error(
        "expected a journal of format 1 to {SCHEMA}, found format {0}: run the version of modalkit that wrote it"
    )]
    Foreign(i64),
    /// It can't be read or written at the moment.
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
}

impl StoreError {
    pub(crate) fn of_open(error: rusqlite::Error) -> Self {
        if is_damage(&error) { Self::Damaged(error.to_string()) } else { Self::Sqlite(error) }
    }
}

/// Whether an error says that the file isn't what was written.
pub(crate) fn is_damage(error: &rusqlite::Error) -> bool {
    match error {
        rusqlite::Error::SqliteFailure(failure, _) => {
            matches!(failure.code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
        }
        // A value of another kind, or text that is none.
        rusqlite::Error::FromSqlConversionFailure(..)
        | rusqlite::Error::InvalidColumnType(..)
        | rusqlite::Error::IntegralValueOutOfRange(..)
        | rusqlite::Error::Utf8Error(..) => true,
        _ => false,
    }
}

/// Makes a new file a journal, and brings one of an earlier format up to date.
pub(crate) fn prepare(connection: &mut Connection) -> Result<(), StoreError> {
    let number = |name: &str| {
        connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0)).map_err(StoreError::of_open)
    };
    let (application, version) = (number("application_id")?, number("user_version")?);
    let is_new =
        number("page_count")? == 0 || application == 0 && version == 0 && number("schema_version")? == 0;
    if !is_new && application != APPLICATION_ID {
        return Err(StoreError::Damaged("it says it is something else than a journal".to_owned()));
    }
    if !is_new && !(1..=SCHEMA).contains(&version) {
        return Err(StoreError::Foreign(version));
    }
    let set = |name: &str, value: &dyn rusqlite::ToSql| {
        connection.pragma_update(None, name, value).map_err(StoreError::of_open)
    };
    set("journal_mode", &"wal")?;
    set("synchronous", &"full")?;
    set("wal_autocheckpoint", &CHECKPOINT_PAGES)?;
    set("journal_size_limit", &WAL_BYTES_KEPT)?;
    if is_new || version < SCHEMA {
        let transaction = connection.transaction().map_err(StoreError::of_open)?;
        let steps: &[&str] = match version {
            _ if is_new => &[JOBS, TABLES, INDEXES],
            1 => &[ASIDE_FORMAT_1, JOBS, FROM_FORMAT_1, INDEXES],
            _ => &[FROM_FORMAT_2, INDEXES],
        };
        for step in steps {
            transaction.execute_batch(step).map_err(StoreError::of_open)?;
        }
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", SCHEMA)?;
        transaction.commit()?;
    }
    Ok(())
}
