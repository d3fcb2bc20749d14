//! A queue in a file: each result is a line of JSON, appended to `QUEUE.jsonl` and synced before it counts as delivered; a file that has
//! grown large is renamed and a new one begun.
//!
//! It owns the files, and never knows who reads them: `tail -F` does, and so does anything that takes lines.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use modalkit_sdk::{QueueBackend, QueueContext, QueueError, QueuedMessage, export_queue_backend};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Files that stay open; beyond them all are closed, and opened again when they are used.
const OPEN_MAX: usize = 64;
/// Bytes of a file's name.
const NAME_BYTES_MAX: usize = 200;

/// Its keys in `settings`.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct Settings {
    /// The folder of the files; made where it isn't there.
    pub folder: PathBuf,
    /// Bytes after which a file is renamed to `QUEUE%NUMBER.jsonl` and a new one begun.
    #[serde(default = "rotate_bytes")]
    pub rotate_bytes: u64,
}

fn rotate_bytes() -> u64 {
    64 << 20
}

/// One line.
#[derive(Serialize)]
struct Line<'a> {
    job_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    traceparent: Option<&'a str>,
    body: &'a RawValue,
}

/// The files.
pub struct Files {
    settings: Settings,
    open: Mutex<HashMap<String, Appended>>,
}

/// A file that is appended to.
struct Appended {
    file: File,
    bytes: u64,
}

impl QueueBackend for Files {
    type Settings = Settings;

    fn open(context: QueueContext<Settings>) -> Result<Self, QueueError> {
        let settings = context.into_settings();
        fs::create_dir_all(&settings.folder)
            .map_err(|error| QueueError::from(error).context(settings.folder.display()))?;
        Ok(Self { settings, open: Mutex::default() })
    }

    fn check(&self) -> Result<(), QueueError> {
        let folder = &self.settings.folder;
        fs::metadata(folder).map(drop).map_err(|error| QueueError::from(error).context(folder.display()))
    }

    fn send(&self, queue: &str, messages: &[QueuedMessage<'_>]) -> Vec<Result<(), QueueError>> {
        let Some(name) = file_name(queue) else {
            let refuse =
                |_| Err(QueueError::refuse(format!("the queue's name is too long for a file: {queue}")));
            return messages.iter().map(refuse).collect();
        };
        let mut lines = Vec::new();
        let mut results: Vec<Result<(), QueueError>> =
            messages.iter().map(|message| write_line(&mut lines, message)).collect();
        if let Err(error) = self.append(&name, &lines) {
            let error = format!("can't append to the file of {queue}: {error}");
            results.iter_mut().filter(|result| result.is_ok()).for_each(|result| {
                *result = Err(QueueError::retry(&error));
            });
        }
        results
    }
}

fn write_line(lines: &mut Vec<u8>, message: &QueuedMessage<'_>) -> Result<(), QueueError> {
    // Line ends in JSON stand between its parts only, where blanks say the same.
    let body = message.body.replace(['\n', '\r'], " ");
    let body: &RawValue = serde_json::from_str(&body)
        .map_err(|error| QueueError::refuse(error).context("the message is no JSON"))?;
    let line = Line { job_id: message.job_id, traceparent: message.traceparent, body };
    serde_json::to_writer(&mut *lines, &line).map_err(QueueError::refuse)?;
    lines.push(b'\n');
    Ok(())
}

impl Files {
    /// Appends lines and syncs them.
    fn append(&self, name: &str, lines: &[u8]) -> io::Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken out: where anything fails it is opened anew, and a half-written line ended.
        let mut appended = match open.remove(name) {
            // Whoever reads it may have moved it away, and what is appended then would be nowhere.
            Some(appended) if self.is_there(name, &appended.file) => appended,
            _ => self.begin(name)?,
        };
        if appended.bytes > 0 && appended.bytes + lines.len() as u64 > self.settings.rotate_bytes {
            drop(appended);
            self.rotate(name)?;
            appended = self.begin(name)?;
        }
        appended.file.write_all(lines)?;
        appended.file.sync_data()?;
        appended.bytes += lines.len() as u64;
        if open.len() >= OPEN_MAX {
            open.clear();
        }
        open.insert(name.to_owned(), appended);
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.settings.folder.join(format!("{name}.jsonl"))
    }

