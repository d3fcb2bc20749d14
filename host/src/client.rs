//! The commands that ask a running host: its models, a reload, a rollback. It speaks to the host as anybody could, over HTTP,
//! and writes what people read, or the host's own JSON.

use std::{fmt::Write, time::Duration};

use serde_json::Value;

/// How long the host may take to take a connection. A reload itself may take as long as a model's load does.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// All models, or one with its history.
    Models(Option<String>),
    /// A model's plugin, taken from its volume again.
    Reload(String),
    /// A volume, looked through.
    ReloadVolume(String),
    /// A model's generation before.
    RollBack(String),
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answered.
    #[error("can't reach the host at {url}; say where it listens with --url or MODALKIT_URL")]
    Unreachable {
        /// Where it was looked for.
        url: String,
        /// What happened.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The answer is none of this host's.
    #[error("{url} answered {status} with something that is no JSON; is it a modalkit host?")]
    Foreign {
        /// What was asked.
        url: String,
        /// The status.
        status: u16,
    },
}

/// What the host answered, to be printed; and whether it did what was asked.
pub struct Answered {
    /// The text, with its last line's end.
    pub text: String,
    /// Whether that was done.
    pub done: bool,
}

/// Asks the host at `url`, which has no slash at its end.
///
/// # Errors
/// It can't be reached, or isn't a host of this kind.
pub fn ask(url: &str, ask: &Ask, json: bool) -> Result<Answered, ClientError> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .build()
        .into();
    let (path, posted) = match ask {
        Ask::Models(None) => ("/models".to_owned(), false),
        Ask::Models(Some(name)) => (format!("/models/{}", escaped(name)), false),
        Ask::Reload(name) => (format!("/models/{}/reload", escaped(name)), true),
        Ask::RollBack(name) => (format!("/models/{}/rollback", escaped(name)), true),
        Ask::ReloadVolume(name) => (format!("/volumes/{}/reload", escaped(name)), true),
    };
    let whole = format!("{url}{path}");
    let sent = if posted { agent.post(&whole).send_empty() } else { agent.get(&whole).call() };
    let unreachable = |source| ClientError::Unreachable { url: url.to_owned(), source: Box::new(source) };
    let mut response = sent.map_err(unreachable)?;
    let status = response.status().as_u16();
    let body = response.body_mut().read_to_string().map_err(unreachable)?;
    let answer: Value =
        serde_json::from_str(&body).map_err(|_| ClientError::Foreign { url: whole, status })?;
    let text = if json { format!("{body}\n") } else { for_people(ask, &answer) };
    Ok(Answered { text, done: status == 200 })
}

/// A name as a step of a path.
fn escaped(name: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    name.bytes().map(byte).collect()
}

fn for_people(ask: &Ask, answer: &Value) -> String {
    if let Some(detail) = answer["detail"].as_str() {
        return format!("{detail}\n");
    }
    match ask {
        Ask::Models(None) => models(answer),
        Ask::Models(Some(_)) => model(answer),
        Ask::Reload(name) | Ask::RollBack(name) => format!("{name}: {}\n", outcome(answer)),
        Ask::ReloadVolume(_) => volume(answer),
    }
}

fn models(answer: &Value) -> String {
    let mut rows =
        vec![["MODEL", "STATE", "GENERATION", "PLUGIN", "VERSION", "REPLICAS", "QUEUED"].map(str::to_owned)];
    for model in answer["models"].as_array().into_iter().flatten() {
        let generation = &model["generation"];
        rows.push([
            word(&model["name"]),
            word(&model["state"]),
            word(&generation["number"]),
            word(&model["plugin"]),
            word(&generation["plugin_version"]),
            word(&model["replicas"]),
            word(&model["queued"]),
        ]);
    }
    let mut text = table(&rows);
    for model in answer["models"].as_array().into_iter().flatten() {
        if let Some(reason) = model["reason"].as_str() {
            let _ = writeln!(text, "\n{}: {reason}", word(&model["name"]));
        }
    }
    text
}

