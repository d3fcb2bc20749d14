//! What a running host answered, written for people.

use std::fmt::Write;

use serde_json::Value;

use super::{
    print::{indented, table},
    request::Ask,
};

/// Errors that are longer than this are cut in the table of jobs.
const ERROR_CHARS_MAX: usize = 100;

/// The host's JSON, as people read it. What a pipeline or a caller wrote stays as it was written.
pub(crate) fn for_people(ask: &Ask, body: &str) -> String {
    let Ok(answer) = serde_json::from_str::<Value>(body) else { return format!("{}\n", indented(body)) };
    let answer = &answer;
    match &answer["detail"] {
        Value::String(detail) => return format!("{detail}\n"),
        Value::Array(details) => return details.iter().map(fault_of_input).collect(),
        _ => {}
    }
    match ask {
        Ask::Models(None) => models(answer),
        Ask::Models(Some(_)) => model(answer),
        Ask::Reload(name) | Ask::RollBack(name) => format!("{name}: {}\n", outcome(answer)),
        Ask::Unload(name) => unloaded(name, answer),
        Ask::ReloadVolume(_) => volume(answer),
        Ask::Devices => devices(answer),
        Ask::Config => settings(answer),
        Ask::ReloadConfig => change(answer),
        Ask::Jobs { .. } => jobs(answer),
        Ask::Metrics | Ask::Job(..) | Ask::CancelJob(_) | Ask::Redeliver(_) | Ask::Predict { .. } => {
            format!("{}\n", indented(body))
        }
    }
}

/// Where, and what is wrong with it.
fn fault_of_input(detail: &Value) -> String {
    let steps = detail["loc"].as_array().into_iter().flatten().skip(1).map(word);
    let place = steps.collect::<Vec<_>>().join(".");
    format!("{}{}{}\n", place, if place.is_empty() { "" } else { ": " }, word(&detail["msg"]))
}

fn settings(answer: &Value) -> String {
    let mut rows = vec![["KEY", "VALUE", "FROM"].map(str::to_owned)];
    for row in answer["settings"].as_array().into_iter().flatten() {
        rows.push([word(&row["key"]), word(&row["value"]), word(&row["from"])]);
    }
    let mut text = table(&rows);
    if !answer["last_change"].is_null() {
        let _ = write!(
            text,
            "\n{} ago: {}",
            ago(&answer["last_change"]["at_unix_ms"]),
            change(&answer["last_change"])
        );
    }
    text
}