    /// Opens a file to be appended to. A line that was cut off when somebody died is ended: it stands alone then.
    fn begin(&self, name: &str) -> io::Result<Appended> {
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(self.path(name))?;
        let mut bytes = file.seek(SeekFrom::End(0))?;
        if bytes > 0 {
            file.seek(SeekFrom::End(-1))?;
            let mut last = [0];
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                file.write_all(b"\n")?;
                bytes += 1;
            }
        }
        sync_folder(&self.settings.folder)?;
        Ok(Appended { file, bytes })
    }

    /// Whether the file is still the one of this name.
    fn is_there(&self, name: &str, file: &File) -> bool {
        match (fs::metadata(self.path(name)), file.metadata()) {
            (Ok(there), Ok(open)) => (there.dev(), there.ino()) == (open.dev(), open.ino()),
            _ => false,
        }
    }

    fn rotate(&self, name: &str) -> io::Result<()> {
        let mut number = 1;
        let free = loop {
            let path = self.settings.folder.join(format!("{name}%{number}.jsonl"));
            if !path.try_exists()? {
                break path;
            }
            number += 1;
        };
        fs::rename(self.path(name), free)?;
        sync_folder(&self.settings.folder)
    }
}

/// What was made or renamed in a folder is there after a power cut as well.
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// A queue's name as that of a file, in the same folder whatever it is: bytes that may not stand there are written as %XX.
fn file_name(queue: &str) -> Option<String> {
    let mut name = String::new();
    for (index, byte) in queue.bytes().enumerate() {
        let plain = byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' || byte == b'.' && index > 0;
        let written = if plain { char::from(byte).to_string() } else { format!("%{byte:02X}") };
        name.push_str(&written);
    }
    (name.len() <= NAME_BYTES_MAX).then_some(name)
}

export_queue_backend!(Files);

#[cfg(test)]
mod tests {
    use super::*;

    fn files(folder: &Path, rotate_bytes: u64) -> Files {
        Files::open(QueueContext::new("file", Settings { folder: folder.to_owned(), rotate_bytes })).unwrap()
    }

    fn send(files: &Files, queue: &str, body: &str) -> Result<(), QueueError> {
        let message = QueuedMessage { job_id: "j", body, traceparent: None };
        files.send(queue, &[message]).remove(0)
    }

    #[test]
    fn each_message_is_a_line_and_a_line_that_was_cut_off_stands_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.jsonl");
        fs::write(&path, "{\"job_id\":\"cut").unwrap();
        let files = files(folder.path(), 1 << 20);
        send(&files, "results", "{\"a\":\n 1e999}").unwrap();
        send(&files, "results", "{\"b\": \"é\\n\"}").unwrap();
        let lines = fs::read_to_string(path).unwrap();
        assert_eq!(
            lines,
            "{\"job_id\":\"cut\n{\"job_id\":\"j\",\"body\":{\"a\":  1e999}}\n{\"job_id\":\"j\",\"body\":{\"b\": \"é\\n\"}}\n"
        );
        assert!(send(&files, "results", "no JSON").is_err());
        // Taken away by a reader, it is begun anew.
        fs::remove_file(folder.path().join("results.jsonl")).unwrap();
        send(&files, "results", "{}").unwrap();
        assert_eq!(
            fs::read_to_string(folder.path().join("results.jsonl")).unwrap(),
            "{\"job_id\":\"j\",\"body\":{}}\n"
        );
    }

    #[test]
    fn a_file_that_has_grown_is_renamed_and_nothing_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path(), 200);
        for number in 0..20 {
            send(&files, "results", &format!("{{\"n\":{number}}}")).unwrap();
        }
        let mut lines = 0;
        for entry in fs::read_dir(folder.path()).unwrap() {
            let text = fs::read_to_string(entry.unwrap().path()).unwrap();
            assert!(text.len() <= 200, "{text}");
            lines += text.lines().count();
        }
        assert_eq!(lines, 20);
        assert!(folder.path().join("results%1.jsonl").exists());
    }

    #[test]
    fn no_name_leads_out_of_the_folder() {
        assert_eq!(file_name("../etc/passwd").unwrap(), "%2E.%2Fetc%2Fpasswd");
        assert_eq!(file_name("...").unwrap(), "%2E..");
        assert_eq!(file_name("orders-2024_v1.0").unwrap(), "orders-2024_v1.0");
        assert_eq!(file_name(&"é".repeat(500)), None);
    }
}
