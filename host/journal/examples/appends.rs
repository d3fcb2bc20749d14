//! How fast this machine's disk takes group-committed appends by themselves: rows of so many bytes, so many in each synced transaction
//! of SQLite, for so many seconds. `cargo xtask bench jobs` compares the host's jobs with it.

#![allow(clippy::print_stdout, reason = "it prints what was measured")]

use std::{
    env,
    error::Error,
    path::Path,
    time::{Duration, Instant},
};

use rusqlite::Connection;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [folder, bytes, group, seconds] = arguments.as_slice() else {
        return Err("expected FOLDER BYTES GROUP SECONDS".into());
    };
    let (bytes, group, seconds): (usize, u64, u64) = (bytes.parse()?, group.parse()?, seconds.parse()?);
    let mut connection = Connection::open(Path::new(folder).join("appends.sqlite"))?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "full")?;
    connection.execute_batch("CREATE TABLE rows (row INTEGER PRIMARY KEY, body BLOB NOT NULL) STRICT")?;
    let body = vec![b'x'; bytes];
    let (begun, limit) = (Instant::now(), Duration::from_secs(seconds));
    let mut written = 0;
    while begun.elapsed() < limit {
        let transaction = connection.transaction()?;
        for _ in 0..group {
            transaction.prepare_cached("INSERT INTO rows (body) VALUES (?1)")?.execute([&body])?;
        }
        transaction.commit()?;
        written += group;
    }
    println!("{:.0}", written as f64 / begun.elapsed().as_secs_f64());
    Ok(())
}