/// GPUs, in the driver's order.
fn devices(answer: &Value) -> String {
    if let Some(why) = answer["why_none"].as_str() {
        return format!("no GPU: {why}\n");
    }
    let mut rows = vec![["DEVICE", "NAME", "MEMORY", "FREE", "BUSY", "LEASED", "HELD BY"].map(str::to_owned)];
    let mebibytes =
        |bytes: &Value| bytes.as_u64().map_or("?".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
    for device in answer["devices"].as_array().into_iter().flatten() {
        let holder = |holder: &Value| format!("{}.{}", word(&holder["model"]), word(&holder["replica"]));
        let holders: Vec<String> = device["holders"].as_array().into_iter().flatten().map(holder).collect();
        let busy = device["utilization_percent"].as_u64().map_or("?".to_owned(), |of| format!("{of} %"));
        rows.push([
            word(&device["ordinal"]),
            word(&device["name"]),
            mebibytes(&device["memory_bytes"]),
            mebibytes(&device["memory_free_bytes"]),
            busy,
            format!("{} MiB", word(&device["leased_mb"])),
            if device["lost"].is_null() {
                holders.join(", ")
            } else {
                format!("lost: {}", word(&device["lost"]))
            },
        ]);
    }
    table(&rows)
}

/// Jobs, the youngest first.
fn jobs(answer: &Value) -> String {
    let mut rows =
        vec![["JOB", "MODEL", "STATE", "ATTEMPTS", "DELIVERY", "ACCEPTED", "ERROR"].map(str::to_owned)];
    for job in answer["jobs"].as_array().into_iter().flatten() {
        let delivery = match job["delivery"]["queue"].as_str() {
            Some(queue) => format!("{} ({queue})", word(&job["delivery"]["state"])),
            None => word(&job["delivery"]["state"]),
        };
        let accepted = format!("{} ago", ago(&job["accepted_unix_ms"]));
        let of = |key: &str| word(&job[key]);
        // One line each; `modalkit jobs ID` has all of it.
        let error = cut(job["error"].as_str().or(job["delivery"]["error"].as_str()).unwrap_or_default());
        rows.push([of("job_id"), of("model"), of("state"), of("attempts"), delivery, accepted, error]);
    }
    let mut text = table(&rows);
    if let Some(next) = answer["next"].as_str() {
        let _ = writeln!(text, "there may be more: --after {next}");
    }
    text
}

/// The beginning of a text, on one line.
fn cut(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let mut beginning: String = line.chars().take(ERROR_CHARS_MAX).collect();
    if beginning.len() < text.len() {
        beginning.push('…');
    }
    beginning
}

/// What became of a changed configuration.
fn change(answer: &Value) -> String {
    let names =
        |value: &Value| value.as_array().into_iter().flatten().map(word).collect::<Vec<_>>().join(", ");
    let mut text = format!("{}\n", word(&answer["outcome"]));
    for (what, list) in answer["models"].as_object().into_iter().flatten() {
        let list = names(list);
        if !list.is_empty() {
            let _ = writeln!(text, "{what}: {list}");
        }
    }
    let restart = names(&answer["restart"]);
    if !restart.is_empty() {
        let _ = writeln!(text, "restart the host to apply: {restart}");
    }
    for fault in answer["errors"].as_array().into_iter().flatten() {
        let _ = writeln!(
            text,
            "\n{}  {}\n  expected  {}\n  found     {}",
            word(&fault["at"]),
            word(&fault["key"]),
            word(&fault["expected"]),
            word(&fault["found"])
        );
        if let Some(help) = fault["help"].as_str() {
            let _ = writeln!(text, "  help      {help}");
        }
    }
    text
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
    if answer["as_configured"] == false {
        text.push_str(
            "              it serves as it was loaded, and the configuration says something else by now\n",
        );
    }
    if answer["configured"] == false {
        text.push_str(
            "              it has no entry in the configuration: its plugin was dropped into a volume\n",
        );
    }
    let mut entries: Vec<(u64, [String; 5])> = Vec::new();
    for entry in answer["history"].as_array().into_iter().flatten() {
        let row = [
            ago(&entry["at_unix_ms"]),
            word(&entry["cause"]),
            word(&entry["generation"]),
            total(entry),
            outcome(entry),
        ];
        entries.push((entry["at_unix_ms"].as_u64().unwrap_or_default(), row));
    }
    for report in answer["data_history"].as_array().into_iter().flatten() {
        let row = [ago(&report["at_unix_ms"]), "data".into(), "-".into(), "-".into(), data_reload(report)];
        entries.push((report["at_unix_ms"].as_u64().unwrap_or_default(), row));
    }
    entries.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
    let mut rows = vec![["AGO", "CAUSE", "GENERATION", "MS", "OUTCOME"].map(str::to_owned)];
    rows.extend(entries.into_iter().map(|(_, row)| row));
    text.push('\n');
    text.push_str(&table(&rows));
    text
}

fn unloaded(name: &str, answer: &Value) -> String {
    match answer["file"].as_str() {
        Some(file) => format!(
            "{name}: unloaded; {file} is taken again when its content changes, at `modalkit reload {name}`, and at the next start\n"
        ),
        None => format!("{name}: unloaded\n"),
    }
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
        (Some(reason), "rolled back") => {
            format!("rolled back to generation {}: {reason}", word(&entry["generation"]))
        }
        (Some(reason), _) => format!("{words}: {reason}"),
        (None, "swapped") => format!("swapped, generation {} serves", word(&entry["generation"])),
        (None, "superseded") => "superseded by a newer change".into(),
        (None, _) => words,
    }
}