fn model(answer: &Value) -> String {
    let generation = &answer["generation"];
    let facts = [
        ("model", word(&answer["name"])),
        ("state", word(&answer["state"])),
        ("reason", word(&answer["reason"])),
        ("reload", word(&answer["reload"])),
        ("generation", word(&generation["number"])),
        ("plugin", format!("{} {}", word(&generation["plugin_name"]), word(&generation["plugin_version"]))),
        ("sha256", word(&generation["plugin_sha256"])),
        ("file", word(&answer["source"]["path"])),
        ("replicas", word(&answer["replicas"])),
        ("goes back to", word(&answer["previous"])),
        (
            "retired",
            format!(
                "{} libraries, {} bytes",
                word(&answer["retired"]["libraries"]),
                word(&answer["retired"]["bytes"])
            ),
        ),
    ];
    let mut text = String::new();
    for (name, fact) in facts.iter().filter(|(_, fact)| fact != "-") {
        let _ = writeln!(text, "{name:<13} {fact}");
    }
    if answer["source"]["present"] == false {
        text.push_str("              the file is gone; what is loaded serves on\n");
    }
    let mut rows = vec![["AGO", "CAUSE", "GENERATION", "MS", "OUTCOME"].map(str::to_owned)];
    for entry in answer["history"].as_array().into_iter().flatten() {
        rows.push([
            ago(&entry["at_unix_ms"]),
            word(&entry["cause"]),
            word(&entry["generation"]),
            total(entry),
            outcome(entry),
        ]);
    }
    text.push('\n');
    text.push_str(&table(&rows));
    text
}

fn volume(answer: &Value) -> String {
    let mut text = String::new();
    for (name, model) in answer["models"].as_object().into_iter().flatten() {
        let reload = if model["reload"].is_null() {
            "its plugin is as it was".into()
        } else {
            outcome(&model["reload"])
        };
        let _ = writeln!(text, "{name}: {reload}");
        let errors: Vec<&str> =
            model["hook"]["errors"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if !errors.is_empty() {
            let _ = writeln!(text, "{name}: on_volume_reload failed: {}", errors.join("; "));
        }
    }
    if text.is_empty() { "no model uses it\n".into() } else { text }
}

fn outcome(entry: &Value) -> String {
    let words = word(&entry["outcome"]).replace('_', " ");
    match (entry["reason"].as_str(), words.as_str()) {
        (Some(reason), _) => format!("{words}: {reason}"),
        (None, "swapped") => format!("swapped, generation {} serves", word(&entry["generation"])),
        (None, "superseded") => "superseded by a newer change".into(),
        (None, _) => words,
    }
}

/// What a change took before it ended: all phases but the drain, which comes after.
fn total(entry: &Value) -> String {
    let phases = entry["phases"].as_object().into_iter().flatten();
    let sum: f64 = phases.filter(|(name, _)| *name != "drain_ms").filter_map(|(_, took)| took.as_f64()).sum();
    format!("{sum:.0}")
}

fn ago(at: &Value) -> String {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_millis();
    let seconds = now.saturating_sub(u128::from(at.as_u64().unwrap_or_default())) / 1000;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

fn word(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Columns as wide as their widest cell, the last as long as it is.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn models_are_a_table_and_reasons_stand_below() {
        let answer = json!({"models": [
            {"name": "echo", "state": "ready", "plugin": "echo", "replicas": 1, "queued": 0,
             "generation": {"number": 3, "plugin_version": "0.1.0"}},
            {"name": "digits", "state": "failed", "reason": "no luck", "plugin": "onnx", "replicas": 0, "queued": 0},
        ]});
        assert_eq!(
            for_people(&Ask::Models(None), &answer),
            "MODEL   STATE   GENERATION  PLUGIN  VERSION  REPLICAS  QUEUED\n\
             echo    ready   3           echo    0.1.0    1         0\n\
             digits  failed  -           onnx    -        0         0\n\
             \ndigits: no luck\n"
        );
    }

    #[test]
    fn outcomes_are_sentences() {
        let refused = json!({"outcome": "refused", "reason": "it is no ELF file"});
        assert_eq!(for_people(&Ask::Reload("a".into()), &refused), "a: refused: it is no ELF file\n");
        let swapped = json!({"outcome": "swapped", "generation": 4});
        assert_eq!(for_people(&Ask::Reload("a".into()), &swapped), "a: swapped, generation 4 serves\n");
        assert_eq!(for_people(&Ask::Reload("a".into()), &json!({"outcome": "stopped"})), "a: stopped\n");
        assert_eq!(escaped("my model/é"), "my%20model%2F%C3%A9");
        let unknown = json!({"detail": "no such name; expected one of [\"a\"]"});
        assert!(for_people(&Ask::RollBack("b".into()), &unknown).starts_with("no such name"));
    }
}