/// What became of changed data.
fn data_reload(report: &Value) -> String {
    let files: Vec<String> = report["changed"].as_array().into_iter().flatten().map(word).collect();
    let errors: Vec<&str> =
        report["errors"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let what = if files.is_empty() { word(&report["volume"]) } else { files.join(", ") };
    match errors.as_slice() {
        [] => format!("on_volume_reload: {what}"),
        errors => format!("on_volume_reload failed: {}: {what}", errors.join("; ")),
    }
}

/// What a change took before it ended: all phases but the drain, which comes after.
fn total(entry: &Value) -> String {
    let phases = entry["phases"].as_object().into_iter().flatten();
    let took: Vec<f64> =
        phases.filter(|(name, _)| *name != "drain_ms").filter_map(|(_, took)| took.as_f64()).collect();
    if took.is_empty() { "-".to_owned() } else { format!("{:.0}", took.iter().sum::<f64>()) }
}

fn ago(at: &Value) -> String {
    let seconds = modalkit_journal::unix_ms().saturating_sub(at.as_u64().unwrap_or_default()) / 1000;
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
            for_people(&Ask::Models(None), &answer.to_string()),
            "MODEL   STATE   GENERATION  PLUGIN  VERSION  REPLICAS  QUEUED\n\
             echo    ready   3           echo    0.1.0    1         0\n\
             digits  failed  -           onnx    -        0         0\n\
             \ndigits: no luck\n"
        );
    }

    #[test]
    fn changes_of_data_stand_among_the_others_by_their_time() {
        let answer = json!({
            "name": "a", "history": [
                {"at_unix_ms": 9, "cause": "file", "generation": 2, "outcome": "swapped", "phases": {"load_ms": 2.4, "drain_ms": 90.0}},
                {"at_unix_ms": 1, "cause": "file", "outcome": "refused", "reason": "no", "phases": {}}],
            "data_history": [
                {"at_unix_ms": 5, "volume": "v", "changed": ["a.txt"], "errors": [null]},
                {"at_unix_ms": 3, "volume": "v", "changed": [], "errors": [null, "no luck"]}],
        });
        let said = for_people(&Ask::Models(Some("a".into())), &answer.to_string());
        let rows: Vec<Vec<&str>> = said
            .lines()
            .skip_while(|line| !line.starts_with("AGO"))
            .map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
            .collect();
        let outcomes: Vec<(&str, &str)> = rows[1..].iter().map(|row| (row[3], row[4])).collect();
        assert_eq!(
            outcomes,
            [
                ("2", "swapped, generation 2 serves"),
                ("-", "on_volume_reload: a.txt"),
                ("-", "on_volume_reload failed: no luck: v"),
                ("-", "refused: no"),
            ]
        );
    }

    #[test]
    fn a_list_of_jobs_says_why_they_failed() {
        let job = |error: Value| {
            json!({"job_id": "j", "model": "m", "state": "failed", "attempts": 1, "error": error,
                   "delivery": {"state": "none"}})
        };
        let ask = Ask::Jobs { state: None, delivery: None, model: None, after: None, limit: 2 };
        let long = format!("first line {}\nsecond", "x".repeat(200));
        let said = for_people(&ask, &json!({"jobs": [job(json!("no luck")), job(json!(long))]}).to_string());
        let ends: Vec<&str> = said.lines().map(|line| line.rsplit("  ").next().unwrap()).collect();
        assert_eq!((ends[0], ends[1]), ("ERROR", "no luck"));
        assert!(ends[2].starts_with("first line x") && ends[2].ends_with("x…"), "{said}");
        assert_eq!(ends[2].chars().count(), ERROR_CHARS_MAX + 1);
    }

    #[test]
    fn outcomes_are_sentences() {
        let refused = json!({"outcome": "refused", "reason": "it is no ELF file"});
        assert_eq!(
            for_people(&Ask::Reload("a".into()), &refused.to_string()),
            "a: refused: it is no ELF file\n"
        );
        let swapped = json!({"outcome": "swapped", "generation": 4});
        assert_eq!(
            for_people(&Ask::Reload("a".into()), &swapped.to_string()),
            "a: swapped, generation 4 serves\n"
        );
        let back = json!({"outcome": "rolled_back", "generation": 3, "reason": "it was asked for"});
        assert_eq!(
            for_people(&Ask::RollBack("a".into()), &back.to_string()),
            "a: rolled back to generation 3: it was asked for\n"
        );
        assert_eq!(for_people(&Ask::Reload("a".into()), r#"{"outcome": "stopped"}"#), "a: stopped\n");
        let unknown = json!({"detail": "\"b\": no such name; expected one of [\"a\"]"});
        let said = for_people(&Ask::RollBack("b".into()), &unknown.to_string());
        assert!(said.starts_with("\"b\": no such name"), "{said}");
    }
}
